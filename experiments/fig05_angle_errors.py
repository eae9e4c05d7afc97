"""Fig. 5: densities of the errors of the Euler angles, Init-1.

python experiments/fig05_angle_errors.py RUN [RUN ...] --out FILE.png
"""

import sys

import figures
from figures import ANGLES, POSES

if __name__ == "__main__":
    sys.exit(
        figures.main(
            __doc__, lambda runs: figures.densities(runs, POSES, ANGLES, "degree")
        )
    )
