"""The demonstration: simulate the built-in phantom, refine it, show what came of it."""

import time
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxrefine import evaluation, io, simulate
from jaxrefine.data.particles import Particles
from jaxrefine.errors import InputError
from jaxrefine.maps.fsc import fsc
from jaxrefine.refinement import loop
from jaxrefine.refinement.config import RefineConfig
from jaxrefine.refinement.reconstruction import reconstruct
from jaxrefine.report import plots
from jaxrefine.runs import progress
from jaxrefine.runs.provenance import peak_rss_mib


@dataclass(frozen=True)
class DemoConfig:
    """What the demonstration simulates.

    Lengths are voxels, angles radians; ``snr_db`` is the signal-to-noise ratio in a
    pixel. ``batch_size`` particles are computed at once: memory grows with it.
    """

    size: int = 64
    particles: int = 1000
    snr_db: float = -5.0
    max_angle_error: float = 0.7
    max_shift: float = 3.0
    initial_blur: float = 4.0
    seed: int = 0
    batch_size: int = 256


def run(config: DemoConfig, out: Path) -> dict[str, Any]:
    """Run the demonstration and write maps, pictures and ``summary.json``.

    ``demo.json`` comes first and marks the folder as a demo's own, so that an
    interrupted demo can be repeated there; ``summary.json`` comes last.

    Parameters
    ----------
    config
        What to simulate.
    out
        Folder to write to; made if absent.

    Returns
    -------
    The content of ``summary.json``.

    Raises
    ------
    InputError
        If a number is out of range, or the folder holds something else.
    """
    _check(config, out)
    out.mkdir(parents=True, exist_ok=True)
    (out / "summary.json").unlink(missing_ok=True)
    io.write_json(out / "demo.json", asdict(config))
    begin = time.perf_counter()
    phantom_key, data_key, key = jax.random.split(jax.random.key(config.seed), 3)
    truth = simulate.phantom(phantom_key, config.size)
    dataset = simulate.make_dataset(
        data_key,
        truth,
        config.particles,
        max_shift=config.max_shift,
        max_angle_error=config.max_angle_error,
        snr_db=config.snr_db,
    )
    initial_map = simulate.blur(truth, config.initial_blur)
    particles = Particles(np.asarray(dataset.images))
    settings = RefineConfig(
        # Uniform errors of +-e have the standard deviation e / sqrt(3), and the three
        # angles' errors add up where views are near a pole.
        angle_spread=max(config.max_angle_error * 0.65, 0.05),
        shift_spread=max(config.max_shift * 0.65, 0.5),
        max_shift=2 * config.max_shift + 1,
        batch_size=config.batch_size,
    )
    with progress.Bars() as bars:
        advance = bars.next("oracle", 1)
        oracle = reconstruct(particles, dataset.truth, settings, key=key)
        advance(None, {})
        advance = bars.next("unrefined", 1)
        unrefined = reconstruct(particles, dataset.initial, settings, key=key)
        advance(None, {})
        advance = bars.next("joint", settings.iterations)
        joint = loop.refine(
            particles,
            dataset.initial,
            initial_map,
            settings,
            key=key,
            callback=lambda state, info: advance(state, info.row()),
        )
    poses = {
        "oracle": dataset.truth,
        "unrefined": dataset.initial,
        "joint": joint.poses,
    }
    volumes = {
        "oracle": oracle.volume,
        "unrefined": unrefined.volume,
        "joint": joint.volume,
    }

    maps = {"truth": np.asarray(truth), "initial": np.asarray(initial_map), **volumes}
    for name, volume in maps.items():
        io.write_mrc(out / f"{name}.mrc", volume, 1.0)
    found = {
        name: evaluation.assess(volume, poses[name], truth, dataset.truth)
        for name, volume in volumes.items()
    }
    errors = {name: one.errors for name, one in found.items()}
    _draw(config, dataset.images, maps, errors, out)

    summary = _summarise(found)
    summary["undetermined"] = int(joint.undetermined.sum())
    summary["iterations"] = int(joint.state.iteration)
    summary["settings"] = asdict(config)
    summary["rc_unit"] = "shells (periods per box) at FSC 0.5"
    summary["versions"] = {
        name: version(name) for name in ("jaxrefine", "jax", "jaxlib", "numpy")
    }
    summary["device"] = jax.devices()[0].device_kind
    summary["wall_s"] = time.perf_counter() - begin
    summary["peak_rss_mib"] = peak_rss_mib()
    io.write_json(out / "summary.json", summary)
    return summary


def _check(config: DemoConfig, out: Path) -> None:
    """Refuse settings and folders that would fail, or destroy something, later."""
    for name, least in (("size", 16), ("particles", 4), ("batch_size", 1)):
        if getattr(config, name) < least:
            value = getattr(config, name)
            raise InputError(f"{name} wants a value of at least {least}, not {value}.")
    if not 0 < config.initial_blur < float("inf"):
        value = config.initial_blur
        raise InputError(f"initial_blur wants a positive value, not {value}.")
    if not abs(config.snr_db) <= 100:
        value = config.snr_db
        raise InputError(f"snr_db wants a value from -100 to 100, not {value}.")
    for name in ("max_angle_error", "max_shift"):
        if not 0 <= getattr(config, name) < float("inf"):
            value = getattr(config, name)
            raise InputError(f"{name} wants a value of at least 0, not {value}.")
    if not 0 <= config.seed < 2**31:
        raise InputError(f"seed wants a value from 0 to 2^31 - 1, not {config.seed}.")
    if out.exists() and not out.is_dir():
        raise InputError(f"{out} is a file; a folder to write to is wanted.")
    if out.is_dir() and any(out.iterdir()) and not (out / "demo.json").exists():
        raise InputError(
            f"{out} holds files that are not a demo's; name a new or an empty folder."
        )


def _summarise(
    found: dict[str, evaluation.Assessment],
) -> dict[str, Any]:
    """Gather the figures of merit under their documented names."""
    summary: dict[str, Any] = {}
    rows = {name: one.row() for name, one in found.items()}
    for name, row in rows.items():
        for figure in ("mean_fsc", "mean_fsc_aligned", "rc", "gauge_rotation_deg"):
            summary[f"{figure}_{name}"] = row[figure]
    for figure in ("angle_error_deg_median", "angle_error_deg_p90"):
        summary[f"{figure}_init"] = rows["unrefined"][figure]
        summary[f"{figure}_joint"] = rows["joint"][figure]
    for figure in ("fraction_within_5_deg", "fraction_within_10_deg"):
        summary[figure] = rows["joint"][figure]
    summary["shift_error_px_median"] = rows["joint"]["shift_error_px_median"]
    return summary


def _draw(config: DemoConfig, images, maps, errors, out: Path) -> None:
    """Write the pictures."""
    caption = (
        f"Built-in phantom, {config.size}³ voxels, {config.particles} particles, "
        f"{config.snr_db:g} dB, Init-1 with {config.max_angle_error:g} rad and "
        f"shifts up to {config.max_shift:g} px, seed {config.seed}."
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
    plots.fsc_curves(out / "fsc.png", curves, config.size, None, caption)
    for file, unit, member in (
        ("angle_errors.png", "angle error (degrees)", "angle_in_degrees"),
        ("shift_errors.png", "shift error (pixels)", "shift_in_pixels"),
    ):
        shown = {
            "initial": np.asarray(getattr(errors["unrefined"], member)),
            "joint": np.asarray(getattr(errors["joint"], member)),
        }
        plots.error_histograms(out / file, shown, unit, caption)


def report(summary: dict) -> str:
    """Return the summary's figures as lines for a reader."""
    lines = [f"{'':>12}  mean FSC  aligned     r_c"]
    nyquist = summary["settings"]["size"] // 2
    for name in ("oracle", "joint", "unrefined"):
        mean, aligned = (
            summary[f"{f}_{name}"] for f in ("mean_fsc", "mean_fsc_aligned")
        )
        rc = rc_text(summary[f"rc_{name}"], nyquist)
        lines.append(f"{name:>12}  {mean:8.3f}  {aligned:7.3f}  {rc:>6}")
    lines.append(
        "aligned: without the motion of the whole map that the poses imply, for joint "
        f"a rotation of {summary['gauge_rotation_deg_joint']:.2f} degrees"
    )
    median = summary["angle_error_deg_median_init"]
    lines.append(
        f"median angle error {median:.1f} -> "
        f"{summary['angle_error_deg_median_joint']:.2f} degrees, "
        f"{100 * summary['fraction_within_10_deg']:.1f} % within 10 degrees, "
        f"median shift error {summary['shift_error_px_median']:.2f} pixels"
    )
    peak = summary["peak_rss_mib"]
    memory = "" if peak is None else f", at most {peak:.0f} MiB"
    lines.append(f"{summary['wall_s']:.0f} s{memory}")
    return "\n".join(lines)


def rc_text(rc: float, nyquist: int) -> str:
    """Return ``r_c`` for a table; a curve that never crosses gives a lower bound."""
    return f"≥ {rc:.1f}" if rc >= nyquist else f"{rc:.1f}"
