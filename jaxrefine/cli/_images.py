"""What every command with particles shares: its options, inputs and their checks."""

import argparse
import math
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxrefine import io
from jaxrefine.data.particles import Particles
from jaxrefine.data.preprocess import Masked, Normalised, Resampled
from jaxrefine.errors import InputError
from jaxrefine.maps.mask import check_mask
from jaxrefine.operators.resample import resample

_IGNORED = {"rlnBeamTiltX", "rlnBeamTiltY", "rlnOddZernike", "rlnEvenZernike"}
_IGNORED |= {f"rlnMagMat{i}{j}" for i in (0, 1) for j in (0, 1)}
_TRIVIAL = {"0", "0.0", "0.000000", "1", "1.0", "1.000000"}
_SAME_VOXEL = 1e-3
_CIRCLE = 0.75  # of the images' side: what is not background, by default


def add_options(option: Callable[..., Any]) -> None:
    """Declare the options."""
    option(
        "--invert",
        action="store_true",
        help="protein is dark in the images; implies --normalise",
    )
    option(
        "--normalise",
        action="store_true",
        help="bring every image's background, outside of the particle's diameter, to "
        "mean 0 and standard deviation 1",
    )
    option(
        "--particle-diameter",
        type=float,
        help="largest diameter of the particle, angstroms: of the circle that "
        "--normalise and --mask-images use, three fourths of the box by default",
    )
    option(
        "--mask-images",
        action="store_true",
        help="set images to 0 outside of the particle's diameter, with a soft edge, "
        "about its given position (the image's centre where poses are not used); they "
        "want to be normalised",
    )
    option("--datadir", type=Path, help="where else to look for stacks of images")


def read(
    options: argparse.Namespace, *, with_poses: bool, diameter_used: bool = False
) -> io.ParticleFile:
    """Read the particles; prepare their images as the options say.

    Raises
    ------
    InputError
        If the particles cannot be used, or have no poses but are to have some; if the
        images' side is odd; if the particle's diameter is given, and neither the images
        nor the command use it.
    """
    source = io.read_particles(options.particles, options.datadir)
    if with_poses and not source.has_poses:
        raise InputError(
            f"{options.particles} has no poses (rlnAngleRot, rlnAngleTilt); "
            "`jaxrefine match` finds some."
        )
    particles = source.particles
    if options.invert and particles.ctf is not None and np.any(particles.ctf.scale < 0):
        raise InputError(
            f"{options.particles} says by itself that protein is dark (a negative "
            "rlnCtfScalefactor, or blob/sign); --invert would undo that."
        )
    m = particles.image_size
    if m % 2:
        raise InputError(
            f"{options.particles} names images of {m} x {m} pixels; an even side is "
            "wanted, here and by RELION."
        )
    _say_what_is_done(source)
    box = box_of(particles)
    diameter = options.particle_diameter
    if diameter is not None and not 0 < diameter <= box:
        raise InputError(
            f"--particle-diameter wants more than 0 and at most the box, {box:g} A, "
            f"not {diameter:g}."
        )
    circled = options.invert or options.normalise or options.mask_images
    if diameter is not None and not (diameter_used or circled):
        raise InputError(
            "--particle-diameter does nothing here without --normalise, --invert or "
            "--mask-images."
        )
    circle = _CIRCLE * box if diameter is None else diameter
    pixels = circle / particles.pixel_size_in_angstroms
    images = particles.images
    if options.invert or options.normalise:
        images = Normalised(images, pixels, options.invert)
    if options.mask_images:
        shifts = np.asarray(source.poses.shifts)
        images = Masked(images, pixels, shifts if with_poses else 0 * shifts)
    particles = replace(particles, images=images)
    return replace(source, particles=particles)


def _say_what_is_done(source: io.ParticleFile) -> None:
    """Tell of images that are resampled, and of optics ignored or not given."""
    pixel, smallest = source.particles.pixel_size_in_angstroms, source.pixel_sizes.min()
    if isinstance(source.particles.images, Resampled):
        print(
            f"{source.path}: images with pixels of {smallest:g} A and more are "
            f"resampled to {pixel:g} A",
            file=sys.stderr,
        )
    if source.particles.ctf is None:
        print(
            f"{source.path} gives no defocus: its images are taken to have no "
            "contrast-transfer function",
            file=sys.stderr,
        )
    ignored = [
        name
        for block in source.blocks.values()
        for name, values in block.items()
        if name in _IGNORED and set(values) - _TRIVIAL
    ]
    if ignored:
        print(
            f"{source.path}: {', '.join(ignored)} are ignored; optics are defocus, "
            "spherical aberration and amplitude contrast here",
            file=sys.stderr,
        )


def add_resample(option: Callable[..., Any]) -> None:
    """Declare the option for commands with a map."""
    option(
        "--resample",
        action="store_true",
        help="bring a map of another box or voxel size to the images'",
    )


def read_map(path: Path, source: io.ParticleFile, resampled: bool) -> jax.Array:
    """Read the map that particles are compared with.

    Raises
    ------
    InputError
        If it is zero, or its box or voxels are not those of the images and it is not
        to be resampled.
    """
    volume = _on_grid(path, io.read_mrc(path)[0], source, resampled)
    if not volume.any():
        raise InputError(f"{path} is zero everywhere; a map to start from is wanted.")
    return volume


def read_mask(path: Path, source: io.ParticleFile, resampled: bool) -> jax.Array:
    """Read the mask of a map.

    Raises
    ------
    InputError
        If it is not from 0 to 1, is zero, or is on another grid, as for a map.
    """
    values, _ = io.read_mrc(path)
    check_mask(values, path)
    mask = jnp.clip(_on_grid(path, values, source, resampled), 0, 1)
    check_mask(mask, path)
    return mask


def _on_grid(
    path: Path, volume: np.ndarray, source: io.ParticleFile, resampled: bool
) -> jax.Array:
    """Return a map on the grid of the images; resample it if that is allowed.

    A map of their side whose voxel size is unset is taken to be there.
    """
    n, m = volume.shape[0], source.particles.image_size
    pixel, voxel = source.particles.pixel_size_in_angstroms, io.voxel_size(path)
    if voxel is None and n == m:
        voxel = pixel
    if voxel is None:
        raise InputError(
            f"{path} has {n}^3 voxels of a size that it does not say, but the images "
            f"of {source.path} have {m}^2 pixels of {pixel:g} A; a voxel size in the "
            "map's header is wanted."
        )
    same = abs(voxel - pixel) <= _SAME_VOXEL * pixel
    if n == m and same:
        return jnp.asarray(volume)
    if resampled:
        grids = f"{n}^3 voxels of {voxel:g} A", f"{m}^3 of {pixel:g} A"
        print(f"{path}: {grids[0]}, resampled to {grids[1]}", file=sys.stderr)
        return resample(jnp.asarray(volume), voxel, m, pixel)
    here, there = f"voxels of {voxel:g} A", f"pixels of {pixel:g} A"
    if n != m:
        here, there = f"{n}^3 voxels", f"{m}^2 pixels"
    raise InputError(
        f"{path} has {here}, but the images of {source.path} have {there}; --resample "
        "brings it there."
    )


def box_of(particles: Particles) -> float:
    """Return the side of the images in angstroms."""
    return particles.image_size * particles.pixel_size_in_angstroms


def shell(flag: str, resolution: float, particles: Particles) -> int:
    """Return a resolution in angstroms as a band limit in cycles per box.

    Raises
    ------
    InputError
        If it is not one of the images', naming the option.
    """
    box, last = box_of(particles), (particles.image_size - 1) // 2
    if not box / (last + 1) < resolution <= box:
        raise InputError(
            f"{flag} wants {box / last:.3g} to {box:g} A for these images, not "
            f"{resolution:g}."
        )
    return math.floor(box / resolution)
