"""Cost: section III-D measured, seconds of a pose update against the images' side.

One update of the poses of simulated particles near the truth, with a map at hand:

- projection matching: the best pose of a grid, all frequencies below Nyquist, with one
  angular step for all sides, and with steps as ``1 / n``, as section III-D counts them,
  which are the same at the largest side;
- Theorem 1, in space: the cost (34), the cost with its gradient, and Algorithm 3, that
  is ``K_GD = 3`` gradient steps on angles and shifts with their line searches;
- slices: the cost with its gradient, and the engine's visit of a particle that it does
  not search for: at most three steps of Levenberg and Marquardt, and the weighing.

The times include what is computed once for the map or for each image, except the map's
autocorrelation and spectrum where a cost alone is timed. The normal operator of the
volume update is timed as well; its time does not depend on the number of particles.

    python experiments/cost.py configs/cost.toml --preset cpu

Each time is the median of several rounds in which the functions take turns, without the
first round, which compiles. ``metrics.json`` also holds the exponents ``k`` of ``n**k``
that fit the times best. ``plot_cost.py`` draws it.
"""

import math
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import equinox as eqx
import harness
import jax
import jax.numpy as jnp
import numpy as np
from harness import Study
from settings import StudySettings, matching_step

from jaxrefine import io, simulate
from jaxrefine._batching import map_over_particles
from jaxrefine.data import observation
from jaxrefine.data.particles import Particles
from jaxrefine.data.visit import visit
from jaxrefine.errors import InputError
from jaxrefine.operators import kbwf, normal, slices, spatial
from jaxrefine.operators.gridding import Gridding
from jaxrefine.paper import algorithm3
from jaxrefine.poses import likelihood, update
from jaxrefine.poses.hypotheses import certain
from jaxrefine.poses.matching import MatchConfig, match
from jaxrefine.poses.prior import priors_about
from jaxrefine.refinement import pose_step
from jaxrefine.refinement.config import RefineConfig
from jaxrefine.runs.options import option
from jaxrefine.runs.provenance import available_cores


@dataclass(frozen=True, kw_only=True)
class CostSettings(StudySettings):
    """The settings of the study."""

    sizes: tuple[int, ...] = option(
        unit="pixels", least=16, help="sides of the images, two or more"
    )
    repetitions: int = option(
        least=1, help="timed calls of each function, after one that is not"
    )
    matching_step_in_degrees: float = matching_step()

    def __post_init__(self):
        if len(set(self.sizes)) < 2:
            raise InputError(
                f"sizes must hold at least 2 different sizes, got {list(self.sizes)}"
            )


NORMAL_OPERATOR = "normal operator"
"""The one function whose time is not divided by the number of particles."""

_ANGLE_ERROR = 0.1  # radians: every method can improve on such poses
_FIRST_STEPS = 2e-4, 2e-3  # the released code's, of angles and shifts
_BATCH = 8  # particles at once in space, where memory grows with the cube of the side

Calls = dict[str, Callable[[], Any]]
"""What is timed, by name."""


def prepare(size: int, settings: CostSettings) -> tuple[Calls, Callable[[], float]]:
    """Simulate particles; return what is timed, and what counts line-search trials."""
    map_key, data_key = jax.random.split(jax.random.key(settings.seed))
    truth = simulate.phantom(map_key, size)
    dataset = simulate.make_dataset(
        data_key,
        truth,
        settings.particles,
        max_shift=settings.max_shift,
        max_angle_error=_ANGLE_ERROR,
        snr_db=settings.snr_db,
    )
    images, poses = dataset.images, dataset.initial
    euler_poses = algorithm3.EulerPoses.of(poses)
    last = (size - 1) // 2

    basis = kbwf.KBWF()
    footprint = spatial.footprint(basis)
    image_filter = spatial.spline_filter(footprint, size)
    coefficients = kbwf.expand(basis, truth)
    support = spatial.Support.ball(size)
    terms = algorithm3.map_terms(footprint, coefficients, support)
    transfer = normal.transfer(normal.kernel(footprint, poses.rotations, size))

    def in_space(function):
        @eqx.filter_jit
        def evaluate(terms, images, poses):
            def of_particle(image_and_pose):
                image, pose = image_and_pose
                return function(terms, algorithm3.particle(image_filter, image), pose)

            return map_over_particles(of_particle, (images, poses), _BATCH)

        return lambda: evaluate(terms, images, euler_poses)

    steps = algorithm3.PoseConfig(*_FIRST_STEPS)

    def descend():
        return algorithm3.run(
            euler_poses, images, coefficients, footprint, image_filter, support, steps
        )

    particles = Particles(np.asarray(images))
    everyone = np.arange(len(particles))
    noise = jnp.full(size // 2 + 1, (dataset.sigma * size) ** 2, truth.dtype)
    view = observation.view(particles, last, noise)
    spectrum = Gridding().spectrum(truth, last)

    @eqx.filter_jit
    def slice_gradients(spectrum, view, images, poses):
        def of_particle(image_spectrum, rotation, shift):
            return likelihood.cost_and_gradient(
                spectrum, view.observation(image_spectrum, None), rotation, shift
            )

        image_spectra = view.spectra(images, None)
        return jax.vmap(of_particle)(image_spectra, poses.rotations, poses.shifts)

    def polish():
        config = RefineConfig()
        coarse = slices.bucket(config.search_r_max, size)
        reference = update.Reference(
            config.search_interpolation.spectrum(truth, coarse),
            config.interpolation.spectrum(truth, last),
            observation.view(particles, last, noise, observation.PART),
        )
        steps = pose_step.visit_steps(
            config,
            size,
            coarse,
            last,
            is_wide=False,
            compared=True,
            key=jax.random.key(0),
        )
        known = update.Known(
            everyone.astype(np.int32),
            priors_about(poses, 1.0, 10.0, np.pi, 10.0),
            certain(poses, config.hypotheses),
            np.zeros(len(particles), bool),
        )
        common = (steps, reference)
        return visit(
            update.update_block, common, particles, everyone, known, len(particles)
        )

    finest = settings.matching_step_in_degrees
    same, scaled = (
        MatchConfig(
            angle_step=math.radians(step), max_shift=settings.max_shift, r_max=last
        )
        for step in (finest, finest * max(settings.sizes) / size)
    )
    apply = jax.jit(normal.apply_normal)
    calls = {
        "projection matching": lambda: match(particles, truth, same).poses,
        "projection matching, steps as 1/n": lambda: (
            match(particles, truth, scaled).poses
        ),
        "spatial, cost": in_space(algorithm3.particle_cost),
        "spatial, cost and gradient": in_space(algorithm3.particle_cost_and_gradient),
        "spatial, Algorithm 3": descend,
        "slices, cost and gradient": lambda: slice_gradients(
            spectrum, view, images, poses
        ),
        "slices, visit": polish,
        NORMAL_OPERATOR: lambda: apply(transfer, coefficients),
    }

    def trials() -> float:
        info = descend()[1]
        return float(jnp.mean(info.angle_trials + info.shift_trials)) / 2

    return calls, trials


def measure(
    calls: Calls, repetitions: int, clock: Callable[[], float] = time.perf_counter
) -> tuple[dict[str, float], dict[str, float]]:
    """Return the median time of each call, and how much longer the first one took.

    Parameters
    ----------
    calls
        What is timed, by name.
    repetitions
        Rounds that count, in which the calls take turns.
    clock
        Tells the time, in seconds.
    """

    def seconds(call: Callable[[], Any]) -> float:
        begin = clock()
        jax.block_until_ready(call())
        return clock() - begin

    first, *rounds = (
        {name: seconds(call) for name, call in calls.items()}
        for _ in range(repetitions + 1)
    )
    typical = {name: median(times[name] for times in rounds) for name in calls}
    return typical, {name: first[name] - typical[name] for name in calls}


def point(size: int, settings: CostSettings) -> dict[str, Any]:
    """Measure at one side of the images."""
    calls, trials = prepare(size, settings)
    typical, compilation = measure(calls, settings.repetitions)
    operator = typical.pop(NORMAL_OPERATOR)
    count = settings.particles
    return {
        "size": size,
        "seconds_per_particle": {name: t / count for name, t in typical.items()},
        "normal_operator_s": operator,
        "compilation_s": compilation,
        "line_search_trials": trials(),
    }


def exponents(points: list[dict[str, Any]]) -> dict[str, float]:
    """Return the slopes of the lines that fit log time against log side best."""
    sizes = np.log([point["size"] for point in points])
    times = {
        name: [point["seconds_per_particle"][name] for point in points]
        for name in points[0]["seconds_per_particle"]
    }
    times[NORMAL_OPERATOR] = [point["normal_operator_s"] for point in points]
    return {
        name: float(np.polyfit(sizes, np.log(values), 1)[0])
        for name, values in times.items()
    }


def table(results: dict[str, Any]) -> str:
    """Return the times as a Markdown table, in milliseconds."""
    points, slopes = results["points"], results["exponents"]
    head = " | ".join(f"n = {point['size']}" for point in points)
    rows = [
        f"| ms per particle | {head} | exponent |",
        "|---|" + "---|" * (len(points) + 1),
    ]
    for name in points[0]["seconds_per_particle"]:
        times = [1e3 * point["seconds_per_particle"][name] for point in points]
        cells = " | ".join(f"{value:.3g}" for value in times)
        rows.append(f"| {name} | {cells} | {slopes[name]:.1f} |")
    cells = " | ".join(f"{1e3 * p['normal_operator_s']:.3g}" for p in points)
    rows.append(
        f"| {NORMAL_OPERATOR}, ms in all | {cells} | {slopes[NORMAL_OPERATOR]:.1f} |"
    )
    return "\n".join(rows)


Measure = Callable[[int, CostSettings], dict[str, Any]]
"""Measures at one side of the images, as `point` does."""


def run(study: Study[CostSettings], measure_at: Measure = point) -> None:
    """Measure at the sides that are left, and print the table."""
    settings = study.settings
    with study.open() as folder:
        out = folder.path
        if not folder.finished:
            points = harness.read_metrics(out).get("points", [])
            for size in sorted(settings.sizes)[len(points) :]:
                points.append(measure_at(size, settings))
                harness.add_provenance(out)
                io.write_json(out / "metrics.json", _results(points))
            results = _results(points) | {"exponents": exponents(points)}
            io.write_json(out / "metrics.json", results)
            (out / "table.md").write_text(table(results) + "\n", encoding="utf-8")
            harness.finish(folder)
    print(table(harness.read_metrics(out)))
    print(f"results are in {out}")


def _results(points: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return what ``metrics.json`` holds."""
    device, threads = jax.devices()[0].device_kind, available_cores()
    return {"device": device, "threads": threads, "points": points}


def main() -> int:
    """Measure at the sides that are left, and print the table."""
    return harness.main(lambda: run(harness.parse(__doc__, CostSettings)))


if __name__ == "__main__":
    sys.exit(main())
