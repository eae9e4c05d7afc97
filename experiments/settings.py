"""The settings that studies share; each study declares its own beside them.

A study's settings are a frozen dataclass of options (:mod:`jaxrefine.runs.options`).
What the results do not depend on may be changed when a run is carried on: titles, the
size of batches, and time limits, which only decide how far a run has come.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxrefine.runs.options import option


def matching_step() -> Any:
    """Declare the angular step of projection matching."""
    return option(
        unit="degrees",
        least=0,
        above=True,
        most=90,
        help="step of the grid of projection matching",
    )


@dataclass(frozen=True, kw_only=True)
class StudySettings:
    """What every study says of its particles."""

    title: str = option(affects_results=False, help="title in tables and figures")
    # RELION takes the seed plus 1, as a signed number of 32 bits.
    seed: int = option(least=0, most=2**31 - 2, help="seed of everything random")
    particles: int = option(least=1, help="number of particles")
    snr_db: float = option(unit="decibels", help="signal-to-noise ratio in a pixel")
    max_shift: float = option(
        unit="pixels", least=0, help="largest shift along x and y"
    )


@dataclass(frozen=True, kw_only=True)
class DatasetSettings(StudySettings):
    """A simulated data set, which methods are compared on."""

    volume: Path | None = option(
        None, help="true map (MRC)", default_text="the built-in phantom"
    )
    size: int = option(
        unit="voxels",
        least=1,
        help="side of the built-in phantom; a true map brings its own",
    )
    voxel_size_in_angstroms: float = option(
        unit="angstroms", least=0, above=True, help="edge of a voxel"
    )
    initial_blur: float = option(
        unit="voxels",
        least=0,
        above=True,
        help="an initial map that is not made ab initio is the truth blurred by a "
        "Gaussian of this width",
    )
    batch_size: int = option(
        least=1,
        affects_results=False,
        help="particles computed at once; memory grows with it",
    )

    @property
    def map_name(self) -> str:
        """What the true map is called in tables and figures."""
        if self.volume is None:
            return "built-in phantom (stand-in for the real map)"
        return self.volume.name

    def caption(self, start: str) -> str:
        """Say under which conditions results were found.

        Parameters
        ----------
        start
            What the refinements begin with.
        """
        return (
            f"{self.title}: {self.map_name}, {self.size}³ voxels, {self.particles} "
            f"particles at {self.snr_db:g} dB, shifts up to {self.max_shift:g} px "
            f"unknown, {start}, seed {self.seed}."
        )


@dataclass(frozen=True, kw_only=True)
class Init1Start(DatasetSettings):
    """The start Init-1 of section IV-B: perturbed angles and a blurred map."""

    max_angle_error_in_radians: float = option(
        unit="radians", least=0, help="largest initial error of each Euler angle"
    )

    @property
    def start(self) -> str:
        """What the refinements begin with, in words."""
        return (
            f"Euler angles off by up to {self.max_angle_error_in_radians:g} rad, "
            f"initial map = truth blurred by {self.initial_blur:g} voxels"
        )


@dataclass(frozen=True, kw_only=True)
class ComparisonSettings(DatasetSettings):
    """What a comparison of methods adds; each study declares which there are."""

    methods: tuple[str, ...] = option(help="families of methods to compare")


@dataclass(frozen=True, kw_only=True)
class PaperSettings(DatasetSettings):
    """How the paper's algorithm is run."""

    paper_iterations: int = option(
        least=1, help="outer iterations of the paper's algorithm"
    )


@dataclass(frozen=True, kw_only=True)
class RelionSettings(DatasetSettings):
    """How RELION's auto-refine is run."""

    relion_limit_min: float = option(
        unit="minutes",
        least=0,
        affects_results=False,
        help="time limit of RELION's auto-refine; 0 leaves it out",
    )
    auto_refine_low_pass: float = option(
        unit="angstroms",
        least=0,
        above=True,
        help="resolution of the initial map that auto-refine starts with",
    )


@dataclass(frozen=True, kw_only=True)
class Init2Start(RelionSettings):
    """The start Init-2 of section V-E: map and poses by RELION, ab initio."""

    ab_initio_limit_min: float = option(
        unit="minutes",
        least=0,
        affects_results=False,
        help="time limit of RELION's ab-initio reconstruction",
    )
    ab_initio_iterations: tuple[int, int, int] = option(
        least=0, help="its initial iterations, those between, and its final ones"
    )
    ab_initio_resolutions: tuple[float, float] = option(
        unit="angstroms",
        least=0,
        above=True,
        help="its resolution in the initial iterations and in the final ones",
    )
    relion_most_poses: int = option(
        least=0,
        help="poses of RELION's coarse grid that are looked at more finely "
        "(--maxsig); 0 for all that are not negligible",
    )
