"""Sets of particles that are refined by themselves: all of them, or two half sets."""

from dataclasses import dataclass
from typing import final

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PRNGKeyArray

from jaxrefine._types import Volume
from jaxrefine.data.particles import Particles
from jaxrefine.errors import InputError
from jaxrefine.geometry import Poses
from jaxrefine.maps.folds import FOLDS
from jaxrefine.maps.mask import check_mask
from jaxrefine.operators.gridding import Insertion, default_insertion
from jaxrefine.poses.prior import Prior, priors_about
from jaxrefine.refinement.config import RefineConfig

FEWEST = 4
"""Particles that a set wants at least: two for each fold."""


@final
@dataclass(frozen=True)
class ParticleSet:
    """Particles that are refined by themselves, and how.

    Attributes
    ----------
    particles, prior
        The particles, and what is known of their poses.
    fold
        The fold of each particle, 0 or 1.
    config
        Parameters.
    mask
        What of a map the particles are compared with; None for all of it.
    """

    particles: Particles
    prior: Prior
    fold: Int[np.ndarray, " particles"]
    config: RefineConfig
    mask: Volume | None = None

    def masked(self, volume: Volume) -> Volume:
        """Return what of a map the particles are compared with."""
        return volume if self.mask is None else volume * self.mask

    @property
    def last(self) -> int:
        """The largest band limit, cycles per box."""
        return (self.particles.image_size - 1) // 2

    @property
    def insertion(self) -> Insertion:
        """How slices are inserted."""
        chosen = self.config.insertion
        return default_insertion() if chosen is None else chosen

    def members(self, fold: int) -> Int[np.ndarray, " members"]:
        """Return the particles of a fold."""
        return np.flatnonzero(self.fold == fold)


def particle_set(
    particles: Particles,
    poses: Poses,
    key: PRNGKeyArray,
    config: RefineConfig,
    mask: Volume | None = None,
) -> ParticleSet:
    """Deal particles into two folds, with priors about their poses."""
    prior = priors_about(
        poses,
        config.angle_spread,
        config.shift_spread,
        config.max_angle,
        config.max_shift,
    )
    order = np.asarray(jax.random.permutation(key, len(particles)))
    fold = np.empty(len(particles), int)
    fold[order] = np.arange(len(particles)) % FOLDS
    return ParticleSet(particles, prior, fold, config, mask)


def divide(
    particles: Particles,
    poses: Poses,
    config: RefineConfig,
    key: PRNGKeyArray,
    subsets: Int[np.ndarray, " particles"] | None,
    mask: Float[Array, "_ _ _"] | None = None,
) -> tuple[PRNGKeyArray, list[Int[np.ndarray, " members"]], list[ParticleSet]]:
    """Deal the particles into sets and folds.

    Parameters
    ----------
    particles, poses
        All particles, and their given poses.
    config
        Parameters, which say whether there are half sets.
    key
        Deals the particles.
    subsets
        With half sets, the set of each particle, 1 or 2; dealt at random without it.
    mask
        From 0 in the solvent to 1, of the map's side ``n``.

    Returns
    -------
    A key for the search, the particles of each set, by their places among all, and the
    sets: one, or two half sets.

    Raises
    ------
    InputError
        If the mask is not of the map's side or not from 0 to 1, or `halves` refuses
        the subsets.
    """
    dealing, fold, draw = jax.random.split(key, 3)
    if mask is not None:
        mask = _checked_mask(mask, particles.image_size)
    members = [np.arange(len(particles))]
    if config.half_sets:
        members = halves(len(particles), dealing, subsets)
    sets = [
        particle_set(particles.take(some), take(poses, some), fold, config, mask)
        for some in members
    ]
    return draw, members, sets


def deal(count: int, key: PRNGKeyArray) -> Int[np.ndarray, " particles"]:
    """Deal particles into two halves, 1 and 2, at random."""
    subsets = np.empty(count, int)
    subsets[np.asarray(jax.random.permutation(key, count))] = 1 + np.arange(count) % 2
    return subsets


def halves(
    count: int, key: PRNGKeyArray, subsets: Int[np.ndarray, " particles"] | None
) -> list[Int[np.ndarray, " members"]]:
    """Return the particles of two halves: given as 1 and 2, or dealt at random.

    Parameters
    ----------
    count
        Number of particles.
    key
        Deals them, if they are not given.
    subsets
        The half of each particle, 1 or 2, or None.

    Raises
    ------
    InputError
        If there is not a 1 or a 2 for each particle, or one half has fewer than 4.
    """
    if subsets is None:
        subsets = deal(count, key)
    if subsets.shape != (count,) or set(np.unique(subsets)) != {1, 2}:
        raise InputError(
            f"half sets want a 1 or a 2 for each of {count} particles, not "
            f"{sorted(set(subsets.tolist()))[:5]} for {len(subsets)}"
        )
    sets = [np.flatnonzero(subsets == 1), np.flatnonzero(subsets == 2)]
    if min(len(some) for some in sets) < FEWEST:
        raise InputError(
            f"each half set wants at least {FEWEST} particles, not {len(sets[0])} and "
            f"{len(sets[1])}"
        )
    return sets


def take(poses: Poses, some: Int[np.ndarray, " some"]) -> Poses:
    """Return some of the poses."""
    return Poses(poses.angles[some], poses.shifts[some])


def checked(particles: Particles, poses: Poses, volume: Volume) -> tuple[Poses, Volume]:
    """Return poses and map in single precision; refuse what does not fit.

    Parameters
    ----------
    particles, poses
        Images of side ``n``, 16 or more, and as many poses, radians and pixels.
    volume
        The map, of shape ``(n, n, n)``.

    Raises
    ------
    InputError
        If there are fewer than 4 particles, images are too small, or images, poses and
        map do not fit each other, or poses or map are not finite.
    """
    count, n = len(particles), particles.image_size
    if count < FEWEST:
        raise InputError(f"at least {FEWEST} particles are wanted, not {count}")
    if n < 16:
        raise InputError(f"images of side 16 or more are wanted, not {n}")
    if poses.angles.shape != (count, 3) or poses.shifts.shape != (count, 2):
        raise InputError(
            f"{count} images want as many poses, not angles of shape "
            f"{poses.angles.shape} and shifts of shape {poses.shifts.shape}"
        )
    if volume.shape != (n, n, n):
        raise InputError(
            f"images of side {n} want a map of that side, not of shape {volume.shape}"
        )
    for name, array in (
        ("angles", poses.angles),
        ("shifts", poses.shifts),
        ("the map's values", volume),
    ):
        bad = int(np.sum(~np.isfinite(np.asarray(array))))
        if bad:
            raise InputError(f"{name} must be finite, but {bad} of them are not")
    angles, shifts = (jnp.asarray(x, jnp.float32) for x in (poses.angles, poses.shifts))
    return Poses(angles, shifts), jnp.asarray(volume, jnp.float32)


def _checked_mask(mask: Float[Array, "_ _ _"], n: int) -> Volume:
    """Return a mask in single precision; refuse what does not fit."""
    if mask.shape != (n, n, n):
        raise InputError(
            f"images of side {n} want a mask of that side, not of shape {mask.shape}"
        )
    check_mask(mask)
    return jnp.asarray(mask, jnp.float32)
