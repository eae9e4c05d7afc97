"""Cost: times of a pose update against the side of the images.

python experiments/plot_cost.py RUN --out FILE.png
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import figures
import harness
from cost import NORMAL_OPERATOR, CostSettings
from finished import settings_of
from matplotlib.figure import Figure

from jaxrefine.errors import InputError
from jaxrefine.report import plots

LOOKS = {
    "projection matching": ("#8C564B", "-"),
    "projection matching, steps as 1/n": ("#8C564B", "--"),
    "spatial, Algorithm 3": ("#0072B2", "-"),
    "spatial, cost and gradient": ("#0072B2", "--"),
    "spatial, cost": ("#0072B2", ":"),
    "slices, visit": ("#D62728", "-"),
    "slices, cost and gradient": ("#D62728", ":"),
}
"""Colour and dashes of each function."""


class CostRun(NamedTuple):
    """A finished run of ``cost.py``: its settings, and what it measured."""

    settings: CostSettings
    results: dict[str, Any]


def read(folder: Path) -> CostRun:
    """Read a finished run.

    Raises
    ------
    InputError
        If the folder holds none.
    """
    return CostRun(settings_of(CostSettings, folder), harness.read_metrics(folder))


def draw(runs: Sequence[CostRun]) -> Figure:
    """Draw the times of one run.

    Raises
    ------
    InputError
        If there are several.
    """
    if len(runs) != 1:
        raise InputError(f"RUN must be one folder, got {len(runs)}")
    settings, results = runs[0]
    points, exponents = results["points"], results["exponents"]
    sizes = [point["size"] for point in points]
    trials = ", ".join(f"{point['line_search_trials']:.1f}" for point in points)
    text = (
        f"Medians of {settings.repetitions} calls on {results['device']}, "
        f"{results['threads']} threads, without compilation; legend: best fit to a "
        f"power of n. {settings.particles} particles of the built-in phantom at once, "
        f"{settings.snr_db:g} dB, seed {settings.seed}; all frequencies below "
        f"Nyquist. Projection matching: steps of {settings.matching_step_in_degrees:g} "
        f"degrees (1/n: at n = {max(sizes)}), shifts up to {settings.max_shift:g} px. "
        f"Algorithm 3: three steps, with {trials} trials in a line search on average. "
        "Visit: at most three steps of Levenberg and Marquardt."
    )
    figure = plots.captioned_figure(9.6, 5.6, text)
    axes = figure.subplots()
    for name, (colour, dash) in LOOKS.items():
        times = [1e3 * point["seconds_per_particle"][name] for point in points]
        label = f"{name} ($n^{{{exponents[name]:.1f}}}$)"
        look = {"color": colour, "linestyle": dash, "lw": 2, "marker": "o", "ms": 4}
        axes.plot(sizes, times, label=label, **look)
    operator_times = [1e3 * point["normal_operator_s"] for point in points]
    label = f"{NORMAL_OPERATOR}, in all ($n^{{{exponents[NORMAL_OPERATOR]:.1f}}}$)"
    axes.plot(sizes, operator_times, "0.6", lw=4, zorder=1, label=label)
    axes.set(xscale="log", yscale="log")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.set_xticks(sizes, [str(size) for size in sizes])
    axes.set_xticks([], minor=True)
    plots.label_axes(axes, "side of images and map, n (pixels)", "ms per particle")
    figure.legend(
        loc="outside right upper",
        fontsize=plots.TEXT_SIZE - 1,
        frameon=False,
        handlelength=3,
    )
    return figure


if __name__ == "__main__":
    sys.exit(figures.save(__doc__, read, draw))
