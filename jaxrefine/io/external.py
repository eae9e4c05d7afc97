"""What RELION hands to a program that makes the map in its place.

``relion_refine --external_reconstruct`` (3.1 to 5) writes the sums over images that a
map is made from, runs the program that ``RELION_EXTERNAL_RECONSTRUCT_EXECUTABLE``
names, with a STAR file as its last argument, and reads the map that it has written
(``BackProjector::externalReconstruct`` in RELION's ``backprojector.cpp``). All names in
the STAR file hold from the folder that RELION runs in, and so does the program.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import final

import numpy as np
from jaxtyping import Complex64, Float32

from jaxrefine.errors import InputError
from jaxrefine.io.columns import numbers, whole_numbers
from jaxrefine.io.mrc import read_grid
from jaxrefine.io.star import Table, read_star

_BLOCK = "external_reconstruct_general"
_REAL, _IMAGINARY = "rlnExtReconsDataReal", "rlnExtReconsDataImag"
_WEIGHT, _RESULT = "rlnExtReconsWeight", "rlnExtReconsResult"
_RESULT_TABLE = "rlnExtReconsResultStarfile"
_BOX, _DIMENSIONS = "rlnOriginalImageSize", "rlnReferenceDimensionality"
_NEEDED = (_REAL, _IMAGINARY, _WEIGHT, _RESULT, _BOX, _DIMENSIONS)
_PIXEL_SIZE = "rlnPixelSize"  # written from RELION 4 on
_LEAST_BOX = 4  # voxels: two shells


@final
@dataclass(frozen=True)
class ExternalReconstruction:
    r"""The sums that RELION needs a map of, and where it looks for the map.

    The sums are on the lattice of frequencies that ``rfftn`` of a cube of side ``f``
    has, ``f`` being the box times RELION's padding factor.

    Attributes
    ----------
    data
        :math:`\sum \mathrm{CTF}\, F / \sigma^2` over images and poses.
    weight
        :math:`\sum \mathrm{CTF}^2 / \sigma^2`, nowhere negative.
    box
        Side of the map in voxels.
    voxel_size_in_angstroms
        Edge of its voxels; None if RELION does not say, as before version 4.
    result
        The map to write.
    result_table
        A table that RELION takes the spectrum of the signal from, instead of its own,
        if there is one; None if RELION names none.
    inputs
        The files that were read.
    """

    data: Complex64[np.ndarray, "f f h"]
    weight: Float32[np.ndarray, "f f h"]
    box: int
    voxel_size_in_angstroms: float | None
    result: Path
    result_table: Path | None
    inputs: tuple[Path, ...]


def read_external_reconstruction(path: str | Path) -> ExternalReconstruction:
    """Read what RELION has written for an external reconstruction.

    Parameters
    ----------
    path
        The STAR file, ``ROOT_external_reconstruct.star``.

    Raises
    ------
    InputError
        If a file is missing or cannot be read, if the STAR file is of another kind or
        of a reference of two dimensions, if the grids do not fit each other or the box,
        or if a weight is negative.
    """
    blocks = read_star(path)
    if _BLOCK not in blocks:
        raise InputError(
            f"{path} must have a block {_BLOCK!r}, as relion_refine "
            "--external_reconstruct writes it, got the blocks "
            f"{', '.join(map(repr, blocks))}"
        )
    table = blocks[_BLOCK]
    missing = [name for name in _NEEDED if len(table.get(name, ())) != 1]
    if missing:
        raise InputError(
            f"{path}, block {_BLOCK!r}: there must be one value of "
            f"{', '.join(_NEEDED)}, got none or several of {', '.join(missing)}"
        )
    box, dimensions = (_number(table, name, path) for name in (_BOX, _DIMENSIONS))
    if dimensions != 3:
        raise InputError(
            f"{path}: the reference must have 3 dimensions, got {dimensions}"
        )
    names = [Path(table[name][0]) for name in (_REAL, _IMAGINARY, _WEIGHT)]
    real, imaginary, weight = (read_grid(name) for name in names)
    _check_grids(path, box, names, (real, imaginary, weight))
    of_result = "".join(table.get(_RESULT_TABLE, ()))
    data = np.empty(real.shape, np.complex64)
    data.real, data.imag = real, imaginary
    return ExternalReconstruction(
        data=data,
        weight=weight,
        box=box,
        voxel_size_in_angstroms=_voxel_size(table, path),
        result=Path(table[_RESULT][0]),
        result_table=Path(of_result) if of_result else None,
        inputs=(Path(path), *names),
    )


def _number(table: Table, name: str, path: str | Path) -> int:
    return int(whole_numbers(table, name, path)[0])


def _voxel_size(table: Table, path: str | Path) -> float | None:
    if _PIXEL_SIZE not in table:
        return None
    size = float(numbers(table, _PIXEL_SIZE, path)[0])
    if size <= 0:
        raise InputError(f"{path}: {_PIXEL_SIZE} must be positive, got {size:g} A")
    return size


def _check_grids(
    path: str | Path,
    box: int,
    names: Sequence[Path],
    grids: Sequence[Float32[np.ndarray, "..."]],
) -> None:
    """Refuse grids of other shapes, and negative weights.

    Raises
    ------
    InputError
        If there are such.
    """
    if box < _LEAST_BOX:
        raise InputError(f"{path}: {_BOX} must be at least {_LEAST_BOX}, got {box}")
    for name, grid in zip(names, grids, strict=True):
        size = grid.shape[0]
        shape = (size, size, size // 2 + 1)
        if grid.shape != shape or size < box or grid.shape != grids[0].shape:
            raise InputError(
                f"{name} must hold a half-complex cube of at least {box} x {box} x "
                f"{box // 2 + 1} values, as many as {names[0]}, got "
                f"{' x '.join(map(str, grid.shape))}"
            )
    least = float(grids[-1].min())
    if least < 0:
        raise InputError(f"{names[-1]} must hold weights of at least 0, got {least:g}")
