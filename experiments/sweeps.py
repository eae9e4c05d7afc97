"""Sweeps: how joint refinement fares as one condition changes, all others kept.

The noise, the number of particles or the error of the initial angles takes the values
that the configuration lists. At each of them the same particles are reconstructed from
the true poses (oracle), from the initial ones (unrefined), jointly, and from the poses
that are found in the true map at the known noise (true map); the Cramer-Rao bound on
the poses goes with these. Times include compilation, most of it at the first point.

    python experiments/sweeps.py configs/sweeps.toml --preset small --volume MAP.mrc
    python experiments/sweeps.py configs/sweeps.toml --set axis="'particles'"

Every point is a run of `comparison` in ``points/AXIS=VALUE``; ``metrics.json`` gathers
what ``plot_sweeps.py`` draws.
"""

import argparse
import sys
from collections.abc import Mapping
from typing import Any

import cases
import comparison
import harness
import jax
import jax.numpy as jnp
import methods
import numpy as np
from comparison import Case, Method, Outcome, Record
from jaxtyping import Float
from methods import initial_poses, true_poses

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

PRESETS = ("smoke", "small", "cpu", "paper")

AXES = ("snr_db", "particles", "max_angle_error")
"""What can be swept; the values of ``AXIS`` are ``AXIS_values``."""

KEYS = (*cases.KEYS, "axis", *(f"{axis}_values" for axis in AXES))
"""What the configuration must say."""

FIGURES = (
    "mean_fsc",
    "mean_fsc_aligned",
    "rc",
    "angle_error_deg_median",
    "fraction_within_10_deg",
    "wall_s",
)
"""What ``metrics.json`` gathers of each method at each point."""

MADE = ("commit", "dirty", "measured_by")
"""What it gathers of how each result was made, where that was kept."""

BOUND = (
    "bound_angle_deg_rms",
    "bound_angle_deg_median",
    "bound_shift_px_rms",
    "bound_shift_px_median",
)
"""What it gathers of the Cramer-Rao bound."""

_FLAT = 1e3  # standard deviation of a prior that says nothing: radians or pixels
_DRAWS = 200  # of every particle's error, for the medians
_BATCH = 256


def family(config: dict[str, Any], case: Case) -> dict[str, Method]:
    """Return what is compared at every point."""
    del case
    seed = config["seed"]
    # How well the poses are known is what the engine takes for granted at 0.7 rad.
    spread = RefineConfig().angle_spread * config["max_angle_error"] / 0.7
    settings = RefineConfig(angle_spread=spread)
    return {
        "oracle": methods.reconstruction(true_poses, seed),
        "unrefined": methods.reconstruction(initial_poses, seed),
        "joint": methods.refinement(settings, seed),
        "true map": from_true_map(seed),
    }


def from_true_map(seed: int) -> Method:
    """Find the poses in the true map, and make our map of them.

    They are polished from the true poses on. The iteration's row holds the Cramer-Rao
    bound, and the root mean squares of the errors.
    """

    def run(case: Case, record: Record) -> Outcome:
        record.expect(1)
        found = polish(case, LevenbergMarquardt(6))
        poses = Poses(found.rotations, found.shifts)
        key, particles = jax.random.key(seed), methods.particles_of(case)
        made = reconstruct(particles, poses, key=key)
        # No step is made: this is the information at the true poses.
        bound = cramer_rao(polish(case, LevenbergMarquardt(0)).information)
        truth = case.dataset.truth
        errors = evaluation.pose_errors(poses, truth)
        attained = {
            "angle_error_deg_rms": _rms(np.asarray(errors.angle_in_degrees)),
            "shift_error_px_rms": _rms(np.asarray(errors.shift_in_pixels)),
        }
        record.add(made.volume, poses, **bound, **attained)
        return Outcome(made.volume, poses)

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
    found = {}
    for name, unit, part in (
        ("angle_deg", np.rad2deg(1.0), slice(0, 3)),
        ("shift_px", 1.0, slice(3, 5)),
    ):
        square = np.einsum("pii->p", covariance[:, part, part])
        length = np.linalg.norm(errors[..., part], axis=-1)
        found[f"bound_{name}_rms"] = float(unit * np.sqrt(square.mean()))
        found[f"bound_{name}_median"] = float(unit * np.median(length))
    return found


def _rms(values: np.ndarray) -> float:
    return float(np.sqrt(np.mean(values**2)))


def sweep(options: argparse.Namespace, config: dict[str, Any]) -> None:
    """Run what is left of a sweep, and print its table."""
    axis = config["axis"]
    if axis not in AXES:
        raise InputError(f"axis wants one of {', '.join(AXES)}, not {axis}.")
    config = config | {"config": f"{config['config']}_{axis}"}
    out = harness.open_run(options, config)
    if not harness.finished(out):
        harness.write_provenance(out)
        points = []
        for value in config[f"{axis}_values"]:
            folder = out / "points" / f"{axis}={value:g}"
            here = config | {axis: value, "methods": ["sweep"]}
            inner = argparse.Namespace(volume=options.volume, out=folder)
            with harness.claimed(out), harness.claimed(folder.parent):
                comparison.run(inner, here, cases.init1, {"sweep": family})
            points.append(summary(value, harness.read_metrics(folder)))
            io.write_json(out / "metrics.json", {"axis": axis, "points": points})
        (out / "table.md").write_text(
            table(axis, points, config) + "\n", encoding="utf-8"
        )
        harness.finish(out)
    print(table(axis, harness.read_metrics(out)["points"], config))
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


def table(axis: str, points: list[dict[str, Any]], config: Mapping[str, Any]) -> str:
    """Return the points as a Markdown table, with what all but the axis are."""
    rows = [
        f"| {axis} | method | mean FSC | mean FSC, aligned | r_c (shells) | "
        "angle error, median (deg) | bound (deg) | within 10 deg | wall (s) |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for point in points:
        bound = point["bound"]["bound_angle_deg_median"]
        rows += [
            f"| {point['value']:g} | {name} | {r['mean_fsc']:.3f} "
            f"| {r['mean_fsc_aligned']:.3f} | {r['rc']:.1f} "
            f"| {r['angle_error_deg_median']:.2f} | {bound:.2f} "
            f"| {100 * r['fraction_within_10_deg']:.1f} % | {r['wall_s']:.0f} |"
            for name, r in point["methods"].items()
        ]
    said = f"{harness.caption(config)} Of these, {axis} varies."
    if axis == "max_angle_error":
        said += " The engine is told how large it may be."
    return "\n".join([*rows, "", said])


def main() -> None:
    """Run what is left of the sweep, then print its table."""
    options = harness.parse(__doc__, PRESETS)
    sweep(options, harness.resolve(options, KEYS))


if __name__ == "__main__":
    sys.exit(harness.main(main))
