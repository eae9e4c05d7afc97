"""``jaxrefine simulate``: a data set that RELION reads, with its truth."""

import argparse
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from jaxrefine import io, simulate
from jaxrefine.ctf import CTF, apply_ctf
from jaxrefine.errors import InputError
from jaxrefine.geometry import Poses
from jaxrefine.operators.resample import fourier_crop
from jaxrefine.runs import progress
from jaxrefine.runs.folder import RunFolder, file_digest

_DEFOCUS = (8e3, 22e3)  # Angstrom
_ASTIGMATISM = 1e3  # Angstrom, largest difference of the two defoci
_NUMBERS = {  # option: least and largest value
    "particles": (1, 10**9),
    "snr_db": (-200.0, 200.0),
    "sigma": (0.0, 1e30),
    "max_shift": (0.0, 1e6),
    "init_angle": (0.0, 10.0),
    "init_blur": (0.0, 1e3),
    "seed": (0, 2**31 - 1),
    "batch_size": (1, 10**6),
    "voltage": (1.0, 1e4),
    "spherical_aberration": (0.0, 100.0),
    "amplitude_contrast": (0.0, 1.0),
}


def add(commands) -> None:
    """Declare the command."""
    command = commands.add_parser(
        "simulate",
        help="make a data set from a map, with its truth",
        description="Write particles.star and particles.mrcs, initial poses and noisy "
        "images; truth.star and truth.mrc; init.star and init.mrc, where to start.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    option = command.add_argument
    option("map", type=Path, metavar="MAP.mrc", help="the true map")
    option("--out", type=Path, required=True, help="folder to write to")
    option("--particles", type=int, required=True, help="number of particles")
    noise = command.add_mutually_exclusive_group(required=True)
    noise.add_argument(
        "--snr-db",
        type=float,
        default=argparse.SUPPRESS,
        help="signal-to-noise ratio per pixel, decibels",
    )
    noise.add_argument(
        "--sigma",
        type=float,
        default=argparse.SUPPRESS,
        help="standard deviation of the noise, in units of the projections",
    )
    option(
        "--max-shift",
        type=float,
        default=0.0,
        help="largest shift along x and y, pixels",
    )
    option(
        "--init-angle",
        type=float,
        default=0.7,
        help="largest initial error of each Euler angle, radians",
    )
    option(
        "--init-blur",
        type=float,
        default=4.0,
        help="the initial map is the truth blurred by this many pixels",
    )
    option("--size", type=int, help="crop the map to this side in Fourier space")
    option("--ctf", action="store_true", help="give each image a defocus")
    option("--voltage", type=float, default=300.0, help="kV")
    option("--spherical-aberration", type=float, default=2.7, help="mm")
    option("--amplitude-contrast", type=float, default=0.1, help="0 to 1")
    option("--seed", type=int, default=0, help="seed of everything random")
    option("--batch-size", type=int, default=8, help="particles computed at once")
    command.set_defaults(run=run)


@dataclass(frozen=True)
class _Plan:
    """The data set, but for its images."""

    map: jax.Array
    truth: Poses
    initial: Poses
    ctf: CTF | None
    noise_key: jax.Array


def run(options: argparse.Namespace) -> None:
    """Write the data set."""
    _check(options)
    volume, voxel = io.read_mrc(options.map)
    if options.size is not None:
        pixel = voxel * volume.shape[0] / options.size
        volume = np.asarray(fourier_crop(jnp.asarray(volume), options.size))
    else:
        pixel = voxel
    if not volume.any():
        raise InputError(f"{options.map} is zero everywhere; nothing would be seen.")
    ignored = {"command_line", "run", "command", "out", "map", "batch_size"}
    settings = {k: v for k, v in vars(options).items() if k not in ignored}
    settings["map_sha256"] = file_digest(options.map)
    folder = RunFolder(options.out, "simulate.json", settings)
    if folder.finished:
        print(f"{options.out} holds this data set already")
        return

    plan = _plan(options, jnp.asarray(volume))
    out, n = options.out, volume.shape[0]
    sigma = _write_images(options, plan, pixel)
    names = [f"{i:06d}@particles.mrcs" for i in range(1, options.particles + 1)]
    tables = {"truth": plan.truth, "init": plan.initial, "particles": plan.initial}
    group = CTF(0.0, 0.0, **_optics_group(options))
    for name, poses in tables.items():
        path = out / f"{name}.star"
        io.write_new_particles(path, poses, names, n, pixel, group, plan.ctf)
    io.write_mrc(out / "truth.mrc", volume, pixel)
    start = simulate.blur(plan.map, options.init_blur)
    io.write_mrc(out / "init.mrc", start, pixel)
    folder.finish(
        {"map": str(options.map), "sigma": sigma, "pixel_size_in_angstroms": pixel}
    )
    print(
        f"{options.particles} particles of {n}^2 pixels of {pixel:g} A, "
        f"noise sigma {sigma:g}, are in {out}"
    )


def _check(options: argparse.Namespace) -> None:
    for name, (least, largest) in _NUMBERS.items():
        value = getattr(options, name, least)
        if not least <= value <= largest:
            raise InputError(
                f"--{name.replace('_', '-')} wants a value from {least:g} to "
                f"{largest:g}, not {value}."
            )
    if options.size is not None and options.size < 8:
        raise InputError(f"--size wants a value of at least 8, not {options.size}.")


def _optics_group(options: argparse.Namespace) -> dict[str, float]:
    names = ("voltage", "spherical_aberration", "amplitude_contrast")
    return {name: getattr(options, name) for name in names}


def _plan(options: argparse.Namespace, volume: jax.Array) -> _Plan:
    """Draw the poses and the optics."""
    keys = jax.random.split(jax.random.key(options.seed), 5)
    angle_key, shift_key, error_key, optics_key, noise_key = keys
    count, dtype = options.particles, volume.dtype
    truth = Poses(
        simulate.equidistributed_rotations(angle_key, count, dtype),
        simulate.random_shifts(shift_key, count, options.max_shift, dtype),
    )
    initial = simulate.init1_poses(error_key, truth, options.init_angle)
    ctf = _draw_ctf(optics_key, options, dtype) if options.ctf else None
    return _Plan(volume, truth, initial, ctf, noise_key)


def _draw_ctf(key: jax.Array, options: argparse.Namespace, dtype) -> CTF:
    """Draw each particle's mean defocus, and its astigmatism about it."""
    count = (options.particles,)
    mean_key, difference_key, angle_key = jax.random.split(key, 3)
    mean = jax.random.uniform(mean_key, count, dtype, *_DEFOCUS)
    half = jax.random.uniform(difference_key, count, dtype, 0.0, _ASTIGMATISM / 2)
    angle = jax.random.uniform(angle_key, count, dtype, 0.0, math.pi)
    return CTF(mean + half, mean - half, angle, **_optics_group(options))


def _write_images(options: argparse.Namespace, plan: _Plan, pixel: float) -> float:
    """Write the stack, clean and then noisy; return the noise's standard deviation.

    Each particle has a key of its own, so that its noise does not depend on the batch.
    """
    count, n = options.particles, plan.map.shape[0]
    batches = list(_batches(count, 16 * options.batch_size))
    path = options.out / "particles.mrcs"
    with progress.Bars() as bars, io.new_stack(path, count, n, pixel) as stack:
        power, advance = 0.0, bars.next("projecting", len(batches))
        for first, last in batches:
            images = _clean_images(options, plan, pixel, slice(first, last))
            stack[first:last] = images
            power += float(np.sum(images.astype(np.float64) ** 2))
            advance(None, {})
        if hasattr(options, "sigma"):
            sigma = options.sigma
        else:
            mean = jnp.asarray(power / (count * n**2))
            sigma = float(simulate.noise_std_of_power(mean, options.snr_db))
        for first, last in batches:
            stack[first:last] += _noise(plan.noise_key, first, last, n, sigma)
    return sigma


def _batches(count: int, size: int) -> Iterator[tuple[int, int]]:
    for first in range(0, count, size):
        yield first, min(first + size, count)


def _clean_images(
    options: argparse.Namespace, plan: _Plan, pixel: float, rows: slice
) -> np.ndarray:
    poses, ctf = jax.tree.map(lambda leaf: leaf[rows], (plan.truth, plan.ctf))
    images = simulate.clean_images(plan.map, poses, batch_size=options.batch_size)
    return np.asarray(images if ctf is None else apply_ctf(ctf, images, pixel))


def _noise(key: jax.Array, first: int, last: int, n: int, sigma: float) -> np.ndarray:
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(first, last))
    draw = jax.vmap(lambda key: jax.random.normal(key, (n, n), jnp.float32))
    return sigma * np.asarray(draw(keys))
