"""Init-2 (section V-E, Figs. 9-12): a real scenario, from a map made ab initio.

Half of the particles each are refined by themselves, starting from a map and poses that
RELION made ab initio (by projection matching where RELION is not installed), with the
translations at zero. The map of all particles is masked and filtered to the resolution
of the half maps. A second joint refinement ("joint, matched first") begins with poses
that global matching finds in the initial map, since some of RELION's poses are too far
off for a local refinement.

    python experiments/init2.py configs/hjc_init2.toml --preset small --volume MAP.mrc

prints a table, and stores it with curves and maps in the run directory. The scripts
``fig09_...py`` to ``fig12_...py`` draw the pictures.
"""

import sys
from dataclasses import dataclass

import cases
import comparison
import methods
from comparison import Case, Family, Method
from methods import initial_poses, true_poses
from settings import ComparisonSettings, Init2Start, PaperSettings

from jaxrefine.poses.matching import MatchConfig
from jaxrefine.refinement.config import RefineConfig
from jaxrefine.runs.options import option


def engine(settings: Init2Start, case: Case) -> dict[str, Method]:
    """Return our default engine, for poses that are not known to start with."""
    seed, max_shift = settings.seed, settings.max_shift
    config = RefineConfig(half_sets=True, max_shift=2 * max_shift + 1, iterations=20)
    matching = MatchConfig(max_shift=max_shift + 1)
    return {
        "oracle": methods.reconstruction(true_poses, seed),
        "unrefined": methods.reconstruction(initial_poses, seed, case.remark),
        "joint": methods.refinement(config, seed),
        "joint, matched first": methods.refinement(config, seed, matching),
    }


def by_relion(settings: Init2Start, case: Case) -> dict[str, Method]:
    """Return RELION's programs, where they are installed."""
    del case
    return methods.relion_methods(settings, settings.relion_most_poses or None)


FAMILIES: dict[str, Family] = {
    "engine": engine,
    "paper": methods.paper_algorithm,
    "relion": by_relion,
}
"""What ``methods`` of the settings may list."""


@dataclass(frozen=True, kw_only=True)
class Init2Settings(ComparisonSettings, PaperSettings, Init2Start):
    """The settings of the study."""

    methods: tuple[str, ...] = option(
        choices=tuple(FAMILIES), help="families of methods to compare"
    )


def main() -> int:
    """Run what is left of the study, and print its table."""
    return comparison.main(__doc__, Init2Settings, cases.INIT2, FAMILIES)


if __name__ == "__main__":
    sys.exit(main())
