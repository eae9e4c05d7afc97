"""``jaxrefine simulate``: a data set that RELION reads, with its truth."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from jaxrefine import io, simulate
from jaxrefine._types import Images
from jaxrefine.aberrations import Aberrations
from jaxrefine.cli import _particles
from jaxrefine.cli.commands.simulate import SimulateSettings
from jaxrefine.ctf import CTF, apply_ctf
from jaxrefine.data.preprocess import Resampled
from jaxrefine.errors import InputError
from jaxrefine.geometry import Poses
from jaxrefine.io.particles import SAME_PIXEL
from jaxrefine.operators.resample import fourier_crop
from jaxrefine.runs import options, provenance
from jaxrefine.runs.fingerprint import fingerprint
from jaxrefine.runs.folder import RunFolder
from jaxrefine.runs.progress import Bars

_DEFOCUS = (8e3, 22e3)  # Angstrom
_ASTIGMATISM = 1e3  # Angstrom, largest difference of the two defoci


@dataclass(frozen=True)
class _Plan:
    """The data set, but for its images.

    Attributes
    ----------
    map, pixel_size
        The true map, and its voxel size in angstroms, which is that of the images.
    truth, initial
        The true poses, and those to start from.
    ctf, group, aberrations
        The optics, and the group of each particle; None where there are none.
    like
        The table that they are from; None if they were drawn.
    noise_key
        Key of the noise.
    """

    map: jax.Array
    pixel_size: float
    truth: Poses
    initial: Poses
    ctf: CTF | None
    group: np.ndarray | None
    aberrations: Aberrations | None
    like: io.ParticleFile | None
    noise_key: jax.Array


def run(settings: SimulateSettings) -> None:
    """Write the data set, unless it is there.

    Raises
    ------
    InputError
        If the map or the table cannot be used or do not fit each other, or the folder
        is not that of this run.
    """
    volume, voxel = io.read_mrc(settings.map)
    pixel = voxel
    if settings.size is not None:
        pixel = voxel * volume.shape[0] / settings.size
        volume = np.asarray(fourier_crop(jnp.asarray(volume), settings.size))
    if not volume.any():
        raise InputError(f"{settings.map} must not be zero everywhere, got zeros only")
    like, joined = None, {}
    if settings.like is not None:
        like = _read_like(settings, settings.like, volume.shape[0], pixel)
        pixel = like.particles.pixel_size_in_angstroms
        joined = _particles.identity_of_joined(like)
    details = {
        "command": options.command_line("simulate", settings),
        **provenance.environment(),
    }
    identity, out = fingerprint(settings) | joined, settings.out
    with RunFolder(out, "simulate.json", identity, details=details) as folder:
        if folder.finished:
            print(f"{out} holds this data set already")
            return
        plan = _plan(settings, jnp.asarray(volume), pixel, like)
        sigma = _write(settings, plan)
        usage = provenance.usage(folder.history.elapsed_s)
        folder.finish(
            {
                "map": str(settings.map),
                "sigma": sigma,
                "pixel_size_in_angstroms": pixel,
                **usage,
            }
        )
    n = volume.shape[0]
    print(
        f"{len(plan.truth)} particles of {n}^2 pixels of {pixel:g} A, "
        f"noise sigma {sigma:g}, are in {out}"
    )


def _read_like(
    settings: SimulateSettings, path: Path, side: int, pixel: float
) -> io.ParticleFile:
    """Read the table that the particles are to be like.

    Raises
    ------
    InputError
        If it has no optics, no poses though they are used or some that are outside of
        the images, or images on another grid than that of the map, of so many voxels of
        a size in angstroms.
    """
    like = io.read_without_images(path, side, pixel)
    _particles.tell_where_from(path, like)
    if like.particles.ctf is None:
        raise InputError(
            f"{path} must give the optics of its particles (rlnDefocusU), got none"
        )
    if not like.has_poses and not settings.draw_poses:
        raise InputError(
            f"{path} must have poses (rlnAngleRot, rlnAngleTilt), got none; "
            "--draw-poses draws them"
        )
    m, own = like.particles.image_size, like.particles.pixel_size_in_angstroms
    if isinstance(like.particles.images, Resampled):
        smallest = like.pixel_sizes.min()
        raise InputError(
            f"{path}: all images must have one pixel size, got {smallest:g} to {own:g} "
            "A"
        )
    if m != side or abs(pixel - own) > SAME_PIXEL * own:
        raise InputError(
            f"{settings.map} must have {m}^3 voxels of {own:g} A, the grid of the "
            f"images of {path}, got {side}^3 voxels of {pixel:g} A (--size crops a map "
            "in Fourier space)"
        )
    beyond, limit = _particles.outside_images(like)
    if not settings.draw_poses and beyond.any():
        raise InputError(f"{path}: particles {limit}")
    _particles.tell_what_is_ignored(like)
    return like


def _write(settings: SimulateSettings, plan: _Plan) -> float:
    """Write images, tables and maps; return the noise's standard deviation."""
    out, n, pixel = settings.out, plan.map.shape[0], plan.pixel_size
    sigma = _write_images(settings, plan)
    names = [f"{i:06d}@particles.mrcs" for i in range(1, len(plan.truth) + 1)]
    tables = {"truth": plan.truth, "init": plan.initial, "particles": plan.initial}
    group = CTF(0.0, 0.0, **_optics_group(settings))
    for name, poses in tables.items():
        path = out / f"{name}.star"
        if plan.like is not None:
            io.write_particles(path, plan.like, poses, {"rlnImageName": names})
        else:
            io.write_new_particles(path, poses, names, n, pixel, group, plan.ctf)
    io.write_mrc(out / "truth.mrc", plan.map, pixel)
    start = simulate.blur(plan.map, settings.initial_blur)
    io.write_mrc(out / "init.mrc", start, pixel)
    return sigma


def _optics_group(settings: SimulateSettings) -> dict[str, float]:
    names = ("voltage", "spherical_aberration", "amplitude_contrast")
    return {name: getattr(settings, name) for name in names}


def _plan(
    settings: SimulateSettings,
    volume: jax.Array,
    pixel: float,
    like: io.ParticleFile | None,
) -> _Plan:
    """Draw the poses and the optics, or take them from a table."""
    keys = jax.random.split(jax.random.key(settings.seed), 5)
    angle_key, shift_key, error_key, optics_key, noise_key = keys
    count = settings.particles if like is None else len(like)
    assert count is not None, "the settings hold one of the two"
    dtype = volume.dtype
    if like is None or settings.draw_poses:
        truth = Poses(
            simulate.equidistributed_rotations(angle_key, count, dtype),
            simulate.random_shifts(shift_key, count, settings.max_shift, dtype),
        )
    else:
        truth = like.poses
    initial = simulate.init1_poses(
        error_key, truth, math.radians(settings.max_angle_error)
    )
    ctf = group = aberrations = None
    if like is not None:
        optics = like.particles
        ctf, group, aberrations = optics.ctf, optics.group, optics.aberrations
    elif settings.ctf:
        ctf = _draw_ctf(optics_key, settings, count, dtype)
    return _Plan(
        volume, pixel, truth, initial, ctf, group, aberrations, like, noise_key
    )


def _draw_ctf(key: jax.Array, settings: SimulateSettings, particles: int, dtype) -> CTF:
    """Draw each particle's mean defocus, and its astigmatism about it."""
    count = (particles,)
    mean_key, difference_key, angle_key = jax.random.split(key, 3)
    mean = jax.random.uniform(mean_key, count, dtype, *_DEFOCUS)
    half = jax.random.uniform(difference_key, count, dtype, 0.0, _ASTIGMATISM / 2)
    angle = jax.random.uniform(angle_key, count, dtype, 0.0, math.pi)
    return CTF(mean + half, mean - half, angle, **_optics_group(settings))


def _write_images(settings: SimulateSettings, plan: _Plan) -> float:
    """Write the stack, clean and then noisy; return the noise's standard deviation.

    Each particle has a key of its own, so that its noise does not depend on the batch.
    """
    count, n = len(plan.truth), plan.map.shape[0]
    batches = list(_batches(count, settings.batch_size))
    path = settings.out / "particles.mrcs"
    aberrations = plan.aberrations or Aberrations()
    project = simulate.slice_projector(
        plan.map, magnification=aberrations.magnification
    )
    with Bars() as bars, io.new_stack(path, count, n, plan.pixel_size) as stack:
        power, advance = 0.0, bars.next("projecting", len(batches))
        for first, last in batches:
            images = _clean_images(project, plan, slice(first, last))
            stack[first:last] = images
            power += float(np.sum(images.astype(np.float64) ** 2))
            advance(None, {})
        sigma = settings.sigma
        if settings.snr_db is not None:
            mean = jnp.asarray(power / (count * n**2))
            sigma = float(simulate.noise_std_of_power(mean, settings.snr_db))
        assert sigma is not None, "the settings hold one of the two"
        for first, last in batches:
            stack[first:last] += _noise(plan.noise_key, first, last, n, sigma)
    return sigma


def _batches(count: int, size: int) -> Iterator[tuple[int, int]]:
    for first in range(0, count, size):
        yield first, min(first + size, count)


def _clean_images(
    project: Callable[..., Images], plan: _Plan, rows: slice
) -> np.ndarray:
    """Return the images of some particles, as they are seen through their optics."""
    dtype = plan.map.dtype
    poses, ctf = jax.tree.map(
        lambda leaf: jnp.asarray(leaf[rows], dtype), (plan.truth, plan.ctf)
    )
    group = None if plan.group is None else jnp.asarray(plan.group[rows])
    images = project(poses, group)
    if ctf is not None:
        images = apply_ctf(ctf, images, plan.pixel_size, plan.aberrations, group)
    return np.asarray(images)


def _noise(key: jax.Array, first: int, last: int, n: int, sigma: float) -> np.ndarray:
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(first, last))
    draw = jax.vmap(lambda key: jax.random.normal(key, (n, n), jnp.float32))
    return sigma * np.asarray(draw(keys))
