"""Init-1 (section V, Figs. 1 and 3-8): refinement from poses known to +-0.7 rad.

The same simulated particles are reconstructed with the presets of the paper and of its
authors' released code: from the true poses (oracle), from the initial ones
(unrefined), and jointly. The steps of the paper's preset are also tried at other
scales.

    python experiments/init1.py configs/hjc_init1.toml --preset small --volume MAP.mrc

prints a table, and stores it with curves and pictures in the run directory.
"""

import dataclasses
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import equinox as eqx
import harness
import jax
import jax.numpy as jnp
import numpy as np

from jaxrefine import io, kbwf, metrics, plots, simulate, study
from jaxrefine.demo import rc_text
from jaxrefine.geometry import Poses
from jaxrefine.paper import RefineConfig, Schedule, paper_preset, released_preset
from jaxrefine.progress import Bars

PRESETS = ("smoke", "small", "cpu", "paper")

KEYS = (
    "title",
    "seed",
    "size",
    "particles",
    "sigma",
    "max_angle_error",
    "max_shift",
    "initial_blur",
    "paper_iterations",
    "released_iterations",
    "paper_step_scales",
    "batch_size",
)
"""What the configuration must say."""


class Method(NamedTuple):
    """One way of reconstructing: from which poses, refined or kept, and how."""

    poses: Callable[[simulate.Dataset], Poses]
    refines: bool
    settings: RefineConfig


def methods(config: dict) -> dict[str, Method]:
    """Return every way of reconstructing, by name."""
    true, initial = (lambda data: data.truth), (lambda data: data.initial)
    batch = config["batch_size"]
    paper = paper_preset(config["sigma"], config["paper_iterations"], batch)
    released = released_preset(config["released_iterations"], batch)
    chosen = {
        "oracle (paper)": Method(true, False, paper),
        "oracle (released)": Method(true, False, released),
        "unrefined (paper)": Method(initial, False, paper),
        "unrefined (released)": Method(initial, False, released),
        "joint (released)": Method(initial, True, released),
    }
    for scale in config["paper_step_scales"]:
        name = "joint (paper)" if scale == 1 else f"joint (paper, steps x {scale:g})"
        chosen[name] = Method(initial, True, _with_step_scale(paper, scale))
    return chosen


def _with_step_scale(settings: RefineConfig, scale: float) -> RefineConfig:
    steps = (settings.angle_step, settings.shift_step)
    scaled = tuple(Schedule(float(step.first) * scale) for step in steps)
    return eqx.tree_at(lambda c: (c.angle_step, c.shift_step), settings, scaled)


def prepare(config: dict, volume: Path | None) -> study.Study:
    """Simulate the data set of a configuration."""
    map_key, data_key = jax.random.split(jax.random.key(config["seed"]))
    if volume is None:
        truth = simulate.phantom(map_key, config["size"])
    else:
        truth = jnp.asarray(io.read_mrc(volume)[0])
    dataset = simulate.make_dataset(
        data_key,
        truth,
        config["particles"],
        max_shift=config["max_shift"],
        max_angle_error=config["max_angle_error"],
        sigma=config["sigma"],
        batch_size=config["batch_size"],
    )
    initial_map = simulate.blur(truth, config["initial_blur"])
    return study.prepare(truth, dataset, initial_map)


def run_method(
    name: str,
    case: study.Study,
    method: Method,
    checkpoint: Path,
    bars: Bars,
) -> study.Outcome:
    """Run one method, from its own checkpoint if there is one."""
    settings = method.settings
    if not method.refines:
        poses = method.poses(case.dataset)
        bar = bars.next(name, settings.iterations)
        return study.reconstruct_from(case, poses, settings, bar)
    state = study.initial_state(case)
    history = []
    if checkpoint.exists():
        state, saved = io.load_checkpoint(checkpoint, state)
        history = saved["history"]
    earlier = history[-1]["elapsed_s"] if history else 0.0
    advance = bars.next(name, settings.iterations, done=len(history))

    def progress(state, row):
        history.append({**row, "elapsed_s": earlier + row["elapsed_s"]})
        io.save_checkpoint(checkpoint, state, {"history": history})
        advance(state, row)

    outcome = study.refine_from(case, state, settings, progress)
    wall = earlier + outcome.wall_s
    return dataclasses.replace(outcome, history=history, wall_s=wall)


def entry(outcome: study.Outcome) -> dict:
    """Return what ``metrics.json`` holds of a method."""
    return {
        **outcome.row(),
        "fsc": [round(float(value), 6) for value in outcome.curve],
        "history": outcome.history,
    }


def table(results: dict) -> str:
    """Return the results as a Markdown table."""
    head = (
        "| method | mean FSC | mean FSC, aligned | r_c (shells) | "
        "angle error, median (deg) | p90 | within 10 deg | "
        "shift error, median (px) | wall (s) |\n"
        "|---|---|---|---|---|---|---|---|---|"
    )
    rows = [
        f"| {name} | {r['mean_fsc']:.3f} | {r['mean_fsc_aligned']:.3f} "
        f"| {rc_text(r['rc'], len(r['fsc']) - 1)} "
        f"| {r['angle_error_deg_median']:.2f} | {r['angle_error_deg_p90']:.1f} "
        f"| {100 * r['fraction_within_10_deg']:.1f} % "
        f"| {r['shift_error_px_median']:.3f} | {r['wall_s']:.0f} |"
        for name, r in results.items()
    ]
    return "\n".join([head, *rows])


def draw(config: dict, case: study.Study, results: dict, kept: dict, out: Path) -> None:
    """Write the pictures: slices, resolution curves, pose errors, convergence."""
    caption = (
        f"{config['title']}: {config['map']}, {case.truth.shape[0]}³ voxels, "
        f"{config['particles']} particles, sigma {config['sigma']:g}, errors up to "
        f"{config['max_angle_error']:g} rad and {config['max_shift']:g} px, initial "
        f"map blurred by {config['initial_blur']:g} voxels, seed {config['seed']}."
    )
    shown = _worth_showing(results)
    initial_map = kbwf.evaluate(case.basis, case.start)
    maps = {"truth": np.asarray(case.truth), "initial map": np.asarray(initial_map)}
    maps |= {name: np.asarray(kept[name][0]) for name in shown}
    plots.orthogonal_slices(out / "slices.png", maps, caption)
    curves = {name: np.asarray(results[name]["fsc"]) for name in shown}
    plots.fsc_curves(out / "fsc.png", curves, case.truth.shape[0], None, caption)
    errors = {"initial": kept["unrefined (paper)"][1]}
    errors |= {name: kept[name][1] for name in shown if name.startswith("joint")}
    for file, unit, member in (
        ("angle_errors.png", "angle error (degrees)", "angle_in_degrees"),
        ("shift_errors.png", "shift error (pixels)", "shift_in_pixels"),
    ):
        values = {k: np.asarray(getattr(e, member)) for k, e in errors.items()}
        plots.error_histograms(out / file, values, unit, caption)
    convergence = {
        name: np.asarray([row["rc"] for row in results[name]["history"]])
        for name in shown
    }
    plots.convergence(out / "convergence.png", convergence, "r_c (shells)", caption)


def _worth_showing(results: dict) -> list[str]:
    """Choose the curves of a picture: of the other step scales, only the best."""
    scaled = [name for name in results if "steps x" in name]
    best = sorted(scaled, key=lambda name: results[name]["mean_fsc"])[-1:]
    chosen = ["oracle (paper)", "oracle (released)", "unrefined (paper)"]
    chosen += ["joint (released)", "joint (paper)", *best]
    return [name for name in chosen if name in results]


def main() -> None:
    """Run what is left of the study, then print and draw it."""
    options = harness.parse(__doc__, PRESETS)
    config = harness.resolve(options, KEYS)
    out = harness.open_run(options, config)
    results = harness.read_metrics(out)
    if not (out / "done").exists():
        run(config, options.volume, out, results)
    print(table(results))
    print(f"results and pictures are in {out}")


def run(config: dict, volume: Path | None, out: Path, results: dict) -> None:
    """Run every method that has no result yet, and draw all of them."""
    harness.write_provenance(out)
    case = prepare(config, volume)
    zeros = jnp.zeros(config["particles"], case.truth.dtype)
    like = (jnp.zeros_like(case.truth), metrics.PoseErrors(zeros, zeros))
    kept = {}
    with Bars() as bars:
        for name, method in methods(config).items():
            file = out / f"{slug(name)}.eqx"
            checkpoint = out / f"state_{slug(name)}.eqx"
            if name not in results:
                outcome = run_method(name, case, method, checkpoint, bars)
                arrays = (jnp.asarray(outcome.volume), outcome.errors)
                io.save_checkpoint(file, arrays, {"method": name})
                results[name] = entry(outcome)
                io.write_json(out / "metrics.json", results)
            kept[name], _ = io.load_checkpoint(file, like)
            checkpoint.unlink(missing_ok=True)
    draw(config, case, results, kept, out)
    (out / "table.md").write_text(table(results) + "\n", encoding="utf-8")
    (out / "done").touch()


def slug(name: str) -> str:
    """Return a method's name as a file's: "joint (paper)" is ``joint_paper``."""
    return re.sub(r"[^a-z0-9-]+", "_", name.lower()).strip("_")


if __name__ == "__main__":
    sys.exit(harness.main(main))
