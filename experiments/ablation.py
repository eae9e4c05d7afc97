"""Ablation: what each part of the engine is good for.

From the same start as Init-1, the joint refinement is run as it is and less one part:

- no multi-start: the initial poses are polished, and no others are searched for;
- no marching: all frequencies below Nyquist from the first iteration on, in the widest
  search too;
- the paper's descent: Algorithm 3's steps in the place of those of Levenberg and
  Marquardt: down the gradient by the angles, then by the shift, each with a line search
  by factors of a quarter, three times (``K_GD``); the cost is the engine's, and the
  first steps are those of the first iteration of the authors' released code, since the
  paper's own hardly move a pose in any units that we know of;
- scaled descent: three steps down the gradient, scaled by the curvature of each
  coordinate, without a line search;
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
from typing import Any, final
from unittest.mock import patch

import cases
import comparison
import equinox as eqx
import harness
import init1
import jax
import jax.numpy as jnp
import methods
import optax
from comparison import Case, Method, Outcome, Record
from jaxtyping import Array, Float

from jaxrefine.maps.noise import ShellSums
from jaxrefine.paper.algorithm3 import backtrack
from jaxrefine.paper.presets import released_preset
from jaxrefine.poses.solvers import Constraint, Descent, Estimate, Objective, retract
from jaxrefine.refinement.config import RefineConfig

PRESETS = ("smoke", "small", "cpu", "paper")

KEYS = (*cases.KEYS, "methods")
"""What the configuration must say."""


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
        parts = (
            (jnp.array([1, 1, 1, 0, 0], dtype), self.angle_step),
            (jnp.array([0, 0, 0, 1, 1], dtype), self.shift_step),
        )

        def descend(pose, _):
            lower = jnp.zeros((), bool)
            for part, first in parts:
                rotation, shift = pose

                def move(step, rotation=rotation, shift=shift):
                    return constraint(*retract(rotation, shift, step))

                cost, gradient, _ = objective(rotation, shift)
                step, value, _ = backtrack(
                    lambda step, move=move: objective(*move(step))[0],
                    jnp.zeros(5, dtype),
                    cost,
                    part * gradient,
                    jnp.asarray(first, dtype),
                    jnp.asarray(self.eta, dtype),
                    self.max_trials,
                )
                pose, lower = move(step), lower | (value < cost)
            return pose, lower

        start = constraint(rotation, shift)
        pose, accepted = jax.lax.scan(descend, start, None, self.iterations)
        (rotation, shift), none = pose, jnp.zeros(self.iterations, dtype)
        cost, _, information = objective(rotation, shift)
        return Estimate(rotation, shift, cost, information, none, accepted)


def paper_descent(sigma: float) -> PaperDescent:
    """Return the descent with the first steps of the released code's first iteration.

    In units of the engine's cost, which is the paper's over the variance of the noise
    where that is white, but for frequencies beyond the band limit and the prior.
    """
    released = released_preset()
    angle_step, shift_step = released.angle_step.first, released.shift_step.first
    return PaperDescent(float(angle_step) * sigma**2, float(shift_step) * sigma**2)


def reduced(size: int, sigma: float) -> dict[str, RefineConfig]:
    """Return the engine's parameters less one part, for images of a side and noise."""
    full = RefineConfig()
    return {
        "no multi-start": replace(full, multi_start=()),
        "no marching": replace(full, first_r_max=(size - 1) // 2),
        "the paper's descent": replace(full, update=paper_descent(sigma)),
        "scaled descent": replace(full, update=Descent(optax.sgd(0.5), 3)),
        "one hypothesis": replace(full, hypotheses=1),
    }


def without(config: dict[str, Any], case: Case) -> dict[str, Method]:
    """Return the joint refinement less one part."""
    seed, sigma = config["seed"], float(case.dataset.sigma)
    chosen = {
        name: methods.refinement(settings, seed)
        for name, settings in reduced(len(case.truth), sigma).items()
    }
    full = methods.refinement(RefineConfig(), seed)
    return {**chosen, "no SNR weighting": unweighted(full)}


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


FAMILIES = {"engine": init1.engine, "without": without}
"""What ``methods`` of a configuration may list."""


def main() -> None:
    """Run what is left of the study, then print its table."""
    options = harness.parse(__doc__, PRESETS)
    config = harness.resolve(options, KEYS)
    comparison.run(options, config, cases.init1, FAMILIES)


if __name__ == "__main__":
    sys.exit(harness.main(main))
