"""Maps and image stacks in the MRC format."""

import bz2
import gzip
import math
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import mrcfile
import numpy as np
from jaxtyping import Array, Float, Float32, Shaped
from mrcfile import utils as mrcfile_utils

from jaxrefine.errors import InputError
from jaxrefine.io.atomic import atomic_path, existing_file, reserve

_ISOTROPY = 1e-3  # Edges this close count as equal: cell sizes in headers are rounded.
_COMPLEX_MODES = (3, 4)
_MODE, _NSYMBT, _WORD_MAP = slice(12, 16), slice(92, 96), slice(208, 211)
_BYTE_ORDERS = ("little", "big")
_DAMAGE = (ValueError, OSError, EOFError, zlib.error, MemoryError, ArithmeticError)
_DECOMPRESSORS = {b"\x1f\x8b": gzip.open, b"BZ": bz2.open}


def read_mrc(path: str | Path) -> tuple[Float32[np.ndarray, "n n n"], float]:
    """Read a cubic density map.

    The axes are brought into the order ``[z, y, x]``, whatever order the header's
    ``mapc``, ``mapr`` and ``maps`` declare. The header's origin and start are ignored.

    Parameters
    ----------
    path
        The file, which may be compressed by gzip or bzip2.

    Returns
    -------
    volume
        Densities, of type float32 whatever the file's mode.
    voxel_size
        Edge of a voxel in angstroms; 1.0 if the header leaves it unset (zero).

    Raises
    ------
    InputError
        If the file is missing, is not an MRC file, is truncated or complex, or if the
        map is not cubic, is not finite, or has anisotropic voxels.
    """
    path = existing_file(path)
    data, axes, voxel = _read(path)
    if data.ndim == 4 and len(data) == 1:  # a stack of one volume
        data = data[0]
    if data.ndim != 3 or len(set(data.shape)) != 1:
        shape = " x ".join(map(str, data.shape))
        raise InputError(f"{path} must hold a cubic map, got an array of {shape}")
    if sorted(axes) != [1, 2, 3]:
        raise InputError(
            f"{path}: the header's mapc, mapr, maps must be a permutation of 1, 2, 3, "
            f"got {axes}"
        )
    sections_rows_columns = axes[::-1]
    volume = data.transpose([sections_rows_columns.index(axis) for axis in (3, 2, 1)])
    return _finite(volume, path), _isotropic(voxel, path)


def voxel_size_in_angstroms(path: str | Path) -> float | None:
    """Return the edge of a map's voxels in angstroms; None if it is unset.

    Raises
    ------
    InputError
        If the file is missing, is not an MRC file, or has anisotropic voxels.
    """
    path = existing_file(path)
    voxel = _voxel(_header(path)[0])
    return _isotropic(voxel, path) if any(voxel) else None


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
        Edge of a pixel in angstroms; 1.0 if the header leaves it unset (zero).

    Raises
    ------
    InputError
        If the file is missing, is not an MRC file, is truncated or complex, or if the
        images are not square, are not finite, are transposed, or have anisotropic
        pixels.
    """
    path = existing_file(path)
    data, axes, voxel = _read(path)
    if data.ndim == 2:
        data = data[None]
    _require_square_images(path, data.shape, axes)
    return _finite(data, path), _isotropic(voxel[:2], path)


def map_stack(
    path: str | Path,
) -> tuple[Shaped[np.ndarray, "particles m m"], float | None]:
    """Open a stack of square images as a memory map, without reading them.

    Returns
    -------
    images
        A memory map of the file, indexed ``[particle, y, x]``, in the file's type and
        byte order. Values are not checked.
    pixel_size
        Edge of a pixel in angstroms; None if the header leaves it unset, NaN if the
        header's edges are not positive or not equal.

    Raises
    ------
    InputError
        For the reasons of `read_stack`, except values that are not finite, and if the
        file is compressed.
    """
    path = existing_file(path)
    if _is_compressed(path):
        raise InputError(
            f"{path} is compressed; decompress it first, because its images are read "
            "in place"
        )
    header, dtype, offset = _header(path)
    shape = tuple(int(count) for count in (header.nz, header.ny, header.nx))
    _require_square_images(path, shape, _axes(header))
    voxel = _voxel(header)[:2]
    images = np.memmap(path, dtype, "r", offset, shape)
    pixel = None
    if any(voxel):
        pixel = math.nan
        with suppress(InputError):  # The table of particles may give the pixel size.
            pixel = _isotropic(voxel, path)
    return images, pixel


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

    The file appears complete or not at all. Raises as `write_mrc` does.
    """
    _write(path, images, pixel_size_in_angstroms, is_stack=True)


@contextmanager
def new_stack(
    path: str | Path, count: int, image_size: int, pixel_size_in_angstroms: float
) -> Iterator[Float32[np.ndarray, "particles m m"]]:
    """Provide a stack of images to fill in, as a memory map of the file.

    The file appears at `path` at the end of the body, or not at all if the body raises.
    The header's statistics are marked as not computed.

    Parameters
    ----------
    path
        The file, usually ``.mrcs``.
    count, image_size
        Number of images, and their side in pixels.
    pixel_size_in_angstroms
        Edge of a pixel.

    Raises
    ------
    InputError
        If the file cannot be written, or the disk has too little space for it.
    """
    shape = (count, image_size, image_size)
    with atomic_path(path) as temporary, mrcfile.new_mmap(temporary, shape, 2) as mrc:
        reserve(temporary)
        mrc.set_image_stack()
        mrc.voxel_size = pixel_size_in_angstroms
        mrc.reset_header_stats()
        data: Any = mrc.data
        yield data


def _read(path: Path) -> tuple[np.ndarray, tuple[int, ...], tuple[float, ...]]:
    """Return the data as stored, (mapc, mapr, maps), and the voxel size (x, y, z)."""
    header, _, _ = _header(path)
    try:
        with (
            warnings.catch_warnings(action="ignore"),
            mrcfile.open(path, permissive=True) as mrc,
        ):
            data = mrc.data
    except _DAMAGE:
        data = None
    if data is None or not data.size:
        raise InputError(f"{path} is truncated or damaged: its values cannot be read")
    return data, _axes(header), _voxel(header)


def _header(path: Path) -> tuple[Any, np.dtype, int]:
    """Return a file's header, the type of its values, and their offset in bytes."""
    try:
        _require_start(path)
        with (
            warnings.catch_warnings(action="ignore"),
            mrcfile.open(path, permissive=True, header_only=True) as mrc,
        ):
            header: Any = mrc.header
        if int(header.mode) in _COMPLEX_MODES:
            raise InputError(f"{path} must hold real values, got complex ones")
        dtype = mrcfile_utils.data_dtype_from_header(header)
    except InputError:
        raise
    except _DAMAGE:
        raise InputError(f"{path} is not an MRC file, or is damaged") from None
    offset = header.nbytes + int(header.nsymbt)
    shape = tuple(int(count) for count in (header.nz, header.ny, header.nx))
    expected, actual = offset + math.prod(shape) * dtype.itemsize, path.stat().st_size
    if min(shape) < 1 or (expected > actual and not _is_compressed(path)):
        raise InputError(
            f"{path} is truncated or damaged: according to its header of "
            f"{' x '.join(map(str, shape))} values it must have {expected} bytes, got "
            f"{actual}"
        )
    return header, dtype, offset


def _is_compressed(path: Path) -> bool:
    with open(path, "rb") as file:
        return file.read(2) in _DECOMPRESSORS


def _axes(header: Any) -> tuple[int, ...]:
    """Return (mapc, mapr, maps); (1, 2, 3), that is x, y, z, if they are unset."""
    axes = tuple(int(axis) for axis in (header.mapc, header.mapr, header.maps))
    return axes if any(axes) else (1, 2, 3)


def _voxel(header: Any) -> tuple[float, ...]:
    """Return the edges (x, y, z) of a voxel in angstroms, zero where they are unset."""
    return tuple(
        float(header.cella[axis]) / float(count) if count else 0.0
        for axis, count in zip("xyz", (header.mx, header.my, header.mz), strict=True)
    )


def _require_square_images(
    path: Path, shape: tuple[int, ...], axes: tuple[int, ...]
) -> None:
    if len(shape) != 3 or shape[1] != shape[2]:
        text = " x ".join(map(str, shape))
        raise InputError(
            f"{path} must hold a stack of square images, got an array of {text}"
        )
    if axes != (1, 2, 3):
        raise InputError(
            f"{path}: the header's mapc, mapr, maps must be 1, 2, 3 for a stack of "
            f"images, got {axes}"
        )


def _require_start(path: Path) -> None:
    """Raise if a file does not begin as an MRC file.

    Without the word ``MAP`` that is an ``InputError``. If the extended header is longer
    than the file, in the byte order in which the mode is a small number, it is a
    ``ValueError``. This check must precede `mrcfile`, which allocates as much memory as
    the header asks for, whatever the bytes are.
    """
    with open(path, "rb") as file:
        start = file.read(_WORD_MAP.stop)
    size = path.stat().st_size
    if start[_WORD_MAP] != b"MAP" and start[:2] in _DECOMPRESSORS:
        with _DECOMPRESSORS[start[:2]](path, "rb") as file:
            start = file.read(_WORD_MAP.stop)
        size = math.inf
    if start[_WORD_MAP] != b"MAP":
        raise InputError(f"{path} is not an MRC file: its header lacks the word MAP")
    lengths = [
        int.from_bytes(start[_NSYMBT], order)
        for order in _BYTE_ORDERS
        if int.from_bytes(start[_MODE], order) < 2**16
    ]
    if min(lengths, default=0) > size:
        raise ValueError


def _finite(data: np.ndarray, path: Path) -> np.ndarray:
    """Return a contiguous float32 copy, or raise if a value is NaN or infinite."""
    values = np.array(data, dtype=np.float32, order="C")
    bad = values.size - np.count_nonzero(np.isfinite(values))
    if bad:
        raise InputError(
            f"{path} must hold finite values, got {bad} that are NaN or infinite"
        )
    return values


def _isotropic(voxel: tuple[float, ...], path: Path) -> float:
    """Return the edge of a cubic voxel in angstroms, 1.0 if it is unset."""
    if not any(voxel):
        return 1.0
    edges = " x ".join(f"{edge:g}" for edge in voxel)
    if min(voxel) <= 0 or not all(map(math.isfinite, voxel)):
        raise InputError(f"{path}: the voxel size must be positive, got {edges} A")
    if max(voxel) - min(voxel) > _ISOTROPY * max(voxel):
        raise InputError(f"{path}: the voxel must be isotropic, got {edges} A")
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
            f"cannot write {path}: the voxel size must be positive, got "
            f"{voxel_size_in_angstroms} A"
        )
    with np.errstate(over="ignore"):
        values = np.asarray(data, dtype=np.float32)
    if not np.isfinite(values).all():
        raise InputError(
            f"cannot write {path}: the values must be finite in single precision, got "
            "NaN or infinity"
        )
    with atomic_path(path) as temporary, mrcfile.new(temporary) as mrc:
        mrc.set_data(values)
        if is_stack:
            mrc.set_image_stack()
        mrc.voxel_size = voxel_size_in_angstroms
