"""JSON files, written completely or not at all, and logs, written line by line."""

import json
import math
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from jaxrefine.errors import InputError
from jaxrefine.io.atomic import atomic_path, existing_file, reading, writing

_DEEPEST = 100


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
        temporary.write_text(text + "\n", encoding="utf-8")


def read_json(path: str | Path) -> Any:
    """Read a JSON file.

    Raises
    ------
    InputError
        If the file is missing, cannot be read, is not JSON, or holds objects that are
        nested more than 100 deep.
    """
    path = existing_file(path)
    with reading(path):
        text = path.read_bytes()
    try:
        content = json.loads(text)
    except (ValueError, RecursionError):
        raise InputError(f"{path} is not a JSON file") from None
    if not _is_within(_DEEPEST, content):
        raise InputError(
            f"{path} must hold objects nested at most {_DEEPEST} deep, got more"
        )
    return content


def json_line(content: Any) -> str:
    """Return a line of JSON without its end, with null for NaN and infinity."""
    return json.dumps(_with_nulls(content), allow_nan=False)


def append_line(path: str | Path, line: str) -> None:
    """Append a line to a log, and flush it to disk.

    Raises
    ------
    InputError
        If the file cannot be written; it may then end in an incomplete line.
    """
    with writing(path), open(path, "a", encoding="utf-8") as file:
        file.write(f"{line}\n")
        file.flush()
        os.fsync(file.fileno())


def write_lines(path: str | Path, lines: Iterable[str]) -> None:
    """Write a log anew, which appears complete or not at all.

    Raises
    ------
    InputError
        If the file cannot be written.
    """
    with atomic_path(path) as temporary:
        temporary.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def _is_within(depth: int, content: Any) -> bool:
    """Return whether objects and lists are nested at most so deep."""
    if isinstance(content, dict):
        content = list(content.values())
    if not isinstance(content, list):
        return True
    return depth > 0 and all(_is_within(depth - 1, each) for each in content)


def _with_nulls(content: Any) -> Any:
    """Replace numbers that JSON cannot represent by None."""
    if isinstance(content, dict):
        return {key: _with_nulls(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [_with_nulls(value) for value in content]
    if isinstance(content, float) and not math.isfinite(content):
        return None
    return content
