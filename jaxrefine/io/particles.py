"""Tables of particles: images, optics and poses together.

A table is RELION's, or is converted to RELION's columns by :mod:`jaxrefine.io.cs`.

Only this module and :mod:`jaxrefine.io.poses` convert RELION's origins, which are minus
the package's shifts, and their units.
"""

import os
from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import final

import numpy as np
from jaxtyping import Float, Int

from jaxrefine.ctf import CTF, is_finite
from jaxrefine.data.particles import ImageSource, Particles
from jaxrefine.data.preprocess import LARGEST_STEP, Resampled
from jaxrefine.errors import InputError
from jaxrefine.geometry import Poses
from jaxrefine.io.aberrations import (
    ignored,
    read_aberrations,
    read_tilts,
    tilt_groups,
)
from jaxrefine.io.clusters import clusters
from jaxrefine.io.columns import (
    fixed,
    numbers,
    of_each,
    of_each_if_any,
    parsed,
    particle_block,
    particle_table,
    pixel_sizes_if_any,
    require,
    whole_numbers,
)
from jaxrefine.io.cs import TableFile, read_cs, refuse_group_file
from jaxrefine.io.fields import called, is_cs, lack_of
from jaxrefine.io.poses import (
    angle_columns,
    pose_columns,
    poses_on_one_grid,
    rotations_of,
)
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
# Columns of what the images of a table are, beside their optics and their poses: how
# well they fit a map, their scale, and which of them are copies.
_OF_IMAGES = (
    "jaxrefine",  # all of this package's
    "rlnNormCorrection",
    "rlnGroupScaleCorrection",
    "rlnIsFlip",
    "rlnLogLikeliContribution",
    "rlnMaxValueProbDistribution",
    "rlnNrOfSignificantSamples",
    "rlnImageOriginalName",
    "rlnOriginalParticleName",
)
_LARGEST_IMAGE = 100_000  # pixels along its side
SAME_PIXEL = 1e-3  # Pixel sizes this close, relatively, count as equal: no resampling.


@final
@dataclass(frozen=True)
class ParticleFile:
    """A table of particles, and the images, optics and poses that it describes.

    Attributes
    ----------
    path
        The file.
    blocks
        Its tables, unchanged; those of a cryoSPARC file in RELION's columns.
    particles
        The images, which are read on demand, with their optics.
    poses
        The poses: rotation matrices, and shifts in pixels of `particles`.
    pixel_sizes
        Pixel size of each image in its stack, in angstroms. Where they differ, the
        images of `particles` are resampled to the largest (`preprocess.Resampled`).
    has_poses
        Whether the file has poses. If it has neither ``rlnAngleRot`` nor
        ``rlnAngleTilt``, `poses` holds identity rotations and zero shifts.
    optics_group
        ``rlnOpticsGroup`` of each particle, from 1; None if the file has no such
        column.
    stacks
        The path of each stack of images, by its name in the table.
    shared
        How many different images, particles and helical tubes the rows are of, by these
        words, where several rows are of one; these are clusters of `particles`.
    joined, classes, passed_over
        Of a cryoSPARC table: where its fields were found, the number of particles in
        its classes, and what is wrong with files beside it, see `cs.TableFile`.
    lacking
        What files beside it lack, see there.
    ignored
        Columns, or fields of a cryoSPARC table, of optics that are not used.
    """

    path: Path
    blocks: dict[str, Table] = field(repr=False)
    particles: Particles = field(repr=False)
    poses: Poses = field(repr=False)
    pixel_sizes: Float[np.ndarray, " particles"] = field(repr=False)
    has_poses: bool
    optics_group: Int[np.ndarray, " particles"] | None = field(repr=False)
    stacks: dict[str, Path] = field(repr=False)
    shared: dict[str, int] = field(repr=False)
    joined: dict[Path, tuple[str, ...]] = field(default_factory=dict)
    classes: dict[int, int] = field(default_factory=dict)
    passed_over: tuple[str, ...] = ()
    ignored: tuple[str, ...] = ()
    lacking: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.particles)

    @property
    def protein_is_dark(self) -> bool:
        """Whether the file says so of an image, by a negative ``rlnCtfScalefactor``."""
        table = particle_table(self.blocks, self.path)
        if "rlnCtfScalefactor" not in table:
            return False
        return bool((parsed(table["rlnCtfScalefactor"]) < 0).any())

    @cached_property
    def random_subset(self) -> Int[np.ndarray, " particles"] | None:
        """``rlnRandomSubset`` of each particle, 1 or 2; None without such a column.

        Raises
        ------
        InputError
            If a value is neither 1 nor 2, or if all values are equal.
        """
        table = particle_table(self.blocks, self.path)
        if "rlnRandomSubset" not in table:
            return None
        subset = parsed(table["rlnRandomSubset"])
        good, expected = (subset == 1) | (subset == 2), "1 or 2"
        if is_cs(self.path):  # The field counts from 0.
            table = {"rlnRandomSubset": [f"{half - 1:.15g}" for half in subset]}
            expected = "0 or 1"
        require(good, table, "rlnRandomSubset", self.path, expected)
        if len(set(subset)) == 1:
            raise InputError(
                f"{self.path}, {called('rlnRandomSubset', self.path)}: there must be "
                f"particles of both half sets, {expected.replace('or', 'and')}, got "
                f"{table['rlnRandomSubset'][0]} for all particles"
            )
        return subset.astype(np.int64)


def read_table(
    path: str | Path,
    passthrough: str | Path | None = None,
    class_number: int | None = None,
    *,
    with_ctf: bool = True,
) -> TableFile:
    """Read the blocks of a STAR file, or of a ``.cs`` file converted to one.

    Parameters
    ----------
    path
        The file.
    passthrough, class_number, with_ctf
        Of a cryoSPARC table, see `read_cs`.

    Raises
    ------
    InputError
        For the reasons of `read_star` and `read_cs`, if the file is a ``.csg`` file of
        cryoSPARC, or if a STAR file is given a passthrough file or a class.
    """
    path = Path(path)
    if path.suffix == ".csg":
        refuse_group_file(path)
    if is_cs(path):
        return read_cs(path, passthrough, class_number, with_ctf=with_ctf)
    for given, what in ((passthrough, "passthrough file"), (class_number, "class")):
        if given is not None:
            raise InputError(
                f"a {what} must be given with a cryoSPARC table (.cs), got {given} "
                f"with {path}"
            )
    return TableFile(read_star(path))


def read_particles(
    path: str | Path,
    datadir: str | Path | None = None,
    *,
    passthrough: str | Path | None = None,
    class_number: int | None = None,
    with_ctf: bool = True,
) -> ParticleFile:
    """Read a table of particles; their images are read later, on demand.

    The pixel size is ``rlnImagePixelSize``, ``rlnPixelSize``, ``rlnDetectorPixelSize``
    divided by ``rlnMagnification``, or that of the first stack. Where pixel sizes
    differ, images are resampled to the largest as they are read. The optics are read if
    there is a column ``rlnDefocusU``; columns of the particles take precedence over
    those of their optics group. Each optics group has its own noise spectrum
    (`particles.Particles`) and its own aberrations (`aberrations.read_aberrations`);
    without optics groups there is a single one, and there are no aberrations, but for
    particles of different beam tilts in a table of RELION 3.0, which are then groups.

    Rows that are not independent form a cluster: those of one image; those of one
    particle, which have the same ``rlnImageOriginalName`` (if they were expanded, and
    then subtracted from or extracted again) or the image of that name, cryoSPARC's
    ``sym_expand/src_uid`` or ``uid``, or the same coordinates in a micrograph; and
    those of one helical tube, ``rlnHelicalTubeID`` of ``rlnMicrographName``, or of the
    stack where that is not known.

    Parameters
    ----------
    path
        A STAR file of RELION, of any version, or a ``.cs`` file of cryoSPARC.
    datadir
        Folder in which stacks with a relative path are looked for first; then follow
        the folder of the file, the working directory, and the folders above that of the
        file.
    passthrough, class_number
        Of a cryoSPARC table, see `read_cs`.
    with_ctf
        Whether optics are read. If not, `particles` has none but a magnification,
        whatever the file says.

    Raises
    ------
    InputError
        If the file is not a table of particles with images, if a stack is missing,
        damaged or too short, if images differ in size, or pixel sizes or magnifications
        by more than 25 %, if only some of the columns of poses or of optics are there,
        if a value is not a number in single precision, if the particles are from
        tomograms, if the images were multiplied by their CTF or its sign, or if optics
        are to be read and those of a cryoSPARC table are in none of its files.
    """
    path = Path(path)
    file = read_table(path, passthrough, class_number, with_ctf=with_ctf)
    table = _require_particles(file, path, with_ctf)
    images, stacks = open_images(table["rlnImageName"], path, datadir)
    _require_box(file.blocks, table, images.image_size, path)
    if np.isnan(images.pixel_size_in_angstroms or 1.0) and (
        pixel_sizes_if_any(file.blocks, table, path) is None
    ):
        raise InputError(
            "the pixel size of the first stack must be positive and the same along "
            f"x and y, since {path} gives none, got another in "
            f"{next(iter(stacks.values()))}"
        )
    found = _described(path, file, images, images.pixel_size_in_angstroms, with_ctf)
    cluster, shared = clusters(table, images, path)
    particles = replace(found.particles, cluster=cluster)
    return replace(found, particles=particles, stacks=stacks, shared=shared)


def read_without_images(
    path: str | Path, image_size: int, pixel_size_in_angstroms: float
) -> ParticleFile:
    """Read a table of particles for images that are still to be made.

    The images that it names need not be there: those of `particles` are zero, and none
    of them depend on each other. Columns that tell of the images of the table, and not
    of their optics or poses, are left out: how well they fit a map
    (``rlnLogLikeliContribution``, ``rlnMaxValueProbDistribution``,
    ``rlnNrOfSignificantSamples`` and all of this package), their scale and hand
    (``rlnNormCorrection``, ``rlnGroupScaleCorrection``, ``rlnIsFlip``), and which are
    copies (``rlnImageOriginalName``, ``rlnOriginalParticleName``). Segments of a tube
    stay its segments.

    Parameters
    ----------
    path
        As for `read_particles`.
    image_size, pixel_size_in_angstroms
        Side of the images and edge of a pixel, where the table does not say them.

    Raises
    ------
    InputError
        For the reasons of `read_particles`, but for those of stacks and their names, or
        if the images of the table are not all of one size, or their size is no whole
        number from 2 to 100,000.
    """
    path = Path(path)
    file = read_table(path)
    table = _require_particles(file, path, True)
    sizes = of_each_if_any(file.blocks, table, "rlnImageSize", path)
    size = image_size if sizes is None else float(sizes[0])
    if not (2 <= size <= _LARGEST_IMAGE and size == int(size)):
        raise InputError(
            f"{path}, column rlnImageSize: sizes must be whole numbers from 2 to "
            f"{_LARGEST_IMAGE}, got {size:g}"
        )
    size = int(size)
    _require_box(file.blocks, table, size, path)
    name = particle_block(file.blocks, path)
    kept = {
        column: table[column] for column in table if not column.startswith(_OF_IMAGES)
    }
    file = replace(file, blocks={**file.blocks, name: kept})
    blank = np.broadcast_to(np.float32(0), (len(table["rlnImageName"]), size, size))
    return _described(path, file, blank, pixel_size_in_angstroms, True)


def _require_particles(file: TableFile, path: Path, with_ctf: bool) -> Table:
    """Return the table of particles; raise if they are not single ones with images."""
    blocks = file.blocks
    table = particle_table(blocks, path)
    if not any(table.values()):
        raise InputError(f"{path} must hold particles, got none")
    if "rlnImageName" not in table:
        raise InputError(f"{path} must have the column rlnImageName, got none")
    if with_ctf and is_cs(path) and "rlnDefocusU" not in table:
        raise InputError(lack_of("ctf", path, file.joined, file.lacking))
    _require_single_particles(blocks, table, path)
    _require_raw_images(blocks, table, path)
    return table


def _described(
    path: Path,
    file: TableFile,
    images: ImageSource,
    pixel_size_of_stack: float | None,
    with_ctf: bool,
) -> ParticleFile:
    """Return images with the optics and the poses that a table says they have.

    Parameters
    ----------
    path, file, with_ctf
        The table, and whether its optics are used.
    images
        The images that it names.
    pixel_size_of_stack
        Their pixel size, where the table has none; None if it is not known.
    """
    blocks = file.blocks
    table = particle_table(blocks, path)
    count = len(table["rlnImageName"])
    posed = has_poses(blocks, path)
    if posed:
        poses, _ = poses_on_one_grid(blocks, path)
    else:
        poses = Poses(np.tile(np.eye(3), (count, 1, 1)), np.zeros((count, 2)))
    ctf = _ctf(blocks, table, path) if with_ctf else None
    sizes = _pixel_sizes(blocks, table, path)
    if sizes is None:
        if pixel_size_of_stack is None and ctf is not None:
            raise InputError(
                f"{path} or its first stack must give a pixel size, got defocus values "
                "without it"
            )
        sizes = np.full(count, pixel_size_of_stack or 1.0)
    pixel_size = float(sizes.max())
    source = images
    if sizes.min() < pixel_size * (1 - SAME_PIXEL):
        source = Resampled(images, pixel_size / sizes)
    optics_group = None
    if "rlnOpticsGroup" in table:
        optics_group = whole_numbers(table, "rlnOpticsGroup", path)
    has_ctf = ctf is not None
    if ctf is not None:
        _require_finite(ctf, pixel_size, path)
    tilt_group = tilt_groups(blocks, path, with_ctf=has_ctf)
    noise_group = tilt_group
    if optics_group is not None:
        _, noise_group = np.unique(optics_group, return_inverse=True)
    if tilt_group is None:
        aberrations = read_aberrations(
            blocks, path, optics_group, with_ctf=has_ctf, pixel_size=pixel_size
        )
    else:
        aberrations = read_tilts(blocks, path, tilt_group, pixel_size=pixel_size)
    return ParticleFile(
        path,
        blocks,
        Particles(source, ctf, pixel_size, noise_group, None, aberrations),
        poses,
        sizes,
        posed,
        optics_group,
        {},
        {},
        file.joined,
        file.classes,
        file.passed_over,
        (*file.ignored, *ignored(blocks, path, tilt_group, with_ctf=has_ctf)),
        file.lacking,
    )


def write_particles(
    path: str | Path,
    particle_file: ParticleFile,
    poses: Poses,
    extra: Mapping[str, Values] | None = None,
) -> None:
    """Write a table that was read, with new poses and additional columns.

    The file is a STAR file, whatever was read. Blocks, columns and their order are
    kept. Origins are written in angstroms if there is an ``rlnImagePixelSize`` and in
    pixels otherwise, and also in the other unit if the table has it. A number of a pose
    that has not changed keeps its text. The names of stacks are kept if all of them are
    found from one folder: that of the new file, the working directory, or one above the
    new file. Otherwise, stacks that were found beside the old file get their path
    relative to the new file's folder, and others their absolute path.

    Parameters
    ----------
    path
        The file, which appears complete or not at all.
    particle_file
        The table, from `read_particles`.
    poses
        The poses to write, one for each particle.
    extra
        Additional columns, which replace those of the same name.

    Raises
    ------
    InputError
        If there is not one pose, or one value of each column, for each particle, or if
        the file cannot be written.
    """
    path = Path(path)
    blocks = dict(particle_file.blocks)
    name = particle_block(blocks, particle_file.path)
    table = copy(blocks[name])
    columns: dict[str, Values] = {
        **_poses_in_style(blocks, table, particle_file, poses),
        **(extra or {}),
    }
    columns_read: Table = {}
    if particle_file.has_poses:
        columns_read = _poses_in_style(
            blocks, table, particle_file, particle_file.poses
        )
    for column, values in columns.items():
        if len(values) != len(particle_file):
            raise InputError(
                f"cannot write {path}: there must be one value of {column} for each of "
                f"{len(particle_file)} particles, got {len(values)}"
            )
        texts = _texts(values)
        if column in columns_read and column in table:
            texts = [
                original if text == unchanged else text
                for original, text, unchanged in zip(
                    table[column], texts, columns_read[column], strict=True
                )
            ]
        table[column] = texts
    renamed = names_from(path, particle_file.path, particle_file.stacks)
    table["rlnImageName"] = [
        _renamed(image, path, renamed) for image in table["rlnImageName"]
    ]
    blocks[name] = table
    write_star(path, blocks)


def has_poses(blocks: dict[str, Table], path: str | Path) -> bool:
    """Return whether the blocks of a file of particles have a column of a view."""
    return not _VIEW.isdisjoint(particle_table(blocks, path))


def stacks_found(
    blocks: dict[str, Table], path: str | Path, datadir: str | Path | None = None
) -> dict[str, Path]:
    """Return the path of each stack that a table names, by its name there.

    Stacks that are nowhere are left out, and none is opened. The parameters, but for
    the blocks of the file, are those of `read_particles`.

    Raises
    ------
    InputError
        If the table names no images, a name is none of an image, or `datadir` is not a
        folder.
    """
    path = Path(path)
    table = particle_table(blocks, path)
    if "rlnImageName" not in table:
        raise InputError(f"{path} must have the column rlnImageName, got none")
    folders = search_folders(path, datadir)
    names = {split_name(image, path)[1]: None for image in table["rlnImageName"]}
    found = {stack: locate(stack, folders) for stack in names}
    return {stack: place for stack, place in found.items() if place is not None}


def write_expanded(
    path: str | Path,
    source: str | Path,
    blocks: dict[str, Table],
    stacks: Mapping[str, Path],
    operators: Float[np.ndarray, "order 3 3"],
) -> None:
    """Write a table that was read, with every particle once for each operator.

    The particle's rows follow each other, in the order of the operators: that of ``S``
    has the rotation ``R S``, which gives the same image of a map with this symmetry,
    and all else is that of the particle. Of the row of the identity, angles keep their
    text, too. Stacks that were found are named as `write_particles` names them, and
    others keep their names.

    Parameters
    ----------
    path
        The file, which appears complete or not at all.
    source, blocks
        The file that was read and its blocks, see `read_table`, with poses.
    stacks
        The path of each stack that was found, from `stacks_found`.
    operators
        Rotation matrices, such as those of `jaxrefine.symmetry.operators`.

    Raises
    ------
    InputError
        If an angle is missing or not a number, or if the file cannot be written.
    """
    path, source = Path(path), Path(source)
    given = rotations_of(blocks, source)
    rows = np.repeat(np.arange(len(given)), len(operators)).tolist()
    turned = (given[:, None] @ operators).reshape(-1, 3, 3)
    name = particle_block(blocks, source)
    table = {
        column: [texts[row] for row in rows] for column, texts in blocks[name].items()
    }
    unchanged = angle_columns(given)
    for column, texts in angle_columns(turned).items():
        table[column] = [
            original if text == unchanged[column][row] else text
            for row, original, text in zip(rows, table[column], texts, strict=True)
        ]
    renamed = names_from(path, source, stacks)
    table["rlnImageName"] = [
        _renamed(image, path, renamed) for image in table["rlnImageName"]
    ]
    write_star(path, {**blocks, name: table})


def write_new_particles(
    path: str | Path,
    poses: Poses,
    image_names: Sequence[str],
    image_size: int,
    pixel_size_in_angstroms: float,
    group: CTF | None = None,
    ctf: CTF | None = None,
) -> None:
    """Write a RELION 3.1 file of particles that share one optics group.

    RELION's programs require the optics of the group, even where they correct no CTF,
    and the name of a micrograph, for which ``simulated.mrc`` is written.

    Parameters
    ----------
    path
        The file, which appears complete or not at all.
    poses, image_names
        The pose and the ``rlnImageName`` of each particle, such as
        ``000001@particles.mrcs``. RELION's origins are minus the shifts, in angstroms.
    image_size, pixel_size_in_angstroms
        Side of the images in pixels, and edge of a pixel.
    group
        Voltage, spherical aberration and amplitude contrast of the optics group.
    ctf
        Defocus, phase shift, B-factor and scale of each particle, which need a group.

    Raises
    ------
    InputError
        If there is not one name for each pose, if there is a CTF but no group, or if
        the file cannot be written.
    """
    if len(image_names) != len(poses):
        raise InputError(
            f"cannot write {path}: there must be one image name for each of "
            f"{len(poses)} poses, got {len(image_names)}"
        )
    if ctf is not None and group is None:
        raise InputError(f"cannot write {path}: a CTF must have a group, got none")
    of_group = {} if group is None else _GROUP_OPTICS
    optics = {
        "rlnOpticsGroup": ["1"],
        "rlnOpticsGroupName": ["opticsGroup1"],
        **{
            name: [f"{float(getattr(group, leaf)):.6f}"]
            for name, leaf in of_group.items()
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
    """Return an identity of each particle's image that different tables share.

    Returns
    -------
    The number of the image in its stack, from 1, and the absolute path of the stack,
    which need not exist; None if the table names no images.
    """
    path = Path(path)
    table = particle_table(blocks, path)
    if "rlnImageName" not in table:
        return None
    pairs = [split_name(name, path) for name in table["rlnImageName"]]
    folders = search_folders(path)
    absolute = {
        stack: Path(os.path.realpath(locate(stack, folders) or path.parent / stack))
        for stack in {stack for _, stack in pairs}
    }
    return [(number, absolute[stack]) for number, stack in pairs]


# Column: field of CTF, its unit, and a default value or the column that has it (None
# where the column is required).
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
                raise InputError(f"{path} must have rlnDefocusU, got {name} without it")
        return None
    leaves = {}
    for name, (leaf, unit, default) in _PARTICLE_OPTICS.items():
        if isinstance(default, str) and name not in table:
            name = default
        if name in table:
            leaves[leaf] = unit * numbers(table, name, path)
        else:
            leaves[leaf] = default
    for name, leaf in _GROUP_OPTICS.items():
        leaves[leaf] = of_each(blocks, table, name, path)
    contrast = leaves["amplitude_contrast"]
    if not bool(((contrast >= 0) & (contrast <= 1)).all()):
        raise InputError(
            f"{path}, {called('rlnAmplitudeContrast', path)}: values must be "
            f"from 0 to 1, got {float(contrast.min()):g} to {float(contrast.max()):g}"
        )
    lowest = float(leaves["voltage"].min())
    if not lowest > 0:
        raise InputError(
            f"{path}, {called('rlnVoltage', path)}: values must be positive, "
            f"got {lowest:g}"
        )
    return CTF(**leaves)


def _require_finite(ctf: CTF, pixel_size: float, path: Path) -> None:
    """Raise if a CTF is not finite at some frequency, in single precision."""
    bad = np.flatnonzero(~np.asarray(is_finite(ctf, pixel_size)))
    if len(bad):
        raise InputError(
            f"{path}: the contrast-transfer function of particle {bad[0] + 1} must be "
            "finite, got optics that are out of range"
        )


def _require_single_particles(
    blocks: dict[str, Table], table: Table, path: Path
) -> None:
    """Raise if a table's images are those of particles in tomograms."""
    general, name = blocks.get("general", {}), "rlnTomoSubTomosAre2DStacks"
    if name in general and numbers(general, name, path).any():
        raise InputError(
            f"{path} must be a table of single particles, got {name}: its images are "
            "tilt series of particles in tomograms"
        )
    dimensions = of_each_if_any(blocks, table, "rlnImageDimensionality", path)
    if dimensions is not None and (dimensions != 2).any():
        raise InputError(
            f"{path}: rlnImageDimensionality must be 2, for single particles, got "
            f"{dimensions[dimensions != 2][0]:g}"
        )


def _require_raw_images(blocks: dict[str, Table], table: Table, path: Path) -> None:
    """Raise if a table says that the CTF was applied to its images."""
    for name, treatment in _PREPARED.items():
        flags = of_each_if_any(blocks, table, name, path)
        if flags is not None and flags.any():
            raise InputError(
                f"{path}: images must be as they were extracted, got {name}: they are "
                f"{treatment}"
            )


def _require_box(blocks: dict[str, Table], table: Table, size: int, path: Path) -> None:
    """Raise if a table states another image size than the images have."""
    sizes = of_each_if_any(blocks, table, "rlnImageSize", path)
    if sizes is not None and (sizes != size).any():
        stated = ", ".join(f"{value:g}" for value in np.unique(sizes))
        raise InputError(
            f"{path}: {called('rlnImageSize', path)} must be {size}, the size of the "
            f"images in pixels, got {stated}"
        )


def _pixel_sizes(
    blocks: dict[str, Table], table: Table, path: Path
) -> Float[np.ndarray, " particles"] | None:
    """Return the pixel size of each image, in angstroms; None if the table has none."""
    sizes = pixel_sizes_if_any(blocks, table, path)
    if sizes is not None:
        smallest, largest = float(sizes.min()), float(sizes.max())
        if largest > LARGEST_STEP * smallest:
            raise InputError(
                f"{path}: pixel sizes must differ by at most {LARGEST_STEP - 1:.0%}, "
                f"got {smallest:g} to {largest:g} A"
            )
    return sizes


def _poses_in_style(
    blocks: dict[str, Table], table: Table, particle_file: ParticleFile, poses: Poses
) -> Table:
    """Return the columns of poses, with origins in the units that a table uses."""
    pixel_size = particle_file.particles.pixel_size_in_angstroms
    shifts = np.asarray(poses.shifts, np.float64)
    in_angstroms = "rlnImagePixelSize" in table.keys() | blocks.get("optics", {})
    columns: Table = {}
    for unit in (pixel_size, None):
        suffix = "" if unit is None else "Angst"
        is_preferred = (unit is not None) == in_angstroms
        if is_preferred or any(f"rlnOrigin{axis}{suffix}" in table for axis in "XY"):
            # Origins in pixels count those of the stack, not the resampled ones.
            step = 1.0 if unit else (pixel_size / particle_file.pixel_sizes)[:, None]
            columns |= pose_columns(Poses(poses.rotations, step * shifts), unit)
    return columns


def _renamed(image: str, path: Path, names: Mapping[str, str]) -> str:
    """Return an image's name with its stack renamed, if it is in `names`."""
    start, stack = image.find("@") + 1, split_name(image, path)[1]
    return image[:start] + names.get(stack, stack) + image[start + len(stack) :]


def _texts(values: Values) -> list[str]:
    """Format the values of a column."""
    array = np.asarray(values)
    if np.issubdtype(array.dtype, np.floating):
        return fixed(array.astype(np.float64))
    return [str(value) for value in array.tolist()]
