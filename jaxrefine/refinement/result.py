"""What a refinement, its iterations and a reconstruction return."""

from dataclasses import dataclass
from functools import cached_property
from typing import final

import numpy as np
from jaxtyping import Bool, Float

from jaxrefine.geometry import Poses
from jaxrefine.maps.sums import Sums, least_squares
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
        How many particles were searched for.
    decided
        Fraction of the particles with one hypothesis left.
    damping
        Median damping of each iteration of the polishing.
    angle_change_in_degrees, shift_change_in_pixels
        Medians over the particles.
    tau
        Weight of the regulariser, for each set.
    fold_score
        Mean correlation of the folds' maps.
    gold_score
        Mean correlation of the half sets' regularised maps; None without half sets.
    """

    iteration: int
    r_max: int
    search_r_max: int
    searched: int
    decided: float
    damping: list[float]
    angle_change_in_degrees: float
    shift_change_in_pixels: float
    tau: list[float]
    fold_score: float
    gold_score: float | None = None

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
        The map.
    sums
        What the map was made of, for the two halves of the particles.
    lam, tau
        Weight of the regulariser, absolute and in units of the noise.
    errors
        Errors of prediction that ``tau`` was chosen by, if it was.
    """

    volume: Float[np.ndarray, "n n n"]
    sums: list[Sums]
    lam: float
    tau: float
    errors: dict[float, float]

    @cached_property
    def half_maps(self) -> list[np.ndarray]:
        """Maps of the halves by themselves, not regularised, made when asked for."""
        return [np.asarray(least_squares(half)) for half in self.sums]


@final
@dataclass(frozen=True)
class Result:
    """What a refinement returns.

    Attributes
    ----------
    poses
        Refined poses.
    covariances
        Of each rotation vector (radians) and shift (pixels); 0 for what is fixed.
    log_likelihood
        Logarithm of each particle's evidence: how much more probable the image is with
        the particle than without.
    undetermined
        Particles whose images are more probable without a particle. They keep the poses
        that they were given, and no map is made of them.
    volume
        The map.
    half_maps, fsc
        With half sets, their maps, not regularised, and the correlation of these.
    tau
        Weight of the regulariser.
    state
        The last state.
    """

    poses: Poses
    covariances: Float[np.ndarray, "particles 5 5"]
    log_likelihood: Float[np.ndarray, " particles"]
    undetermined: Bool[np.ndarray, " particles"]
    volume: Float[np.ndarray, "n n n"]
    half_maps: tuple[np.ndarray, np.ndarray] | None
    fsc: Float[np.ndarray, " shells"] | None
    tau: float
    state: RefineState
