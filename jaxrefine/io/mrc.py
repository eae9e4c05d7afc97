"""Maps and image stacks in the MRC format."""

import bz2
import gzip
import math
import os
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import mrcfile
import numpy as np
from jaxtyping import Array, Float, Float32, Int, Shaped
from mrcfile.dtypes import HEADER_DTYPE

from jaxrefine.errors import InputError
from jaxrefine.io.atomic import atomic_path, existing_file, reading, reserve

_ISOTROPY = 1e-3  # Edges this close count as equal: cell sizes in headers are rounded.
_TYPES = {0: "i1", 1: "i2", 2: "f4", 6: "u2", 12: "f2"}  # by the header's mode
_COMPLEX_MODES, _MODE_OF_4_BITS = (3, 4), 101
_KNOWN_MODES = {*_TYPES, *_COMPLEX_MODES, _MODE_OF_4_BITS}
_WORD_MAP, _STAMP = slice(208, 211), slice(212, 213)
_BIG_ENDIAN_STAMP = b"\x11"
_HEADERS = (HEADER_DTYPE.newbyteorder("<"), HEADER_DTYPE.newbyteorder(">"))
_DECOMPRESSORS = {b"\x1f\x8b": gzip.open, b"BZ": bz2.open}
_AT_ONCE = 2**20  # bytes that are decompressed at once


@final
@dataclass(frozen=True)
class Stack:
    """The sections of an MRC file, which are read when they are asked for.

    Attributes
    ----------
    path
        The file.
    shape
        Number of sections, rows and columns.
    dtype
        Type of the values in the file, with its byte order.
    offset
        Place of the first value in the file, in bytes.
    axes
        The header's ``(mapc, mapr, maps)``; ``(1, 2, 3)``, that is x, y, z, if they are
        unset.
    voxel
        Edges (x, y, z) of a voxel in angstroms, zero where they are unset.
    is_compressed
        Whether all of this is within a file of gzip or bzip2.
    """

    path: Path
    shape: tuple[int, int, int]
    dtype: np.dtype
    offset: int
    axes: tuple[int, int, int]
    voxel: tuple[float, float, float]
    is_compressed: bool

    @property
    def pixel_size_in_angstroms(self) -> float | None:
        """Edge of a pixel: None if it is unset, NaN if not positive or not equal."""
        if not any(self.voxel[:2]):
            return None
        with suppress(InputError):  # The table of particles may give the pixel size.
            return _isotropic(self.voxel[:2], self.path)
        return math.nan

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(
        self, indices: Int[np.ndarray, " chosen"]
    ) -> Shaped[np.ndarray, "chosen m m"]:
        """Read sections, in the type of the file; neighbours in one go.

        They are not mapped to memory, because the system ends a process that reads
        beyond the end of a mapped file, and the file may become shorter meanwhile.

        Raises
        ------
        InputError
            If the file has become shorter, or cannot be read.
        """
        sections = np.empty((len(indices), *self.shape[1:]), self.dtype)
        size = math.prod(self.shape[1:]) * self.dtype.itemsize
        steps = np.flatnonzero(np.diff(indices) != 1) + 1
        with reading(self.path), open(self.path, "rb", buffering=0) as file:
            for run in np.split(np.arange(len(indices)), steps):
                if not len(run):
                    continue
                file.seek(self.offset + int(indices[run[0]]) * size)
                wanted = sections[run[0] : run[-1] + 1].reshape(-1).view(np.uint8).data
                while wanted and (count := file.readinto(wanted)):
                    wanted = wanted[count:]
                if wanted:
                    raise InputError(
                        f"{self.path} must stay as it is while it is read, got a "
                        f"file that has become shorter: image {indices[run[-1]] + 1} "
                        "is not there any more"
                    )
        return sections


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
    header = _open(path)
    return _volume(header), _isotropic(header.voxel, header.path)


def read_densities(path: str | Path) -> Float32[np.ndarray, "n n n"]:
    """Read a cubic density map whose voxel size is known, whatever its header says.

    Raises as `read_mrc` does, except for anisotropic voxels.
    """
    return _volume(_open(path))


def read_grid(path: str | Path) -> Float32[np.ndarray, "nz ny nx"]:
    """Read the values of a file of any shape, in the order of the file.

    The voxel size and the order of the axes in the header are ignored.

    Raises
    ------
    InputError
        If the file is missing, is not an MRC file, is truncated or complex, or if a
        value is not finite.
    """
    header = _open(path)
    return _finite(_values(header), header.path)


def _volume(header: Stack) -> Float32[np.ndarray, "n n n"]:
    path, axes = header.path, header.axes
    if len(set(header.shape)) != 1:
        raise InputError(
            f"{path} must hold a cubic map, got an array of {_text(header.shape)}"
        )
    if sorted(axes) != [1, 2, 3]:
        raise InputError(
            f"{path}: the header's mapc, mapr, maps must be a permutation of 1, 2, 3, "
            f"got {axes}"
        )
    sections_rows_columns = axes[::-1]
    order = [sections_rows_columns.index(axis) for axis in (3, 2, 1)]
    return _finite(_values(header).transpose(order), path)


def voxel_size_in_angstroms(path: str | Path) -> float | None:
    """Return the edge of a map's voxels in angstroms; None if it is unset.

    Raises
    ------
    InputError
        If the file is missing, is not an MRC file, or has anisotropic voxels.
    """
    header = _open(path)
    return _isotropic(header.voxel, header.path) if any(header.voxel) else None


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
    stack = _open(path)
    _require_square_images(stack)
    return _finite(_values(stack), stack.path), _isotropic(stack.voxel[:2], stack.path)


def open_stack(path: str | Path) -> Stack:
    """Open a stack of square images, without reading them.

    Values are not checked.

    Raises
    ------
    InputError
        For the reasons of `read_stack`, except values that are not finite, and if the
        file is compressed.
    """
    stack = _open(path)
    if stack.is_compressed:
        raise InputError(
            f"{path} is compressed; decompress it first, because its images are read "
            "in place"
        )
    _require_square_images(stack)
    return stack


def write_mrc(
    path: str | Path,
    volume: Float[Array | np.ndarray, "n n n"],
    voxel_size_in_angstroms: float | None,
) -> None:
    """Write a density map, indexed ``[z, y, x]``, as float32.

    The file appears complete or not at all. A voxel size of None leaves that of the
    header unset.

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


def _open(path: str | Path) -> Stack:
    """Read the header of an MRC file.

    Its byte order is the one in which it fits the file. The word ``MAP`` may be
    missing, as in files of old programs, if the file is exactly as long as it should
    be.
    """
    path = existing_file(path)
    with reading(path), open(path, "rb") as file:
        start, size = file.read(HEADER_DTYPE.itemsize), os.fstat(file.fileno()).st_size
    is_compressed = start[_WORD_MAP] != b"MAP" and start[:2] in _DECOMPRESSORS
    if is_compressed:
        start, size = _decompressed(path, HEADER_DTYPE.itemsize), None
    has_word = start[_WORD_MAP] == b"MAP"
    if len(start) < HEADER_DTYPE.itemsize:
        raise InputError(
            f"{path} is not an MRC file: it must have a header of "
            f"{HEADER_DTYPE.itemsize} bytes, got {len(start)}"
        )
    errors = []
    for dtype in _HEADERS[:: -1 if start[_STAMP] == _BIG_ENDIAN_STAMP else 1]:
        header = np.frombuffer(start, dtype)[0]
        try:
            stack = _described(header, path, is_compressed)
            _require_length(stack, size, exactly=not has_word)
            return stack
        except InputError as error:
            errors.append((int(header["mode"]) not in _KNOWN_MODES, error))
    if not has_word:
        raise InputError(
            f"{path} is not an MRC file: its header lacks the word MAP, and the mode "
            "and the sizes in it do not fit the length of the file"
        )
    raise min(errors, key=lambda each: each[0])[1]


def _described(header: np.void, path: Path, is_compressed: bool) -> Stack:
    """Return what a header says of a file."""
    mode, extended = int(header["mode"]), int(header["nsymbt"])
    if mode in _COMPLEX_MODES:
        raise InputError(f"{path} must hold real values, got complex ones")
    if mode == _MODE_OF_4_BITS:
        raise InputError(
            f"{path} must hold values of at least 8 bits, got some of 4 bits (mode "
            f"{mode}); `newstack -mode 1` of IMOD converts them"
        )
    if mode not in _TYPES:
        raise InputError(
            f"{path} is damaged: the mode in its header must be one of "
            f"{', '.join(map(str, _TYPES))}, got {mode}"
        )
    nz, ny, nx = (int(header[name]) for name in ("nz", "ny", "nx"))
    if min(nz, ny, nx, extended + 1) < 1:
        raise InputError(
            f"{path} is truncated or damaged: its header must announce values, got "
            f"{nz} x {ny} x {nx} of them after an extended header of {extended} bytes"
        )
    axes = (int(header["mapc"]), int(header["mapr"]), int(header["maps"]))
    x, y, z = (
        float(header["cella"][axis]) / float(header[count]) if header[count] else 0.0
        for axis, count in (("x", "mx"), ("y", "my"), ("z", "mz"))
    )
    return Stack(
        path=path,
        shape=(nz, ny, nx),
        dtype=np.dtype(_TYPES[mode]).newbyteorder(header.dtype["mode"].byteorder),
        offset=HEADER_DTYPE.itemsize + extended,
        axes=axes if any(axes) else (1, 2, 3),
        voxel=(x, y, z),
        is_compressed=is_compressed,
    )


def _require_length(stack: Stack, size: int | None, *, exactly: bool = False) -> None:
    """Raise if a file is shorter than its header says; it may be longer.

    Parameters
    ----------
    stack
        What the header says.
    size
        Length of the file in bytes; None if that is not known, as of a compressed one.
    exactly
        Whether it must not be longer either.
    """
    expected = stack.offset + math.prod(stack.shape) * stack.dtype.itemsize
    if size is not None and (size < expected or (exactly and size > expected)):
        raise InputError(
            f"{stack.path} is truncated or damaged: according to its header of "
            f"{_text(stack.shape)} values it must have {expected} bytes, got {size}"
        )


def _values(stack: Stack) -> Shaped[np.ndarray, "nz ny nx"]:
    """Read all values of a file, and nothing that may follow."""
    count = math.prod(stack.shape)
    if stack.is_compressed:
        size = stack.offset + count * stack.dtype.itemsize
        data = _decompressed(stack.path, size)
        _require_length(stack, len(data))
        values = np.frombuffer(data, stack.dtype, count, stack.offset)
    else:
        with reading(stack.path):
            values = np.fromfile(stack.path, stack.dtype, count, offset=stack.offset)
        _require_length(stack, stack.offset + values.nbytes)
    return values.reshape(stack.shape)


def _decompressed(path: Path, size: int) -> bytearray:
    """Return at most `size` bytes of what is compressed in a file.

    What may follow is not read, as in a file that is not compressed; a stream that ends
    there must have the checksum that it says.
    """
    data = bytearray()
    with reading(path), open(path, "rb") as compressed:
        opener = _DECOMPRESSORS[compressed.read(2)]
        compressed.seek(0)
        try:
            with opener(compressed) as file:
                while chunk := file.read(min(_AT_ONCE, size - len(data))):
                    data += chunk
                file.read(1)  # At its end, a stream compares its checksum.
        except (EOFError, zlib.error, OSError) as error:
            if isinstance(error, OSError) and error.errno is not None:
                raise  # The others say that the content is damaged.
            raise InputError(
                f"{path} is not an MRC file, or is damaged: it cannot be decompressed"
            ) from None
    return data


def _require_square_images(stack: Stack) -> None:
    if stack.shape[1] != stack.shape[2]:
        raise InputError(
            f"{stack.path} must hold a stack of square images, got an array of "
            f"{_text(stack.shape)}"
        )
    if stack.axes != (1, 2, 3):
        raise InputError(
            f"{stack.path}: the header's mapc, mapr, maps must be 1, 2, 3 for a stack "
            f"of images, got {stack.axes}"
        )


def _text(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape))


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
    voxel_size_in_angstroms: float | None,
    *,
    is_stack: bool,
) -> None:
    if voxel_size_in_angstroms is None:
        voxel_size_in_angstroms = 0.0  # MRC's word for unset
    elif not 0 < voxel_size_in_angstroms < math.inf:
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
        with np.errstate(over="ignore"):
            mrc.set_data(values)
        header: Any = mrc.header
        if not np.isfinite([header.dmean, header.rms]).all():
            header.dmean = np.mean(values, dtype=np.float64)
            header.rms = np.std(values, dtype=np.float64)
        if is_stack:
            mrc.set_image_stack()
        mrc.voxel_size = voxel_size_in_angstroms
