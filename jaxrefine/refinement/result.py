"""The results of a refinement, of its iterations and of a reconstruction."""

from dataclasses import dataclass
from functools import cached_property
from typing import final

import numpy as np
from jaxtyping import Bool, Float

from jaxrefine.geometry import Poses
from jaxrefine.maps.sums import Sums, least_squares
from jaxrefine.poses.optics import OpticsEstimate
from jaxrefine.refinement.state import RefineState


@final
@dataclass(frozen=True)
class RefineInfo:
    """What is reported of an outer iteration.

    Attributes
    ----------
    iteration
        Its number, from 1.
    r_max, search_r_max
        Band limits of the polishing and of the search, cycles per box; 0 for a search
        that did not take place.
    searched
        Number of particles that were searched for.
    decided
        Fraction of the particles whose best hypothesis has a weight of at least
        ``Tuning.decided``.
    evaluations
        Mean number of evaluations of a particle's likelihood at the band limit.
    angle_change_in_degrees, shift_change_in_pixels
        Median changes of the best poses.
    tau
        Weight of the regulariser, for each set.
    fold_score
        Mean correlation of the folds' maps.
    gold_score
        Mean correlation of the half sets' regularised maps; None without half sets.
    is_kept
        Whether its poses and maps are those that the refinement goes on with, or ends
        with; if not, those of the iteration before are.
    """

    iteration: int
    r_max: int
    search_r_max: int
    searched: int
    decided: float
    evaluations: float
    angle_change_in_degrees: float
    shift_change_in_pixels: float
    tau: list[float]
    fold_score: float
    gold_score: float | None = None
    is_kept: bool = True

    def row(self) -> dict[str, int | float | list[float] | None]:
        """Return the numbers by name, for a table."""
        return dict(self.__dict__)


@final
@dataclass(frozen=True)
class Reconstruction:
    """A map, made of particles at given poses.

    Attributes
    ----------
    volume
        The map, of shape ``(n, n, n)``.
    sums
        The sums that the map was made of, for the two halves of the particles.
    lam, tau
        Weight of the regulariser, absolute and in units of the noise.
    errors
        Error of prediction of each ``tau`` that was tried; empty if it was given.
    """

    volume: Float[np.ndarray, "n n n"]
    sums: list[Sums]
    lam: float
    tau: float
    errors: dict[float, float]

    @cached_property
    def half_maps(self) -> list[np.ndarray]:
        """Maps of the two halves, not regularised; made when they are first read."""
        return [np.asarray(least_squares(half)) for half in self.sums]


@final
@dataclass(frozen=True)
class Result:
    """What a refinement returns.

    Attributes
    ----------
    poses
        Refined poses: rotation matrices ``(P, 3, 3)``, and shifts ``(P, 2)`` in pixels.
    covariances
        Of each rotation vector (radians) and shift (pixels); 0 for what is fixed.
    log_likelihood
        Logarithm of each particle's evidence: how much more probable the image is with
        the particle, at any pose, than without, see :mod:`jaxrefine.poses.presence`.
    undetermined
        Whether an image does not show that it has a particle: its evidence is at most
        that which one image of noise in 20 exceeds (`presence.LEAST_EVIDENCE`), or its
        refined position is outside of the image. Such particles keep their given poses,
        and are left out of the maps.
    volume
        The map, of shape ``(n, n, n)``.
    half_maps, fsc
        With half sets, their maps, not regularised, and the FSC of these; else None.
    informed_up_to
        With half sets, the last shell in which poses were compared and in which the
        regularised maps of the half sets agree (FSC 0.5, see `schedule.supported`);
        else None.
    tau
        Weight of the regulariser.
    state
        The last state.
    estimated_optics
        Contrast and defocus of each particle, relative to those given, their standard
        deviations, and whether they are at a limit; None if neither is refined.
    """

    poses: Poses
    covariances: Float[np.ndarray, "particles 5 5"]
    log_likelihood: Float[np.ndarray, " particles"]
    undetermined: Bool[np.ndarray, " particles"]
    volume: Float[np.ndarray, "n n n"]
    half_maps: tuple[np.ndarray, np.ndarray] | None
    fsc: Float[np.ndarray, " shells"] | None
    informed_up_to: int | None
    tau: float
    state: RefineState
    estimated_optics: OpticsEstimate | None = None
