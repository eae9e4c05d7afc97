"""JSON reports, written whole or not at all."""

import json
from pathlib import Path
from typing import Any

from jaxrefine.io._atomic import atomic_path


def write_json(path: str | Path, content: Any) -> None:
    """Write a report as indented JSON.

    Raises
    ------
    InputError
        If the system refuses to write there.
    """
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(content, indent=2) + "\n")
