"""A few weighted candidate poses for each particle.

At low resolution a noisy image is compatible with several orientations. All of them are
kept, weighted by their posterior probability, until the data decide.
"""

from typing import final

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxrefine._types import Scalar
from jaxrefine.geometry import (
    Poses,
)

_HIGHEST = jax.lax.Precision.HIGHEST


@final
class Hypotheses(eqx.Module):
    """Weighted candidate poses of every particle, the most probable one first.

    Attributes
    ----------
    rotations, shifts
        ``H`` poses of each particle.
    log_weights
        Logarithms of their posterior probabilities, minus infinity for an empty place.
    """

    rotations: Float[Array | np.ndarray, "*particles h 3 3"]
    shifts: Float[Array | np.ndarray, "*particles h 2"]
    log_weights: Float[Array | np.ndarray, "*particles h"]

    @property
    def weights(self) -> Float[Array, "*particles h"]:
        """The posterior probabilities; they add up to 1."""
        return jnp.exp(self.log_weights)

    def best(self) -> Poses:
        """Return the most probable pose of every particle."""
        return Poses(self.rotations[..., 0, :, :], self.shifts[..., 0, :])


@eqx.filter_jit
def certain(poses: Poses, count: int) -> Hypotheses:
    """Return one pose of weight 1 for each particle, with places for ``count``."""
    rotations = jnp.repeat(poses.rotations[:, None], count, axis=1)
    shifts = jnp.repeat(poses.shifts[:, None], count, axis=1)
    empty = jnp.full((len(poses), count), -jnp.inf, poses.shifts.dtype)
    return Hypotheses(rotations, shifts, empty.at[:, 0].set(0.0))


def distinct(
    rotations: Float[Array, "h 3 3"],
    evidence: Float[Array, "h"],
    separation: Scalar,
    operators: Float[Array | np.ndarray, "order 3 3"] | None = None,
) -> Float[Array, "h"]:
    """Return the evidence of one particle's candidates, of nearly equal ones once.

    That of the others is minus infinity. Parameters as for `merge`.
    """
    copies = rotations[:, None]
    if operators is not None:
        group = jnp.asarray(operators, rotations.dtype)
        copies = jnp.einsum("jab,sbc->jsac", rotations, group, precision=_HIGHEST)
    cosine = jnp.einsum("iab,jsab->ijs", rotations, copies, precision=_HIGHEST)
    near = 3.0 - jnp.max(cosine, axis=-1) < separation**2
    count = evidence.shape[0]
    first = jnp.arange(count)
    above = (evidence[:, None] > evidence[None]) | (
        (evidence[:, None] == evidence[None]) & (first[:, None] < first[None])
    )
    repeated = jnp.any(near & above, axis=0)
    return jnp.where(repeated, -jnp.inf, evidence)


def merge(
    rotations: Float[Array, "h 3 3"],
    shifts: Float[Array, "h 2"],
    evidence: Float[Array, "h"],
    separation: Scalar,
    operators: Float[Array | np.ndarray, "order 3 3"] | None = None,
) -> tuple[Hypotheses, Int[Array, "h"]]:
    """Rank one particle's candidates, counting those that are nearly equal once.

    Parameters
    ----------
    rotations, shifts
        Polished candidates.
    evidence
        Logarithms of their unnormalised posterior masses.
    separation
        Candidates nearer than this angle (radians) count as one.
    operators
        Operators ``S`` of the map's symmetry, if any, for which ``R`` and ``R S`` are
        equivalent.

    Returns
    -------
    The ranked hypotheses, and the indices of the candidates in this order.
    """
    evidence = distinct(rotations, evidence, separation, operators)
    order = jnp.argsort(-evidence)
    # Relative to the first, so that rounding does not grow with the evidence.
    ranked = evidence[order] - jnp.max(evidence)
    ranked = ranked - jax.nn.logsumexp(ranked)
    return Hypotheses(rotations[order], shifts[order], ranked), order
