"""Numbers in the columns of RELION's tables, of particles and of optics groups."""

import math
import reprlib
from contextlib import suppress
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Float64, Int64

from jaxrefine.errors import InputError, some
from jaxrefine.io.fields import called
from jaxrefine.io.star import Table

_SINGLE = np.finfo(np.float32)
_NAMED = 5  # blocks, of a file in which there are too many
_LARGEST_WHOLE = 2**53  # A float64 represents every whole number up to this one.
_ANGSTROMS_PER_MICROMETRE = 1e4  # rlnDetectorPixelSize is in micrometres.


def particle_table(blocks: dict[str, Table], path: str | Path) -> Table:
    """Return the block ``particles``, or the only block besides ``optics``.

    Raises
    ------
    InputError
        If there is no such block, or more than one candidate.
    """
    return blocks[particle_block(blocks, path)]


def particle_block(blocks: dict[str, Table], path: str | Path) -> str:
    """Return the name of the block that `particle_table` returns; raises as it does."""
    if "particles" in blocks:
        return "particles"
    others = [name for name in blocks if name != "optics"]
    if len(others) != 1:
        names = [reprlib.repr(name) for name in blocks]
        raise InputError(
            f"{path} must have a block 'particles', or a single block besides "
            f"'optics', got the blocks {some(names, _NAMED, ', ')}"
        )
    return others[0]


def pixel_sizes(
    blocks: dict[str, Table], particles: Table, path: str | Path
) -> Float64[np.ndarray, " particles"]:
    """Return the pixel size in angstroms of each particle's image.

    See `pixel_sizes_if_any` for the columns that it is read from.

    Raises
    ------
    InputError
        If the tables give no pixel size, or one that is not positive in single
        precision.
    """
    sizes = pixel_sizes_if_any(blocks, particles, path)
    if sizes is None:
        raise InputError(
            f"{path} must have the columns rlnOpticsGroup and rlnImagePixelSize in an "
            "optics block, got origins in angstroms without a pixel size"
        )
    return sizes


def pixel_sizes_if_any(
    blocks: dict[str, Table], particles: Table, path: str | Path
) -> Float64[np.ndarray, " particles"] | None:
    """Return the pixel size in angstroms of each particle's image, or None.

    It is ``rlnImagePixelSize`` of the particle or of its optics group or, in older
    files, ``rlnPixelSize`` or ``rlnDetectorPixelSize`` divided by
    ``rlnMagnification``.

    Raises
    ------
    InputError
        If a pixel size is not positive in single precision.
    """
    sizes = of_each_if_any(blocks, particles, "rlnImagePixelSize", path)
    if sizes is None and "rlnPixelSize" in particles:
        sizes = numbers(particles, "rlnPixelSize", path)
    if sizes is None and {"rlnDetectorPixelSize", "rlnMagnification"} <= set(particles):
        detector = numbers(particles, "rlnDetectorPixelSize", path)
        magnification = numbers(particles, "rlnMagnification", path)
        sizes = np.zeros_like(detector)
        with np.errstate(over="ignore"):
            np.divide(detector, magnification, out=sizes, where=magnification > 0)
        sizes = _ANGSTROMS_PER_MICROMETRE * sizes
    if sizes is None:
        return None
    good = is_single(sizes) & (sizes >= _SINGLE.tiny)
    if not good.all():
        row = int(np.argmin(good))
        raise InputError(
            f"{path}: the pixel size must be a positive number in single precision, "
            f"got {sizes[row]:g} A (particle {row + 1})"
        )
    return sizes


def of_each_if_any(
    blocks: dict[str, Table], particles: Table, name: str, path: str | Path
) -> Float64[np.ndarray, " particles"] | None:
    """Return what `of_each` does, or None if neither table has the column."""
    exists = name in particles or name in blocks.get("optics", {})
    return of_each(blocks, particles, name, path) if exists else None


def of_each(
    blocks: dict[str, Table], particles: Table, name: str, path: str | Path
) -> Float64[np.ndarray, " particles"]:
    """Return a number for each particle, from its own row or its optics group's.

    Raises
    ------
    InputError
        If a value is not a number, or for the reasons of `of_optics_group`.
    """
    if name in particles:
        return numbers(particles, name, path)
    return of_optics_group(blocks, particles, name, path)


def of_optics_group(
    blocks: dict[str, Table], particles: Table, name: str, path: str | Path
) -> Float64[np.ndarray, " particles"]:
    """Return a column of the optics groups, expanded to one value for each particle.

    Raises
    ------
    InputError
        If there is no such column, if a particle's group is missing, or if two groups
        have the same number.
    """
    optics = blocks.get("optics", {})
    if not {"rlnOpticsGroup", name} <= optics.keys():
        raise InputError(
            f"{path} must have an optics block with the columns rlnOpticsGroup and "
            f"{name}, got none"
        )
    if "rlnOpticsGroup" not in particles:
        raise InputError(
            f"{path}: the table of particles must have the column rlnOpticsGroup, got "
            "none"
        )
    return numbers(optics, name, path)[optics_rows(blocks, particles, path)]


def optics_rows(
    blocks: dict[str, Table], particles: Table, path: str | Path
) -> Int64[np.ndarray, " particles"]:
    """Return the row of each particle's group in the table of optics groups.

    Both tables have the column ``rlnOpticsGroup``.

    Raises
    ------
    InputError
        If a particle's group is missing, or if two groups have the same number.
    """
    numbered = whole_numbers(blocks["optics"], "rlnOpticsGroup", path)
    groups, rows = np.unique(numbered, return_index=True)
    if len(groups) < len(numbered):
        raise InputError(
            f"{path}: optics groups must have numbers of their own, got two with the "
            "same number"
        )
    membership = whole_numbers(particles, "rlnOpticsGroup", path)
    unknown = np.setdiff1d(membership, groups)
    if len(unknown):
        raise InputError(
            f"{path} must have an optics group for each particle, got particles of "
            f"group {', '.join(map(str, unknown))}, which is missing"
        )
    return rows[np.searchsorted(groups, membership)]


def numbers(table: Table, name: str, path: str | Path) -> Float64[np.ndarray, " rows"]:
    """Return a column as numbers that are finite in single precision.

    Raises
    ------
    InputError
        If a value is not such a number.
    """
    values = parsed(table[name])
    expected = "a finite number in single precision"
    require(is_single(values), table, name, path, expected)
    return values


def whole_numbers(
    table: Table, name: str, path: str | Path
) -> Int64[np.ndarray, " rows"]:
    """Return a column as whole numbers.

    Raises
    ------
    InputError
        If a value is not a whole number.
    """
    values = numbers(table, name, path)
    is_whole = (values == np.rint(values)) & (np.abs(values) <= _LARGEST_WHOLE)
    require(is_whole, table, name, path, "a whole number")
    return values.astype(np.int64)


def require(
    good: Bool[np.ndarray, " rows"],
    table: Table,
    name: str,
    path: str | Path,
    expected: str,
) -> None:
    """Raise an `InputError` that names the first bad value of a column, if any."""
    if not good.all():
        row = int(np.argmin(good))
        text = reprlib.repr(table[name][row])
        raise InputError(
            f"{path}, {called(name, path)}: the value must be {expected}, got "
            f"{text} (row {row + 1})"
        )


def is_single(values: Float64[np.ndarray, "..."]) -> Bool[np.ndarray, "..."]:
    """Return whether each value is finite in single precision, in which it is used."""
    return np.abs(values) <= float(_SINGLE.max)


def parsed(texts: list[str]) -> Float64[np.ndarray, " rows"]:
    """Parse decimal numbers; NaN for other text, and for Python's ``1_0``."""
    together = "".join(texts)
    if together.isascii() and "_" not in together:
        with suppress(ValueError):
            return np.fromiter(map(float, texts), np.float64, len(texts))
    return np.array([_number(text) for text in texts], np.float64)


def _number(text: str) -> float:
    try:
        return float(text) if text.isascii() and "_" not in text else math.nan
    except ValueError:
        return math.nan


def fixed(numbers: Float64[np.ndarray, " particles"]) -> list[str]:
    """Format numbers for a column, with six decimal places, and no sign of 0."""
    return [f"{number:z.6f}" for number in numbers]
