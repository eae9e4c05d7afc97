"""The demonstration: simulate the built-in phantom, refine it, show what came of it."""

import platform
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxrefine import io, metrics, plots, progress, simulate, study
from jaxrefine.errors import InputError
from jaxrefine.refine import RefineConfig, paper_preset, released_preset

PRESETS: dict[str, Callable[[float, int], RefineConfig]] = {
    "paper": lambda sigma, batch: paper_preset(sigma, batch_size=batch),
    "released": lambda sigma, batch: released_preset(batch_size=batch),
}
"""Settings by name, from the noise's standard deviation and the batch size."""


@dataclass(frozen=True)
class DemoConfig:
    """What the demonstration simulates, and how it refines.

    Lengths are voxels, angles radians; ``sigma`` is the noise's standard deviation
    where the phantom's peak density is one. ``batch_size`` particles are computed at
    once: memory grows with it.
    """

    size: int = 40
    particles: int = 200
    sigma: float = 0.5
    max_angle_error: float = 0.7
    max_shift: float = 3.0
    initial_blur: float = 3.0
    seed: int = 0
    preset: str = "released"
    batch_size: int = 8


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
    phantom_key, data_key = jax.random.split(jax.random.key(config.seed))
    truth = simulate.phantom(phantom_key, config.size)
    dataset = simulate.make_dataset(
        data_key,
        truth,
        config.particles,
        max_shift=config.max_shift,
        max_angle_error=config.max_angle_error,
        sigma=config.sigma,
        batch_size=config.batch_size,
    )
    initial_map = simulate.blur(truth, config.initial_blur)
    case = study.prepare(truth, dataset, initial_map)
    settings = PRESETS[config.preset](config.sigma, config.batch_size)

    count = settings.iterations
    with progress.Bars() as bars:
        oracle = study.reconstruct_from(
            case, dataset.truth, settings, bars.next("oracle", count)
        )
        unrefined = study.reconstruct_from(
            case, dataset.initial, settings, bars.next("unrefined", count)
        )
        joint = study.refine_from(
            case, study.initial_state(case), settings, bars.next("joint", count)
        )
    outcomes = {"oracle": oracle, "joint": joint, "unrefined": unrefined}

    maps = {"truth": np.asarray(truth), "initial": np.asarray(initial_map)}
    maps |= {name: outcome.volume for name, outcome in outcomes.items()}
    for name, volume in maps.items():
        io.write_mrc(out / f"{name}.mrc", volume, 1.0)
    _draw(config, dataset, case, maps, outcomes, out)

    summary: dict[str, Any] = _summarise(outcomes, unrefined.errors)
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
    if config.preset not in PRESETS:
        names = ", ".join(PRESETS)
        raise InputError(f"The preset is one of {names}, not {config.preset}.")
    for name, least in (("size", 16), ("particles", 2), ("batch_size", 1)):
        if getattr(config, name) < least:
            value = getattr(config, name)
            raise InputError(f"{name} wants a value of at least {least}, not {value}.")
    for name in ("sigma", "initial_blur"):
        if not 0 < getattr(config, name) < float("inf"):
            value = getattr(config, name)
            raise InputError(f"{name} wants a positive value, not {value}.")
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


def _summarise(outcomes: dict[str, study.Outcome], initial) -> dict[str, Any]:
    """Gather the figures of merit under their documented names."""
    summary = {}
    for name, outcome in outcomes.items():
        row = outcome.row()
        summary[f"mean_fsc_{name}"] = row["mean_fsc"]
        summary[f"mean_fsc_aligned_{name}"] = row["mean_fsc_aligned"]
        summary[f"rc_{name}"] = row["rc"]
    summary["gauge_rotation_deg_joint"] = outcomes["joint"].row()["gauge_rotation_deg"]
    start = metrics.summarise(initial)
    end = metrics.summarise(outcomes["joint"].errors)
    for figure in ("median", "p90"):
        summary[f"angle_error_deg_{figure}_init"] = start[f"angle_error_deg_{figure}"]
        summary[f"angle_error_deg_{figure}_joint"] = end[f"angle_error_deg_{figure}"]
    for figure in ("fraction_within_5_deg", "fraction_within_10_deg"):
        summary[figure] = end[figure]
    summary["shift_error_px_median"] = end["shift_error_px_median"]
    return summary


def _draw(config, dataset, case, maps, outcomes, out: Path) -> None:
    """Write the four pictures."""
    caption = (
        f"Built-in phantom, {config.size}³ voxels, {config.particles} particles, "
        f"noise sigma {config.sigma:g}, Init-1 with {config.max_angle_error:g} rad and "
        f"shifts up to {config.max_shift:g} px, preset {config.preset}, seed "
        f"{config.seed}."
    )
    plots.image_gallery(out / "particles.png", np.asarray(dataset.images), caption)
    plots.orthogonal_slices(out / "slices.png", maps, caption)
    initial = metrics.fsc(maps["initial"], case.truth)
    curves = {name: outcome.curve for name, outcome in outcomes.items()}
    curves["initial map"] = np.asarray(initial)
    plots.fsc_curves(out / "fsc.png", curves, config.size, None, caption)
    before, after = outcomes["unrefined"].errors, outcomes["joint"].errors
    for file, unit, member in (
        ("angle_errors.png", "angle error (degrees)", "angle_in_degrees"),
        ("shift_errors.png", "shift error (pixels)", "shift_in_pixels"),
    ):
        errors = {
            "initial": np.asarray(getattr(before, member)),
            "joint": np.asarray(getattr(after, member)),
        }
        plots.error_histograms(out / file, errors, unit, caption)


def peak_rss_mib() -> float | None:
    """Return the most memory this process has held, in MiB, where Python can tell."""
    try:
        import resource
    except ModuleNotFoundError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if platform.system() == "Darwin" else 2**10)


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
