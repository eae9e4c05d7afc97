"""What the figures of the paper share: finished runs, styles, panels.

A script ``figNN_....py`` reads the folders of runs and draws one picture. It
computes nothing but the display: the numbers are those of ``metrics.json``, the maps
those of ``maps``.
"""

import argparse
import string
import sys
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Concatenate, NamedTuple, NoReturn, ParamSpec, TypeVar

import harness
import numpy as np
from finished import Run, open_run
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from jaxrefine.errors import InputError
from jaxrefine.report import plots
from jaxrefine.report.plots import TEXT_SIZE

STYLES: dict[str, plots.Style] = {
    "oracle": ("black", "-"),
    "oracle (paper)": ("#666666", "-"),
    "joint": ("#D62728", "-."),
    "joint, post-processed": ("#D62728", "-"),
    "joint, matched first": ("#FF7F0E", "-."),
    "joint, matched first, post-processed": ("#FF7F0E", "-"),
    "joint (released)": ("#E69F00", "-."),
    "joint (paper)": ("#CC79A7", "-."),
    "joint (paper, printed steps)": ("#8C3F8C", "-."),
    "RELION auto-refine, post-processed": ("#009E73", "-"),
    "RELION auto-refine": ("#009E73", "--"),
    "RELION, local searches, post-processed": ("#005F45", "-"),
    "RELION, local searches": ("#005F45", "--"),
    "RELION, true poses": ("#7FBF3F", ":"),
    "projection matching": ("#8C564B", ":"),
    "unrefined": ("#0072B2", "--"),
    "unrefined (paper)": ("#56B4E9", "--"),
}
"""Colour and dashes of each method, the same in all figures."""

POSES = (
    "unrefined",
    "RELION auto-refine",
    "RELION, local searches",
    "joint (paper)",
    "joint",
    "joint, matched first",
)
"""Whose pose errors the paper shows, RELION's local searches, and two of ours."""

ANGLES = {"rot": "rot", "tilt": "tilt", "psi": "psi"}
SHIFTS = {"x": "x shift", "y": "y shift"}
"""Labels of the poses' coordinates."""

_CELL = 0.85  # inches
_PLANES = ("xy", "xz", "yz")  # as `plots.central_slices` gives them
_THRESHOLD = 0.2  # of the truth's largest density: where its surface is drawn
_SURFACE = LinearSegmentedColormap.from_list(
    "surface", [(0, "#0b1a2b"), (0.45, "#3f6f9f"), (0.9, "#dce9f5"), (1, "white")]
)


P = ParamSpec("P")
R = TypeVar("R")


def main(
    description: str | None,
    draw: Callable[Concatenate[list[Run], P], Figure],
    *arguments: P.args,
    **keywords: P.kwargs,
) -> NoReturn:
    """Draw the runs that the command line names, and exit.

    Parameters
    ----------
    description
        Of the figure, for ``--help``.
    draw
        Makes the figure.
    arguments, keywords
        What it is called with, after the runs.
    """
    sys.exit(
        save(description, open_run, lambda runs: draw(runs, *arguments, **keywords))
    )


def save(
    description: str | None,
    read: Callable[[Path], R],
    draw: Callable[[list[R]], Figure],
) -> int:
    """Draw what the folders hold that the command line names.

    Parameters
    ----------
    description
        Of the figure, for ``--help``.
    read
        Reads one of the folders.
    draw
        Makes the figure of what was read.

    Returns
    -------
    The exit code.
    """

    def command() -> None:
        parser = argparse.ArgumentParser(
            description=description,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        parser.add_argument("runs", type=Path, nargs="+", metavar="RUN")
        parser.add_argument("--out", type=Path, required=True, metavar="FILE.png")
        given = parser.parse_args()
        if not given.out.parent.is_dir():
            raise InputError(
                f"--out must be in an existing folder, got {given.out}: "
                f"{given.out.parent} is not a folder."
            )
        figure = draw([read(folder) for folder in given.runs])
        plots.save(figure, given.out)

    return harness.main(command)


# --- curves


def fsc(runs: Sequence[Run], methods: Sequence[str]) -> Figure:
    """Draw the correlation of the methods' maps with the truth, a panel for a run."""
    text = (
        "Fourier shell correlation with the true map, the rigid motion that the poses "
        "leave free undone; lines at 0.5 and 0.143."
    )
    figure, panels = _panels(runs, _caption(runs, methods, text))
    for run, axes in zip(runs, panels, strict=True):
        values = run.values("fsc_aligned", methods)
        curves = {name: np.array(curve) for name, curve in values.items()}
        size, voxel = run.settings.size, run.settings.voxel_size_in_angstroms
        plots.draw_fsc(axes, curves, [STYLES[name] for name in curves], size, voxel)
    _add_legend(figure, panels)
    return figure


def convergence(runs: Sequence[Run], methods: Sequence[str]) -> Figure:
    """Draw r_c against the iteration, a panel for a run."""
    text = (
        "Shell at which the Fourier shell correlation with the true map falls to 0.5, "
        "maps as they stand; n / 2 if it never does. Level lines: not iterative. The "
        "engine's last map, with TV's weight by cross-validation, is not an iteration. "
        "Thinner lines lie on thicker ones."
    )
    figure, panels = _panels(runs, _caption(runs, methods, text))
    for run, axes in zip(runs, panels, strict=True):
        histories = run.values("history", methods)
        widths = np.linspace(4.0, 1.2, len(histories))
        for (name, history), width in zip(histories.items(), widths, strict=True):
            colour, dash = STYLES[name]
            look: dict[str, Any] = {"color": colour, "linestyle": dash, "label": name}
            radii = [row["rc"] for row in history]
            if len(radii) == 1:
                axes.axhline(radii[0], lw=width, **look)
            else:
                number = [row["iteration"] for row in history]
                axes.plot(number, radii, lw=width, marker="o", ms=width + 1.5, **look)
        axes.set_ylim(0, 1.04 * (run.settings.size // 2))
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        plots.label_axes(axes, "iteration", "$r_c$ (Fourier shells)")
    _add_legend(figure, panels)
    return figure


def densities(
    runs: Sequence[Run],
    methods: Sequence[str],
    coordinates: Mapping[str, str],
    unit: str,
) -> Figure:
    """Draw the densities of pose differences, a row for a run.

    Parameters
    ----------
    runs, methods
        What to draw.
    coordinates
        Labels of the coordinates, by their name in ``metrics.json``.
    unit
        Of the differences, in the singular.
    """
    text = (
        "Densities of the true minus the refined coordinates of the particles, after "
        "the rigid motion of all poses that the data leave free is undone. Legend: "
        "percentage outside of the panel, by panel."
    )
    width = 2.5 + 3.2 * len(coordinates)
    caption = _caption(runs, methods, text)
    figure = plots.captioned_figure(width, 2.9 * len(runs) + 1, caption)
    grid = figure.subplots(len(runs), len(coordinates), squeeze=False)
    for run, row in zip(runs, grid, strict=True):
        by_method = run.values("differences", methods)
        for (coordinate, label), axes in zip(coordinates.items(), row, strict=True):
            for name, differences in by_method.items():
                bins, (colour, _) = differences[coordinate], STYLES[name]
                count = len(bins["density"])
                edges = bins["first"] + bins["width"] * np.arange(count + 1)
                axes.stairs(bins["density"], edges, color=colour, alpha=0.15, fill=True)
                axes.stairs(bins["density"], edges, color=colour, lw=1.4, label=name)
                axes.set_xlim(edges[0], edges[-1])
            axes.set_ylim(bottom=0)
            plots.label_axes(axes, f"{label} ({unit}s)", f"density (per {unit})")
        for axes in row[1:]:
            axes.set_ylabel("")
        row[0].set_title(run.settings.title, size=TEXT_SIZE + 1, loc="left")
        labels = [
            f"{name}\n({_percentages(d[c]['outside'] for c in coordinates)} outside)"
            for name, d in by_method.items()
        ]
        row[-1].legend(
            row[-1].get_legend_handles_labels()[0],
            labels,
            loc="upper left",
            bbox_to_anchor=(1.02, 1.02),
            fontsize=TEXT_SIZE - 1,
            frameon=False,
        )
    return figure


def _percentages(fractions: Iterable[float]) -> str:
    return ", ".join(f"{100 * fraction:.0f}" for fraction in fractions) + " %"


def _panels(runs: Sequence[Run], caption: str) -> tuple[Figure, list[Axes]]:
    """Return a figure with a titled panel for each run, side by side."""
    figure = plots.captioned_figure(5.2 * len(runs) + 3, 5.2, caption)
    panels = list(figure.subplots(1, len(runs), squeeze=False)[0])
    for run, axes in zip(runs, panels, strict=True):
        axes.set_title(run.settings.title, size=TEXT_SIZE + 1, loc="left")
    return figure, panels


def _add_legend(figure: Figure, panels: Sequence[Axes]) -> None:
    """Put one legend for all panels to their right."""
    curves = {}
    for axes in panels:
        curves |= dict(zip(*axes.get_legend_handles_labels()[::-1], strict=True))
    figure.legend(
        curves.values(),
        curves,
        loc="outside right upper",
        fontsize=TEXT_SIZE - 1,
        frameon=False,
        handlelength=3,
    )


# --- maps


class Column(NamedTuple):
    """A map to draw, with its title and what to write below it."""

    title: str
    volume: np.ndarray
    note: str = ""


def columns(run: Run, names: Sequence[str]) -> list[Column]:
    """Choose maps of a run: truth, initial map, and those of methods that it has."""
    given = ("truth", "initial map")
    shown = [name for name in names if name in given or name in run.results]
    return [
        Column(f"({letter}) {name}", run.map(name))
        for letter, name in zip(string.ascii_lowercase, shown, strict=False)
    ]


def maps(
    runs: Sequence[Run],
    names: Sequence[str],
    choose: Callable[[Run], list[Column]] | None = None,
    *,
    text: str = "",
    surfaces: bool,
    images: bool,
) -> Figure:
    """Draw maps beside each other, a band for a run.

    Parameters
    ----------
    runs
        What to draw.
    names
        Of the maps, as of `columns`; what is remarked on methods is said in the
        caption.
    choose
        Gives the maps of a run; by default `columns`.
    text
        Begins the caption.
    surfaces
        Whether to render the maps, above three orthogonal slices instead of one.
    images
        Whether to put samples of the images to the left, where they were kept.
    """
    planes = _PLANES if surfaces else ("xz",)
    text += f" Slices: central planes, {', '.join(planes)}, each on its own grey scale."
    if surfaces:
        text += (
            " Surfaces: seen along +y, each around as many voxels as the truth has "
            f"above {_THRESHOLD:g} of its largest density."
        )
    bands = [choose(run) if choose else columns(run, names) for run in runs]
    samples = [run.images() if images else () for run in runs]
    if any(len(images) for images in samples):
        text += " Left: samples of the noisy images."
    # In cells: a map's panel takes 2 x 2 of them, an image's one.
    height = 2 * (len(planes) + surfaces)
    image_columns = [-(-len(shown) // height) for shown in samples]
    width = max(
        count + 2 * len(band) for count, band in zip(image_columns, bands, strict=True)
    )
    figure = plots.captioned_figure(
        _CELL * width + 0.2,
        len(runs) * (_CELL * height + 0.6) + 1,
        _caption(runs, names, text.strip()),
    )
    subfigures = figure.subfigures(len(runs), 1, squeeze=False)[:, 0]
    for subfigure, run, band, shown, left in zip(
        subfigures, runs, bands, samples, image_columns, strict=True
    ):
        subfigure.suptitle(run.settings.title, size=TEXT_SIZE + 1, weight="bold")
        grid = subfigure.add_gridspec(height, left + 2 * len(band))
        for cell, image in zip(np.ndindex(height, left), shown, strict=False):
            _show(subfigure.add_subplot(grid[cell]), image)
        share = surface_share(run.map("truth"))
        for place, column in enumerate(band):
            across = slice(left + 2 * place, left + 2 * place + 2)
            panels = [
                subfigure.add_subplot(grid[row : row + 2, across])
                for row in range(0, height, 2)
            ]
            if surfaces:
                _show_surface(panels[0], column.volume, share)
            slices = dict(
                zip(_PLANES, plots.central_slices(column.volume), strict=True)
            )
            for axes, plane in zip(panels[-len(planes) :], planes, strict=True):
                _show(axes, slices[plane])
                if surfaces and place == 0:
                    axes.set_ylabel(plane, size=TEXT_SIZE - 2)
            title = textwrap.fill(column.title, 24, break_on_hyphens=False)
            panels[0].set_title(title, size=TEXT_SIZE - 2)
            panels[-1].set_xlabel(column.note, size=TEXT_SIZE - 2)
    return figure


def _show_surface(axes: Axes, volume: np.ndarray, share: float) -> None:
    """Render the surface around a fraction of the voxels."""
    axes.imshow(
        plots.isosurface(volume, surface_level(volume, share)),
        cmap=_SURFACE,
        origin="lower",
        vmin=0,
        vmax=1,
        interpolation="bilinear",
    )
    axes.set_axis_off()


def surface_share(truth: np.ndarray) -> float:
    """Return the fraction of voxels that the surface of the truth encloses."""
    return float(np.mean(truth >= _THRESHOLD * truth.max()))


def surface_level(volume: np.ndarray, share: float) -> float:
    """Return the density that a fraction of the voxels exceed."""
    return float(np.quantile(volume, 1 - share))


def _show(axes: Axes, picture: np.ndarray) -> None:
    """Show a slice or an image on a grey scale of its own."""
    low, high = np.percentile(picture, (0.5, 99.8))
    plots.show_picture(axes, picture, low, high)


def _caption(runs: Sequence[Run], methods: Sequence[str], text: str) -> str:
    """Add the conditions of the runs to a text, and what is remarked on methods."""
    lines = [text]
    for run in runs:
        lines.append(run.caption)
        remarks = {}
        for name in methods:
            # The map that poses start with is that of the method that keeps them.
            source = "unrefined" if name == "initial map" else name
            remark = run.results.get(source, {}).get("remark")
            if remark and remark not in remarks.values():
                remarks[name.removesuffix(", post-processed")] = remark
        lines += [f"{name}: {remark}." for name, remark in remarks.items()]
        if run.lacking and any(name.startswith("RELION") for name in methods):
            lines.append(run.lacking)
    return " ".join(lines)
