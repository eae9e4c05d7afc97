"""Measured figures in JSON files, with what they were measured with.

A file is a list of records::

    {"case": "hjc64", "provenance": {"commit": ..., "versions": ...}, "figures": {...}}

Records of before this format have no commit of their own: ``recorded_in`` is the commit
that their figures were stored in, and what was not stored then is absent.
"""

import json
import platform
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from jaxrefine.runs import provenance

RESULTS = Path(__file__).with_name("results")
ROOT = Path(__file__).resolve().parents[1]

Record = dict[str, Any]
"""A case's name, the provenance and the figures."""


def record(case: str, figures: dict[str, Any]) -> Record:
    """Return figures that were measured just now with what they were measured with."""
    return {
        "case": case,
        "provenance": {
            **provenance.commit(ROOT),
            "date": datetime.now(UTC).date().isoformat(),
            "machine": platform.machine(),
            "cores": provenance.available_cores(),
            **provenance.environment(),
        },
        "figures": figures,
    }


def stored_at(benchmark: str) -> Path:
    """Return the file of a benchmark's records."""
    return RESULTS / f"{benchmark}.json"


def read(path: Path) -> list[Record]:
    """Return the records of a file; none if there is no file."""
    return json.loads(path.read_text()) if path.exists() else []


def store(path: Path, measured: Record) -> None:
    """Add a record to a file, in place of one of the same case on as many cores."""
    kept = [stored for stored in read(path) if _identity(stored) != _identity(measured)]
    path.write_text(json.dumps([*kept, measured], indent=2) + "\n")


def _identity(measured: Record) -> tuple[str, int]:
    """Return what a file has one record of."""
    return measured["case"], measured["provenance"]["cores"]


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table in Markdown."""
    lines = [header, ["---"] * len(header), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def origins(records: Sequence[Record]) -> str:
    """Return a sentence that says where, when and with what records were measured."""
    described: dict[str, list[str]] = {}
    for each in records:
        described.setdefault(_origin(each["provenance"]), []).append(each["case"])
    if len(described) == 1:
        return f"Measured {next(iter(described))}.\n"
    each_origin = (f"{', '.join(cases)} {text}" for text, cases in described.items())
    return f"Measured: {'; '.join(each_origin)}.\n"


def _origin(measured: dict[str, Any]) -> str:
    cores = measured["cores"]
    words = [f"on {cores} {measured['machine']} core{'s' * (cores > 1)}"]
    if "device" in measured and "cpu" not in measured["device"]:
        words.append(f"with {measured['device']}")
    versions = measured.get("versions", {})
    if "jax" in versions:
        software = f"JAX {versions['jax']}"
        if "python" in versions:
            software += f" and Python {versions['python']}"
        words.append(f"with {software}")
    if "commit" in measured:
        changed = " and changes of it" if measured["dirty"] else ""
        words.append(f"at commit {measured['commit'][:7]}{changed}, {measured['date']}")
    else:
        words.append(f"and stored in commit {measured['recorded_in'][:7]}")
    return " ".join(words)
