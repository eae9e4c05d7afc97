"""How well a pose is known: the curvature of its posterior."""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxrefine._watch import Stage
from jaxrefine.data.observation import Observation, View
from jaxrefine.data.particles import Particles
from jaxrefine.data.visit import Comparison, visit
from jaxrefine.operators.gridding import Spectrum
from jaxrefine.poses import likelihood
from jaxrefine.poses.prior import Prior
from jaxrefine.poses.solvers import retract

_HIGHEST = jax.lax.Precision.HIGHEST
# Least curvature that is accepted, relative to that of Gauss-Newton. With less, an axis
# of the error ellipsoid would be more than three times as long, and so reach beyond the
# cubature points from which it was measured.
_LEAST_CURVATURE = 0.1


def mean_curvature(
    reference: Spectrum,
    observation: Observation,
    prior: Prior,
    rotation: Float[Array, "3 3"],
    shift: Float[Array, "2"],
    information: Float[Array, "5 5"],
) -> Float[Array, "5 5"]:
    r"""Return the mean Hessian of the cost over the Gaussian posterior of a pose.

    .. math:: \mathbb{E}[\nabla^2 J] = \Sigma^{-1}\, \mathbb{E}[\delta\, \nabla
       J(\delta)^T], \qquad \delta \sim \mathcal{N}(0, \Sigma)

    (Stein's lemma), the expectation by the spherical-radial cubature rule of third
    degree: gradients at plus and minus :math:`\sqrt 5` standard deviations along five
    axes (Arasaratnam and Haykin, IEEE Trans. Automatic Control 54, 2009). Unlike the
    Gauss-Newton information, it includes the residual and the flattening of the cost
    away from its optimum, so that the error ellipsoids of its inverse contain the true
    pose more nearly as often as they should. Where it is not safely positive definite,
    the given information is returned.

    Parameters
    ----------
    reference, observation, rotation, shift
        As for `likelihood.cost`.
    prior
        What is known of the pose.
    information
        Inverse of the covariance :math:`\Sigma`, of the rotation vector (radians) and
        the shift (pixels).
    """
    root, free = jnp.linalg.cholesky(information), prior.free
    # Columns are five independent errors of one standard deviation.
    half = jnp.linalg.inv(root).T
    steps = math.sqrt(5) * jnp.concatenate([half.T, -half.T])

    def gradient(step):
        pose = retract(rotation, shift, free * step)
        _, slope = likelihood.cost_and_gradient(reference, observation, *pose)
        fixed = (1 - free) * jnp.diag(prior.information()) * step
        slope = free * (slope + prior.gradient(*pose)) + fixed
        return jnp.matmul(half.T, slope, precision=_HIGHEST)

    slopes = jax.lax.map(gradient, steps)
    mean = (slopes[:5] - slopes[5:]) / (2 * math.sqrt(5))
    whitened = (mean + mean.T) / 2
    curvature = jnp.matmul(root, whitened, precision=_HIGHEST)
    curvature = jnp.matmul(curvature, root.T, precision=_HIGHEST)
    is_safe = jnp.linalg.eigvalsh(whitened)[0] > _LEAST_CURVATURE
    return jnp.where(is_safe, curvature, information)


def mean_curvatures(
    particles: Particles,
    owners: Int[np.ndarray, " c"],
    reference: Spectrum,
    view: View,
    prior: Prior,
    rotations: Float[np.ndarray, "c 3 3"],
    shifts: Float[np.ndarray, "c 2"],
    information: Float[np.ndarray, "c 5 5"],
    batch_size: int,
    stage: Stage | None = None,
) -> Float[np.ndarray, "c 5 5"]:
    """Return `mean_curvature` for the poses of some of the particles.

    Parameters
    ----------
    information
        That of each pose, as for `mean_curvature`.
    particles, owners, reference, view, prior, rotations, shifts, batch_size
        As for `polish.polish_poses`.
    stage
        Told how many candidates have been visited.
    """
    of_owners = jax.tree.map(np.asarray, prior).take(owners)
    candidates = (of_owners, rotations, shifts, information)
    return visit(
        Comparison(mean_curvature),
        (reference, view),
        particles,
        owners,
        candidates,
        batch_size,
        stage,
    )
