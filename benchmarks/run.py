"""Run benchmarks, and show what they have measured.

    python benchmarks/run.py                          # all that need no data
    python benchmarks/run.py refinement --case hjc64 --data FOLDER
    python benchmarks/run.py --table                  # the stored figures as Markdown

Figures are stored in ``benchmarks/results/NAME.json`` with the machine, the versions
and the commit, or in the file that ``--json`` names. Run benchmarks when nothing else
runs on the machine.
"""

import argparse
import importlib
import json
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import cast

import records
from benchmark import Benchmark, Settings

NAMES = {
    "spatial": "the spatial engine: normal operator, pose and volume updates",
    "slices": "accuracy and speed of reading and inserting central slices",
    "elsewhere": "slices by the other packages that are installed",
    "refinement": "joint refinement against the truth, the oracle and RELION",
    "ctf": "data with CTFs through the command line, and RELION's map of our poses",
    "matching": "first poses of a control like real data, and RELION's first iteration",
    "presence": "images of noise among particles, with poses that were searched for",
    "external": "RELION's refinement with our maps and with its own",
    "regularisation": "four ways to choose the regulariser's weight",
    "low_snr": "iterations of a refinement at low SNR, and what poses can give",
    "tuning": "what each constant of the engine does",
}
WITHOUT_DATA = ("spatial", "slices")


def load(name: str) -> Benchmark:
    """Return a benchmark by its name."""
    return cast(Benchmark, importlib.import_module(name))


def markdown() -> str:
    """Return the stored figures of every benchmark as Markdown, without a title."""
    return "\n".join(
        f"## {title[0].upper()}{title[1:]} (`{name}`)\n\n{table(name)}"
        for name, title in NAMES.items()
        if records.stored_at(name).exists()
    )


def table(name: str) -> str:
    """Return the stored figures of a benchmark as Markdown, and where they are from."""
    stored = records.read(records.stored_at(name))
    if not stored:
        return "No figures are stored yet.\n"
    benchmark = load(name)
    place = {case: place for place, case in enumerate(benchmark.CASES)}
    stored.sort(key=lambda each: place[each["case"]])
    return f"{benchmark.table(stored)}\n{records.origins(stored)}"


def _check(
    parser: argparse.ArgumentParser,
    option: str,
    values: Sequence[str],
    known: Collection[str],
) -> None:
    for value in values:
        if value not in known:
            names = ", ".join(known) or "(none)"
            parser.error(f"{option} must be one of {names}, got {value}")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the benchmarks that the command line names."""
    parser = argparse.ArgumentParser(
        description="Run benchmarks, and show what they have measured.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="\n".join(f"{name:16}{what}" for name, what in NAMES.items()),
    )
    parser.add_argument(
        "names",
        nargs="*",
        metavar="NAME",
        help=f"a benchmark of the list below; by default {' and '.join(WITHOUT_DATA)}",
    )
    parser.add_argument(
        "--case",
        nargs="+",
        metavar="CASE",
        help="what to measure, one benchmark's; by default every case",
    )
    parser.add_argument(
        "--parts",
        nargs="+",
        default=[],
        metavar="PART",
        help="what to measure of each case, for some benchmarks; by default all",
    )
    parser.add_argument(
        "--data",
        type=Path,
        default=records.ROOT.parent / "shared" / "data",
        help="the folder of the real maps (default: %(default)s)",
    )
    parser.add_argument("--json", type=Path, help="where to store the figures")
    parser.add_argument(
        "--table", action="store_true", help="print the stored figures and stop"
    )
    options = parser.parse_args(arguments)
    if options.table:
        print(markdown(), end="")
        return
    names = options.names or WITHOUT_DATA
    _check(parser, "NAME", names, NAMES)
    if len(names) > 1 and (options.case or options.parts or options.json):
        parser.error("--case, --parts and --json need exactly one NAME")
    if options.parts and not options.json:
        parser.error("--parts needs --json: the stored figures are of all parts")
    settings = Settings(options.data, options.parts)
    for name in names:
        benchmark = load(name)
        cases = options.case or list(benchmark.CASES)
        _check(parser, "--case", cases, benchmark.CASES)
        _check(parser, "--parts", options.parts, benchmark.PARTS)
        path = options.json or records.stored_at(name)
        for case in cases:
            print(f"{name}: {case}", flush=True)
            record = records.record(case, benchmark.measure(case, settings))
            print(json.dumps(record["figures"], indent=2), flush=True)
            records.store(path, record)


if __name__ == "__main__":
    main()
