"""Tables in the STAR format, and the poses that RELION keeps in them.

RELION's dialect: a row is one line, and a block holds one table. A column's name is
written here without its leading underscore, a block's without its leading ``data_``.
"""

import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Array, Float, Float64, Int64

from jaxrefine.errors import InputError
from jaxrefine.io._atomic import atomic_path, existing_file

Table = dict[str, list[str]]
"""The values of each column, all columns of one length."""


class Pairs(Table):
    """A table of one row that stands in its file as names with values, not as a loop.

    A block without anything in it is one too, of no columns.
    """


_LARGEST_WHOLE = 2**53  # up to which every whole number is a float
_UNIT_OF_DETECTOR_PIXEL = 1e4  # micrometres, in Angstrom
_ANGLES = ("rlnAngleRot", "rlnAngleTilt", "rlnAnglePsi")
_VALUE = re.compile(r"""\"(.*?)\"(?=\s|$)|'(.*?)'(?=\s|$)|(\S+)""", re.ASCII)
_NEEDS_QUOTES = re.compile(r"""^$|\s|^(?:["'_#;]|data_|loop_)""")


def read_star(path: str | Path) -> dict[str, Table]:
    """Read every block of a STAR file.

    A block of name-value pairs becomes a table of one row, marked as `Pairs`; an empty
    loop becomes a table whose columns are empty. Values stay strings, without their
    quotes; `write_star` writes them back as they were, and comments are lost.

    Raises
    ------
    InputError
        If the file is missing or is not a STAR file, if a row has too few or too many
        values, or if a block or column occurs twice.
    """
    path = existing_file(path)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise InputError(f"{path} is not a STAR file: it is not text.") from None
    if "\0" in text:
        raise InputError(f"{path} is not a STAR file: it is not text.")

    blocks: dict[str, Table] = {}
    name, table = "", None
    in_loop = False
    for number, line in enumerate(text.split("\n"), start=1):
        values = _values(line)
        if not values:
            continue
        where = f"{path}, line {number}"
        first = "" if line.lstrip().startswith(("'", '"')) else values[0]
        alone = len(values) == 1
        if alone and first.startswith("data_"):
            name, table, in_loop = first.removeprefix("data_"), Pairs(), False
            _insert(blocks, name, table, where)
        elif table is None:
            raise InputError(
                f"{where}: this is not a STAR file, no data_ block is open."
            )
        elif alone and first == "loop_":
            if table or in_loop:
                raise InputError(f"{where}: the block already holds a table.")
            table, in_loop = {}, True
            blocks[name] = table
        elif in_loop and alone and first.startswith("_") and not any(table.values()):
            _insert(table, first[1:], [], where)
        elif in_loop:
            if len(values) != len(table):
                raise InputError(
                    f"{where}: the row has {len(values)} values "
                    f"for {len(table)} columns."
                )
            for column, value in zip(table.values(), values, strict=True):
                column.append(value)
        elif len(values) == 2 and first.startswith("_"):
            _insert(table, first[1:], [values[1]], where)
        else:
            raise InputError(f"{where}: loop_ or one name and one value are wanted.")
    if not blocks:
        raise InputError(f"{path} is not a STAR file: it has no data_ block.")
    return blocks


def write_star(path: str | Path, blocks: dict[str, Table]) -> None:
    """Write blocks in RELION's style: `Pairs` as names with values, others as loops.

    A file with optics groups is marked as of RELION 3.1, which takes one without that
    mark to be older, and converts it. The file appears complete or not at all.

    Raises
    ------
    InputError
        If the columns of a block differ in length, or those of `Pairs` have not one
        value, if a value cannot be quoted, or if the file cannot be written.
    """
    version = ["", "# version 30001"] if "optics" in blocks else []
    lines = []
    for name, table in blocks.items():
        lengths = {len(column) for column in table.values()}
        if len(lengths) > 1 or (isinstance(table, Pairs) and lengths - {1}):
            raise InputError(f"Block {name!r} has columns of different lengths.")
        lines += [*version, "", f"data_{name}", ""]
        if isinstance(table, Pairs):
            for column, (value,) in table.items():
                lines.append(f"_{column:<40} {_quoted(value):>12}")
        else:
            lines.append("loop_ ")
            lines += [f"_{column} #{i} " for i, column in enumerate(table, start=1)]
            for row in zip(*table.values(), strict=True):
                lines.append(" ".join(f"{_quoted(value):>12}" for value in row))
        lines.append("")
    with atomic_path(path) as temporary:
        temporary.write_text("\n".join(lines) + "\n", encoding="utf-8")


def read_poses(
    path: str | Path,
) -> tuple[Float64[np.ndarray, "particles 3"], Float64[np.ndarray, "particles 2"]]:
    """Read the poses of the particles from a RELION file, old or 3.1.

    Returns
    -------
    angles
        (rot, tilt, psi) in radians.
    shifts
        (x, y) in pixels: the position of the particle in the image, which is *minus*
        RELION's origin. An origin that the file lacks is zero; one in Angstrom
        (``rlnOriginXAngst``) is divided by the pixel size of the particle's optics
        group, and takes precedence over one in pixels (``rlnOriginX``).

    Raises
    ------
    InputError
        If the file is not a STAR file with one table of particles, lacks an angle,
        holds something that is not a number, or gives origins in Angstrom without the
        pixel size.
    """
    return poses_of(read_star(path), path)


def poses_of(
    blocks: dict[str, Table], path: str | Path
) -> tuple[Float64[np.ndarray, "particles 3"], Float64[np.ndarray, "particles 2"]]:
    """Return the poses in the blocks of a file, as `read_poses` does."""
    particles = particle_table(blocks, path)
    missing = [name for name in _ANGLES if name not in particles]
    if missing:
        raise InputError(f"{path} lacks the columns {', '.join(missing)}.")
    angles = [numbers(particles, name, path) for name in _ANGLES]
    origins = []
    for axis in "XY":
        if f"rlnOrigin{axis}Angst" in particles:
            in_angstroms = numbers(particles, f"rlnOrigin{axis}Angst", path)
            with np.errstate(over="ignore"):
                origins.append(in_angstroms / pixel_sizes(blocks, particles, path))
        elif f"rlnOrigin{axis}" in particles:
            origins.append(numbers(particles, f"rlnOrigin{axis}", path))
        else:
            origins.append(np.zeros_like(angles[0]))
    if not np.isfinite(origins).all():
        raise InputError(f"{path} has origins that are not finite in pixels.")
    return np.deg2rad(np.stack(angles, axis=-1)), -np.stack(origins, axis=-1)


def poses_on_one_grid(
    blocks: dict[str, Table], path: str | Path
) -> tuple[Float64[np.ndarray, "particles 3"], Float64[np.ndarray, "particles 2"]]:
    """Return poses as `poses_of` does, with all shifts in the largest pixels."""
    angles, shifts = poses_of(blocks, path)
    sizes = pixel_sizes_if_any(blocks, particle_table(blocks, path), path)
    if sizes is not None and len(sizes):
        shifts = shifts * (sizes / sizes.max())[:, None]
    return angles, shifts


def write_poses(
    path: str | Path,
    angles: Float[Array | np.ndarray, "particles 3"],
    shifts: Float[Array | np.ndarray, "particles 2"],
    pixel_size_in_angstroms: float,
    image_names: Sequence[str],
    image_size: int,
) -> None:
    """Write a RELION 3.1 file of particles that share one optics group.

    Parameters
    ----------
    path
        The file, which appears complete or not at all.
    angles
        (rot, tilt, psi) in radians.
    shifts
        (x, y) in pixels; minus these, in Angstrom, are RELION's origins.
    pixel_size_in_angstroms
        The pixel size of the images.
    image_names
        ``rlnImageName`` of each particle, such as ``000001@particles.mrcs``.
    image_size
        The edge of the images in pixels.

    Raises
    ------
    InputError
        If there is not one name for each pose, or the file cannot be written.
    """
    if len(image_names) != len(angles):
        raise InputError(
            f"Cannot write {path}: {len(image_names)} image names came "
            f"with {len(angles)} poses."
        )
    optics = {
        "rlnOpticsGroup": ["1"],
        "rlnOpticsGroupName": ["opticsGroup1"],
        "rlnImagePixelSize": [f"{pixel_size_in_angstroms:.6f}"],
        "rlnImageSize": [str(image_size)],
        "rlnImageDimensionality": ["2"],
    }
    particles = {
        "rlnImageName": list(image_names),
        **pose_columns(angles, shifts, pixel_size_in_angstroms),
        "rlnOpticsGroup": ["1"] * len(image_names),
    }
    write_star(path, {"optics": optics, "particles": particles})


def pose_columns(
    angles: Float[Array | np.ndarray, "particles 3"],
    shifts: Float[Array | np.ndarray, "particles 2"],
    pixel_size_in_angstroms: float | None,
) -> Table:
    """Return RELION's columns of poses.

    Origins are in Angstrom (``rlnOriginXAngst``), or without a pixel size in pixels
    (``rlnOriginX``).
    """
    degrees = np.rad2deg(np.asarray(angles, dtype=np.float64))
    scale = 1.0 if pixel_size_in_angstroms is None else pixel_size_in_angstroms
    suffix = "" if pixel_size_in_angstroms is None else "Angst"
    origins = 0.0 - scale * np.asarray(shifts, dtype=np.float64)
    columns = {name: fixed(degrees[:, i]) for i, name in enumerate(_ANGLES)}
    for i, axis in enumerate("XY"):
        columns[f"rlnOrigin{axis}{suffix}"] = fixed(origins[:, i])
    return columns


def _values(line: str) -> list[str]:
    """Split a line into its values, without quotes and comment."""
    if line.isascii() and not any(mark in line for mark in "\"'#"):
        return line.split()
    values = []
    for match in _VALUE.finditer(line):
        if match[0].startswith("#"):
            break
        values.append(match[match.lastindex or 0])
    return values


def _quoted(value: str) -> str:
    """Return a value as it stands in a row."""
    if not _NEEDS_QUOTES.search(value):
        return value
    for mark in "\"'":
        if not re.search(rf"{mark}\s|[\r\n]", value):
            return f"{mark}{value}{mark}"
    raise InputError(f"The value {value!r} cannot be quoted in a STAR file.")


def _insert(mapping: dict, name: str, item: Table | list[str], where: str) -> None:
    if name in mapping:
        raise InputError(f"{where}: {name!r} occurs twice.")
    mapping[name] = item


def particle_table(blocks: dict[str, Table], path: str | Path) -> Table:
    """Return the block ``particles``, or the only one beside ``optics``."""
    return blocks[particle_block(blocks, path)]


def particle_block(blocks: dict[str, Table], path: str | Path) -> str:
    """Return the name of the block that `particle_table` returns."""
    if "particles" in blocks:
        return "particles"
    others = [name for name in blocks if name != "optics"]
    if len(others) != 1:
        raise InputError(
            f"{path} has the blocks {', '.join(map(repr, blocks))}; "
            "one called 'particles', or one alone, is wanted."
        )
    return others[0]


def pixel_sizes(
    blocks: dict[str, Table], particles: Table, path: str | Path
) -> Float64[np.ndarray, " particles"]:
    """Return the pixel size in Angstrom of each particle's image.

    That of its optics group or, in older files, its own, or that of the detector over
    the magnification.

    Raises
    ------
    InputError
        If none is there, or one is not positive.
    """
    old = "rlnImagePixelSize" not in blocks.get("optics", {})
    if old and "rlnPixelSize" in particles:
        sizes = numbers(particles, "rlnPixelSize", path)
    elif old and {"rlnDetectorPixelSize", "rlnMagnification"} <= particles.keys():
        detector = numbers(particles, "rlnDetectorPixelSize", path)
        magnification = numbers(particles, "rlnMagnification", path)
        sizes = np.zeros_like(detector)
        with np.errstate(over="ignore"):
            np.divide(detector, magnification, out=sizes, where=magnification > 0)
            sizes = _UNIT_OF_DETECTOR_PIXEL * sizes
    else:
        sizes = of_optics_group(blocks, particles, "rlnImagePixelSize", path)
    if not (sizes > 0).all():
        raise InputError(f"{path} has a pixel size that is not positive.")
    return sizes


def pixel_sizes_if_any(
    blocks: dict[str, Table], particles: Table, path: str | Path
) -> Float64[np.ndarray, " particles"] | None:
    """Return what `pixel_sizes` does, or None if the tables give none."""
    own = {"rlnPixelSize"}, {"rlnDetectorPixelSize", "rlnMagnification"}
    given = "rlnImagePixelSize" in blocks.get("optics", {})
    if given or any(names <= particles.keys() for names in own):
        return pixel_sizes(blocks, particles, path)
    return None


def of_optics_group(
    blocks: dict[str, Table], particles: Table, name: str, path: str | Path
) -> Float64[np.ndarray, " particles"]:
    """Return a column of the optics groups, for each particle.

    Raises
    ------
    InputError
        If there is no such column, if a particle's group is missing, or if two groups
        have one number.
    """
    optics = blocks.get("optics", {})
    if not {"rlnOpticsGroup", name} <= optics.keys():
        raise InputError(
            f"{path} has no optics block with rlnOpticsGroup and {name}, which its "
            "particles need."
        )
    if "rlnOpticsGroup" not in particles:
        raise InputError(f"{path} gives the particles no rlnOpticsGroup.")
    values = numbers(optics, name, path)
    groups, places = np.unique(
        whole_numbers(optics, "rlnOpticsGroup", path), return_index=True
    )
    if len(groups) < len(values):
        raise InputError(f"{path} has two optics groups of one number.")
    own = whole_numbers(particles, "rlnOpticsGroup", path)
    unknown = np.setdiff1d(own, groups)
    if len(unknown):
        raise InputError(f"{path} has no optics group {', '.join(map(str, unknown))}.")
    return values[places[np.searchsorted(groups, own)]]


def numbers(
    table: Table, name: str, path: str | Path
) -> Float64[np.ndarray, " particles"]:
    """Return a column as finite numbers."""
    try:
        numbers = np.array([float(value) for value in table[name]], dtype=np.float64)
    except ValueError as error:
        raise InputError(f"{path}, column {name}: {error}.") from None
    if not np.isfinite(numbers).all():
        raise InputError(f"{path}, column {name}: a value is NaN or infinite.")
    return numbers


def whole_numbers(
    table: Table, name: str, path: str | Path
) -> Int64[np.ndarray, " particles"]:
    """Return a column as whole numbers."""
    values = numbers(table, name, path)
    if (values != np.rint(values)).any() or (np.abs(values) > _LARGEST_WHOLE).any():
        raise InputError(f"{path}, column {name}: whole numbers are wanted.")
    return values.astype(np.int64)


def fixed(numbers: Float64[np.ndarray, " particles"]) -> list[str]:
    """Return numbers as they stand in a column."""
    return [f"{number:.6f}" for number in numbers]
