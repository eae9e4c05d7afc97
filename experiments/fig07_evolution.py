"""Fig. 7: the joint refinement's map through the iterations.

python experiments/fig07_evolution.py RUN [RUN ...] --out FILE.png
"""

import figures
import numpy as np
from figures import Column
from finished import Run

METHOD = "joint"
TEXT = (
    "Map through the iterations; the last map, with TV's weight by cross-validation, "
    "comes after them. Below: its mean Fourier shell correlation with the truth, as it "
    "stands, and the median error of the orientations."
)


def evolution(run: Run) -> list[Column]:
    """Choose the initial map, and up to six iterations from the first to the last."""
    history = run.values("history", [METHOD])[METHOD]
    chosen = np.unique(np.geomspace(1, len(history), 6).round().astype(int))
    shown = [Column("initial map", run.map("initial map"))]
    for number in chosen:
        row = history[number - 1]
        error = row["angle_error_in_degrees_median"]
        note = f"FSC {row['mean_fsc']:.3f}\n{error:.1f}° off"
        volume = run.map(f"{METHOD}_{number:03d}")
        shown.append(Column(f"iteration {number}", volume, note))
    return shown


if __name__ == "__main__":
    figures.main(
        __doc__,
        figures.maps,
        [METHOD],
        evolution,
        text=TEXT,
        surfaces=True,
        images=False,
    )
