"""A set of particles that is refined by itself: its settings and its state."""

from dataclasses import dataclass
from typing import final

import equinox as eqx
import jax
import numpy as np
from jaxtyping import Array, Float, Int, PRNGKeyArray

from jaxrefine import admm, tv
from jaxrefine.crossfit import FOLDS
from jaxrefine.errors import InputError
from jaxrefine.geometry import Poses
from jaxrefine.gridding import Gridding, Insertion, default_insertion
from jaxrefine.hypotheses import Hypotheses, Prior
from jaxrefine.hypotheses import prior as make_prior
from jaxrefine.particles import Particles
from jaxrefine.tangent import LevenbergMarquardt, PoseUpdate


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
        Largest changes of the given poses, radians and pixels.
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
    half_sets: bool = False
    iterations: int = 12
    first_r_max: int = 7
    search_r_max: int = 11
    multi_start: tuple[int, ...] = (0, 2)
    hypotheses: int = 3
    candidates: int = 32
    admm_iterations: int = 10
    tau: float | None = None
    update: PoseUpdate = LevenbergMarquardt()
    regulariser: tv.Regulariser = tv.IsotropicTV()
    interpolation: Gridding = Gridding()
    search_interpolation: Gridding = Gridding(2, 2.0)
    insertion: Insertion | None = None
    batch_size: int = 256

    def __post_init__(self):
        for name in ("angle_spread", "shift_spread", "max_angle", "max_shift"):
            if not getattr(self, name) > 0:
                value = getattr(self, name)
                raise InputError(f"{name} wants to be positive, not {value}")
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
    gain, noise
        Scale of the maps and power of the noise, by shell.
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
    noise: Float[Array, "shells"]
    tau: Float[Array, ""]
    fold_fsc: Float[Array, "shells"]


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
    """

    particles: Particles
    prior: Prior
    fold: Int[np.ndarray, " particles"]
    config: RefineConfig

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
    particles: Particles, poses: Poses, key: PRNGKeyArray, config: RefineConfig
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
    return ParticleSet(particles, prior, fold, config)
