"""What the columns of RELION's tables hold: numbers, also those of optics groups."""

import math
import reprlib
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Float64, Int64

from jaxrefine.errors import InputError
from jaxrefine.io.star import Table

_SINGLE = np.finfo(np.float32)
_LARGEST_WHOLE = 2**53  # up to which every whole number is a float
_UNIT_OF_DETECTOR_PIXEL = 1e4  # micrometres, in Angstrom


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
    """Return what `pixel_sizes_if_any` does.

    Raises
    ------
    InputError
        As there, and if the tables give none.
    """
    sizes = pixel_sizes_if_any(blocks, particles, path)
    if sizes is None:
        raise InputError(
            f"{path} has origins in Angstrom but no pixel size; rlnImagePixelSize is "
            "wanted, with rlnOpticsGroup in an optics block."
        )
    return sizes


def pixel_sizes_if_any(
    blocks: dict[str, Table], particles: Table, path: str | Path
) -> Float64[np.ndarray, " particles"] | None:
    """Return the pixel size in Angstrom of each particle's image, or None.

    That is its own ``rlnImagePixelSize`` or its optics group's or, in older files,
    ``rlnPixelSize``, or the pixel of the detector over the magnification.

    Raises
    ------
    InputError
        If one is not positive in single precision.
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
        sizes = _UNIT_OF_DETECTOR_PIXEL * sizes
    if sizes is None:
        return None
    good = is_single(sizes) & (sizes >= _SINGLE.tiny)
    if not good.all():
        row = int(np.argmin(good))
        raise InputError(
            f"{path} has pixels of {sizes[row]:g} A (particle {row + 1}); a positive "
            "number in single precision is wanted."
        )
    return sizes


def of_each_if_any(
    blocks: dict[str, Table], particles: Table, name: str, path: str | Path
) -> Float64[np.ndarray, " particles"] | None:
    """Return what `of_each` does, or None if there is no such column."""
    given = name in particles or name in blocks.get("optics", {})
    return of_each(blocks, particles, name, path) if given else None


def of_each(
    blocks: dict[str, Table], particles: Table, name: str, path: str | Path
) -> Float64[np.ndarray, " particles"]:
    """Return a number of each particle, from its own row or its optics group's.

    Raises what `of_optics_group` does.
    """
    if name in particles:
        return numbers(particles, name, path)
    return of_optics_group(blocks, particles, name, path)


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


def numbers(table: Table, name: str, path: str | Path) -> Float64[np.ndarray, " rows"]:
    """Return a column as numbers that are finite in single precision.

    Raises
    ------
    InputError
        If a value is something else.
    """
    values = np.array([_number(text) for text in table[name]], dtype=np.float64)
    wanted = "a finite number in single precision"
    require(is_single(values), table, name, path, wanted)
    return values


def whole_numbers(
    table: Table, name: str, path: str | Path
) -> Int64[np.ndarray, " rows"]:
    """Return a column as whole numbers.

    Raises
    ------
    InputError
        If a value is something else.
    """
    values = numbers(table, name, path)
    whole = (values == np.rint(values)) & (np.abs(values) <= _LARGEST_WHOLE)
    require(whole, table, name, path, "a whole number")
    return values.astype(np.int64)


def require(
    good: Bool[np.ndarray, " rows"],
    table: Table,
    name: str,
    path: str | Path,
    wanted: str,
) -> None:
    """Raise if some value of a column is not good, naming the first."""
    if not good.all():
        row = int(np.argmin(good))
        text = reprlib.repr(table[name][row])
        raise InputError(
            f"{path}, column {name}: {wanted} is wanted, not {text} (row {row + 1})."
        )


def is_single(values: Float64[np.ndarray, "..."]) -> Bool[np.ndarray, "..."]:
    """Whether each value is finite in single precision, in which it is used."""
    return np.abs(values) <= float(_SINGLE.max)


def _number(text: str) -> float:
    """Return a decimal number; NaN for what is none, and for Python's ``1_0``."""
    try:
        return float(text) if text.isascii() and "_" not in text else math.nan
    except ValueError:
        return math.nan


def fixed(numbers: Float64[np.ndarray, " particles"]) -> list[str]:
    """Return numbers as they stand in a column."""
    return [f"{number:.6f}" for number in numbers]
