"""Sweeps: joint refinement as one condition changes and all others stay.

The noise, the number of particles or the error of the initial angles takes the values
that the configuration lists. At each of them the same particles are reconstructed from
the true poses (oracle), from the initial ones (unrefined), jointly, and from the poses
that are found in the true map at the known noise (true map); the Cramer-Rao bound on
the poses goes with these. The first three are also done by the paper's algorithm.
Times include compilation, most of it at the first point.

    python experiments/sweeps.py configs/sweeps.toml --preset small --volume MAP.mrc
    python experiments/sweeps.py configs/sweeps.toml --set axis="'particles'"

Every point is a run of `comparison` in ``points/AXIS=VALUE``; ``metrics.json`` gathers
what ``plot_sweeps.py`` draws.
"""

import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import cases
import comparison
import harness
import jax
import jax.numpy as jnp
import methods
import numpy as np
from comparison import Case, Method, Outcome, Record
from harness import Study
from jaxtyping import Float
from methods import initial_poses, true_poses
from settings import Init1Start, PaperSettings

from jaxrefine import evaluation, io
from jaxrefine.data import observation
from jaxrefine.errors import InputError
from jaxrefine.geometry import Poses
from jaxrefine.operators.gridding import Gridding
from jaxrefine.poses.polish import Polished, polish_poses
from jaxrefine.poses.prior import priors_about
from jaxrefine.poses.solvers import LevenbergMarquardt, PoseUpdate
from jaxrefine.refinement.config import RefineConfig
from jaxrefine.refinement.reconstruction import reconstruct
from jaxrefine.runs.options import option

AXES = ("snr_db", "particles", "max_angle_error_in_radians")
"""What can be swept; the values of ``AXIS`` are ``AXIS_values``."""


@dataclass(frozen=True, kw_only=True)
class SweepSettings(Init1Start, PaperSettings):
    """The settings of the study; every value of the axis replaces its own."""

    axis: str = option(choices=AXES, help="what is swept")
    snr_db_values: tuple[float, ...] = option(
        unit="decibels", help="signal-to-noise ratios of a sweep of snr_db"
    )
    particles_values: tuple[int, ...] = option(
        least=1, help="numbers of particles of a sweep of particles"
    )
    max_angle_error_in_radians_values: tuple[float, ...] = option(
        unit="radians",
        least=0,
        help="largest errors of a sweep of max_angle_error_in_radians",
    )

    def __post_init__(self):
        if not self.values:
            raise InputError(f"{self.axis}_values must not be empty")

    @property
    def values(self) -> tuple[float, ...]:
        """The values of the axis."""
        return getattr(self, f"{self.axis}_values")

    def at(self, value: float) -> "SweepSettings":
        """Return the settings of one of the points."""
        return replace(self, **{self.axis: value})


FIGURES = (
    "mean_fsc",
    "mean_fsc_aligned",
    "rc",
    "angle_error_in_degrees_median",
    "fraction_within_10_degrees",
    "wall_s",
)
"""What ``metrics.json`` gathers of each method at each point."""

MADE = ("commit", "dirty", "measured_by")
"""What it gathers of the commits that each result is from, where they are known."""

BOUND = (
    "bound_angle_in_degrees_rms",
    "bound_angle_in_degrees_median",
    "bound_shift_in_pixels_rms",
    "bound_shift_in_pixels_median",
)
"""What it gathers of the Cramer-Rao bound."""

_FLAT = 1e3  # standard deviation of an uninformative prior: radians or pixels
_DRAWS = 200  # of every particle's error, for the medians
_BATCH = 256


def family(settings: SweepSettings, case: Case) -> dict[str, Method]:
    """Return what is compared at every point."""
    seed = settings.seed
    # The engine's default is for the errors of up to 0.7 rad of Init-1.
    spread = RefineConfig().angle_spread * settings.max_angle_error_in_radians / 0.7
    config = RefineConfig(angle_spread=spread)
    return {
        "oracle": methods.reconstruction(true_poses, seed),
        "unrefined": methods.reconstruction(initial_poses, seed),
        "joint": methods.refinement(config, seed),
        **methods.paper_algorithm(settings, case),
        "true map": from_true_map(seed),
    }


def from_true_map(seed: int) -> Method:
    """Find the poses in the true map, and make our map of them.

    They are polished from the true poses on. The iteration's row holds the Cramer-Rao
    bound, and the root mean squares of the errors.
    """

    def run(case: Case, record: Record) -> Outcome:
        record.expect(1)
        polished = polish(case, LevenbergMarquardt(6))
        poses = Poses(polished.rotations, polished.shifts)
        key, particles = jax.random.key(seed), methods.particles_of(case)
        volume = reconstruct(particles, poses, key=key).volume
        # No step is made: this is the information at the true poses.
        bound = cramer_rao(np.asarray(polish(case, LevenbergMarquardt(0)).information))
        truth = case.dataset.truth
        errors = evaluation.pose_errors(poses, truth)
        attained = {
            "angle_error_in_degrees_rms": _rms(np.asarray(errors.angle_in_degrees)),
            "shift_error_in_pixels_rms": _rms(np.asarray(errors.shift_in_pixels)),
        }
        record.add(volume, poses, **bound, **attained)
        return Outcome(volume, poses)

    return run


def polish(case: Case, update: PoseUpdate) -> Polished:
    """Take the true poses to their optima in the true map, at the known noise."""
    particles, truth = methods.particles_of(case), case.dataset.truth
    m = particles.image_size
    last = (m - 1) // 2
    poses = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), truth)
    noise = jnp.full(m // 2 + 1, (float(case.dataset.sigma) * m) ** 2, jnp.float32)
    return polish_poses(
        particles,
        np.arange(len(particles)),
        Gridding().spectrum(case.truth.astype(jnp.float32), last),
        observation.view(particles, last, noise),
        priors_about(poses, _FLAT, _FLAT, np.pi, _FLAT),
        np.asarray(poses.rotations),
        np.asarray(poses.shifts),
        update,
        min(_BATCH, len(particles)),
    )


def cramer_rao(information: Float[np.ndarray, "particles 5 5"]) -> dict[str, float]:
    """Return the errors of poses that attain the Cramer-Rao bound.

    Of all particles, the root mean square of the rotation's angle and of the shift's
    length, and their medians, for Gaussian errors.

    Parameters
    ----------
    information
        Fisher information on the rotation vectors (radians) and shifts (pixels).
    """
    covariance = np.linalg.inv(information.astype(float))
    draws = np.random.default_rng(0).standard_normal((_DRAWS, 5))
    errors = np.einsum("pij,dj->pdi", np.linalg.cholesky(covariance), draws)
    bound = {}
    for name, unit, components in (
        ("angle_in_degrees", np.rad2deg(1.0), slice(0, 3)),
        ("shift_in_pixels", 1.0, slice(3, 5)),
    ):
        square = np.einsum("pii->p", covariance[:, components, components])
        length = np.linalg.norm(errors[..., components], axis=-1)
        bound[f"bound_{name}_rms"] = float(unit * np.sqrt(square.mean()))
        bound[f"bound_{name}_median"] = float(unit * np.median(length))
    return bound


def _rms(values: np.ndarray) -> float:
    return float(np.sqrt(np.mean(values**2)))


def sweep(study: Study[SweepSettings]) -> None:
    """Run what is left of a sweep, and print its table."""
    settings = study.settings
    axis, caption = settings.axis, settings.caption(settings.start)
    study = replace(study, config=f"{study.config}_{axis}")
    with study.open() as folder:
        out = folder.path
        folder.keep("start", settings.start)
        if not folder.finished:
            points = []
            for value in settings.values:
                inner = out / "points" / f"{axis}={value:g}"
                point = replace(study, settings=settings.at(value), out=inner)
                comparison.run(point, cases.INIT1, [family])
                harness.add_provenance(out)
                points.append(summary(value, harness.read_metrics(inner)))
                io.write_json(out / "metrics.json", {"axis": axis, "points": points})
            text = table(axis, points, caption)
            (out / "table.md").write_text(text + "\n", encoding="utf-8")
            harness.finish(folder)
    print(table(axis, harness.read_metrics(out)["points"], caption))
    print(f"results are in {out}")


def summary(value: float, results: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Gather what a point's results say, at a value of what is swept."""
    row = results["true map"]["history"][-1]
    return {
        "value": value,
        "methods": {
            name: {key: result[key] for key in (*FIGURES, *MADE) if key in result}
            for name, result in results.items()
        },
        "bound": {figure: row[figure] for figure in BOUND},
    }


def table(axis: str, points: list[dict[str, Any]], caption: str) -> str:
    """Return the points as a Markdown table, with their conditions below."""
    rows = [
        f"| {axis} | method | mean FSC | mean FSC, aligned | r_c (shells) | "
        "angle error, median (deg) | bound (deg) | within 10 deg | wall (s) |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for point in points:
        bound = point["bound"]["bound_angle_in_degrees_median"]
        rows += [
            f"| {point['value']:g} | {name} | {r['mean_fsc']:.3f} "
            f"| {r['mean_fsc_aligned']:.3f} | {r['rc']:.1f} "
            f"| {r['angle_error_in_degrees_median']:.2f} | {bound:.2f} "
            f"| {100 * r['fraction_within_10_degrees']:.1f} % | {r['wall_s']:.0f} |"
            for name, r in point["methods"].items()
        ]
    below = f"{caption} Of these, {axis} varies."
    if axis == "max_angle_error_in_radians":
        below += " The engine is told how large it may be."
    return "\n".join([*rows, "", below])


def main() -> int:
    """Run what is left of the sweep, and print its table."""
    return harness.main(lambda: sweep(harness.parse(__doc__, SweepSettings)))


if __name__ == "__main__":
    sys.exit(main())
