"""What some settings of `paper_preset` are worth.

Algorithm 1 is run from the start of Init-1 with `paper_preset`, and with one of these
settings changed at a time:

- volume first: an iteration ends with the poses, as the paper's does, so that the last
  map is not one of the last poses;
- whole Newton steps: first steps ``1 / kappa`` from the first iteration on, where
  `paper_preset` begins with half of that;
- lambda from 4 sigma: it begins at 4 sigma sqrt(w[0]), whatever the initial map is,
  and rho stays as it is;
- lambda constant: it is sigma sqrt(w[0]) all the time, and rho stays as it is, so that
  the threshold lambda / rho rises;
- rho constant: it is 4 w[0] all the time, and the threshold lambda / rho falls;
- a quarter of rho: the threshold is four times as large;
- K_ADMM = 2, K_GD = 8: fewer iterations in a volume update than the 5 of
  `paper_preset` (the paper has 2 or 5), more in a pose update than its 3;
- new multipliers: those of ADMM begin at zero in each volume update;
- kappa of the start: the steps are the same fractions of ``1 / kappa``, with the kappa
  of the initial map, which is blurred;
- volume first and last: volume first, and a volume update after the last iteration.

    python experiments/constants.py configs/constants.toml --volume MAP.mrc

prints a table, and stores it with curves and maps in the run directory.
"""

import dataclasses
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import cases
import comparison
import methods
from comparison import Case, Family, Method
from settings import ComparisonSettings, Init1Start, PaperSettings

from jaxrefine.paper import (
    Algorithm1Config,
    Algorithm1State,
    GivenSteps,
    NewtonSteps,
    Problem,
    Schedule,
)
from jaxrefine.paper.steps import mean_curvatures
from jaxrefine.runs.options import option


def lambda_from(multiple: float, config: Algorithm1Config) -> Algorithm1Config:
    """Return settings whose lambda begins at a multiple of its last value."""
    last = config.lam.last
    return dataclasses.replace(config, lam=Schedule(multiple * last, last))


def rho_of(
    factor: float, config: Algorithm1Config, is_constant: bool = False
) -> Algorithm1Config:
    """Return settings with a multiple of rho, or with one of its first value."""
    first, last = config.rho.first, config.rho.last
    rho = Schedule(factor * first, factor * (first if is_constant else last))
    return dataclasses.replace(config, rho=rho)


CHANGES: dict[str, Callable[[Algorithm1Config], Algorithm1Config]] = {
    "volume first": partial(dataclasses.replace, poses_first=False),
    "whole Newton steps": partial(
        dataclasses.replace, steps=NewtonSteps(Schedule(1.0))
    ),
    "lambda from 4 sigma": partial(lambda_from, 4.0),
    "lambda constant": partial(lambda_from, 1.0),
    "rho constant": partial(rho_of, 0.25, is_constant=True),
    "a quarter of rho": partial(rho_of, 0.25),
    "K_ADMM = 2": partial(dataclasses.replace, admm_iterations=2),
    "K_GD = 8": partial(dataclasses.replace, pose_iterations=8),
    "new multipliers": partial(dataclasses.replace, keep_duals=False),
}
"""The settings with one of them changed."""


def changed(settings: "ConstantsSettings", case: Case) -> dict[str, Method]:
    """Return the paper's algorithm with one setting changed at a time."""
    del case
    made = methods.preset_of(settings)

    def preset(change, problem: Problem, start: Algorithm1State) -> Algorithm1Config:
        return change(made(problem, start))

    def kappa_of_the_start(
        problem: Problem, start: Algorithm1State
    ) -> Algorithm1Config:
        curvatures = mean_curvatures(problem, start)
        steps = GivenSteps(*(Schedule(0.5 / each, 1.0 / each) for each in curvatures))
        return dataclasses.replace(made(problem, start), steps=steps)

    presets: dict[str, methods.Preset] = {
        **{name: partial(preset, change) for name, change in CHANGES.items()},
        "kappa of the start": kappa_of_the_start,
    }
    found = {name: methods.spatial_refinement(each) for name, each in presets.items()}
    closed = methods.spatial_refinement(presets["volume first"], closing_update=True)
    return {**found, "volume first and last": closed}


FAMILIES: dict[str, Family] = {"paper": methods.paper_algorithm, "changed": changed}
"""What ``methods`` of the settings may list."""


@dataclass(frozen=True, kw_only=True)
class ConstantsSettings(ComparisonSettings, Init1Start, PaperSettings):
    """The settings of the study."""

    methods: tuple[str, ...] = option(
        choices=tuple(FAMILIES),
        help="what to compare: the paper's algorithm, and with one setting changed",
    )


def main() -> int:
    """Run what is left of the study, and print its table."""
    return comparison.main(__doc__, ConstantsSettings, cases.INIT1, FAMILIES)


if __name__ == "__main__":
    sys.exit(main())
