"""The picture of the README: maps of a demo as surfaces, in a row as in Fig. 3.

jaxrefine demo --out demo && python experiments/hero.py demo --out hero.png
"""

import argparse
import sys
from pathlib import Path

import numpy as np
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure

from jaxrefine import io
from jaxrefine.report import plots

TITLES = {
    "truth": "truth",
    "initial": "initial map",
    "unrefined": "unrefined poses",
    "joint": "joint refinement",
    "oracle": "true poses",
}
THRESHOLD = 0.2  # of the truth's largest density: where its surface is drawn
SHADES = LinearSegmentedColormap.from_list(
    "shades", [(0, "#0b1a2b"), (0.45, "#3f6f9f"), (0.9, "#dce9f5"), (1, "white")]
)


def draw(folder: Path) -> Figure:
    """Draw the maps of a demo, seen along z, as surfaces that hold equal volumes."""
    summary = io.read_json(folder / "summary.json")
    maps = {name: io.read_mrc(folder / f"{name}.mrc")[0] for name in TITLES}
    truth = maps["truth"]
    inside = float(np.mean(truth >= THRESHOLD * truth.max()))
    surfaces = {name: surface(volume, inside) for name, volume in maps.items()}
    shown = np.min(list(surfaces.values()), axis=0) < 1
    rows, columns = (span(shown.any(axis=axis)) for axis in (1, 0))
    figure = Figure((10, 2.5), dpi=130, layout="constrained")
    panels = figure.subplots(1, len(TITLES))
    for axes, (name, picture) in zip(panels, surfaces.items(), strict=True):
        axes.imshow(
            picture[rows, columns],
            cmap=SHADES,
            origin="lower",
            vmin=0,
            vmax=1,
            interpolation="lanczos",
        )
        axes.set_title(TITLES[name], size=11)
        axes.set_axis_off()
        if f"mean_fsc_{name}" in summary:
            label = f"mean FSC {summary[f'mean_fsc_{name}']:.2f}"
            axes.text(0.5, -0.05, label, size=10, ha="center", transform=axes.transAxes)
    return figure


def surface(volume: np.ndarray, inside: float) -> np.ndarray:
    """Render the surface around a fraction of the voxels, as seen along z."""
    level = float(np.quantile(volume, 1 - inside))
    # A cyclic permutation of the axes is a rotation: it keeps the hand.
    return plots.isosurface(np.transpose(volume, (2, 0, 1)), level)


def span(occupied: np.ndarray) -> slice:
    """Return the range of the indices that are occupied, with a margin."""
    indices = np.flatnonzero(occupied)
    return slice(max(indices[0] - 4, 0), indices[-1] + 5)


def main() -> int:
    """Draw what the command line names."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("demo", type=Path, metavar="DEMO")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE.png")
    options = parser.parse_args()
    plots.save(draw(options.demo), options.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
