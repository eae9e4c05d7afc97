"""Maps and image stacks in the MRC format."""

import bz2
import gzip
import math
import warnings
import zlib
from pathlib import Path
from typing import Any

import mrcfile
import numpy as np
from jaxtyping import Array, Float, Float32

from jaxrefine.errors import InputError
from jaxrefine.io._atomic import atomic_path, existing_file

_ISOTROPY = 1e-3
_COMPLEX_MODES = (3, 4)
_WORD_MAP = slice(208, 211)
_DECOMPRESSORS = {b"\x1f\x8b": gzip.open, b"BZ": bz2.open}


def read_mrc(path: str | Path) -> tuple[Float32[np.ndarray, "n n n"], float]:
    """Read a cubic density map.

    The axes are brought to ``[z, y, x]`` whatever order the header's ``mapc``,
    ``mapr`` and ``maps`` declare. The header's origin and start are ignored.

    Parameters
    ----------
    path
        The file, which may be compressed by gzip or bzip2.

    Returns
    -------
    volume
        Densities, of type float32 whatever the file's mode.
    voxel_size
        In Angstrom; 1.0 if the header leaves it unset (zero).

    Raises
    ------
    InputError
        If the file is missing, is not an MRC file, is truncated or complex, or if the
        map is not cubic, not finite, or has an anisotropic voxel.
    """
    path = existing_file(path)
    data, axes, voxel = _read(path)
    if data.ndim != 3 or len(set(data.shape)) != 1:
        shape = " x ".join(map(str, data.shape))
        raise InputError(f"{path} holds an array of {shape}; a cubic map is wanted.")
    if sorted(axes) != [1, 2, 3]:
        raise InputError(
            f"{path} declares the axes mapc, mapr, maps = {axes}; "
            "a permutation of 1, 2, 3 is wanted."
        )
    sections_rows_columns = axes[::-1]
    volume = data.transpose([sections_rows_columns.index(axis) for axis in (3, 2, 1)])
    return _finite(volume, path), _isotropic(voxel, path)


def read_stack(path: str | Path) -> tuple[Float32[np.ndarray, "particles m m"], float]:
    """Read a stack of square images.

    Parameters
    ----------
    path
        The file, usually ``.mrcs``, which may be compressed by gzip or bzip2.

    Returns
    -------
    images
        Indexed ``[particle, y, x]``, of type float32 whatever the file's mode.
    pixel_size
        In Angstrom; 1.0 if the header leaves it unset (zero).

    Raises
    ------
    InputError
        If the file is missing, is not an MRC file, is truncated or complex, or if the
        images are not square, not finite, transposed, or have an anisotropic pixel.
    """
    path = existing_file(path)
    data, axes, voxel = _read(path)
    if data.ndim == 2:
        data = data[None]
    if data.ndim != 3 or data.shape[1] != data.shape[2]:
        shape = " x ".join(map(str, data.shape))
        raise InputError(
            f"{path} holds an array of {shape}; a stack of square images is wanted."
        )
    if axes != (1, 2, 3):
        raise InputError(
            f"{path} declares the axes mapc, mapr, maps = {axes}; "
            "a stack of images must have 1, 2, 3."
        )
    return _finite(data, path), _isotropic(voxel[:2], path)


def write_mrc(
    path: str | Path,
    volume: Float[Array | np.ndarray, "n n n"],
    voxel_size_in_angstroms: float,
) -> None:
    """Write a density map, indexed ``[z, y, x]``, as float32.

    The file appears complete or not at all.

    Raises
    ------
    InputError
        If the map is not finite, the voxel size not positive, or the file cannot be
        written.
    """
    _write(path, volume, voxel_size_in_angstroms, is_stack=False)


def write_stack(
    path: str | Path,
    images: Float[Array | np.ndarray, "particles m m"],
    pixel_size_in_angstroms: float,
) -> None:
    """Write a stack of images, indexed ``[particle, y, x]``, as float32.

    The file appears complete or not at all.

    Raises
    ------
    InputError
        If an image is not finite, the pixel size not positive, or the file cannot be
        written.
    """
    _write(path, images, pixel_size_in_angstroms, is_stack=True)


def _read(path: Path) -> tuple[np.ndarray, tuple[int, ...], tuple[float, ...]]:
    """Return the data as stored, (mapc, mapr, maps), and the voxel size (x, y, z)."""
    try:
        _require_word_map(path)
        with (
            warnings.catch_warnings(action="ignore"),
            mrcfile.open(path, permissive=True) as mrc,
        ):
            header: Any = mrc.header
            data = mrc.data
    except (ValueError, OSError, EOFError, zlib.error, MemoryError, ArithmeticError):
        raise InputError(f"{path} is not an MRC file, or is damaged.") from None
    if int(header.mode) in _COMPLEX_MODES:
        raise InputError(f"{path} holds complex values; a real array is wanted.")
    if data is None or not data.size:
        raise InputError(
            f"{path} is truncated or damaged: its header announces "
            f"{header.nx} x {header.ny} x {header.nz} values of mode {header.mode}, "
            "which cannot be read."
        )
    axes = tuple(int(axis) for axis in (header.mapc, header.mapr, header.maps))
    voxel = tuple(
        float(header.cella[axis]) / float(count) if count else 0.0
        for axis, count in zip("xyz", (header.mx, header.my, header.mz), strict=True)
    )
    return data, axes if any(axes) else (1, 2, 3), voxel


def _require_word_map(path: Path) -> None:
    """Raise ``ValueError`` if the header of a file lacks the word that marks MRC.

    To be asked before `mrcfile`, which takes from any bytes how much to allocate.
    """
    with open(path, "rb") as file:
        start = file.read(_WORD_MAP.stop)
    if start[_WORD_MAP] != b"MAP" and start[:2] in _DECOMPRESSORS:
        with _DECOMPRESSORS[start[:2]](path, "rb") as file:
            start = file.read(_WORD_MAP.stop)
    if start[_WORD_MAP] != b"MAP":
        raise ValueError


def _finite(data: np.ndarray, path: Path) -> np.ndarray:
    """Return a contiguous float32 copy, or raise if a value is NaN or infinite."""
    values = np.array(data, dtype=np.float32, order="C")
    bad = values.size - np.count_nonzero(np.isfinite(values))
    if bad:
        raise InputError(f"{path} holds {bad} values that are NaN or infinite.")
    return values


def _isotropic(voxel: tuple[float, ...], path: Path) -> float:
    """Return the edge of a cubic voxel in Angstrom, 1.0 if it is unset."""
    if not any(voxel):
        return 1.0
    if min(voxel) <= 0 or not all(map(math.isfinite, voxel)):
        edges = ", ".join(f"{edge:g}" for edge in voxel)
        raise InputError(f"{path} has a voxel of {edges} A; positive edges are wanted.")
    if max(voxel) - min(voxel) > _ISOTROPY * max(voxel):
        edges = " x ".join(f"{edge:g}" for edge in voxel)
        raise InputError(f"{path} has an anisotropic voxel of {edges} A.")
    return voxel[0]


def _write(
    path: str | Path,
    data: Array | np.ndarray,
    voxel_size_in_angstroms: float,
    *,
    is_stack: bool,
) -> None:
    if not 0 < voxel_size_in_angstroms < math.inf:
        raise InputError(
            f"Cannot write {path}: the voxel size is {voxel_size_in_angstroms} A; "
            "a positive number is wanted."
        )
    with np.errstate(over="ignore"):
        values = np.asarray(data, dtype=np.float32)
    if not np.isfinite(values).all():
        raise InputError(f"Cannot write {path}: it holds NaN or infinite values.")
    with atomic_path(path) as temporary, mrcfile.new(temporary) as mrc:
        mrc.set_data(values)
        if is_stack:
            mrc.set_image_stack()
        mrc.voxel_size = voxel_size_in_angstroms
