"""What identifies a run: the options that its results depend on, and its input files.

Tables and maps count by all of their content, stacks of images, of which there may be
gigabytes, by their sizes and their ends. None counts by its path.

Like :mod:`jaxrefine.runs.options`, this module imports neither JAX nor NumPy.
"""

import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from jaxrefine.runs.options import declared

_END = 2**16  # bytes: the header and the first lines of images, and the last ones


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


def stacks_digest(paths: Iterable[Path]) -> str:
    """Return a SHA-256 that tells stacks of images from others in a moment.

    It is of the size of each stack and of its first and its last 64 KiB, in which are
    its header, the first image and the last one, or as much of them as fits. Stacks
    that differ only between these ends have the same digest.

    Parameters
    ----------
    paths
        The stacks, in an order that is always the same, such as the table's.
    """
    digest = hashlib.sha256()
    for path in paths:
        size = path.stat().st_size
        digest.update(size.to_bytes(8))
        with open(path, "rb") as file:
            digest.update(file.read(_END))
            file.seek(max(size - _END, 0))
            digest.update(file.read(_END))
    return digest.hexdigest()
