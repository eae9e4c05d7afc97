"""The parameters of the joint refinement."""

from dataclasses import dataclass
from typing import final

import numpy as np
from jaxtyping import Float

from jaxrefine import symmetry
from jaxrefine.errors import InputError
from jaxrefine.maps import tv
from jaxrefine.operators.gridding import Gridding, Insertion
from jaxrefine.poses.search import half_period_turn
from jaxrefine.poses.solvers import LevenbergMarquardt, PoseUpdate


@final
@dataclass(frozen=True)
class Tuning:
    """Constants of the engine that a person may have a reason to change.

    The defaults were set by the mean FSC and the time of the cases ``hjc64``,
    ``ptch64`` and ``hjc64-low`` of ``benchmarks/refinement.py``. On the same data
    ``benchmarks/tuning.py`` compares each of them with a lower and a higher value, but
    for ``least_per_group``, which tells only with several optics groups.

    Attributes
    ----------
    supported_fsc
        Correlation of the maps of the two folds up to where poses are compared. Lower
        values use more of the images, and more noise of the maps.
    settled, progress
        The refinement ends when poses change by less than ``settled`` of their error
        bars, or by more than ``progress`` of what they changed before.
    stalled
        With half sets the refinement ends when the correlation of their maps grows by
        less than this.
    sample
        Particles that scale and noise are measured from in each iteration; fewer are
        faster, and make the spectrum of the noise rougher.
    least_per_group
        Particles of each optics group in this sample, if it has as many.
    shifts_per_period
        Steps of the grid of shifts in one period of the finest detail compared.
    local_shift_steps
        Radius of the grid of shifts of a local search, in steps.
    decided
        Weight of its best hypothesis from which a particle is not searched for again.
    negligible
        Hypotheses of less weight than this are not followed.
    final_rounds
        How many times the ADMM iterations of a volume update the final map takes.
    """

    supported_fsc: float = 0.5
    settled: float = 0.3
    progress: float = 0.75
    stalled: float = 2e-3
    sample: int = 2000
    least_per_group: int = 200
    shifts_per_period: int = 8
    local_shift_steps: int = 3
    decided: float = 0.99
    negligible: float = 1e-2
    final_rounds: int = 3


@final
@dataclass(frozen=True)
class RefineConfig:
    """Parameters of the refinement. The defaults need no tuning.

    Attributes
    ----------
    angle_spread, shift_spread
        How well the given poses are known: standard deviations of each component of
        the rotation vector (radians) and of the shift (pixels).
    max_angle, max_shift
        Largest changes of the given poses, radians and pixels. With 0 the angles, or
        the shifts, stay as they are given.
    symmetry
        Point group of the map, see :mod:`jaxrefine.symmetry`. The given poses are those
        of a map whose axes are the group's.
    particle_diameter
        As a fraction of the box. How far a rotation moves the rim of the particle
        decides how densely rotations are searched.
    half_sets
        Whether two halves of the particles are refined independently, for a
        gold-standard FSC.
    iterations
        Most outer iterations.
    first_r_max
        Band limit of the first iteration, cycles per box: what the initial map and
        poses support.
    search_r_max
        Largest band limit of the search, cycles per box.
    max_r_max
        Largest band limit at which poses are compared, cycles per box; None for what
        the map supports.
    multi_start
        Outer iterations, from 0, that search the whole prior, not just about the
        current poses.
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
        Prior on the gradient of the map.
    interpolation, search_interpolation
        How slices are read from the spectrum of the map, by the polishing and by the
        search.
    insertion
        How slices are inserted; None takes the faster way on the default device.
    batch_size
        Particles at a time.
    tuning
        Further constants, which seldom need a change.

    Raises
    ------
    InputError
        If a parameter is out of range, or there is no such point group.
    """

    angle_spread: float = 0.45
    shift_spread: float = 2.0
    max_angle: float = np.pi
    max_shift: float = 6.0
    symmetry: str = "C1"
    particle_diameter: float = 2 / 3
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
    tuning: Tuning = Tuning()

    @property
    def last_multi_start(self) -> int:
        """The last outer iteration that searches the whole prior; -1 without any."""
        return max(self.multi_start, default=-1)

    @property
    def refines_angles(self) -> bool:
        """Whether the angles are refined; if not, they stay as they are given."""
        return self.max_angle > 0

    @property
    def refines_shifts(self) -> bool:
        """Whether the shifts are refined; if not, they stay as they are given."""
        return self.max_shift > 0

    @property
    def operators(self) -> Float[np.ndarray, "order 3 3"]:
        """The operators of the map's symmetry."""
        return symmetry.operators(self.symmetry)

    def half_period_turn(self, r_max: int) -> float:
        """Return `search.half_period_turn` of the particle, radians."""
        return half_period_turn(self.particle_diameter, r_max)

    def search_cell(self, r_max: int) -> float:
        """Return the side of the cells that rotations are searched in, radians.

        Two thirds of `half_period_turn`, so that cells overlap; candidates that are
        nearer than this count as one.
        """
        return 2 / 3 * self.half_period_turn(r_max)

    def __post_init__(self):
        symmetry.operators(self.symmetry)
        for name in ("angle_spread", "shift_spread"):
            if not getattr(self, name) > 0:
                raise InputError(f"{name} must be positive, got {getattr(self, name)}")
        for name in ("max_angle", "max_shift"):
            if not getattr(self, name) >= 0:
                raise InputError(
                    f"{name} must be at least 0, got {getattr(self, name)}"
                )
        if not 0 < self.particle_diameter <= 1:
            raise InputError(
                "particle_diameter must be more than 0 and at most 1, a fraction of "
                f"the box, got {self.particle_diameter}"
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
                raise InputError(
                    f"{name} must be at least 1, got {getattr(self, name)}"
                )
        if self.max_r_max is not None and not self.max_r_max >= self.first_r_max:
            raise InputError(
                f"max_r_max must be at least first_r_max, {self.first_r_max}, got "
                f"{self.max_r_max}"
            )
        if self.tau is not None and not self.tau > 0:
            raise InputError(f"tau must be positive, got {self.tau}")
