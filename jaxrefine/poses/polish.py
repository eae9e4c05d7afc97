"""The polishing of candidate poses: each is optimised on the continuum and weighted."""

from typing import final

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxrefine.data.observation import Observation, View
from jaxrefine.data.particles import Particles
from jaxrefine.data.visit import Comparison, visit
from jaxrefine.operators.gridding import Spectrum
from jaxrefine.poses import likelihood
from jaxrefine.poses.hypotheses import Hypotheses, merge
from jaxrefine.poses.prior import Prior
from jaxrefine.poses.solvers import PoseUpdate


@final
class Polished(eqx.Module):
    """Candidate poses at their optima, with a leading axis if there are several.

    Attributes
    ----------
    rotations, shifts, information, evaluations
        See `solvers.Estimate`.
    evidence
        Logarithm of the posterior mass about the pose, relative to the probability of
        the image without a particle.
    """

    rotations: Float[Array | np.ndarray, "*c 3 3"]
    shifts: Float[Array | np.ndarray, "*c 2"]
    information: Float[Array | np.ndarray, "*c 5 5"]
    evaluations: Int[Array | np.ndarray, "*c"]
    evidence: Float[Array | np.ndarray, "*c"]


@final
class Polish(eqx.Module):
    r"""Takes one candidate pose to its optimum and measures the posterior mass there.

    With the cost :math:`J` at the optimum, which includes the prior, the information
    :math:`A` there and the energy :math:`E` of the image, the evidence is that of
    Laplace's method (MacKay, Information Theory, Inference, and Learning Algorithms,
    2003, ch. 27),

    .. math:: E - J + \tfrac52 \log 2\pi - \tfrac12 \log \det A.

    Attributes
    ----------
    update
        How a pose is improved, for instance `solvers.LevenbergMarquardt()`.
    """

    update: PoseUpdate

    def __call__(
        self,
        reference: Spectrum,
        observation: Observation,
        prior: Prior,
        rotation: Float[Array, "3 3"],
        shift: Float[Array, "2"],
    ) -> Polished:
        """Polish one candidate; arguments as for `likelihood.cost`."""
        # A fixed component has only its prior's information. It cancels from the
        # evidence, because the integral of its prior is 1.
        free = prior.free

        def objective(rotation, shift):
            cost, gradient, information = likelihood.normal_equations(
                reference, observation, rotation, shift
            )
            return (
                cost + prior.cost(rotation, shift),
                free * (gradient + prior.gradient(rotation, shift)),
                free[:, None] * free[None] * information + prior.information(),
            )

        estimate = self.update.minimise(objective, rotation, shift, prior.clip)
        _, log_determinant = jnp.linalg.slogdet(estimate.information)
        mass = 2.5 * jnp.log(2 * jnp.pi) - log_determinant / 2
        return Polished(
            estimate.rotation,
            estimate.shift,
            estimate.information,
            estimate.evaluations,
            observation.energy - estimate.cost + mass,
        )


def polish_poses(
    particles: Particles,
    owners: Int[np.ndarray, " c"],
    reference: Spectrum,
    view: View,
    prior: Prior,
    rotations: Float[np.ndarray, "c 3 3"],
    shifts: Float[np.ndarray, "c 2"],
    update: PoseUpdate,
    batch_size: int,
) -> Polished:
    """Take given candidate poses to their optima on the continuum.

    It is for studies of the likelihood: a refinement polishes within its visits, see
    :mod:`jaxrefine.poses.update`.

    Parameters
    ----------
    particles, owners
        All particles, and the index of the one that each candidate belongs to.
    reference, view
        Spectrum of the map, and how images are compared with it.
    prior
        Priors of all particles.
    rotations, shifts
        The candidates, shifts in pixels.
    update
        How a pose is improved, for instance `solvers.LevenbergMarquardt()`.
    batch_size
        Number of candidates at a time, rounded up to whole blocks.

    Returns
    -------
    The polished candidates, in their order, as NumPy arrays.
    """
    of_owners = jax.tree.map(np.asarray, prior).take(owners)
    candidates = (of_owners, rotations, shifts)
    return visit(
        Comparison(Polish(update)),
        (reference, view),
        particles,
        owners,
        candidates,
        batch_size,
    )


@eqx.filter_jit
def weigh(
    rotations: Float[Array, "p h 3 3"],
    shifts: Float[Array, "p h 2"],
    evidence: Float[Array, "p h"],
    separation: Float[Array, ""],
    keep: int,
    operators: Float[Array | np.ndarray, "order 3 3"] | None = None,
) -> tuple[Hypotheses, Int[Array, "p h"]]:
    """Rank the candidates of every particle and keep the best; see `hypotheses.merge`.

    Parameters
    ----------
    rotations, shifts
        Poses of ``h`` candidates of every particle, shifts in pixels.
    evidence
        Their posterior masses, logarithms; see `Polished`.
    separation
        Angle below which two candidates count as one, radians.
    keep
        How many to keep.
    operators
        Of the map's symmetry, if any.

    Returns
    -------
    The kept candidates, the best first, with weights that add up to 1, and the indices
    of all candidates in this order.
    """
    ranked, order = jax.vmap(lambda r, t, e: merge(r, t, e, separation, operators))(
        rotations, shifts, evidence
    )
    kept = jax.tree.map(lambda leaf: leaf[:, :keep], ranked)
    weights = jax.nn.log_softmax(kept.log_weights, axis=-1)
    return Hypotheses(kept.rotations, kept.shifts, weights), order
