"""Ablation: what each part of the engine is good for.

From the same start as Init-1, the joint refinement is run as it is and less one part:

- no multi-start: the initial poses are polished, and no others are searched for;
- no marching: all frequencies below Nyquist from the first iteration on, in the widest
  search too;
- gradient descent: three steps on the poses (the paper's ``K_GD``) in the place of
  three of Levenberg and Marquardt, scaled by the curvature of each coordinate;
- one hypothesis: the best candidate of each search alone is followed;
- no SNR weighting: poses are compared with the maps as they are, whose shells are
  otherwise weighted by how far the other fold's images bear them out. The engine has no
  switch for that; the measured weights are replaced by 1.

    python experiments/ablation.py configs/ablation.toml --preset small --volume MAP.mrc

prints a table, and stores it with curves and maps in the run directory.
``plot_ablation.py`` draws it.
"""

import sys
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import cases
import comparison
import harness
import init1
import jax
import jax.numpy as jnp
import methods
import optax
from comparison import Case, Method, Outcome, Record

from jaxrefine import crossfit
from jaxrefine.refine import RefineConfig
from jaxrefine.tangent import Descent

PRESETS = ("smoke", "small", "cpu", "paper")

KEYS = (*cases.KEYS, "methods")
"""What the configuration must say."""


def reduced(size: int) -> dict[str, RefineConfig]:
    """Return the engine's parameters less one part, for images of a side."""
    full = RefineConfig()
    return {
        "no multi-start": replace(full, multi_start=()),
        "no marching": replace(full, first_r_max=(size - 1) // 2),
        "gradient descent": replace(full, update=Descent(optax.sgd(0.5), 3)),
        "one hypothesis": replace(full, hypotheses=1),
    }


def without(config: dict[str, Any], case: Case) -> dict[str, Method]:
    """Return the joint refinement less one part."""
    seed = config["seed"]
    chosen = {
        name: methods.refinement(settings, seed)
        for name, settings in reduced(len(case.truth)).items()
    }
    full = methods.refinement(RefineConfig(), seed)
    return {**chosen, "no SNR weighting": unweighted(full)}


def unweighted(method: Method) -> Method:
    """Return a refinement for which every shell of a map has the weight 1."""
    ones = property(lambda sums: jnp.ones_like(sums.model))

    def run(case: Case, record: Record) -> Outcome:
        # What was compiled before has the weights in it, and what is now has not.
        jax.clear_caches()
        with patch.object(crossfit.ShellSums, "gain", ones):
            outcome = method(case, record)
        jax.clear_caches()
        return outcome

    return run


FAMILIES = {"engine": init1.engine, "without": without}
"""What ``methods`` of a configuration may list."""


def main() -> None:
    """Run what is left of the study, then print its table."""
    options = harness.parse(__doc__, PRESETS)
    config = harness.resolve(options, KEYS)
    comparison.run(options, config, cases.init1, FAMILIES)


if __name__ == "__main__":
    sys.exit(harness.main(main))
