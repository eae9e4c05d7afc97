"""Init-1 (section V, Figs. 1 and 3-8): refinement from poses known to +-0.7 rad.

The same simulated particles are reconstructed from the true poses (oracle), from the
initial ones (unrefined) and jointly: by the engine, by the paper's algorithm with its
own settings and with those of its authors' released code, by projection matching, and
by RELION where it is installed.

    python experiments/init1.py configs/hjc_init1.toml --preset small --volume MAP.mrc

prints a table, and stores it with curves and maps in the run directory. The scripts
``fig01_...py`` to ``fig08_...py`` draw the pictures.
"""

import sys
from typing import Any

import cases
import comparison
import harness
import methods
from comparison import Case, Method
from methods import initial_poses, true_poses

from jaxrefine.paper.presets import paper_preset, released_preset
from jaxrefine.poses.matching import MatchConfig
from jaxrefine.refinement.config import RefineConfig

PRESETS = ("smoke", "small", "cpu", "paper")

KEYS = (
    *cases.KEYS,
    "methods",
    "paper_iterations",
    "released_iterations",
    "paper_step_scales",
    "matching_rounds",
    "matching_step_deg",
    "relion_limit_min",
    "auto_refine_low_pass",
)
"""What the configuration must say."""


def engine(config: dict[str, Any], case: Case) -> dict[str, Method]:
    """Return the ways of our default engine."""
    del case
    seed = config["seed"]
    return {
        "oracle": methods.reconstruction(true_poses, seed),
        "unrefined": methods.reconstruction(initial_poses, seed),
        "joint": methods.refinement(RefineConfig(), seed),
    }


def published(config: dict[str, Any], case: Case) -> dict[str, Method]:
    """Return the paper's algorithm, as printed and as its authors released it."""
    sigma, batch = float(case.dataset.sigma), config["batch_size"]
    paper = paper_preset(sigma, config["paper_iterations"], batch)
    released = released_preset(config["released_iterations"], batch)
    chosen = {
        "oracle (paper)": methods.spatial_reconstruction(paper, true_poses),
        "unrefined (paper)": methods.spatial_reconstruction(paper, initial_poses),
        "oracle (released)": methods.spatial_reconstruction(released, true_poses),
        "joint (released)": methods.spatial_refinement(released),
    }
    for scale in config["paper_step_scales"]:
        name = "joint (paper)" if scale == 1 else f"joint (paper, steps x {scale:g})"
        scaled = methods.with_step_scale(paper, scale)
        chosen[name] = methods.spatial_refinement(scaled)
    return chosen


def matching(config: dict[str, Any], case: Case) -> dict[str, Method]:
    """Return projection matching, the classical way."""
    del case
    settings = MatchConfig(
        angle_step_in_degrees=config["matching_step_deg"],
        max_shift=config["max_shift"] + 1,
    )
    rounds = config["matching_rounds"]
    found = methods.projection_matching(settings, rounds, config["seed"])
    return {"projection matching": found}


def by_relion(config: dict[str, Any], case: Case) -> dict[str, Method]:
    """Return RELION's programs, where they are installed."""
    del case
    return methods.relion_methods(config)


FAMILIES = {
    "engine": engine,
    "published": published,
    "matching": matching,
    "relion": by_relion,
}
"""What ``methods`` of a configuration may list."""


def main() -> None:
    """Run what is left of the study, then print its table."""
    options = harness.parse(__doc__, PRESETS)
    config = harness.resolve(options, KEYS)
    comparison.run(options, config, cases.init1, FAMILIES)


if __name__ == "__main__":
    sys.exit(harness.main(main))
