"""Cost: times of a pose update against the side of the images.

python experiments/plot_cost.py RUN --out FILE.png
"""

import argparse
import sys
from pathlib import Path

import harness
from cost import NORMAL_OPERATOR
from matplotlib.figure import Figure

from jaxrefine import io
from jaxrefine.errors import InputError
from jaxrefine.report import plots

LOOKS = {
    "projection matching": ("#8C564B", "-"),
    "projection matching, steps as 1/n": ("#8C564B", "--"),
    "spatial, Algorithm 3": ("#0072B2", "-"),
    "spatial, cost and gradient": ("#0072B2", "--"),
    "spatial, cost": ("#0072B2", ":"),
    "slices, LM": ("#D62728", "-"),
    "slices, LM step": ("#D62728", "--"),
    "slices, cost and gradient": ("#D62728", ":"),
}
"""Colour and dashes of each function."""


def draw(run: Path) -> Figure:
    """Draw the times of a finished run.

    Raises
    ------
    InputError
        If the folder does not hold one.
    """
    if not (run / "done").exists():
        raise InputError(f"{run} is not the folder of a finished run.")
    config, results = io.read_json(run / "config.json"), harness.read_metrics(run)
    if "exponents" not in results:
        raise InputError(f"{run} is not a run of cost.py.")
    points, exponents = results["points"], results["exponents"]
    sizes = [point["size"] for point in points]
    trials = ", ".join(f"{point['line_search_trials']:.1f}" for point in points)
    text = (
        f"Medians of {config['repetitions']} calls on {results['device']}, "
        f"{results['threads']} threads, without compilation; legend: best fit to a "
        f"power of n. {config['particles']} particles of the built-in phantom at once, "
        f"{config['snr_db']:g} dB, seed {config['seed']}; all frequencies below "
        f"Nyquist. Projection matching: steps of {config['matching_step_deg']:g} "
        f"degrees (1/n: at n = {max(sizes)}), shifts up to {config['max_shift']:g} px. "
        f"Algorithm 3: three steps, with {trials} trials in a line search on average. "
        "LM: three steps."
    )
    figure = plots.captioned_figure(9.6, 5.6, text)
    axes = figure.subplots()
    for name, (colour, dash) in LOOKS.items():
        times = [1e3 * point["seconds_per_particle"][name] for point in points]
        label = f"{name} ($n^{{{exponents[name]:.1f}}}$)"
        look = {"color": colour, "linestyle": dash, "lw": 2, "marker": "o", "ms": 4}
        axes.plot(sizes, times, label=label, **look)
    whole = [1e3 * point["normal_operator_s"] for point in points]
    label = f"{NORMAL_OPERATOR}, in all ($n^{{{exponents[NORMAL_OPERATOR]:.1f}}}$)"
    axes.plot(sizes, whole, "0.6", lw=4, zorder=1, label=label)
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


def main() -> None:
    """Draw the run that the command line names."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, metavar="RUN")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE.png")
    options = parser.parse_args()
    draw(options.run).savefig(options.out, format="png")


if __name__ == "__main__":
    sys.exit(harness.main(main))
