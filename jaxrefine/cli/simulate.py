"""``jaxrefine simulate``: a data set that RELION reads, with its truth."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from jaxrefine import io, simulate
from jaxrefine._types import Images
from jaxrefine.cli.commands.simulate import SimulateSettings
from jaxrefine.ctf import CTF, apply_ctf
from jaxrefine.errors import InputError
from jaxrefine.geometry import Poses
from jaxrefine.operators.resample import fourier_crop
from jaxrefine.runs import options, provenance
from jaxrefine.runs.fingerprint import fingerprint
from jaxrefine.runs.folder import RunFolder
from jaxrefine.runs.progress import Bars

_DEFOCUS = (8e3, 22e3)  # Angstrom
_ASTIGMATISM = 1e3  # Angstrom, largest difference of the two defoci


@dataclass(frozen=True)
class _Plan:
    """The data set, but for its images."""

    map: jax.Array
    truth: Poses
    initial: Poses
    ctf: CTF | None
    noise_key: jax.Array


def run(settings: SimulateSettings) -> None:
    """Write the data set, unless it is there.

    Raises
    ------
    InputError
        If the map cannot be used, or the folder is not that of this run.
    """
    volume, voxel = io.read_mrc(settings.map)
    pixel = voxel
    if settings.size is not None:
        pixel = voxel * volume.shape[0] / settings.size
        volume = np.asarray(fourier_crop(jnp.asarray(volume), settings.size))
    if not volume.any():
        raise InputError(f"{settings.map} must not be zero everywhere, got zeros only")
    details = {
        "command": options.command_line("simulate", settings),
        **provenance.environment(),
    }
    identity, out = fingerprint(settings), settings.out
    with RunFolder(out, "simulate.json", identity, details=details) as folder:
        if folder.finished:
            print(f"{out} holds this data set already")
            return
        sigma = _write(settings, volume, pixel)
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
        f"{settings.particles} particles of {n}^2 pixels of {pixel:g} A, "
        f"noise sigma {sigma:g}, are in {out}"
    )


def _write(settings: SimulateSettings, volume: np.ndarray, pixel: float) -> float:
    """Write images, tables and maps; return the noise's standard deviation."""
    plan = _plan(settings, jnp.asarray(volume))
    out, n = settings.out, volume.shape[0]
    sigma = _write_images(settings, plan, pixel)
    names = [f"{i:06d}@particles.mrcs" for i in range(1, settings.particles + 1)]
    tables = {"truth": plan.truth, "init": plan.initial, "particles": plan.initial}
    group = CTF(0.0, 0.0, **_optics_group(settings))
    for name, poses in tables.items():
        path = out / f"{name}.star"
        io.write_new_particles(path, poses, names, n, pixel, group, plan.ctf)
    io.write_mrc(out / "truth.mrc", volume, pixel)
    start = simulate.blur(plan.map, settings.initial_blur)
    io.write_mrc(out / "init.mrc", start, pixel)
    return sigma


def _optics_group(settings: SimulateSettings) -> dict[str, float]:
    names = ("voltage", "spherical_aberration", "amplitude_contrast")
    return {name: getattr(settings, name) for name in names}


def _plan(settings: SimulateSettings, volume: jax.Array) -> _Plan:
    """Draw the poses and the optics."""
    keys = jax.random.split(jax.random.key(settings.seed), 5)
    angle_key, shift_key, error_key, optics_key, noise_key = keys
    count, dtype = settings.particles, volume.dtype
    truth = Poses(
        simulate.equidistributed_rotations(angle_key, count, dtype),
        simulate.random_shifts(shift_key, count, settings.max_shift, dtype),
    )
    initial = simulate.init1_poses(
        error_key, truth, math.radians(settings.max_angle_error)
    )
    ctf = _draw_ctf(optics_key, settings, dtype) if settings.ctf else None
    return _Plan(volume, truth, initial, ctf, noise_key)


def _draw_ctf(key: jax.Array, settings: SimulateSettings, dtype) -> CTF:
    """Draw each particle's mean defocus, and its astigmatism about it."""
    count = (settings.particles,)
    mean_key, difference_key, angle_key = jax.random.split(key, 3)
    mean = jax.random.uniform(mean_key, count, dtype, *_DEFOCUS)
    half = jax.random.uniform(difference_key, count, dtype, 0.0, _ASTIGMATISM / 2)
    angle = jax.random.uniform(angle_key, count, dtype, 0.0, math.pi)
    return CTF(mean + half, mean - half, angle, **_optics_group(settings))


def _write_images(settings: SimulateSettings, plan: _Plan, pixel: float) -> float:
    """Write the stack, clean and then noisy; return the noise's standard deviation.

    Each particle has a key of its own, so that its noise does not depend on the batch.
    """
    count, n = settings.particles, plan.map.shape[0]
    batches = list(_batches(count, settings.batch_size))
    path = settings.out / "particles.mrcs"
    project = simulate.slice_projector(plan.map)
    with Bars() as bars, io.new_stack(path, count, n, pixel) as stack:
        power, advance = 0.0, bars.next("projecting", len(batches))
        for first, last in batches:
            images = _clean_images(project, plan, pixel, slice(first, last))
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
    project: Callable[[Poses], Images], plan: _Plan, pixel: float, rows: slice
) -> np.ndarray:
    poses, ctf = jax.tree.map(lambda leaf: leaf[rows], (plan.truth, plan.ctf))
    images = project(poses)
    return np.asarray(images if ctf is None else apply_ctf(ctf, images, pixel))


def _noise(key: jax.Array, first: int, last: int, n: int, sigma: float) -> np.ndarray:
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(first, last))
    draw = jax.vmap(lambda key: jax.random.normal(key, (n, n), jnp.float32))
    return sigma * np.asarray(draw(keys))
