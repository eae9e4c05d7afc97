"""Tables of particles in RELION's format: images, optics and poses together.

The origins, which are minus our shifts, and their units are converted here and in
:mod:`jaxrefine.io.star` alone.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, final

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxrefine.ctf import CTF
from jaxrefine.errors import InputError
from jaxrefine.geometry import Poses
from jaxrefine.io.stacks import locate, open_images, split_name
from jaxrefine.io.star import (
    Table,
    fixed,
    numbers,
    of_optics_group,
    particle_block,
    particle_table,
    pixel_sizes,
    pose_columns,
    poses_of,
    read_star,
    write_star,
)
from jaxrefine.particles import Particles

_SAME_PIXEL = 1e-3
_UNIT_OF_DETECTOR_PIXEL = 1e4  # micrometres, in Angstrom


@final
@dataclass(frozen=True)
class ParticleFile:
    """A table of particles, and what its columns mean.

    Attributes
    ----------
    path
        The file.
    blocks
        Its tables, untouched.
    particles
        The images, which are read when they are asked for, with their optics.
    poses
        The poses: radians, and shifts in pixels.
    random_subset
        ``rlnRandomSubset`` of each particle; None if the file does not say.
    stacks
        The path of each stack of images, by its name in the table.
    """

    path: Path
    blocks: dict[str, Table] = field(repr=False)
    particles: Particles = field(repr=False)
    poses: Poses = field(repr=False)
    random_subset: Int[np.ndarray, " particles"] | None = field(repr=False)
    stacks: dict[str, Path] = field(repr=False)

    def __len__(self) -> int:
        return len(self.particles)


def read_particles(path: str | Path, datadir: str | Path | None = None) -> ParticleFile:
    """Read a table of particles, RELION 3.1 or older; the images stay where they are.

    The pixel size is ``rlnImagePixelSize`` of the optics groups, ``rlnPixelSize``,
    ``rlnDetectorPixelSize`` over ``rlnMagnification``, or that of the first stack. The
    optics are read if there is a column ``rlnDefocusU``; columns of the particles take
    precedence over those of their optics group. Beam tilt and higher aberrations are
    ignored.

    Parameters
    ----------
    path
        The STAR file.
    datadir
        Stacks whose path is relative are looked for in the folder of the file, in the
        working directory, then here.

    Raises
    ------
    InputError
        If the file is not a table of particles with images and poses, if a stack is
        missing, damaged or too short, or if images or pixels differ in size.
    """
    path = Path(path)
    blocks = read_star(path)
    table = particle_table(blocks, path)
    if not any(table.values()):
        raise InputError(f"{path} holds no particles.")
    if "rlnImageName" not in table:
        raise InputError(f"{path} lacks the column rlnImageName.")
    angles, shifts = poses_of(blocks, path)
    folders = [path.parent, Path(), *([] if datadir is None else [Path(datadir)])]
    images, stacks = open_images(table["rlnImageName"], folders, path)
    pixel = _pixel_size(blocks, table, path) or images.pixel_size_in_angstroms
    ctf = _ctf(blocks, table, path)
    if pixel is None and ctf is not None:
        raise InputError(f"{path} gives defoci but no pixel size, nor do its stacks.")
    return ParticleFile(
        path,
        blocks,
        Particles(images, ctf, pixel or 1.0),
        Poses(jnp.asarray(angles), jnp.asarray(shifts)),
        _whole_numbers(table, "rlnRandomSubset", path),
        stacks,
    )


def write_particles(
    path: str | Path,
    particle_file: ParticleFile,
    poses: Poses,
    extra: Mapping[str, Sequence[Any] | Array | np.ndarray] | None = None,
) -> None:
    """Write a table that was read, with other poses and further columns.

    Blocks, columns and their order are kept. Origins are written in the unit that the
    file has them in; if it has none, in Angstrom with optics groups and in pixels
    without. A stack that was found beside the old file is named by its path from the
    new one, one that was found from the working directory keeps its name, and any
    other gets its absolute path.

    Parameters
    ----------
    path
        The file, which appears complete or not at all.
    particle_file
        From `read_particles`.
    poses
        The poses to write.
    extra
        Further columns, which replace those of the same name.

    Raises
    ------
    InputError
        If a column or the poses are not as many as the particles, or the file cannot
        be written.
    """
    path = Path(path)
    blocks = dict(particle_file.blocks)
    name = particle_block(blocks, particle_file.path)
    table = dict(blocks[name])
    columns: dict[str, Sequence[Any] | Array | np.ndarray] = {
        **_poses_in_style(blocks, table, particle_file, poses),
        **(extra or {}),
    }
    for column, values in columns.items():
        if len(values) != len(particle_file):
            raise InputError(
                f"Cannot write {path}: {len(values)} values of {column} came with "
                f"{len(particle_file)} particles."
            )
        table[column] = _texts(values)
    renamed = {
        stack: _name_from(path.parent, stack, found, particle_file.path.parent)
        for stack, found in particle_file.stacks.items()
    }
    table["rlnImageName"] = [
        image[: image.rfind("@") + 1] + renamed[split_name(image, path)[1]]
        for image in table["rlnImageName"]
    ]
    blocks[name] = table
    write_star(path, blocks)


def write_new_particles(
    path: str | Path,
    poses: Poses,
    image_names: Sequence[str],
    image_size: int,
    pixel_size_in_angstroms: float,
    group: CTF,
    ctf: CTF | None = None,
) -> None:
    """Write a RELION 3.1 file of particles that share one optics group.

    RELION wants the group's optics even where it corrects nothing, and the name of a
    micrograph, which is made up.

    Parameters
    ----------
    path
        The file, which appears complete or not at all.
    poses, image_names
        Of each particle.
    image_size, pixel_size_in_angstroms
        Side of the images in pixels, and of a pixel.
    group
        The voltage, spherical aberration and amplitude contrast of the group.
    ctf
        The defocus of each particle, and what else is its own.
    """
    optics = {
        "rlnOpticsGroup": ["1"],
        "rlnOpticsGroupName": ["opticsGroup1"],
        **{
            name: [f"{float(getattr(group, leaf)):.6f}"]
            for name, leaf in _GROUP_OPTICS.items()
        },
        "rlnImagePixelSize": [f"{pixel_size_in_angstroms:.6f}"],
        "rlnImageSize": [str(image_size)],
        "rlnImageDimensionality": ["2"],
    }
    angles, shifts = np.asarray(poses.angles), np.asarray(poses.shifts)
    particles = {
        "rlnImageName": list(image_names),
        "rlnMicrographName": ["simulated.mrc"] * len(image_names),
        "rlnOpticsGroup": ["1"] * len(image_names),
        **pose_columns(angles, shifts, pixel_size_in_angstroms),
    }
    if ctf is not None:
        for name, (leaf, unit, _) in _PARTICLE_OPTICS.items():
            values = np.asarray(getattr(ctf, leaf), np.float64)
            particles[name] = fixed(values / unit)
    write_star(path, {"optics": optics, "particles": particles})


def image_identities(
    blocks: dict[str, Table], path: str | Path
) -> list[tuple[int, Path]] | None:
    """Return what identifies the image of each particle, wherever its table lies.

    That is its number in its stack and the stack's absolute path; None if the table
    names no images. The stack need not exist.
    """
    path = Path(path)
    table = particle_table(blocks, path)
    if "rlnImageName" not in table:
        return None
    parts = [split_name(name, path) for name in table["rlnImageName"]]
    folders = [path.parent, Path()]
    absolute = {
        stack: Path(os.path.abspath(locate(stack, folders) or path.parent / stack))
        for stack in {stack for _, stack in parts}
    }
    return [(number, absolute[stack]) for number, stack in parts]


# Column: leaf of CTF, unit of the column, default (None where the column is required).
_DEGREE = np.pi / 180
_PARTICLE_OPTICS: dict[str, tuple[str, float, float | str | None]] = {
    "rlnDefocusU": ("defocus_u", 1.0, None),
    "rlnDefocusV": ("defocus_v", 1.0, "rlnDefocusU"),
    "rlnDefocusAngle": ("defocus_angle", _DEGREE, 0.0),
    "rlnPhaseShift": ("phase_shift", _DEGREE, 0.0),
    "rlnCtfBfactor": ("b_factor", 1.0, 0.0),
    "rlnCtfScalefactor": ("scale", 1.0, 1.0),
}
_GROUP_OPTICS = {
    "rlnVoltage": "voltage",
    "rlnSphericalAberration": "spherical_aberration",
    "rlnAmplitudeContrast": "amplitude_contrast",
}


def _ctf(blocks: dict[str, Table], table: Table, path: Path) -> CTF | None:
    if "rlnDefocusU" not in table:
        return None
    leaves = {}
    for name, (leaf, unit, default) in _PARTICLE_OPTICS.items():
        if isinstance(default, str) and name not in table:
            name = default
        if name in table:
            leaves[leaf] = jnp.asarray(unit * numbers(table, name, path))
        else:
            leaves[leaf] = default
    for name, leaf in _GROUP_OPTICS.items():
        leaves[leaf] = jnp.asarray(_of_each(blocks, table, name, path))
    contrast = leaves["amplitude_contrast"]
    if not bool(((contrast >= 0) & (contrast <= 1)).all()):
        raise InputError(f"{path}, column rlnAmplitudeContrast: 0 to 1 is wanted.")
    if not bool((leaves["voltage"] > 0).all()):
        raise InputError(f"{path}, column rlnVoltage: positive numbers are wanted.")
    return CTF(**leaves)


def _of_each(
    blocks: dict[str, Table], table: Table, name: str, path: Path
) -> Float[np.ndarray, " particles"]:
    """Return a number of each particle, from its own row or its optics group's."""
    if name in table:
        return numbers(table, name, path)
    return of_optics_group(blocks, table, name, path)


def _pixel_size(blocks: dict[str, Table], table: Table, path: Path) -> float | None:
    """Return the one pixel size of a table, in Angstrom; None if it has none."""
    if "rlnImagePixelSize" in blocks.get("optics", {}):
        sizes = pixel_sizes(blocks, table, path)
    elif "rlnPixelSize" in table:
        sizes = numbers(table, "rlnPixelSize", path)
    elif {"rlnDetectorPixelSize", "rlnMagnification"} <= table.keys():
        detector = numbers(table, "rlnDetectorPixelSize", path)
        magnification = numbers(table, "rlnMagnification", path)
        sizes = np.zeros_like(detector)
        np.divide(detector, magnification, out=sizes, where=magnification > 0)
        sizes = _UNIT_OF_DETECTOR_PIXEL * sizes
    else:
        return None
    smallest, largest = float(sizes.min()), float(sizes.max())
    if smallest <= 0:
        raise InputError(f"{path} has a pixel size that is not positive.")
    if largest - smallest > _SAME_PIXEL * largest:
        raise InputError(
            f"{path} has pixels of {smallest:g} to {largest:g} A; one size is wanted."
        )
    return float(sizes[0])


def _whole_numbers(
    table: Table, name: str, path: Path
) -> Int[np.ndarray, " particles"] | None:
    if name not in table:
        return None
    values = numbers(table, name, path)
    if (values != np.rint(values)).any():
        raise InputError(f"{path}, column {name}: whole numbers are wanted.")
    return values.astype(np.int64)


def _poses_in_style(
    blocks: dict[str, Table], table: Table, particle_file: ParticleFile, poses: Poses
) -> Table:
    """Return the columns of poses, with origins in the unit that a table has."""
    angles, shifts = np.asarray(poses.angles), np.asarray(poses.shifts)
    pixel = particle_file.particles.pixel_size_in_angstroms
    units = [unit for unit in (pixel, None) if _origin(unit) in table]
    if not units:
        units = [pixel if "optics" in blocks else None]
    columns: Table = {}
    for unit in units:
        columns |= pose_columns(angles, shifts, unit)
    return columns


def _origin(pixel: float | None) -> str:
    return "rlnOriginX" if pixel is None else "rlnOriginXAngst"


def _texts(values: Sequence[Any] | Array | np.ndarray) -> list[str]:
    """Return values as they stand in a column."""
    array = np.asarray(values)
    if np.issubdtype(array.dtype, np.floating):
        return fixed(array.astype(np.float64))
    return [str(value) for value in array.tolist()]


def _name_from(folder: Path, stack: str, found: Path, old_folder: Path) -> str:
    """Return the name of a stack in a table that lies in another folder."""
    absolute = os.path.abspath(found)
    if os.path.isabs(stack):
        return stack
    if _same(old_folder / stack, found):
        relative = os.path.relpath(absolute, os.path.abspath(folder))
        return relative if _same(folder / relative, found) else absolute
    shadowed = (folder / stack).exists() and not _same(folder / stack, found)
    return stack if _same(Path(stack), found) and not shadowed else absolute


def _same(path: Path, other: Path) -> bool:
    return path.exists() and other.exists() and path.samefile(other)
