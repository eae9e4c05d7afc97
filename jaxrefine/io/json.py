"""JSON files, written completely or not at all, and logs, written line by line."""

import json
import math
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

from jaxrefine.errors import InputError
from jaxrefine.io.atomic import atomic_path, existing_file, writing


def write_json(path: str | Path, content: Any) -> None:
    """Write indented JSON, with null for NaN and infinity.

    The file appears complete or not at all.

    Raises
    ------
    InputError
        If the file cannot be written.
    """
    with atomic_path(path) as temporary:
        text = json.dumps(_with_nulls(content), indent=2, allow_nan=False)
        temporary.write_text(text + "\n")


def read_json(path: str | Path) -> Any:
    """Read a JSON file.

    Raises
    ------
    InputError
        If the file is missing or is not JSON.
    """
    try:
        return json.loads(existing_file(path).read_text())
    except ValueError:
        raise InputError(f"{path} is not a JSON file") from None


def append_json_line(path: str | Path, content: Any) -> None:
    """Append a line of JSON to a log, and flush it to disk.

    NaN and infinity are written as null.

    Raises
    ------
    InputError
        If the file cannot be written; it may then end in an incomplete line.
    """
    line = json.dumps(_with_nulls(content), allow_nan=False) + "\n"
    with writing(path), open(path, "a") as file:
        file.write(line)
        file.flush()
        os.fsync(file.fileno())


def read_json_lines(path: str | Path) -> list[dict[str, Any]]:
    """Return the objects in the lines of a log, without lines that are damaged.

    Raises
    ------
    InputError
        If the file is missing.
    """
    rows = []
    for line in existing_file(path).read_text(errors="replace").splitlines():
        with suppress(ValueError):
            rows.append(json.loads(line))
    return [row for row in rows if isinstance(row, dict)]


def keep_lines(path: str | Path, count: int) -> None:
    """Keep only the first `count` lines of a log; a missing log becomes an empty one.

    Raises
    ------
    InputError
        If the file cannot be written.
    """
    path = Path(path)
    lines = path.read_bytes().splitlines(keepends=True) if path.is_file() else []
    with atomic_path(path) as temporary:
        temporary.write_bytes(b"".join(lines[:count]))


def _with_nulls(content: Any) -> Any:
    """Replace numbers that JSON cannot represent by None."""
    if isinstance(content, dict):
        return {key: _with_nulls(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [_with_nulls(value) for value in content]
    if isinstance(content, float) and not math.isfinite(content):
        return None
    return content
