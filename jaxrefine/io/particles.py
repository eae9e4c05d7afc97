"""Tables of particles: images, optics and poses together.

A table is RELION's, or is told in RELION's words by :mod:`jaxrefine.io.cs`.

The origins, which are minus our shifts, and their units are converted here and in
:mod:`jaxrefine.io.poses` alone.
"""

import os
from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import final

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from jaxrefine.ctf import CTF, is_finite
from jaxrefine.data.particles import Particles
from jaxrefine.data.preprocess import LARGEST_STEP, Resampled
from jaxrefine.errors import InputError
from jaxrefine.geometry import Poses
from jaxrefine.io.columns import (
    fixed,
    numbers,
    of_each,
    of_each_if_any,
    particle_block,
    particle_table,
    pixel_sizes_if_any,
    require,
    whole_numbers,
)
from jaxrefine.io.cs import read_cs
from jaxrefine.io.poses import pose_columns, poses_on_one_grid
from jaxrefine.io.stacks import (
    locate,
    names_from,
    open_images,
    search_folders,
    split_name,
)
from jaxrefine.io.star import Table, Values, read_star, write_star

_VIEW = {"rlnAngleRot", "rlnAngleTilt"}
_PREPARED = {
    "rlnCtfDataAreCtfPremultiplied": "multiplied by their CTF",
    "rlnCtfDataArePhaseFlipped": "phase-flipped",
}
_SAME_PIXEL = 1e-3


@final
@dataclass(frozen=True)
class ParticleFile:
    """A table of particles, and what its columns mean.

    Attributes
    ----------
    path
        The file.
    blocks
        Its tables, untouched; those of a cryoSPARC file as RELION would have them.
    particles
        The images, which are read when they are asked for, with their optics.
    poses
        The poses: radians, and shifts in pixels of `particles`.
    pixel_sizes
        Of each image in its stack, in Angstrom. Where optics groups differ, the images
        of `particles` are brought to the largest (`preprocess.Resampled`).
    has_poses
        Whether the file has them: if it has neither ``rlnAngleRot`` nor
        ``rlnAngleTilt``, all poses are zero.
    optics_group
        ``rlnOpticsGroup`` of each particle, from 1; None if the file does not say.
    stacks
        The path of each stack of images, by its name in the table.
    """

    path: Path
    blocks: dict[str, Table] = field(repr=False)
    particles: Particles = field(repr=False)
    poses: Poses = field(repr=False)
    pixel_sizes: Float[np.ndarray, " particles"] = field(repr=False)
    has_poses: bool
    optics_group: Int[np.ndarray, " particles"] | None = field(repr=False)
    stacks: dict[str, Path] = field(repr=False)

    def __len__(self) -> int:
        return len(self.particles)

    @cached_property
    def random_subset(self) -> Int[np.ndarray, " particles"] | None:
        """``rlnRandomSubset`` of each particle, 1 or 2; None if the file does not say.

        Raises
        ------
        InputError
            If there is another value, or one of the two alone.
        """
        table = particle_table(self.blocks, self.path)
        if "rlnRandomSubset" not in table:
            return None
        subset = whole_numbers(table, "rlnRandomSubset", self.path)
        good = (subset == 1) | (subset == 2)
        require(good, table, "rlnRandomSubset", self.path, "1 or 2")
        if len(set(subset)) == 1:
            raise InputError(
                f"{self.path}, column rlnRandomSubset: half sets want both 1 and 2, "
                f"not {subset[0]} for all particles."
            )
        return subset


def read_blocks(path: str | Path) -> dict[str, Table]:
    """Read a STAR file, or a ``.cs`` file as the blocks of one.

    Raises what `read_star` and `read_cs` do.
    """
    path = Path(path)
    return read_cs(path) if path.suffix == ".cs" else read_star(path)


def read_particles(path: str | Path, datadir: str | Path | None = None) -> ParticleFile:
    """Read a table of particles; the images stay where they are.

    The pixel size is ``rlnImagePixelSize``, ``rlnPixelSize``, ``rlnDetectorPixelSize``
    over ``rlnMagnification``, or that of the first stack.
    Where there are several, images are brought to the largest as they are read. The
    optics are read if there is a column ``rlnDefocusU``; columns of the particles take
    precedence over those of their optics group. Beam tilt and higher aberrations are
    ignored. Each optics group has a noise spectrum of its own (`particles.Particles`);
    without any there is one.

    Parameters
    ----------
    path
        A STAR file of RELION, of any version, or a ``.cs`` file of cryoSPARC.
    datadir
        Stacks whose path is relative are looked for here, in the folder of the file, in
        the working directory, then in the folders above that of the file.

    Raises
    ------
    InputError
        If the file is not a table of particles with images, if a stack is missing,
        damaged or too short, if images differ in size, or pixels by more than 25 %, if
        there are some but not all columns of poses or of optics, if a number is not one
        in single precision, if the particles are of tomograms, or if the images are
        multiplied by their CTF or its sign.
    """
    path = Path(path)
    blocks = read_blocks(path)
    table = particle_table(blocks, path)
    if not any(table.values()):
        raise InputError(f"{path} holds no particles.")
    if "rlnImageName" not in table:
        raise InputError(f"{path} lacks the column rlnImageName.")
    _require_single_particles(blocks, table, path)
    _require_raw_images(blocks, table, path)
    count = len(table["rlnImageName"])
    has_poses = not _VIEW.isdisjoint(table)
    poses = Poses(np.tile(np.eye(3), (count, 1, 1)), np.zeros((count, 2)))
    if has_poses:
        poses, _ = poses_on_one_grid(blocks, path)
    images, stacks = open_images(table["rlnImageName"], path, datadir)
    _require_box(blocks, table, images.image_size, path)
    ctf = _ctf(blocks, table, path)
    sizes = _pixel_sizes(blocks, table, path)
    if sizes is None:
        if np.isnan(images.pixel_size_in_angstroms or 1.0):
            raise InputError(
                f"{path} gives no pixel size, and {next(iter(stacks.values()))} none "
                "that is positive and the same along x and y."
            )
        if images.pixel_size_in_angstroms is None and ctf is not None:
            raise InputError(
                f"{path} gives defoci but no pixel size, nor do its stacks."
            )
        sizes = np.full(count, images.pixel_size_in_angstroms or 1.0)
    pixel = float(sizes.max())
    source = images
    if sizes.min() < pixel * (1 - _SAME_PIXEL):
        source = Resampled(images, pixel / sizes)
    if ctf is not None:
        _require_finite(ctf, pixel, path)
    group = None
    if "rlnOpticsGroup" in table:
        group = whole_numbers(table, "rlnOpticsGroup", path)
    places = None if group is None else np.unique(group, return_inverse=True)[1]
    return ParticleFile(
        path,
        blocks,
        Particles(source, ctf, pixel, places),
        poses,
        sizes,
        has_poses,
        group,
        stacks,
    )


def write_particles(
    path: str | Path,
    particle_file: ParticleFile,
    poses: Poses,
    extra: Mapping[str, Values] | None = None,
) -> None:
    """Write a table that was read, with other poses and further columns.

    The file is RELION's, whatever was read. Blocks, columns and their order are kept.
    Origins are written in Angstrom if ``rlnImagePixelSize`` is given and in pixels if
    not, and also in the other unit if the file has that. Numbers of poses that are
    as they were read stay as they stand in the file. So do the names of stacks if from
    one folder, that of the new file or one above, all of them are found. Otherwise,
    stacks that were found beside the old file are named by their path from the new
    one's folder, and others by their absolute path.

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
    table = copy(blocks[name])
    columns: dict[str, Values] = {
        **_poses_in_style(blocks, table, particle_file, poses),
        **(extra or {}),
    }
    read: Table = {}
    if particle_file.has_poses:  # what else stands there was not read
        read = _poses_in_style(blocks, table, particle_file, particle_file.poses)
    for column, values in columns.items():
        if len(values) != len(particle_file):
            raise InputError(
                f"Cannot write {path}: {len(values)} values of {column} came with "
                f"{len(particle_file)} particles."
            )
        texts = _texts(values)
        if column in read and column in table:
            texts = [
                old if new == same else new
                for old, new, same in zip(
                    table[column], texts, read[column], strict=True
                )
            ]
        table[column] = texts
    renamed = names_from(path, particle_file.path, particle_file.stacks)
    table["rlnImageName"] = [
        _renamed(image, path, renamed) for image in table["rlnImageName"]
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
    particles = {
        "rlnImageName": list(image_names),
        "rlnMicrographName": ["simulated.mrc"] * len(image_names),
        "rlnOpticsGroup": ["1"] * len(image_names),
        **pose_columns(poses, pixel_size_in_angstroms),
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
    folders = search_folders(path)
    absolute = {
        stack: Path(os.path.realpath(locate(stack, folders) or path.parent / stack))
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
        for name in _PARTICLE_OPTICS:
            if name in table:
                raise InputError(f"{path} has {name} but lacks rlnDefocusU.")
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
        leaves[leaf] = jnp.asarray(of_each(blocks, table, name, path))
    contrast = leaves["amplitude_contrast"]
    if not bool(((contrast >= 0) & (contrast <= 1)).all()):
        raise InputError(f"{path}, column rlnAmplitudeContrast: 0 to 1 is wanted.")
    if not bool((leaves["voltage"] > 0).all()):
        raise InputError(f"{path}, column rlnVoltage: positive numbers are wanted.")
    return CTF(**leaves)


def _require_finite(ctf: CTF, pixel: float, path: Path) -> None:
    """Raise if a CTF is not a number somewhere, in single precision."""
    bad = np.flatnonzero(~np.asarray(is_finite(ctf, pixel)))
    if len(bad):
        raise InputError(
            f"{path}: the optics of particle {bad[0] + 1} are out of range; its "
            "contrast-transfer function is not finite."
        )


def _require_single_particles(
    blocks: dict[str, Table], table: Table, path: Path
) -> None:
    """Raise if a table says that its images are those of particles in tomograms."""
    stacked, name = blocks.get("general", {}), "rlnTomoSubTomosAre2DStacks"
    if name in stacked and numbers(stacked, name, path).any():
        raise InputError(
            f"{path} says {name}: its images are tilt series of particles in "
            "tomograms; single particles are wanted."
        )
    dimensions = of_each_if_any(blocks, table, "rlnImageDimensionality", path)
    if dimensions is not None and (dimensions != 2).any():
        raise InputError(
            f"{path} says rlnImageDimensionality {dimensions[dimensions != 2][0]:g}: "
            "its images are not of two dimensions; single particles are wanted."
        )


def _require_raw_images(blocks: dict[str, Table], table: Table, path: Path) -> None:
    """Raise if a table says that something was done to its images' CTF."""
    for name, done in _PREPARED.items():
        said = of_each_if_any(blocks, table, name, path)
        if said is not None and said.any():
            raise InputError(
                f"{path} says {name}: its images are {done}; images as they were "
                "extracted are wanted."
            )


def _require_box(blocks: dict[str, Table], table: Table, size: int, path: Path) -> None:
    """Raise if a table says another box than the images have."""
    sizes = of_each_if_any(blocks, table, "rlnImageSize", path)
    if sizes is not None and (sizes != size).any():
        said = ", ".join(f"{each:g}" for each in np.unique(sizes))
        raise InputError(
            f"{path} has particles with an rlnImageSize of {said}, but images of "
            f"{size} pixels; one size is wanted."
        )


def _pixel_sizes(
    blocks: dict[str, Table], table: Table, path: Path
) -> Float[np.ndarray, " particles"] | None:
    """Return the pixel size of each image, in Angstrom; None if the table has none."""
    sizes = pixel_sizes_if_any(blocks, table, path)
    if sizes is not None:
        smallest, largest = float(sizes.min()), float(sizes.max())
        if largest > LARGEST_STEP * smallest:
            raise InputError(
                f"{path} has pixels of {smallest:g} to {largest:g} A; sizes that "
                f"differ by {LARGEST_STEP - 1:.0%} at most are wanted."
            )
    return sizes


def _poses_in_style(
    blocks: dict[str, Table], table: Table, particle_file: ParticleFile, poses: Poses
) -> Table:
    """Return the columns of poses, with origins in the units that a table wants."""
    pixel = particle_file.particles.pixel_size_in_angstroms
    shifts = np.asarray(poses.shifts, np.float64)
    in_angstroms = "rlnImagePixelSize" in table.keys() | blocks.get("optics", {})
    columns: Table = {}
    for unit in (pixel, None):
        suffix = "" if unit is None else "Angst"
        in_style = (unit is not None) == in_angstroms
        if in_style or any(f"rlnOrigin{axis}{suffix}" in table for axis in "XY"):
            own = 1.0 if unit else (pixel / particle_file.pixel_sizes)[:, None]
            columns |= pose_columns(Poses(poses.rotations, own * shifts), unit)
    return columns


def _renamed(image: str, path: Path, names: Mapping[str, str]) -> str:
    """Return an image's name with another for its stack, and all else as it was."""
    start, stack = image.find("@") + 1, split_name(image, path)[1]
    return image[:start] + names[stack] + image[start + len(stack) :]


def _texts(values: Values) -> list[str]:
    """Return values as they stand in a column."""
    array = np.asarray(values)
    if np.issubdtype(array.dtype, np.floating):
        return fixed(array.astype(np.float64))
    return [str(value) for value in array.tolist()]
