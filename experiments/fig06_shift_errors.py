"""Fig. 6: densities of the errors of the shifts, Init-1.

python experiments/fig06_shift_errors.py RUN [RUN ...] --out FILE.png
"""

import sys

import figures
from figures import POSES, SHIFTS

if __name__ == "__main__":
    sys.exit(
        figures.main(
            __doc__, lambda runs: figures.densities(runs, POSES, SHIFTS, "pixel")
        )
    )
