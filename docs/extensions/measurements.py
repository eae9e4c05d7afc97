"""The tables of measured figures, from what the benchmarks have stored.

A page has the line ``<!-- benchmark: NAME -->`` in the place of each.
"""

import re
from typing import Any

import records  # of the folder of the benchmarks
import run
from sphinx.application import Sphinx

MARK = re.compile(r"^<!-- benchmark: (\w+) -->$", re.MULTILINE)


def insert(app: Sphinx, page: str, source: list[str]) -> None:
    """Put the tables in the places that a page has for them."""
    for name in MARK.findall(source[0]):
        app.env.note_dependency(str(records.stored_at(name)))
    source[0] = MARK.sub(lambda mark: run.table(mark[1]), source[0])


def setup(app: Sphinx) -> dict[str, Any]:
    """Register what reads the sources."""
    app.connect("source-read", insert)
    return {"parallel_read_safe": True}
