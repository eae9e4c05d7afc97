"""``jaxrefine demo``: simulate the built-in phantom, refine it, show the result."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxrefine import evaluation, io, simulate
from jaxrefine.cli.commands.demo import DemoSettings
from jaxrefine.cli.engine import DEFAULT, Engine
from jaxrefine.data.particles import Particles
from jaxrefine.errors import InputError
from jaxrefine.geometry import Poses
from jaxrefine.maps.fsc import fsc
from jaxrefine.refinement.config import RefineConfig
from jaxrefine.report import plots
from jaxrefine.runs import options, provenance
from jaxrefine.runs.fingerprint import fingerprint
from jaxrefine.runs.folder import RunFolder
from jaxrefine.runs.progress import Bars

# Uniform errors of +-e have the standard deviation e / sqrt(3) = 0.58 e, and the three
# angles' errors add up where views are near a pole.
_SPREAD_OF_LARGEST = 0.65


def run(settings: DemoSettings, engine: Engine = DEFAULT) -> None:
    """Run the demonstration, or carry on, and print its figures.

    ``demo.json`` comes first and marks the folder as the demo's own; ``summary.json``
    comes last.

    Parameters
    ----------
    settings
        What to simulate.
    engine
        What does the joint refinement and the reconstructions.

    Raises
    ------
    InputError
        If the folder holds something else, or the system refuses to write.
    """
    identity, environment = fingerprint(settings), provenance.environment()
    details = {"command": options.command_line("demo", settings), **environment}
    out = settings.out
    with RunFolder(out, "demo.json", identity, details=details) as folder:
        if folder.finished:
            print(f"{out} holds this demo already, finished")
        else:
            summary = _run(settings, folder, engine)
            summary["settings"] = identity
            summary |= environment | provenance.usage(folder.history.elapsed_s)
            io.write_json(out / "summary.json", summary)
            folder.finish({})
        print(_summary_text(out / "summary.json"))
    print(f"maps, pictures and summary.json are in {out}")


@dataclass(frozen=True)
class _Scene:
    """The truth, and what is known of it at first."""

    truth: jax.Array
    initial_map: jax.Array
    dataset: simulate.Dataset


def _run(settings: DemoSettings, folder: RunFolder, engine: Engine) -> dict[str, Any]:
    """Write maps and pictures; return the figures of merit."""
    phantom_key, data_key, key = jax.random.split(jax.random.key(settings.seed), 3)
    scene = _simulate(settings, phantom_key, data_key)
    dataset = scene.dataset
    particles = Particles(np.asarray(dataset.images))
    config = _configure(settings)
    with Bars() as bars:
        volumes = {}
        for name, given in (("oracle", dataset.truth), ("unrefined", dataset.initial)):
            advance = bars.next(name, 1)
            reconstruction = engine.reconstruct(
                particles, given, config, key=key, watch=bars.watch
            )
            volumes[name] = reconstruction.volume
            advance(None, {})
        start = particles, dataset.initial, scene.initial_map, config
        state = folder.history.resume(lambda: engine.init(*start, key=key))
        done = 0 if state is None else int(state.iteration)
        advance = bars.next("joint", config.iterations, done)

        def record(latest: Any, info: Any) -> None:
            folder.history.record(latest, info.row())
            advance(latest, info.row())

        joint = engine.refine(
            *start, key=key, state=state, callback=record, watch=bars.watch
        )
    volumes["joint"] = joint.volume
    poses = {
        "oracle": dataset.truth,
        "unrefined": dataset.initial,
        "joint": joint.poses,
    }
    assessments = _write(settings, scene, volumes, poses)
    return {
        **_figures(assessments),
        "undetermined": int(joint.undetermined.sum()),
        "iterations": int(joint.state.iteration),
        "rc_unit": "shells (periods per box) at FSC 0.5",
    }


def _simulate(
    settings: DemoSettings, phantom_key: jax.Array, data_key: jax.Array
) -> _Scene:
    truth = simulate.phantom(phantom_key, settings.size)
    dataset = simulate.make_dataset(
        data_key,
        truth,
        settings.particles,
        max_shift=settings.max_shift,
        max_angle_error=math.radians(settings.max_angle_error),
        snr_db=settings.snr_db,
        project=simulate.slice_projector(truth),
    )
    return _Scene(truth, simulate.blur(truth, settings.initial_blur), dataset)


def _configure(settings: DemoSettings) -> RefineConfig:
    """Return the parameters of the refinement, told how far off the start is."""
    largest_angle = math.radians(settings.max_angle_error)
    return RefineConfig(
        angle_spread=max(_SPREAD_OF_LARGEST * largest_angle, 0.05),
        shift_spread=max(_SPREAD_OF_LARGEST * settings.max_shift, 0.5),
        max_shift=2 * settings.max_shift + 1,
        batch_size=settings.batch_size,
    )


def _write(
    settings: DemoSettings,
    scene: _Scene,
    volumes: Mapping[str, np.ndarray],
    poses: Mapping[str, Poses],
) -> dict[str, evaluation.Assessment]:
    """Write the maps and the pictures; return how far each map is from the truth."""
    truth, dataset = scene.truth, scene.dataset
    initial = np.asarray(scene.initial_map)
    maps = {"truth": np.asarray(truth), "initial": initial, **volumes}
    for name, volume in maps.items():
        io.write_mrc(settings.out / f"{name}.mrc", volume, 1.0)
    assessments = {
        name: evaluation.assess(volume, poses[name], truth, dataset.truth)
        for name, volume in volumes.items()
    }
    errors = {name: assessment.errors for name, assessment in assessments.items()}
    _draw(settings, dataset.images, maps, errors)
    return assessments


def _figures(assessments: Mapping[str, evaluation.Assessment]) -> dict[str, Any]:
    """Gather the figures of merit under their documented names."""
    summary: dict[str, Any] = {}
    rows = {name: assessment.row() for name, assessment in assessments.items()}
    for name, row in rows.items():
        for figure in (
            "mean_fsc",
            "mean_fsc_aligned",
            "rc",
            "gauge_rotation_in_degrees",
        ):
            summary[f"{figure}_{name}"] = row[figure]
    for figure in ("angle_error_in_degrees_median", "angle_error_in_degrees_p90"):
        summary[f"{figure}_init"] = rows["unrefined"][figure]
        summary[f"{figure}_joint"] = rows["joint"][figure]
    for figure in ("fraction_within_5_degrees", "fraction_within_10_degrees"):
        summary[figure] = rows["joint"][figure]
    summary["shift_error_in_pixels_median"] = rows["joint"][
        "shift_error_in_pixels_median"
    ]
    return summary


def _draw(
    settings: DemoSettings,
    images: jax.Array,
    maps: Mapping[str, np.ndarray],
    errors: Mapping[str, evaluation.PoseErrors],
) -> None:
    """Write the pictures."""
    out: Path = settings.out
    caption = (
        f"Built-in phantom, {settings.size}³ voxels, {settings.particles} particles, "
        f"{settings.snr_db:g} dB, Init-1 with {settings.max_angle_error:.1f} degrees "
        f"and shifts up to {settings.max_shift:g} px, seed {settings.seed}."
    )
    plots.image_gallery(out / "particles.png", np.asarray(images), caption)
    plots.orthogonal_slices(out / "slices.png", maps, caption)
    truth = jnp.asarray(maps["truth"])
    curves = {
        name: np.asarray(fsc(jnp.asarray(volume), truth))
        for name, volume in maps.items()
        if name != "truth"
    }
    curves["initial map"] = curves.pop("initial")
    plots.fsc_curves(out / "fsc.png", curves, settings.size, None, caption)
    for file, unit, member in (
        ("angle_errors.png", "angle error (degrees)", "angle_in_degrees"),
        ("shift_errors.png", "shift error (pixels)", "shift_in_pixels"),
    ):
        shown = {
            "initial": np.asarray(getattr(errors["unrefined"], member)),
            "joint": np.asarray(getattr(errors["joint"], member)),
        }
        plots.error_histograms(out / file, shown, unit, caption)


def _summary_text(path: Path) -> str:
    """Return the lines of a summary that was written, maybe long ago."""
    summary = io.read_json(path)
    try:
        return report_text(summary)
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(
            f"{path} must be as the demo wrote it, got something else; name another "
            "folder to make it again"
        ) from error


def report_text(summary: Mapping[str, Any]) -> str:
    """Return the figures of ``summary.json`` as lines for a reader."""
    lines = [f"{'':>12}  mean FSC  aligned     r_c"]
    nyquist = summary["settings"]["size"] // 2
    for name in ("oracle", "joint", "unrefined"):
        mean, aligned = (
            summary[f"{f}_{name}"] for f in ("mean_fsc", "mean_fsc_aligned")
        )
        rc = rc_text(summary[f"rc_{name}"], nyquist)
        lines.append(f"{name:>12}  {mean:8.3f}  {aligned:7.3f}  {rc:>6}")
    lines.append(
        "aligned: without the rigid motion of the map that the poses imply, for joint "
        f"a rotation of {summary['gauge_rotation_in_degrees_joint']:.2f} degrees"
    )
    median = summary["angle_error_in_degrees_median_init"]
    lines.append(
        f"median angle error {median:.1f} -> "
        f"{summary['angle_error_in_degrees_median_joint']:.2f} degrees, "
        f"{100 * summary['fraction_within_10_degrees']:.1f} % within 10 degrees, "
        f"median shift error {summary['shift_error_in_pixels_median']:.2f} pixels"
    )
    peak = summary["peak_rss_mib"]
    memory = "" if peak is None else f", at most {peak:.0f} MiB"
    lines.append(f"{summary['wall_s']:.0f} s{memory}")
    return "\n".join(lines)


def rc_text(rc: float, nyquist: int) -> str:
    """Return ``r_c`` for a table; a curve that never crosses gives a lower bound."""
    return f"≥ {rc:.1f}" if rc >= nyquist else f"{rc:.1f}"
