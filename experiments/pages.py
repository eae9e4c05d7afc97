"""The tables of the pages that show results of the experiments.

The line above such a table names the runs that it shows, a figure of each in a cell::

    <!-- results: hjc_init1_small, ptch1_init1_small -->
    | method | mean FSC | within 10 deg |
    |---|---|---|
    | joint | 0.666, 0.636 | 99.0 %, 93.0 % |

These are folders of ``experiments/results``. The heading of a column says which figure
it has, one of `COMPARISON`, and the first cell of a row of which method, up to a colon,
after which there may be words. A table whose line says ``sweeps: hjc, ptch1`` shows
the sweeps of these molecules, columns of `SWEEP`, a row for each condition (``25 dB``).

Rows and columns are chosen in the page: a new one has ``?`` in its cells until they are
written. Cells that are empty stay empty, and columns with other headings stay as they
are, but may not have digits.

    python experiments/pages.py PAGE.md [PAGE.md ...]

writes what ``metrics.json`` holds into all other cells.
"""

import argparse
import functools
import re
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import harness

from jaxrefine.cli.demo import rc_text
from jaxrefine.errors import InputError

RESULTS = Path(__file__).with_name("results")

Entries = Mapping[str, Any]
"""What ``metrics.json`` holds of a method, or of all methods by their names."""

Columns = Mapping[str, Callable[[Entries], str]]
"""How a figure is shown, by the heading of its column."""


def _within(entry: Entries) -> str:
    return f"{100 * entry['fraction_within_10_degrees']:.1f} %"


def _share(methods: Entries, name: str, oracle: str) -> str:
    """Return the aligned mean FSC of a map over that of the oracle's."""
    return (
        f"{methods[name]['mean_fsc_aligned'] / methods[oracle]['mean_fsc_aligned']:.2f}"
    )


COMPARISON: Columns = {
    "mean FSC": lambda entry: f"{entry['mean_fsc']:.3f}",
    "aligned": lambda entry: f"{entry['mean_fsc_aligned']:.3f}",
    "r_c (shells)": lambda entry: rc_text(entry["rc"], len(entry["fsc"]) - 1),
    "angle error, median (deg)": lambda entry: (
        f"{entry['angle_error_in_degrees_median']:.2f}"
    ),
    "within 10 deg": _within,
    "shift error, median (px)": lambda entry: (
        f"{entry['shift_error_in_pixels_median']:.2f}"
    ),
    "wall (s)": lambda entry: f"{entry['wall_s']:.0f}",
}
"""Of a method; "aligned" is the mean FSC after the free rigid motion is undone."""

SWEEP: Columns = {
    "paper, within 10 deg": lambda methods: _within(methods["joint (paper)"]),
    "engine, within 10 deg": lambda methods: _within(methods["joint"]),
    "paper, of its oracle": lambda methods: _share(
        methods, "joint (paper)", "oracle (paper)"
    ),
    "engine, of its oracle": lambda methods: _share(methods, "joint", "oracle"),
}
"""Of all methods in one condition."""

_SWEPT = {"dB": "snr_db", "particles": "particles", "rad": "max_angle_error"}
"""What the folder of a sweep is called after, by the unit of its values."""


@functools.cache
def results(run: str) -> dict[str, Any]:
    """Return what a folder of ``experiments/results`` holds in its ``metrics.json``.

    Raises
    ------
    InputError
        If there is none.
    """
    found = harness.read_metrics(RESULTS / run)
    if not found:
        raise InputError(f"A run must have experiments/results/{run}/metrics.json.")
    return found


def _method(run: str, label: str) -> Entries:
    """Return the entry of the method that a row is called after."""
    name = label.partition(":")[0]
    if name not in results(run):
        raise InputError(f"A row must be called after a method of {run}, got {label}.")
    return results(run)[name]


def _point(molecule: str, label: str) -> Entries:
    """Return the methods in the condition that a row is called after."""
    value, _, unit = label.partition(" ")
    if unit in _SWEPT:
        for point in results(f"{molecule}_sweep_{_SWEPT[unit]}_small")["points"]:
            if f"{point['value']:g}" == value:
                return point["methods"]
    raise InputError(
        f"A row must be called after a condition of a sweep of {molecule}, got {label}."
    )


_KINDS = {"results": (_method, COMPARISON), "sweeps": (_point, SWEEP)}
"""How the entries of a row are found, and the columns."""

TABLE = re.compile(
    rf"^(<!-- ({'|'.join(_KINDS)}): (.+) -->\n)((?:\|.*\n)*)", re.MULTILINE
)
"""A table and the line above it: all of that line, its kind, its runs, the rest."""


def updated(text: str) -> str:
    """Return a page with the stored figures in its tables.

    Parameters
    ----------
    text
        The page, in Markdown.

    Raises
    ------
    InputError
        If a table, row or column cannot be made of the results.
    """
    return TABLE.sub(_table, text)


def _table(match: re.Match[str]) -> str:
    mark, kind, runs, table = match.groups()
    lines = table.splitlines()
    if len(lines) < 3:
        raise InputError(f"A table must follow the line {mark.strip()}.")
    entries, columns = _KINDS[kind]
    heading = _cells(lines[0])
    for number, line in enumerate(lines[2:], start=2):
        label, *old = _cells(line)
        if len(old) != len(heading) - 1:
            raise InputError(f"A row must have {len(heading)} cells, got {line}.")
        found = [entries(run, label) for run in runs.split(", ")]
        new = [label]
        for name, cell in zip(heading[1:], old, strict=True):
            if cell and name in columns:
                try:
                    cell = ", ".join(columns[name](each) for each in found)
                except KeyError as lack:
                    raise InputError(
                        f"The results must have {lack} for the column {name} of "
                        f"{label}, got none."
                    ) from lack
            elif re.search(r"\d", cell):
                raise InputError(
                    f"A column of figures must be one of {', '.join(columns)}, "
                    f"got {name}."
                )
            new.append(cell)
        lines[number] = f"| {' | '.join(new)} |"
    return mark + "".join(f"{line}\n" for line in lines)


def _cells(line: str) -> list[str]:
    return [
        cell.strip()
        for cell in line.strip().removeprefix("|").removesuffix("|").split("|")
    ]


def main() -> None:
    """Update the pages that the command line names."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("pages", type=Path, nargs="+", metavar="PAGE.md")
    pages = parser.parse_args().pages
    texts = [updated(page.read_text(encoding="utf-8")) for page in pages]
    for page, text in zip(pages, texts, strict=True):
        page.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    sys.exit(harness.main(main))
