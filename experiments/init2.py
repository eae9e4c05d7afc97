"""Init-2 (section V-E, Figs. 9-12): a real scenario, from a map made ab initio.

Half of the particles each are refined by themselves, starting from a map and poses that
RELION made ab initio (by projection matching where RELION is not installed), with the
translations at zero. The map of all particles is masked, and what lies beyond the
resolution of the half maps is taken away. Beside that, the poses are first found anew
by global matching with the initial map ("joint, matched first"), for those of RELION's
that are too far off for a local refinement.

    python experiments/init2.py configs/hjc_init2.toml --preset small --volume MAP.mrc

prints a table, and stores it with curves and maps in the run directory. The scripts
``fig09_...py`` to ``fig12_...py`` draw the pictures.
"""

import sys
from typing import Any

import cases
import comparison
import harness
import methods
from comparison import Case, Method
from methods import initial_poses, true_poses

from jaxrefine.poses.matching import MatchConfig
from jaxrefine.refinement.config import RefineConfig

PRESETS = ("smoke", "small", "cpu", "paper")

KEYS = (
    *cases.KEYS,
    "methods",
    "relion_limit_min",
    "relion_most_poses",
    "ab_initio_limit_min",
    "ab_initio_iterations",
    "ab_initio_resolutions",
    "auto_refine_low_pass",
)
"""What the configuration must say."""


def engine(config: dict[str, Any], case: Case) -> dict[str, Method]:
    """Return the ways of our default engine; poses are not known to start with."""
    seed = config["seed"]
    reach = 2 * config["max_shift"] + 1
    settings = RefineConfig(half_sets=True, max_shift=reach, iterations=20)
    matching = MatchConfig(max_shift=config["max_shift"] + 1)
    return {
        "oracle": methods.reconstruction(true_poses, seed),
        "unrefined": methods.reconstruction(initial_poses, seed, case.start),
        "joint": methods.refinement(settings, seed),
        "joint, matched first": methods.refinement(settings, seed, matching),
    }


def by_relion(config: dict[str, Any], case: Case) -> dict[str, Method]:
    """Return RELION's programs, where they are installed."""
    del case
    return methods.relion_methods(config, config["relion_most_poses"] or None)


FAMILIES = {"engine": engine, "relion": by_relion}
"""What ``methods`` of a configuration may list."""


def main() -> None:
    """Run what is left of the study, then print its table."""
    options = harness.parse(__doc__, PRESETS)
    config = harness.resolve(options, KEYS)
    before = harness.stored_config(options, config)
    # A run keeps its start, should RELION come or go.
    config["start"] = before.get("start") or cases.start(config)
    comparison.run(options, config, cases.init2, FAMILIES)


if __name__ == "__main__":
    sys.exit(harness.main(main))
