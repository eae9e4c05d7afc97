"""The parameters of the joint refinement."""

from dataclasses import dataclass
from typing import final

import numpy as np
from jaxtyping import Float

from jaxrefine import symmetry
from jaxrefine.errors import InputError
from jaxrefine.maps import tv
from jaxrefine.operators.gridding import Gridding, Insertion
from jaxrefine.poses.solvers import LevenbergMarquardt, PoseUpdate


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
        Weight of the regulariser in units of the noise, see `maps.sums.solve`; None
        chooses it by cross-validation.
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
