"""Ablation: from the paper's algorithm to the engine, one step at a time.

python experiments/plot_ablation.py RUN [RUN ...] --out FILE.png
"""

from collections.abc import Sequence

import figures
from figures import STYLES
from finished import Run
from matplotlib.figure import Figure

from jaxrefine.report import plots

PANELS = {
    "mean_fsc_aligned": ("mean FSC", "%.3f"),
    "angle_error_in_degrees_median": ("median angle error (deg)", "%.2f"),
    "fraction_within_10_degrees": ("fraction within 10 deg", "%.3f"),
    "wall_s": ("time (s)", "%.0f"),
}
"""Figures of merit, and how they are written."""

METHODS = (
    "oracle (paper)",
    "unrefined (paper)",
    "joint (paper)",
    "on slices",
    "+ Levenberg-Marquardt",
    "+ multi-start",
    "+ cross-validated tau",
    "+ folds",
    "joint",
    "oracle",
)

_OTHERS = "#E69F00"


def draw(runs: Sequence[Run]) -> Figure:
    """Draw bars, a row of panels for each run."""
    text = (
        "FSC with the true map, the rigid motion that the poses leave free undone. "
        "From the paper's algorithm down to the engine (joint), each bar has something "
        "more than the one above. Times include the compilation of what no earlier "
        "method has used."
    )
    captions = " ".join(run.caption for run in runs)
    figure = plots.captioned_figure(13.0, 3.2 * len(runs) + 0.9, f"{text} {captions}")
    grid = figure.subplots(len(runs), len(PANELS), squeeze=False, sharey="row")
    for run, row in zip(runs, grid, strict=True):
        for (merit, (label, form)), axes in zip(PANELS.items(), row, strict=True):
            merits = run.values(merit, METHODS)
            colours = [STYLES.get(name, (_OTHERS,))[0] for name in merits]
            bars = axes.barh(list(merits), list(merits.values()), color=colours)
            axes.bar_label(bars, fmt=form, padding=3, size=plots.TEXT_SIZE - 2)
            axes.margins(x=0.2)
            plots.label_axes(axes, label, "")
        title = f"{run.settings.title}, {run.settings.snr_db:g} dB"
        row[0].set_title(title, size=plots.TEXT_SIZE + 1, loc="left")
        row[0].invert_yaxis()
    return figure


if __name__ == "__main__":
    figures.main(__doc__, draw)
