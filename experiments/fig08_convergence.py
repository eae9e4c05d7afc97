"""Fig. 8: resolution against the iteration, Init-1.

python experiments/fig08_convergence.py RUN [RUN ...] --out FILE.png
"""

import sys

import figures

METHODS = (
    "unrefined",
    "unrefined (paper)",
    "oracle",
    "oracle (paper)",
    "joint",
    "joint (released)",
    "joint (paper)",
    "joint (paper, steps x 1000)",
)


if __name__ == "__main__":
    sys.exit(figures.main(__doc__, lambda runs: figures.convergence(runs, METHODS)))
