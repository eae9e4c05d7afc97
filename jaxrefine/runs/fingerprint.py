"""What identifies a run: the options that its results depend on, and its input files.

Tables and maps count by all of their content, stacks of images, of which there may be
gigabytes, by their sizes and a sample of their content. None counts by its path.

Like :mod:`jaxrefine.runs.options`, this module imports neither JAX nor NumPy.
"""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jaxrefine.runs.options import declared

_BLOCK = 2**16  # bytes that are read at once
_SAMPLE = 2**28  # bytes that are read at most, besides the ends of every stack


def fingerprint(settings: Any) -> dict[str, Any]:
    """Return all that the results of a run depend on, as JSON can hold it.

    Options that do not affect the results are left out; an input file counts by its
    content, wherever it lies.

    Parameters
    ----------
    settings
        A dataclass of options, see :mod:`jaxrefine.runs.options`.
    """
    values = {
        each.name: each.value(settings)
        for each in declared(type(settings))
        if each.affects_results
    }
    return {
        name: file_digest(value) if isinstance(value, Path) else value
        for name, value in values.items()
    }


def file_digest(path: Path) -> str:
    """Return the SHA-256 of a file's content."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def stacks_digest(paths: Sequence[Path]) -> str:
    """Return a SHA-256 that tells stacks of images from others in a moment.

    It is of the size of each stack and of blocks of 64 KiB: the first and the last one,
    and others at equal distances. Up to 256 MiB of stacks are read completely; of more
    it is a sample, in which images that were made anew differ. What it may overlook,
    :func:`times_digest` tells of.

    Parameters
    ----------
    paths
        The stacks, in an order that is always the same, such as the table's.
    """
    sizes = [path.stat().st_size for path in paths]
    stride = _every(sizes) * _BLOCK
    digest = hashlib.sha256()
    for path, size in zip(paths, sizes, strict=True):
        digest.update(size.to_bytes(8))
        with open(path, "rb") as file:
            for start in (*range(0, size, stride), max(size - _BLOCK, 0)):
                file.seek(start)
                digest.update(file.read(_BLOCK))
    return digest.hexdigest()


def times_digest(paths: Sequence[Path]) -> str:
    """Return a SHA-256 of the times at which stacks were last written.

    It is that of no stacks if :func:`stacks_digest` reads all of their content, which
    then tells by itself whether they are the same.
    """
    stats = [path.stat() for path in paths]
    sampled = _every([stat.st_size for stat in stats]) > 1
    digest = hashlib.sha256()
    for stat in stats if sampled else ():
        digest.update(stat.st_mtime_ns.to_bytes(16, signed=True))
    return digest.hexdigest()


def _every(sizes: Sequence[int]) -> int:
    """Return of how many blocks of stacks of these sizes one is read."""
    return max(1, -(-sum(sizes) // _SAMPLE))
