"""Init-1 (section V, Figs. 1 and 3-8): refinement from poses known to +-0.7 rad.

The same simulated particles are reconstructed from the true poses (oracle), from the
initial ones (unrefined) and jointly: by the engine, by the paper's algorithm with its
own settings and with those of its authors' released code, by projection matching, and
by RELION where it is installed, which searches all orientations or around the initial
ones.

    python experiments/init1.py configs/hjc_init1.toml --preset small --volume MAP.mrc

prints a table, and stores it with curves and maps in the run directory. The scripts
``fig01_...py`` to ``fig08_...py`` draw the pictures.
"""

import math
import sys
from dataclasses import dataclass

import cases
import comparison
import methods
from comparison import Case, Family, Method
from methods import initial_poses, true_poses
from settings import (
    ComparisonSettings,
    Init1Start,
    PaperSettings,
    RelionSettings,
    matching_step,
)

from jaxrefine.paper import (
    Algorithm1Config,
    Algorithm1State,
    Problem,
    printed_preset,
    released_preset,
)
from jaxrefine.poses.matching import MatchConfig
from jaxrefine.refinement.config import RefineConfig
from jaxrefine.runs.options import option


def engine(settings: Init1Start, case: Case) -> dict[str, Method]:
    """Return our default engine, with its oracle and the unrefined poses."""
    del case
    seed = settings.seed
    return {
        "oracle": methods.reconstruction(true_poses, seed),
        "unrefined": methods.reconstruction(initial_poses, seed),
        "joint": methods.refinement(RefineConfig(), seed),
    }


def printed(settings: "Init1Settings", case: Case) -> dict[str, Method]:
    """Return the paper's algorithm with the steps that it prints."""
    del case
    preset = methods.preset_of(settings, printed_preset)
    return {"joint (paper, printed steps)": methods.spatial_refinement(preset)}


def basin(settings: "Init1Settings", case: Case) -> dict[str, Method]:
    """Return what a local descent reaches in the true map."""
    del case
    preset, blur = methods.preset_of(settings), settings.initial_blur
    return {"descent in the true map": methods.descent_in_the_true_map(preset, blur)}


def released(settings: "Init1Settings", case: Case) -> dict[str, Method]:
    """Return the paper's algorithm as its authors released it, with its oracle."""

    def preset(problem: Problem, start: Algorithm1State) -> Algorithm1Config:
        del problem, start
        sigma = float(case.dataset.sigma)
        return released_preset(sigma, settings.released_iterations, settings.batch_size)

    return {
        "oracle (released)": methods.spatial_reconstruction(preset, true_poses),
        "joint (released)": methods.spatial_refinement(preset),
    }


def matching(settings: "Init1Settings", case: Case) -> dict[str, Method]:
    """Return projection matching, the classical method."""
    del case
    config = MatchConfig(
        angle_step=math.radians(settings.matching_step_in_degrees),
        max_shift=settings.max_shift + 1,
    )
    rounds, seed = settings.matching_rounds, settings.seed
    return {"projection matching": methods.projection_matching(config, rounds, seed)}


def by_relion(settings: "Init1Settings", case: Case) -> dict[str, Method]:
    """Return RELION's programs, where they are installed."""
    del case
    return methods.relion_methods(settings)


def by_relion_locally(settings: "Init1Settings", case: Case) -> dict[str, Method]:
    """Return RELION with local searches, where it is installed."""
    del case
    limit_s = 60 * settings.relion_local_limit_min
    return methods.relion_local_searches(settings, settings.relion_local_order, limit_s)


FAMILIES: dict[str, Family] = {
    "engine": engine,
    "paper": methods.paper_algorithm,
    "printed": printed,
    "basin": basin,
    "released": released,
    "matching": matching,
    "relion": by_relion,
    "relion_local": by_relion_locally,
}
"""What ``methods`` of the settings may list."""


@dataclass(frozen=True, kw_only=True)
class Init1Settings(ComparisonSettings, Init1Start, PaperSettings, RelionSettings):
    """The settings of the study."""

    methods: tuple[str, ...] = option(
        choices=tuple(FAMILIES), help="families of methods to compare"
    )
    released_iterations: int = option(
        least=1, help="outer iterations with the settings of the released code"
    )
    matching_rounds: int = option(
        least=1, help="rounds of projection matching and reconstruction"
    )
    matching_step_in_degrees: float = matching_step()
    relion_local_order: int = option(
        least=1,
        most=6,
        help="HEALPix order of RELION's first local search, which goes 180 degrees "
        "over 2**order from the initial poses",
    )
    relion_local_limit_min: float = option(
        unit="minutes",
        least=0,
        above=True,
        affects_results=False,
        help="time limit of RELION's local searches",
    )


def main() -> int:
    """Run what is left of the study, and print its table."""
    return comparison.main(__doc__, Init1Settings, cases.INIT1, FAMILIES)


if __name__ == "__main__":
    sys.exit(main())
