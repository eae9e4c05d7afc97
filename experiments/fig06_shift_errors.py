"""Fig. 6: densities of the errors of the shifts, Init-1.

python experiments/fig06_shift_errors.py RUN [RUN ...] --out FILE.png
"""

import sys

import figures

METHODS = ("unrefined", "RELION auto-refine", "joint")
SHIFTS = {"x": "x shift", "y": "y shift"}


if __name__ == "__main__":
    sys.exit(
        figures.main(
            __doc__, lambda runs: figures.densities(runs, METHODS, SHIFTS, "pixel")
        )
    )
