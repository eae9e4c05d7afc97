"""JSON reports, written whole or not at all."""

import json
import math
from pathlib import Path
from typing import Any

from jaxrefine.io._atomic import atomic_path


def write_json(path: str | Path, content: Any) -> None:
    """Write a report as indented JSON, with null for NaN and infinity.

    Raises
    ------
    InputError
        If the system refuses to write there.
    """
    with atomic_path(path) as temporary:
        text = json.dumps(_with_nulls(content), indent=2, allow_nan=False)
        temporary.write_text(text + "\n")


def _with_nulls(content: Any) -> Any:
    """Replace the numbers that JSON cannot hold."""
    if isinstance(content, dict):
        return {key: _with_nulls(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [_with_nulls(value) for value in content]
    if isinstance(content, float) and not math.isfinite(content):
        return None
    return content
