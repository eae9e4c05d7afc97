"""What the figures of the paper share: finished runs, styles, panels.

A script ``figNN_....py`` reads the folders of runs and draws one picture. Nothing is
computed but its display: numbers are those of ``metrics.json``, maps those of ``maps``.
"""

import argparse
import string
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import cases
import harness
import numpy as np
from comparison import slug
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from jaxrefine import io
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
    "joint (paper, steps x 1000)": ("#8C3F8C", "-."),
    "RELION auto-refine, post-processed": ("#009E73", "-"),
    "RELION auto-refine": ("#009E73", "--"),
    "RELION, true poses": ("#7FBF3F", ":"),
    "projection matching": ("#8C564B", ":"),
    "unrefined": ("#0072B2", "--"),
    "unrefined (paper)": ("#56B4E9", "--"),
}
"""Colour and dashes of each method, the same in all figures."""

POSES = ("unrefined", "RELION auto-refine", "joint", "joint, matched first")
"""The methods whose pose errors the paper shows; the last one is beyond it."""

ANGLES = {"rot": "rot", "tilt": "tilt", "psi": "psi"}
SHIFTS = {"x": "x shift", "y": "y shift"}
"""Labels of the poses' coordinates."""

_CELL = 0.85  # inches
_PLANES = ("xy", "xz", "yz")  # as `plots.central_slices` gives them
_THRESHOLD = 0.2  # of the truth's largest density: where its surface is drawn
_SURFACE = LinearSegmentedColormap.from_list(
    "surface", [(0, "#0b1a2b"), (0.45, "#3f6f9f"), (0.9, "#dce9f5"), (1, "white")]
)


@dataclass(frozen=True)
class Run:
    """A finished run.

    Attributes
    ----------
    folder
        Where it is.
    config, results
        Its configuration, and what it measured of each method.
    lacking
        What was left out, as a sentence.
    """

    folder: Path
    config: dict[str, Any]
    results: dict[str, dict[str, Any]]
    lacking: str

    def present(self, methods: Sequence[str]) -> list[str]:
        """Return those of the methods that were run.

        Raises
        ------
        InputError
            If none was.
        """
        found = [name for name in methods if name in self.results]
        if not found:
            wanted = ", ".join(methods)
            raise InputError(f"{self.folder} has a result of none of {wanted}.")
        return found

    def values(self, key: str, methods: Sequence[str]) -> dict[str, Any]:
        """Return one entry of the results, by method, of those that were run."""
        return {name: self.results[name][key] for name in self.present(methods)}

    def map(self, name: str) -> np.ndarray:
        """Return a map, ``[z, y, x]``, such as "truth" or that of a method.

        Raises
        ------
        InputError
            If the folder holds no maps, or not this one.
        """
        if not (self.folder / "maps").is_dir():
            raise InputError(
                f"The figure needs the maps of the run, and {self.folder / 'maps'} is "
                "absent; the run's command in another --out makes them."
            )
        return io.read_mrc(self.folder / "maps" / f"{slug(name)}.mrc")[0]

    def images(self) -> np.ndarray:
        """Return the samples of the images that were kept; perhaps none."""
        path = self.folder / "maps" / "images.mrcs"
        return io.read_stack(path)[0] if path.exists() else np.empty((0, 1, 1))


def open_run(folder: Path) -> Run:
    """Read a run's configuration and results.

    Raises
    ------
    InputError
        If the folder holds no comparison of methods, or an unfinished one.
    """
    if not (folder / "config.json").is_file():
        raise InputError(f"{folder} is not the folder of a run: it has no config.json.")
    config = io.read_json(folder / "config.json")
    missing = [key for key in cases.KEYS if key not in config]
    if missing:
        lacking = ", ".join(missing)
        raise InputError(f"{folder} holds a run that does not say its {lacking}.")
    if not (folder / "done").exists():
        raise InputError(
            f"The run in {folder} is not finished; its command resumes it."
        )
    lacking = (folder / "done").read_text(encoding="utf-8").strip()
    results = harness.read_metrics(folder)
    if "RELION, true poses" in results and "RELION auto-refine" not in results:
        lacking = "RELION's auto-refine was given no time, and is left out."
    return Run(folder, config, results, lacking)


def main(description: str | None, draw: Callable[[list[Run]], Figure]) -> int:
    """Draw the runs that the command line names; return the exit code."""

    def study() -> None:
        parser = argparse.ArgumentParser(
            description=description,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        parser.add_argument("runs", type=Path, nargs="+", metavar="RUN")
        parser.add_argument("--out", type=Path, required=True, metavar="FILE.png")
        options = parser.parse_args()
        if not options.out.parent.is_dir():
            raise InputError(
                f"Cannot write {options.out}: {options.out.parent} is not a folder."
            )
        figure = draw([open_run(folder) for folder in options.runs])
        figure.savefig(options.out, format="png")

    return harness.main(study)


# --- curves


def fsc(runs: Sequence[Run], methods: Sequence[str]) -> Figure:
    """Draw the correlation of the methods' maps with the truth, a panel for a run."""
    text = (
        "Fourier shell correlation with the true map, the rigid motion that the poses "
        "leave free undone; lines at 0.5 and 0.143."
    )
    figure, panels = _panels(runs, _caption(runs, methods, text))
    for run, axes in zip(runs, panels, strict=True):
        found = run.values("fsc_aligned", methods)
        curves = {name: np.array(curve) for name, curve in found.items()}
        size, voxel = run.config["size"], run.config["voxel_size_in_angstroms"]
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
        found = run.values("history", methods)
        widths = np.linspace(4.0, 1.2, len(found))
        for (name, history), width in zip(found.items(), widths, strict=True):
            colour, dash = STYLES[name]
            look: dict[str, Any] = {"color": colour, "linestyle": dash, "label": name}
            radii = [row["rc"] for row in history]
            if len(radii) == 1:
                axes.axhline(radii[0], lw=width, **look)
            else:
                number = [row["iteration"] for row in history]
                axes.plot(number, radii, lw=width, marker="o", ms=width + 1.5, **look)
        axes.set_ylim(0, 1.04 * (run.config["size"] // 2))
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
        found = run.values("differences", methods)
        for (coordinate, label), axes in zip(coordinates.items(), row, strict=True):
            for name, differences in found.items():
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
        row[0].set_title(run.config["title"], size=TEXT_SIZE + 1, loc="left")
        labels = [
            f"{name}\n({_percentages(d[c]['outside'] for c in coordinates)} outside)"
            for name, d in found.items()
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
        axes.set_title(run.config["title"], size=TEXT_SIZE + 1, loc="left")
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
    if any(len(some) for some in samples):
        text += " Left: samples of the noisy images."
    # Cells; a map's panel takes 2 x 2, an image's one.
    high = 2 * (len(planes) + surfaces)
    left = [-(-len(some) // high) for some in samples]
    wide = [few + 2 * len(band) for few, band in zip(left, bands, strict=True)]
    figure = plots.captioned_figure(
        _CELL * max(wide) + 0.2,
        len(runs) * (_CELL * high + 0.6) + 1,
        _caption(runs, names, text.strip()),
    )
    parts = figure.subfigures(len(runs), 1, squeeze=False)[:, 0]
    for part, run, band, some, few in zip(
        parts, runs, bands, samples, left, strict=True
    ):
        part.suptitle(run.config["title"], size=TEXT_SIZE + 1, weight="bold")
        grid = part.add_gridspec(high, few + 2 * len(band))
        for cell, image in zip(np.ndindex(high, few), some, strict=False):
            _show(part.add_subplot(grid[cell]), image)
        share = _share_of_truth(run)
        for place, column in enumerate(band):
            across = slice(few + 2 * place, few + 2 * place + 2)
            panels = [
                part.add_subplot(grid[row : row + 2, across])
                for row in range(0, high, 2)
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
        plots.isosurface(volume, _level(volume, share)),
        cmap=_SURFACE,
        origin="lower",
        vmin=0,
        vmax=1,
        interpolation="bilinear",
    )
    axes.set_axis_off()


def _share_of_truth(run: Run) -> float:
    """Return the fraction of voxels that the surface of the truth is drawn around."""
    truth = run.map("truth")
    return float(np.mean(truth >= _THRESHOLD * truth.max()))


def _level(volume: np.ndarray, share: float) -> float:
    """Return the density that a fraction of the voxels are above."""
    return float(np.quantile(volume, 1 - share))


def _show(axes: Axes, picture: np.ndarray) -> None:
    """Show a slice or an image on a grey scale of its own."""
    low, high = np.percentile(picture, (0.5, 99.8))
    plots.show_picture(axes, picture, low, high)


def _caption(runs: Sequence[Run], methods: Sequence[str], text: str) -> str:
    """Add the conditions of the runs to a text, and what is remarked on methods."""
    lines = [text]
    for run in runs:
        lines.append(harness.caption(run.config))
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
