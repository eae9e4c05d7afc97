"""The parameters of the joint refinement."""

import math
from dataclasses import dataclass
from typing import final

import numpy as np
from jaxtyping import Float

from jaxrefine import symmetry
from jaxrefine.errors import InputError
from jaxrefine.maps import tv
from jaxrefine.maps.folds import FOLDS
from jaxrefine.operators.gridding import Gridding, Insertion
from jaxrefine.poses.search import PARTICLE_DIAMETER, half_period_turn, search_cell
from jaxrefine.poses.solvers import LevenbergMarquardt, PoseUpdate


def _check_at_least(config: object, least: int, *names: str) -> None:
    """Refuse a parameter that is smaller, or not a number."""
    for name in names:
        value = getattr(config, name)
        if not value >= least:
            raise InputError(f"{name} must be at least {least}, got {value}")


@final
@dataclass(frozen=True)
class Tuning:
    """Constants of the engine that a person may have a reason to change.

    The defaults were chosen by the mean FSC and the time of the cases ``hjc64``,
    ``ptch64`` and ``hjc64-low`` of ``benchmarks/refinement.py``, which has neither half
    sets nor several optics groups. ``benchmarks/tuning.py`` compares each of them but
    ``least_per_group`` with a lower and a higher value: on ``hjc64``, none of these
    changes the mean FSC by more than 0.0021, or loses a particle.

    Attributes
    ----------
    supported_fsc
        Poses are compared up to the shell where the correlation of the folds' maps, or
        of the half sets', falls to this. Lower values use more of the images, and more
        of the maps' noise. Set by ``benchmarks/refinement.py``.
    settled, progress
        Without half sets, the refinement ends when poses change by less than
        ``settled`` times their error bars, or by more than ``progress`` times what they
        changed before. Set by ``benchmarks/refinement.py``.
    stalled
        With half sets, the refinement ends when the correlation of their maps grows by
        less than this, and an iteration after which it is less than before is not kept;
        without, it has no effect. Set by judgement: no refinement of
        ``benchmarks/refinement.py`` has half sets. ``benchmarks/tuning.py`` measures
        it with half sets.
    sample
        Number of particles from which scale and noise are measured in each iteration;
        fewer are faster, and make the spectrum of the noise rougher. Set by
        ``benchmarks/refinement.py``.
    least_per_group
        Least number of particles of each optics group in this sample, if the group has
        as many; with one group it has no effect as long as it is at most ``sample``.
        Set by judgement: no benchmark has several groups.
    shifts_per_period
        Steps of the grid of shifts in one period of the finest detail that is compared.
        Set by ``benchmarks/refinement.py``.
    local_shift_steps
        Radius of the grid of shifts of a local search, in steps. Set by
        ``benchmarks/refinement.py``.
    decided
        A particle whose best hypothesis has at least this weight is not searched for
        again. Set by ``benchmarks/refinement.py``.
    negligible
        Hypotheses of at most this weight are not followed. Set by
        ``benchmarks/refinement.py``.
    final_rounds
        The final map takes this many times the ADMM iterations of a volume update. Set
        by ``benchmarks/refinement.py``.

    Raises
    ------
    InputError
        If a constant is out of range.
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

    def __post_init__(self):
        for name in ("supported_fsc", "decided"):
            if not 0 < getattr(self, name) <= 1:
                raise InputError(
                    f"{name} must be more than 0 and at most 1, got "
                    f"{getattr(self, name)}"
                )
        if not self.progress > 0:
            raise InputError(f"progress must be positive, got {self.progress}")
        if not 0 <= self.negligible < 1:
            raise InputError(
                f"negligible must be at least 0 and less than 1, got {self.negligible}"
            )
        _check_at_least(self, 0, "settled", "stalled", "local_shift_steps")
        _check_at_least(self, 1, "shifts_per_period", "final_rounds")
        # One particle of each fold.
        _check_at_least(self, FOLDS, "sample", "least_per_group")


@final
@dataclass(frozen=True)
class RefineConfig:
    """Parameters of the refinement. The defaults need no tuning.

    Attributes
    ----------
    angle_spread, shift_spread
        How well the given poses are known: standard deviations of each component of
        the rotation vector (radians, at most ``pi``) and of the shift (pixels).
    max_angle, max_shift
        Largest changes of the given poses, radians (at most ``pi``) and pixels. With 0
        the angles, or the shifts, stay as they are given, and are taken to be known for
        certain: see :mod:`jaxrefine.poses.presence`.
    symmetry
        Point group of the map, see :mod:`jaxrefine.symmetry`. The given poses are those
        of a map whose axes are the group's.
    symmetry_relax
        Point group up to whose operators the given poses are known, which the map need
        not have: every search tries all copies of a pose. It has the operators of
        `symmetry`, whose copies are the same, and others; C1 relaxes nothing.
    particle_diameter
        As a fraction of the box. The larger the particle, the farther a rotation moves
        its rim, and the more densely rotations are searched.
    half_sets
        Whether two halves of the particles are refined independently, for a
        gold-standard FSC.
    contrast_spread
        Standard deviation of the particles' contrast, a factor about 1 of each one's
        projection, which is refined; with 0 it is 1.
    defocus_spread
        Standard deviation of the particles' defocus about the given one, angstroms,
        which is refined; with 0 it is as given.
    iterations
        Largest number of outer iterations.
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
        Number of candidate poses of each particle that are kept, if these are near one
        copy of the given pose; see `places`.
    candidates
        Number of orientations that a local search tries for each hypothesis.
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
        Number of particles at a time.
    tuning
        Further constants, which seldom need a change.

    Raises
    ------
    InputError
        If a parameter is out of range, there is no such point group, or
        `symmetry_relax` has not all operators of `symmetry`, or no others (unless it is
        C1).
    """

    angle_spread: float = 0.45
    shift_spread: float = 2.0
    max_angle: float = np.pi
    max_shift: float = 6.0
    symmetry: str = "C1"
    symmetry_relax: str = "C1"
    particle_diameter: float = PARTICLE_DIAMETER
    half_sets: bool = False
    contrast_spread: float = 0.0
    defocus_spread: float = 0.0
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
    search_interpolation: Gridding = Gridding(2, 2.0)
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
        return bool(self.max_angle > 0)

    @property
    def refines_shifts(self) -> bool:
        """Whether the shifts are refined; if not, they stay as they are given."""
        return bool(self.max_shift > 0)

    @property
    def operators(self) -> Float[np.ndarray, "order 3 3"]:
        """The operators of the map's symmetry."""
        return symmetry.operators(self.symmetry)

    @property
    def copies(self) -> Float[np.ndarray, "copies 3 3"]:
        """The operators up to which the given poses are known, the identity first.

        Of those that the map's symmetry makes equivalent, one.
        """
        if self.symmetry_relax == "C1":
            return np.eye(3)[None]
        return symmetry.representatives(self.symmetry_relax, self.symmetry)

    @property
    def places(self) -> int:
        """How many candidate poses of each particle are kept.

        One for each copy of the given pose, and the other `hypotheses` wherever they
        are.
        """
        return self.hypotheses + len(self.copies) - 1

    def half_period_turn(self, r_max: int) -> float:
        """Return `search.half_period_turn` of the particle, radians."""
        return half_period_turn(self.particle_diameter, r_max)

    def search_cell(self, r_max: int) -> float:
        """Return `search.search_cell` of the particle, radians.

        Candidates that are nearer than this count as one.
        """
        return search_cell(self.particle_diameter, r_max)

    def __post_init__(self):
        symmetry.operators(self.symmetry)
        symmetry.operators(self.symmetry_relax, "symmetry_relax")
        if self.symmetry_relax != "C1" and len(self.copies) == 1:
            both = f"{self.symmetry} and {self.symmetry_relax}"
            if self.symmetry == self.symmetry_relax:
                both = f"{self.symmetry} for both"
            raise InputError(
                f"symmetry_relax must have operators that symmetry has not, got {both}"
            )
        if len(self.copies) > 1 and not self.refines_angles:
            raise InputError(
                "symmetry_relax must be C1 if angles are fixed, got "
                f"{self.symmetry_relax}"
            )
        if not 0 < self.angle_spread <= math.pi:
            raise InputError(
                "angle_spread must be more than 0 and at most pi radians, got "
                f"{self.angle_spread}"
            )
        if not self.shift_spread > 0:
            raise InputError(f"shift_spread must be positive, got {self.shift_spread}")
        _check_at_least(self, 0, "max_shift", "contrast_spread", "defocus_spread")
        if not 0 <= self.max_angle <= math.pi:
            raise InputError(
                "max_angle must be at least 0 and at most pi radians, got "
                f"{self.max_angle}"
            )
        if not 0 < self.particle_diameter <= 1:
            raise InputError(
                "particle_diameter must be more than 0 and at most 1, a fraction of "
                f"the box, got {self.particle_diameter}"
            )
        _check_at_least(
            self,
            1,
            "iterations",
            "first_r_max",
            "search_r_max",
            "hypotheses",
            "candidates",
            "admm_iterations",
            "batch_size",
        )
        if self.max_r_max is not None and not self.max_r_max >= self.first_r_max:
            raise InputError(
                f"max_r_max must be at least first_r_max, {self.first_r_max}, got "
                f"{self.max_r_max}"
            )
        if self.tau is not None and not self.tau > 0:
            raise InputError(f"tau must be positive, got {self.tau}")
