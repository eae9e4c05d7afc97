"""Sweeps: map, resolution and poses against what is swept, a row for each sweep.

python experiments/plot_sweeps.py RUN [RUN ...] --out FILE.png
"""

from collections.abc import Sequence
from typing import Any

import figures
from figures import STYLES
from finished import Run
from matplotlib.figure import Figure
from matplotlib.ticker import LogFormatter

from jaxrefine.errors import InputError
from jaxrefine.report import plots

LABELS = {
    "snr_db": "SNR per pixel (dB)",
    "particles": "number of particles",
    "max_angle_error_in_radians": "largest error of initial angles (rad)",
}
"""What is swept."""

PANELS = {
    "mean_fsc_aligned": "mean FSC",
    "rc": "$r_c$ (Fourier shells)",
    "angle_error_in_degrees_median": "median angle error (deg)",
    "fraction_within_10_degrees": "fraction within 10 deg",
}
"""Figures of merit."""

LIMITS = {"mean_fsc_aligned": (0, 1), "fraction_within_10_degrees": (-0.03, 1.03)}
"""Of the axes of those that are fractions."""

METHODS = {
    "oracle": STYLES["oracle"],
    "true map": ("#009E73", ":"),
    "joint": STYLES["joint"],
    "oracle (paper)": STYLES["oracle (paper)"],
    "joint (paper)": STYLES["joint (paper)"],
    "unrefined": STYLES["unrefined"],
}

_ERROR = "angle_error_in_degrees_median"


def draw(runs: Sequence[Run]) -> Figure:
    """Draw the sweeps; all but what is swept must agree.

    Raises
    ------
    InputError
        If a run is not a sweep, or the runs are of different conditions.
    """
    for run in runs:
        if "axis" not in run.results:
            raise InputError(f"{run.folder} must be the run of a sweep, it is not")
    captions = {run.caption for run in runs}
    if len(captions) > 1:
        raise InputError(
            "Sweeps that are drawn together must be of the same conditions; draw these "
            "each by itself."
        )
    text = (
        f"{captions.pop()} Each row varies one of these. FSC with the true map, the "
        "rigid motion that the poses leave free undone; r_c, where it falls to 0.5, of "
        "maps as they stand. The engine is told how large the errors of the angles may "
        "be. True map: optima in it, at the known noise, nearest to the true poses, "
        "and our map of these. Bound: median over particles, for Gaussian errors."
    )
    figure = plots.captioned_figure(3.6 * len(PANELS), 3.1 * len(runs) + 1, text)
    grid = figure.subplots(len(runs), len(PANELS), squeeze=False)
    curves: dict[str, Any] = {}
    for run, row in zip(runs, grid, strict=True):
        axis, points = run.results["axis"], run.results["points"]
        values = [point["value"] for point in points]
        for (merit, label), axes in zip(PANELS.items(), row, strict=True):
            for name, (colour, dash) in METHODS.items():
                if merit == _ERROR and name.startswith("oracle"):
                    continue  # its poses are the true ones
                there = [point for point in points if name in point["methods"]]
                if not there:
                    continue
                curves[name] = axes.plot(
                    [point["value"] for point in there],
                    [point["methods"][name][merit] for point in there],
                    color=colour,
                    linestyle=dash,
                    lw=2,
                    marker="o",
                    ms=4,
                )[0]
            if merit == _ERROR:
                limits = [
                    point["bound"]["bound_angle_in_degrees_median"] for point in points
                ]
                curves["Cramér-Rao bound"] = axes.plot(values, limits, "0.5", lw=5)[0]
                curves["Cramér-Rao bound"].set(zorder=1, alpha=0.5)
                axes.set_yscale("log")
                axes.yaxis.set_major_formatter("{x:g}")
                axes.yaxis.set_minor_formatter(LogFormatter())
            else:
                axes.set_ylim(*LIMITS.get(merit, (0, None)))
            if axis == "particles":
                axes.set_xscale("log", base=2)
            axes.set_xticks(values, [f"{value:g}" for value in values])
            axes.set_xticks([], minor=True)
            plots.label_axes(axes, LABELS[axis], label)
    figure.legend(
        curves.values(),
        curves,
        loc="outside upper center",
        ncols=len(curves),
        fontsize=plots.TEXT_SIZE,
        frameon=False,
        handlelength=3,
    )
    return figure


if __name__ == "__main__":
    figures.main(__doc__, draw)
