"""What identifies a run: the options that its results depend on, and its input files.

Like :mod:`jaxrefine.runs.options`, this module imports neither JAX nor NumPy.
"""

import hashlib
from pathlib import Path
from typing import Any

from jaxrefine.runs.options import declared


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
