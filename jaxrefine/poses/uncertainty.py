"""How well a pose is known: the curvature of its posterior."""

import math

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxrefine._types import Images
from jaxrefine.ctf import CTF
from jaxrefine.data.observation import View
from jaxrefine.data.particles import Particles
from jaxrefine.operators.gridding import Spectrum
from jaxrefine.poses import likelihood
from jaxrefine.poses._visit import visit
from jaxrefine.poses.prior import Prior
from jaxrefine.poses.solvers import retract

_HIGHEST = jax.lax.Precision.HIGHEST
_LEAST_CURVATURE = 0.1  # of that of Gauss and Newton


@eqx.filter_jit
def _curvature(
    spectrum: Spectrum,
    view: View,
    images: Images,
    ctf: CTF | None,
    group: Int[Array, "b"],
    prior: Prior,
    rotations: Float[Array, "b 3 3"],
    shifts: Float[Array, "b 2"],
    information: Float[Array, "b 5 5"],
) -> Float[Array, "b 5 5"]:
    data, transfer = view.spectra(images, group), view.transfer(ctf, group)

    def one(data, transfer, prior, rotation, shift, information):
        root, free = jnp.linalg.cholesky(information), prior.free
        # Columns are five independent errors of one standard deviation.
        half = jnp.linalg.inv(root).T
        steps = math.sqrt(5) * jnp.concatenate([half.T, -half.T])

        def gradient(step):
            place = retract(rotation, shift, free * step)
            _, slope = likelihood.cost_and_gradient(
                spectrum, view.disc, data, *place, transfer, view.weights
            )
            still = (1 - free) * jnp.diag(prior.information()) * step
            slope = free * (slope + prior.gradient(*place)) + still
            return jnp.matmul(half.T, slope, precision=_HIGHEST)

        slopes = jax.lax.map(gradient, steps)
        mean = (slopes[:5] - slopes[5:]) / (2 * math.sqrt(5))
        whitened = (mean + mean.T) / 2
        found = jnp.matmul(root, whitened, precision=_HIGHEST)
        found = jnp.matmul(found, root.T, precision=_HIGHEST)
        sound = jnp.linalg.eigvalsh(whitened)[0] > _LEAST_CURVATURE
        return jnp.where(sound, found, information)

    return jax.vmap(one)(data, transfer, prior, rotations, shifts, information)


def mean_curvature(
    particles: Particles,
    owners: Int[np.ndarray, " c"],
    spectrum: Spectrum,
    view: View,
    prior: Prior,
    rotations: Float[np.ndarray, "c 3 3"],
    shifts: Float[np.ndarray, "c 2"],
    information: Float[np.ndarray, "c 5 5"],
    batch_size: int,
) -> Float[np.ndarray, "c 5 5"]:
    r"""Return the mean Hessian of the cost over the Gaussian posterior of each pose.

    .. math:: \mathbb{E}[\nabla^2 J] = \Sigma^{-1}\, \mathbb{E}[\delta\, \nabla
       J(\delta)^T], \qquad \delta \sim \mathcal{N}(0, \Sigma)

    by the cubature rule of third degree: gradients at plus and minus :math:`\sqrt 5`
    standard deviations along five axes. Unlike the information of Gauss and Newton it
    knows the residual and how the cost flattens away from its optimum, so ellipsoids
    of its inverse cover what they should more nearly. Where it is not safely positive
    definite, the given information is returned.
    """

    def curvature_of_batch(places, images, ctf, group, prior):
        found = _curvature(
            spectrum,
            view,
            images,
            ctf,
            group,
            prior,
            jnp.asarray(rotations[places]),
            jnp.asarray(shifts[places]),
            jnp.asarray(information[places]),
        )
        return (found,)

    return visit(particles, owners, prior, batch_size, curvature_of_batch)[0]
