"""Ablation: from the paper's algorithm to the engine, one step at a time.

Every method begins with the poses and the map of Init-1:

- joint (paper): Algorithm 1 with `paper_preset`;
- on slices: the same alternation with the engine's operators: projections are slices of
  the map's spectrum, and images are inserted there. Poses take the steps of Algorithm
  3, down the gradient by the angles, then by the shift, each with a line search, three
  times (``K_GD``); angles move by a rotation vector. The weight of TV, now of voxels
  and not of coefficients, falls as in `paper_preset`, to sigma sqrt(w[0]) with the w of
  these operators. Images are compared with one map, made of all of them, up to the last
  shell. The support is the cube, volume updates have fewer conjugate gradients, and the
  initial map is scaled to the images;
- + Levenberg-Marquardt: steps of second order in their place;
- + multi-start: the engine's search, of its prior in iterations 0 and 2, and about the
  poses so far in iteration 1 and, for undecided particles, later. The best few poses of
  a particle are followed and weighted. The search needs a prior, and poses have the
  engine's; above, they have none;
- + cross-validated tau: TV's weight in the last map is the one that predicts best;
- + folds: a particle is compared with a map that is not made from it;
- joint: the engine. It also begins at low frequencies, measures the noise and the
  weight of each shell, has one weight of TV in all iterations but the last map's, twice
  as many ADMM iterations, and ends by itself.

From "on slices" to "+ folds" each has one thing more than the one before, and the last
map is made of the final poses in the same number of ADMM iterations.

    python experiments/ablation.py configs/ablation.toml --preset small --volume MAP.mrc

prints a table, and stores it with curves and maps in the run directory.
``plot_ablation.py`` draws it.
"""

import dataclasses
import sys
from dataclasses import dataclass
from typing import final

import cases
import comparison
import equinox as eqx
import init1
import jax
import jax.numpy as jnp
import methods
import numpy as np
from comparison import Case, Family, Method, Outcome, Record
from jaxtyping import Array, Float
from settings import ComparisonSettings, Init1Start, PaperSettings

from jaxrefine.maps import admm, folds
from jaxrefine.maps.folds import Folds
from jaxrefine.maps.noise import white_noise
from jaxrefine.maps.sums import Sums
from jaxrefine.operators import slices
from jaxrefine.paper import NewtonSteps, Schedule, paper_preset
from jaxrefine.paper.algorithm3 import backtrack
from jaxrefine.poses.prior import priors_about
from jaxrefine.poses.solvers import (
    Constraint,
    Estimate,
    LevenbergMarquardt,
    Objective,
    PoseUpdate,
    retract,
)
from jaxrefine.refinement import insertion, map_step, pose_step
from jaxrefine.refinement.config import RefineConfig
from jaxrefine.refinement.sets import ParticleSet, make_particle_set
from jaxrefine.refinement.state import SetState
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

    angle_step: Float[Array, ""] = eqx.field(converter=jnp.asarray)
    shift_step: Float[Array, ""] = eqx.field(converter=jnp.asarray)
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
            evaluations = jnp.zeros((), jnp.int32)
            for chosen, first_step in searches:
                rotation, shift = pose

                def move(step, rotation=rotation, shift=shift):
                    return constraint(*retract(rotation, shift, step))

                cost, gradient, _ = objective(rotation, shift)
                step, _, trials = backtrack(
                    lambda step, move=move: objective(*move(step))[0],
                    jnp.zeros(5, dtype),
                    cost,
                    chosen * gradient,
                    first_step.astype(dtype),
                    jnp.asarray(self.eta, dtype),
                    self.max_trials,
                )
                pose, evaluations = move(step), evaluations + 1 + trials
            return pose, evaluations

        start = constraint(rotation, shift)
        pose, evaluations = jax.lax.scan(descend, start, None, self.iterations)
        cost, _, information = objective(*pose)
        total = (jnp.sum(evaluations) + 1).astype(jnp.int32)
        return Estimate(*pose, cost, information, total)


def newton_descent(
    information: Float[Array, "particles 5 5"], fraction: Float[Array, ""]
) -> PaperDescent:
    """Return the descent whose first steps are a fraction of Newton's.

    As `jaxrefine.paper.NewtonSteps`: one for all angles and one for both shifts, with
    the mean over the particles of the information on their poses.
    """
    diagonal = jnp.diagonal(information, axis1=1, axis2=2)
    fraction = fraction.astype(diagonal.dtype)
    return PaperDescent(
        fraction / diagonal[:, :3].mean(), fraction / diagonal[:, 3:].mean()
    )


@dataclass(frozen=True)
class Rung:
    """What is between the paper's algorithm and the engine.

    Attributes
    ----------
    update
        How poses are improved; None for the steps of the paper's algorithm.
    multi_start
        Whether poses are searched for, in the iterations in which the engine does.
    cross_validation
        Whether the last map's ``tau`` is chosen by cross-validation.
    folds
        Whether a particle is compared with a map that is not made from it.
    """

    update: PoseUpdate | None = None
    multi_start: bool = False
    cross_validation: bool = False
    folds: bool = False


RUNGS = {
    "on slices": Rung(),
    "+ Levenberg-Marquardt": Rung(LevenbergMarquardt()),
    "+ multi-start": Rung(LevenbergMarquardt(), True),
    "+ cross-validated tau": Rung(LevenbergMarquardt(), True, True),
    "+ folds": Rung(LevenbergMarquardt(), True, True, True),
}
"""Each with one thing more than the one before."""

_FLAT = 1e3  # standard deviation of an uninformative prior: radians or pixels


def climb(rung: Rung, iterations: int, seed: int) -> Method:
    """Return the alternation of pose and volume updates that a rung describes."""

    def run(case: Case, record: Record) -> Outcome:
        problem, start = methods.spatial_problem(case)
        paper = paper_preset(problem, start, iterations=iterations)
        config = RefineConfig(admm_iterations=paper.admm_iterations)
        if not rung.multi_start:
            config = dataclasses.replace(config, multi_start=())
        dealing, key = jax.random.split(jax.random.key(seed))
        particles = particle_set_of(case, config, dealing, rung.multi_start)
        last = slices.bucket(particles.last_shell, len(case.truth))
        everyone = np.ones(len(particles), bool)
        # The weight of TV in units of sigma sqrt(w[0]), as `maps.sums.solve` has it.
        weight = Schedule(paper.lam.first / paper.lam.last, 1.0)

        def update_poses(state: SetState, iteration: int) -> SetState:
            at = iteration, last, jax.random.fold_in(key, iteration)
            maps = pose_step.reference_maps(particles, state)

            def by(update: PoseUpdate) -> SetState:
                chosen = dataclasses.replace(config, update=update)
                moved = dataclasses.replace(particles, config=chosen)
                return pose_step.update_poses(moved, state, maps, *at)[0]

            if rung.update is not None:
                return by(rung.update)
            still = by(LevenbergMarquardt(0))
            assert isinstance(paper.steps, NewtonSteps)
            fraction = paper.steps.fraction(jnp.asarray(iteration), iterations)
            return by(newton_descent(still.information, fraction))

        def sum_up(state: SetState) -> list[Sums]:
            return insertion.sum_up(particles, state.hypotheses, state.noise, everyone)

        state = record.resume(white_start(particles, case, white_noise(problem.images)))
        record.expect(iterations)
        for iteration in range(len(record.rows), iterations):
            state = update_poses(state, iteration)
            tau = weight(jnp.asarray(iteration), iterations).astype(state.tau.dtype)
            state = eqx.tree_at(lambda s: s.tau, state, tau)
            data = compared_with(sum_up(state), rung.folds)
            state = map_step.update_maps(particles, state, data)
            record.add(state.mean_map, state.hypotheses.best(), state)
        sums = sum_up(state)
        if rung.cross_validation:
            state = cross_validated(particles, state, sums)
        final = map_step.final_map(config, sums, state)
        return Outcome(np.asarray(final.volume), state.hypotheses.best())

    return run


def compared_with(sums: list[Sums], apart: bool) -> Folds:
    """Return what the maps are made from that the particles of each fold meet.

    The images of the other fold, or, where the folds are not kept apart, all images.
    """
    return folds.folds(sums if apart else [sums[0] + sums[1]] * 2)


def cross_validated(
    particles: ParticleSet, state: SetState, sums: list[Sums]
) -> SetState:
    """Choose ``tau``, beginning with maps that know nothing of the other fold's images.

    A map that was made of all images holds what is to be predicted.
    """
    empty = tuple(admm.init(jnp.zeros_like(each.coefficients)) for each in state.maps)
    state = eqx.tree_at(lambda s: s.maps, state, empty)
    for _ in range(particles.config.tuning.final_rounds):
        state = map_step.update_maps(particles, state, folds.folds(sums))
    return map_step.choose_tau(particles, state, sums)[0]


def particle_set_of(
    case: Case, config: RefineConfig, key: jax.Array, has_prior: bool
) -> ParticleSet:
    """Return the particles of a case, with the engine's prior or without one."""
    poses = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), case.dataset.initial)
    particles = make_particle_set(methods.particles_of(case), poses, key, config)
    if has_prior:
        return particles
    prior = priors_about(poses, _FLAT, _FLAT, config.max_angle, _FLAT)
    return dataclasses.replace(particles, prior=prior)


def white_start(particles: ParticleSet, case: Case, sigma: float) -> SetState:
    """Return the initial poses and map, and white noise of a standard deviation."""
    state = map_step.start(particles, case.initial_map.astype(jnp.float32))
    power = (sigma * particles.particles.image_size) ** 2
    return eqx.tree_at(lambda s: s.noise, state, jnp.full_like(state.noise, power))


def between(settings: "AblationSettings", case: Case) -> dict[str, Method]:
    """Return what is between the paper's algorithm and the engine."""
    del case
    iterations, seed = settings.paper_iterations, settings.seed
    return {name: climb(rung, iterations, seed) for name, rung in RUNGS.items()}


FAMILIES: dict[str, Family] = {
    "paper": methods.paper_algorithm,
    "between": between,
    "engine": init1.engine,
}
"""What ``methods`` of the settings may list."""


@dataclass(frozen=True, kw_only=True)
class AblationSettings(ComparisonSettings, Init1Start, PaperSettings):
    """The settings of the study."""

    methods: tuple[str, ...] = option(
        choices=tuple(FAMILIES),
        help="what to compare: the paper's algorithm, the engine, what is between",
    )


def main() -> int:
    """Run what is left of the study, and print its table."""
    return comparison.main(__doc__, AblationSettings, cases.INIT1, FAMILIES)


if __name__ == "__main__":
    sys.exit(main())
