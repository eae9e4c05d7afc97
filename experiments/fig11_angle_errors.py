"""Fig. 11: densities of the errors of the Euler angles, Init-2.

python experiments/fig11_angle_errors.py RUN [RUN ...] --out FILE.png
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
