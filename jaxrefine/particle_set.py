"""A set of particles that is refined by itself: its settings and its state."""

from dataclasses import dataclass
from typing import final

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PRNGKeyArray

from jaxrefine import admm, symmetry, tv
from jaxrefine._types import Volume
from jaxrefine.crossfit import FOLDS
from jaxrefine.errors import InputError
from jaxrefine.geometry import Poses
from jaxrefine.gridding import Gridding, Insertion, default_insertion
from jaxrefine.hypotheses import Hypotheses, Prior
from jaxrefine.hypotheses import prior as make_prior
from jaxrefine.particles import Particles
from jaxrefine.postprocess import check_mask
from jaxrefine.tangent import LevenbergMarquardt, PoseUpdate

FEWEST = 4
"""Particles that a set wants at least: two for each fold."""


@final
@dataclass(frozen=True)
class RefineConfig:
    """Parameters of the refinement. The defaults want no tuning.

    Attributes
    ----------
    angle_spread, shift_spread
        How well the given poses are known: standard deviations of each component of
        the rotation (radians) and of the shift (pixels).
    max_angle, max_shift
        Largest changes of the given poses, radians and pixels. 0 keeps the angles, or
        the shifts, as they are given.
    symmetry
        Point group of the map, see :mod:`jaxrefine.symmetry`. The given poses are those
        of a map whose axes are the group's.
    diameter
        Of the particle, as a fraction of the box: how far rotations move its rim says
        how densely they are searched.
    half_sets
        Whether two halves of the particles are refined independently, for a
        gold-standard FSC.
    iterations
        Most outer iterations.
    first_r_max
        Band limit of the first iteration, cycles per box: what the initial map and
        poses support.
    search_r_max
        Largest band limit of the search.
    max_r_max
        Largest band limit at which poses are compared; None for what the map supports.
    multi_start
        Outer iterations that search the whole prior, not just about the current poses.
    hypotheses
        Candidate poses of each particle that are followed.
    candidates
        Orientations that a local search tries.
    admm_iterations
        ADMM iterations of each volume update.
    tau
        Weight of the regulariser in units of the noise (see :mod:`jaxrefine.crossfit`);
        None chooses it by cross-validation.
    update
        How candidate poses are polished.
    regulariser
        Prior on the map's gradient.
    interpolation, search_interpolation
        How slices are read from the map's spectrum, by the polishing and by the search.
    insertion
        How slices are inserted; None takes the faster way on the default device.
    batch_size
        Particles at a time.
    """

    angle_spread: float = 0.45
    shift_spread: float = 2.0
    max_angle: float = np.pi
    max_shift: float = 6.0
    symmetry: str = "C1"
    diameter: float = 2 / 3
    half_sets: bool = False
    iterations: int = 12
    first_r_max: int = 7
    search_r_max: int = 11
    max_r_max: int | None = None
    multi_start: tuple[int, ...] = (0, 2)
    hypotheses: int = 3
    candidates: int = 32
    admm_iterations: int = 10
    tau: float | None = None
    update: PoseUpdate = LevenbergMarquardt()
    regulariser: tv.Regulariser = tv.IsotropicTV()
    interpolation: Gridding = Gridding()
    search_interpolation: Gridding = Gridding(3, 1.5)
    insertion: Insertion | None = None
    batch_size: int = 256

    @property
    def last_multi_start(self) -> int:
        """The last outer iteration that searches the whole prior; -1 without any."""
        return max(self.multi_start, default=-1)

    @property
    def turns(self) -> bool:
        """Whether the angles are refined; if not, they stay as they are given."""
        return self.max_angle > 0

    @property
    def moves(self) -> bool:
        """Whether the shifts are refined; if not, they stay as they are given."""
        return self.max_shift > 0

    @property
    def operators(self) -> Float[np.ndarray, "order 3 3"]:
        """The operators of the map's symmetry."""
        return symmetry.operators(self.symmetry)

    def cell(self, r_max: int) -> float:
        """Return the side of a cell of rotations, in radians.

        One over ``r_max`` for a particle of two thirds of the box; see
        `search.wanted_candidates`.
        """
        return 2 / (3 * self.diameter * r_max)

    def __post_init__(self):
        symmetry.operators(self.symmetry)
        for name in ("angle_spread", "shift_spread"):
            if not getattr(self, name) > 0:
                value = getattr(self, name)
                raise InputError(f"{name} wants to be positive, not {value}")
        for name in ("max_angle", "max_shift"):
            if not getattr(self, name) >= 0:
                value = getattr(self, name)
                raise InputError(f"{name} wants to be at least 0, not {value}")
        if not 0 < self.diameter <= 1:
            raise InputError(
                f"diameter wants to be from 0 to 1 of the box, not {self.diameter}"
            )
        for name in (
            "iterations",
            "first_r_max",
            "search_r_max",
            "hypotheses",
            "candidates",
            "admm_iterations",
            "batch_size",
        ):
            if not getattr(self, name) >= 1:
                value = getattr(self, name)
                raise InputError(f"{name} wants to be at least 1, not {value}")
        if self.max_r_max is not None and not self.max_r_max >= self.first_r_max:
            raise InputError(
                f"max_r_max wants to be at least first_r_max, {self.first_r_max}, not "
                f"{self.max_r_max}"
            )
        if self.tau is not None and not self.tau > 0:
            raise InputError(f"tau wants to be positive, not {self.tau}")


@final
class SetState(eqx.Module):
    """What is known of a set of particles that is refined by itself.

    Attributes
    ----------
    hypotheses
        Poses.
    information, evidence
        Of each particle's best pose; see `posterior.Polished`.
    maps
        ADMM states of the folds' maps.
    gain
        Scale of the maps, by shell.
    noise
        Power of the noise in each group of particles, by shell.
    tau
        Weight of the regulariser.
    fold_fsc
        Correlation of the folds' maps.
    """

    hypotheses: Hypotheses
    information: Float[Array, "particles 5 5"]
    evidence: Float[Array, "particles"]
    maps: tuple[admm.ADMMState, ...]
    gain: Float[Array, "shells"]
    noise: Float[Array, "groups shells"]
    tau: Float[Array, ""]
    fold_fsc: Float[Array, "shells"]

    @property
    def mean_map(self) -> Volume:
        """The mean of the folds' maps."""
        first, second = (one.coefficients for one in self.maps)
        return (first + second) / 2


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
    prior = make_prior(
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
