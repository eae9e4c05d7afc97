"""Measure the results of finished runs anew, from the maps and poses that they keep.

    python experiments/remeasure.py RUN [RUN ...]

Correlations and pose errors are measured by the present code; iterations, times and
remarks stay, and so do all results whose poses were not kept. The runs may be sweeps.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

import comparison
import harness
import jax.numpy as jnp
import sweeps
from finished import Run, open_run

from jaxrefine import io
from jaxrefine.geometry import Poses


def remeasure(folder: Path) -> None:
    """Measure a run; of a sweep, all points.

    Raises
    ------
    InputError
        If the folder holds no finished run, or its maps are gone.
    """
    run = open_run(folder)
    if "points" in run.results:
        axis, points = run.results["axis"], []
        for value in (point["value"] for point in run.results["points"]):
            inner = folder / "points" / f"{axis}={value:g}"
            remeasure(inner)
            points.append(sweeps.summary(value, harness.read_metrics(inner)))
        io.write_json(folder / "metrics.json", {"axis": axis, "points": points})
        text = sweeps.table(axis, points, run.caption)
    else:
        results = _measured(run)
        io.write_json(folder / "metrics.json", results)
        text = comparison.table(results, run.caption)
    (folder / "table.md").write_text(text + "\n", encoding="utf-8")


def _measured(run: Run) -> dict[str, Any]:
    """Return the results of a run, measured anew, with the commit that did so."""
    measured_by = harness.commit()
    truth, true_poses = jnp.asarray(run.map("truth")), _poses(run.folder, "truth")
    results = {}
    for name, entry in run.results.items():
        results[name] = entry
        method = name.removesuffix(", post-processed")
        if (run.folder / "poses" / f"{comparison.slug(method)}.star").exists():
            poses = _poses(run.folder, method)
            merits = comparison.measure(run.map(name), poses, truth, true_poses)
            results[name] = entry | merits | {"measured_by": measured_by}
        else:
            print(f"{run.folder}: the poses of {name} are absent; it stays as it is")
    return results


def _poses(folder: Path, name: str) -> Poses:
    path = folder / "poses" / f"{comparison.slug(name)}.star"
    return io.read_poses(path)


def main() -> None:
    """Measure the runs that the command line names."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN")
    for folder in parser.parse_args().runs:
        remeasure(folder)


if __name__ == "__main__":
    sys.exit(harness.main(main))
