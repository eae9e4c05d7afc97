"""Ablation: what each part of the engine contributes.

From the same start as Init-1, the joint refinement is run in full and without one part:

- no multi-start: the initial poses are polished, and no others are searched for;
- no marching: all frequencies below Nyquist from the first iteration on, in the widest
  search too;
- the paper's descent: Algorithm 3's steps in the place of those of Levenberg and
  Marquardt: down the gradient by the angles, then by the shift, each with a line search
  by factors of a quarter, three times (``K_GD``); the cost is the engine's, and the
  first steps are those of the first iteration of the authors' released code, since the
  paper's own are in units that it does not tell;
- scaled descent: three steps down the gradient, scaled by the curvature of each
  coordinate, without a line search;
- one hypothesis: the best candidate of each search alone is followed;
- no SNR weighting: poses are compared with the maps as they are. (The engine weights
  each shell of a map by how well the images of the other fold agree with it, and has no
  switch for that; the measured weights are replaced by 1.)

    python experiments/ablation.py configs/ablation.toml --preset small --volume MAP.mrc

prints a table, and stores it with curves and maps in the run directory.
``plot_ablation.py`` draws it.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import final
from unittest.mock import patch

import cases
import comparison
import equinox as eqx
import init1
import jax
import jax.numpy as jnp
import methods
import optax
from comparison import Case, Family, Method, Outcome, Record
from jaxtyping import Array, Float
from settings import ComparisonSettings, Init1Start

from jaxrefine.maps.noise import ShellSums
from jaxrefine.paper.algorithm3 import backtrack
from jaxrefine.paper.presets import released_preset
from jaxrefine.poses.solvers import Constraint, Descent, Estimate, Objective, retract
from jaxrefine.refinement.config import RefineConfig
from jaxrefine.runs.options import option


@final
class PaperDescent(eqx.Module):
    """A pose update with the steps of Algorithm 3, on whatever cost it is given.

    The angles move by a rotation vector, so that there is no chart to leave.

    Parameters
    ----------
    angle_step, shift_step
        First trial steps of every line search, in inverse units of the cost.
    eta
        Factor by which a rejected step shrinks.
    iterations
        Steps of the angles and of the shift, ``K_GD``.
    max_trials
        Steps tried in one line search.
    """

    angle_step: float = eqx.field(static=True)
    shift_step: float = eqx.field(static=True)
    eta: float = eqx.field(static=True, default=0.25)
    iterations: int = eqx.field(static=True, default=3)
    max_trials: int = eqx.field(static=True, default=10)

    def minimise(
        self,
        objective: Objective,
        rotation: Float[Array, "3 3"],
        shift: Float[Array, "2"],
        constraint: Constraint,
    ) -> Estimate:
        """Improve one pose."""
        dtype = rotation.dtype
        searches = (
            (jnp.array([1, 1, 1, 0, 0], dtype), self.angle_step),
            (jnp.array([0, 0, 0, 1, 1], dtype), self.shift_step),
        )

        def descend(pose, _):
            lower = jnp.zeros((), bool)
            for chosen, first_step in searches:
                rotation, shift = pose

                def move(step, rotation=rotation, shift=shift):
                    return constraint(*retract(rotation, shift, step))

                cost, gradient, _ = objective(rotation, shift)
                step, value, _ = backtrack(
                    lambda step, move=move: objective(*move(step))[0],
                    jnp.zeros(5, dtype),
                    cost,
                    chosen * gradient,
                    jnp.asarray(first_step, dtype),
                    jnp.asarray(self.eta, dtype),
                    self.max_trials,
                )
                pose, lower = move(step), lower | (value < cost)
            return pose, lower

        start = constraint(rotation, shift)
        pose, accepted = jax.lax.scan(descend, start, None, self.iterations)
        cost, _, information = objective(*pose)
        undamped = jnp.zeros(self.iterations, dtype)
        return Estimate(*pose, cost, information, undamped, accepted)


def paper_descent(sigma: float) -> PaperDescent:
    """Return the descent with the first steps of the released code's first iteration.

    In units of the engine's cost, which is the paper's over the variance of the noise
    where that is white, but for frequencies beyond the band limit and the prior.
    """
    released = released_preset()
    angle_step, shift_step = released.angle_step.first, released.shift_step.first
    return PaperDescent(float(angle_step) * sigma**2, float(shift_step) * sigma**2)


REDUCED: dict[str, Callable[[int, float], RefineConfig]] = {
    "no multi-start": lambda size, sigma: RefineConfig(multi_start=()),
    "no marching": lambda size, sigma: RefineConfig(first_r_max=(size - 1) // 2),
    "the paper's descent": lambda size, sigma: RefineConfig(
        update=paper_descent(sigma)
    ),
    "scaled descent": lambda size, sigma: RefineConfig(
        update=Descent(optax.sgd(0.5), 3)
    ),
    "one hypothesis": lambda size, sigma: RefineConfig(hypotheses=1),
}
"""The engine with one parameter changed, for images of a side and noise."""


def reduced(name: str) -> Family:
    """Return the joint refinement with one parameter changed, see `REDUCED`."""

    def family(settings: Init1Start, case: Case) -> dict[str, Method]:
        config = REDUCED[name](len(case.truth), float(case.dataset.sigma))
        return {name: methods.refinement(config, settings.seed)}

    return family


def unweighted(method: Method) -> Method:
    """Return a refinement for which every shell of a map has the weight 1."""
    ones = property(lambda sums: jnp.ones_like(sums.model))

    def run(case: Case, record: Record) -> Outcome:
        # What was compiled before has the weights in it, and what is now has not.
        jax.clear_caches()
        with patch.object(ShellSums, "gain", ones):
            outcome = method(case, record)
        jax.clear_caches()
        return outcome

    return run


def without_weights(settings: Init1Start, case: Case) -> dict[str, Method]:
    """Return the joint refinement without SNR weighting."""
    del case
    full = methods.refinement(RefineConfig(), settings.seed)
    return {"no SNR weighting": unweighted(full)}


FAMILIES: dict[str, Family] = {
    "engine": init1.engine,
    **{name: reduced(name) for name in REDUCED},
    "no SNR weighting": without_weights,
}
"""What ``methods`` of the settings may list."""


@dataclass(frozen=True, kw_only=True)
class AblationSettings(ComparisonSettings, Init1Start):
    """The settings of the study."""

    methods: tuple[str, ...] = option(
        choices=tuple(FAMILIES),
        help="what to compare: the engine in full, and without each of its parts",
    )


def main() -> int:
    """Run what is left of the study, and print its table."""
    return comparison.main(__doc__, AblationSettings, cases.INIT1, FAMILIES)


if __name__ == "__main__":
    sys.exit(main())
