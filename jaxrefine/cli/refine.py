"""``jaxrefine refine``: particles, a map and rough poses in; all three refined out."""

import argparse
import math
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxrefine import io
from jaxrefine.cli import _images, _production, _published
from jaxrefine.cli._outcome import Outcome
from jaxrefine.errors import InputError
from jaxrefine.geometry import Poses, geodesic_distance
from jaxrefine.report import html
from jaxrefine.runs import progress
from jaxrefine.runs.folder import RunFolder, file_digest

_ENGINES = {"default": _production, "paper": _published, "released": _published}
_RESULTS = {"map": "map.mrc", "halves": ("half1.mrc", "half2.mrc")}


def add(commands) -> None:
    """Declare the command."""
    command = commands.add_parser(
        "refine",
        help="refine the poses of particles and a map jointly",
        description="The same command carries on where it was stopped.",
    )
    option = command.add_argument
    option("particles", type=Path, metavar="PARTICLES.star", help="with rough poses")
    option("--map", type=Path, required=True, help="the map to start from")
    option(
        "--mask",
        type=Path,
        metavar="MASK.mrc",
        help="1 in the particle, 0 in the solvent, soft edge: poses are refined with "
        "masked maps, those written are whole",
    )
    _images.add_resample(option)
    option("--out", type=Path, required=True, help="folder to write to")
    option(
        "--half-sets",
        action="store_true",
        help="refine two halves of the particles by themselves, for their FSC",
    )
    option(
        "--preset",
        choices=tuple(_ENGINES),
        default="default",
        help="default: fast, with contrast-transfer functions; paper and released: "
        "the published algorithm, literally, and as its authors released it",
    )
    option("--iterations", type=int, help="most outer iterations")
    option(
        "--initial-resolution",
        type=float,
        help="what the map and the poses are good for at first, angstroms (default: a "
        "fifth of the particle's diameter)",
    )
    option("--max-angle", type=float, help="largest turn of a pose, degrees")
    option("--max-shift", type=float, help="largest move of a particle, pixels")
    option(
        "--prior-angle",
        type=float,
        help="how well the given angles are known: standard deviation of each "
        "component of the rotation, degrees (default 26)",
    )
    option(
        "--prior-shift",
        type=float,
        help="the same of the positions along x and y, pixels (default 2)",
    )
    option(
        "--fix-angles", action="store_true", help="keep the angles, refine positions"
    )
    option(
        "--fix-shifts", action="store_true", help="keep the positions, refine angles"
    )
    option(
        "--symmetry",
        type=str.upper,
        default="C1",
        help="point group of the map (default C1)",
    )
    option(
        "--max-resolution",
        type=float,
        help="finest detail that poses are compared in, angstroms",
    )
    option("--seed", type=int, default=0, help="seed of everything random (default 0)")
    option("--batch-size", type=int, help="particles computed at once")
    option("--memory", type=float, help="at most so much, GiB (default: what is free)")
    _images.add_options(option)
    command.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    """Refine, or carry on, or say that it is done."""
    _check(options)
    source = _images.read(
        options, with_poses=True, diameter_used=_ENGINES[options.preset] is _production
    )
    volume = _images.read_map(options.map, source, options.resample)
    mask = None
    if options.mask is not None:
        mask = _images.read_mask(options.mask, source, options.resample)
    engine = _ENGINES[options.preset]
    config = engine.configure(options, source)
    _check_shifts(options, source.particles.image_size)
    folder = RunFolder(options.out, "run.json", _settings(options, source))
    if folder.finished:
        print(f"{options.out} holds this refinement already, finished")
        return
    try:
        with progress.Bars() as bars:
            outcome = engine.run(options, source, volume, mask, config, folder, bars)
    except InputError:
        folder.abandon()
        raise
    changes = _changes(source.poses, outcome.poses)
    outcome = replace(outcome, columns=outcome.columns | changes)
    _write(options.out, source, outcome)
    settings = _describe(config)
    told = _report(options, source, volume, settings, outcome, folder)
    html.write(options.out / "report.html", told)
    folder.finish({"config": settings, **outcome.report})
    print(_sentence(options.out, told))


def _check(options: argparse.Namespace) -> None:
    for name in ("iterations", "batch_size"):
        value = getattr(options, name)
        if value is not None and value < 1:
            flag = f"--{name.replace('_', '-')}"
            raise InputError(f"{flag} wants a value of at least 1, not {value}.")
    for name, most in (
        ("initial_resolution", math.inf),
        ("max_angle", 180.0),
        ("max_shift", math.inf),
        ("prior_angle", 180.0),
        ("prior_shift", math.inf),
        ("max_resolution", math.inf),
        ("memory", math.inf),
    ):
        value = getattr(options, name)
        if value is not None and not (0 < value <= most and math.isfinite(value)):
            flag = f"--{name.replace('_', '-')}"
            limit = "" if most == math.inf else f" of at most {most:g}"
            raise InputError(f"{flag} wants a positive value{limit}, not {value}.")
    if not 0 <= options.seed < 2**31:
        raise InputError(
            f"--seed wants a value from 0 to 2^31 - 1, not {options.seed}."
        )


def _check_shifts(options: argparse.Namespace, image_size: int) -> None:
    """Raise if particles may be shifted out of their images."""
    for name in ("max_shift", "prior_shift"):
        value = getattr(options, name)
        if value is not None and value > image_size / 2:
            raise InputError(
                f"--{name.replace('_', '-')} wants at most half of the images' side, "
                f"{image_size // 2} pixels, not {value:g}."
            )


def _settings(options: argparse.Namespace, source: io.ParticleFile) -> dict[str, Any]:
    """Return what the results depend on: options, and the contents of the inputs.

    Stacks, which may be large, are known by their sizes.
    """
    names = ("half_sets", "preset", "iterations", "initial_resolution", "max_angle")
    names += ("max_shift", "prior_angle", "prior_shift", "seed", "fix_angles")
    names += ("fix_shifts", "symmetry", "max_resolution", "particle_diameter")
    names += ("invert", "normalise", "mask_images", "resample")
    sizes = sorted(path.stat().st_size for path in source.stacks.values())
    return {
        **{name: getattr(options, name) for name in names},
        "particles": file_digest(options.particles),
        "map": file_digest(options.map),
        "mask": file_digest(options.mask) if options.mask else None,
        "stacks": [len(sizes), sum(sizes)],
    }


def _changes(given: Poses, found: Poses) -> dict[str, np.ndarray]:
    """Return how far each pose has moved: the angle of its turn, and pixels."""
    old = given.rotations.astype(found.rotations.dtype)
    turn = jax.jit(geodesic_distance)(old, found.rotations)
    move = np.asarray(found.shifts, float) - np.asarray(given.shifts, float)
    return {
        "jaxrefineAngleChange": np.rad2deg(np.asarray(turn)),
        "jaxrefineShiftChange": np.linalg.norm(move, axis=1),
    }


def _write(out: Path, source: io.ParticleFile, outcome: Outcome) -> None:
    pixel = source.particles.pixel_size_in_angstroms
    io.write_mrc(out / _RESULTS["map"], outcome.volume, pixel)
    if outcome.half_maps is not None:
        for name, half in zip(_RESULTS["halves"], outcome.half_maps, strict=True):
            io.write_mrc(out / name, half, pixel)
    io.write_particles(out / "particles.star", source, outcome.poses, outcome.columns)


def _sentence(out: Path, told: html.Report) -> str:
    text = f"{len(told.poses)} particles and a map are in {out}"
    if told.half_set_fsc is not None:
        text += f"; the half maps agree to {html.resolution(told, 'A')}, FSC 0.143"
    if told.undetermined is not None and told.undetermined.any():
        count = int(told.undetermined.sum())
        text += f"; {count} show no particle, and are not in the map"
    return text


def _report(
    options: argparse.Namespace,
    source: io.ParticleFile,
    volume: jax.Array,
    settings: dict[str, Any],
    outcome: Outcome,
    folder: RunFolder,
) -> html.Report:
    """Gather what the report says."""
    columns, curve = outcome.columns, outcome.report.get("half_set_fsc")
    folds = outcome.report.get("fold_fsc")
    undetermined = columns.get("jaxrefineUndetermined")
    return html.Report(
        title=f"Refinement of {options.particles.name}",
        command=options.command_line,
        pixel_size_in_angstroms=source.particles.pixel_size_in_angstroms,
        poses=outcome.poses,
        angle_change_in_degrees=columns["jaxrefineAngleChange"],
        shift_change_in_pixels=columns["jaxrefineShiftChange"],
        initial_map=np.asarray(volume),
        volume=outcome.volume,
        rows=folder.rows(),
        settings=settings,
        half_set_fsc=None if curve is None else np.asarray(curve),
        fold_fsc=None if folds is None else np.asarray(folds),
        angle_std_in_degrees=columns.get("jaxrefineAngleStd"),
        shift_std_in_pixels=columns.get("jaxrefineShiftStd"),
        undetermined=None if undetermined is None else undetermined.astype(bool),
        **folder.provenance(),
    )


def _describe(config: Any) -> dict[str, Any]:
    """Return the resolved parameters, as JSON holds them."""
    plain = bool | int | float | str | None

    def entry(value: Any) -> Any:
        if isinstance(value, tuple):
            return [entry(each) for each in value]
        return value if isinstance(value, plain) else repr(value)

    return {each.name: entry(getattr(config, each.name)) for each in fields(config)}
