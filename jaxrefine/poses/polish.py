"""Candidate poses on the continuum: each is taken to its optimum, and weighed."""

from typing import final

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
from jaxrefine.poses.hypotheses import Hypotheses, merge
from jaxrefine.poses.prior import Prior
from jaxrefine.poses.solvers import Estimate, PoseUpdate

NEGLIGIBLE = 1e-2
"""Hypotheses less probable than this are not followed."""


@eqx.filter_jit
def _polish(
    spectrum: Spectrum,
    view: View,
    images: Images,
    ctf: CTF | None,
    group: Int[Array, "b"],
    prior: Prior,
    rotations: Float[Array, "b 3 3"],
    shifts: Float[Array, "b 2"],
    update: PoseUpdate,
) -> tuple[Estimate, Float[Array, "b"]]:
    data, transfer = view.spectra(images, group), view.transfer(ctf, group)

    def one(data, transfer, prior, rotation, shift):
        # A fixed component has its prior's information and no other, which takes it out
        # of the evidence, too: its integral over the prior is 1.
        free = prior.free

        def objective(rotation, shift):
            cost, gradient, information = likelihood.normal_equations(
                spectrum, view.disc, data, rotation, shift, transfer, view.weights
            )
            return (
                cost + prior.cost(rotation, shift),
                free * (gradient + prior.gradient(rotation, shift)),
                free[:, None] * free[None] * information + prior.information(),
            )

        estimate = update.minimise(objective, rotation, shift, prior.clip)
        energy = jnp.sum(view.weights * (data.real**2 + data.imag**2)) / 2
        _, volume = jnp.linalg.slogdet(estimate.information)
        mass = 2.5 * jnp.log(2 * jnp.pi) - volume / 2
        return estimate, energy - estimate.cost + mass

    return jax.vmap(one)(data, transfer, prior, rotations, shifts)


@final
class Polished(eqx.Module):
    """What became of some candidates (leading axis: candidates).

    Attributes
    ----------
    rotations, shifts, information, damping
        See `solvers.Estimate`.
    evidence
        Logarithm of the posterior mass about the pose, relative to the probability
        that the image shows no particle.
    """

    rotations: Float[np.ndarray, "c 3 3"]
    shifts: Float[np.ndarray, "c 2"]
    information: Float[np.ndarray, "c 5 5"]
    damping: Float[np.ndarray, "c iterations"]
    evidence: Float[np.ndarray, "c"]


def polish_poses(
    particles: Particles,
    owners: Int[np.ndarray, " c"],
    spectrum: Spectrum,
    view: View,
    prior: Prior,
    rotations: Float[np.ndarray, "c 3 3"],
    shifts: Float[np.ndarray, "c 2"],
    update: PoseUpdate,
    batch_size: int,
) -> Polished:
    """Take candidate poses to their optima on the continuum.

    Parameters
    ----------
    particles, owners
        All particles, and the one that each candidate belongs to.
    spectrum, view, prior
        As for :func:`explore`.
    rotations, shifts
        The candidates.
    update
        How, for instance `solvers.LevenbergMarquardt()`.
    batch_size
        Candidates at a time, at most as many as there are particles.
    """

    def polish_batch(places, images, ctf, group, prior):
        estimate, evidence = _polish(
            spectrum,
            view,
            images,
            ctf,
            group,
            prior,
            jnp.asarray(rotations[places]),
            jnp.asarray(shifts[places]),
            update,
        )
        return (
            estimate.rotation,
            estimate.shift,
            estimate.information,
            estimate.damping,
            evidence,
        )

    return Polished(*visit(particles, owners, prior, batch_size, polish_batch))


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
        Angle below which two of them are one, radians.
    keep
        How many to keep.
    operators
        Of the map's symmetry, if any.

    Returns
    -------
    What is kept, the best first, with weights that add up to 1, and the places of all
    candidates in that order.
    """
    ranked, order = jax.vmap(lambda r, t, e: merge(r, t, e, separation, operators))(
        rotations, shifts, evidence
    )
    kept = jax.tree.map(lambda leaf: leaf[:, :keep], ranked)
    weights = jax.nn.log_softmax(kept.log_weights, axis=-1)
    return Hypotheses(kept.rotations, kept.shifts, weights), order
