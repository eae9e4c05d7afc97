"""What every command with particles shares: its options, inputs and their checks."""

import argparse
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxrefine import io
from jaxrefine.background import Normalised
from jaxrefine.errors import InputError

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
        help="bring every image's background, outside of the particle's diameter (by "
        "default three fourths of the box), to mean 0 and standard deviation 1",
    )
    option(
        "--particle-diameter",
        type=float,
        help="largest diameter of the particle, angstroms",
    )
    option("--datadir", type=Path, help="where else to look for stacks of images")


def read(options: argparse.Namespace, *, with_poses: bool) -> io.ParticleFile:
    """Read the particles; prepare their images as the options say.

    Raises
    ------
    InputError
        If the particles cannot be used, or have no poses but are to have some.
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
    box = particles.image_size * particles.pixel_size_in_angstroms
    diameter = options.particle_diameter
    if diameter is not None and not 0 < diameter <= box:
        raise InputError(
            f"--particle-diameter wants more than 0 and at most the box, {box:g} A, "
            f"not {diameter:g}."
        )
    if not (options.invert or options.normalise):
        return source
    circle = _CIRCLE * box if diameter is None else diameter
    pixels = circle / particles.pixel_size_in_angstroms
    images = Normalised(particles.images, pixels, options.invert)
    return replace(source, particles=replace(particles, images=images))


def read_map(path: Path, source: io.ParticleFile) -> jax.Array:
    """Read the map that particles are compared with.

    Raises
    ------
    InputError
        If it is zero, or its box or voxels are not those of the images.
    """
    volume, voxel = io.read_mrc(path)
    n, m = volume.shape[0], source.particles.image_size
    pixel = source.particles.pixel_size_in_angstroms
    if n != m:
        raise InputError(
            f"{path} has {n}^3 voxels, but the images of {source.path} have {m}^2 "
            "pixels; the same side is wanted."
        )
    if abs(voxel - pixel) > _SAME_VOXEL * pixel:
        raise InputError(
            f"{path} has voxels of {voxel:g} A, but the images of {source.path} have "
            f"pixels of {pixel:g} A; the same size is wanted."
        )
    if not volume.any():
        raise InputError(f"{path} is zero everywhere; a map to start from is wanted.")
    return jnp.asarray(volume)


def check_folder(out: Path) -> None:
    """Refuse to write where there is no folder, or a folder of this name.

    Raises
    ------
    InputError
        If the file cannot be written.
    """
    if not out.parent.is_dir():
        raise InputError(f"Cannot write {out}: {out.parent} is not a folder.")
    if out.is_dir():
        raise InputError(f"Cannot write {out}: it is a folder.")


def check_output(out: Path, source: io.ParticleFile, *others: Path) -> None:
    """Refuse to write over an input.

    Raises
    ------
    InputError
        If the file to write is the table, one of its stacks, or another input.
    """
    for path in (source.path, *others, *source.stacks.values()):
        if out.exists() and path.exists() and out.samefile(path):
            raise InputError(f"Cannot write {out}: it is an input.")
