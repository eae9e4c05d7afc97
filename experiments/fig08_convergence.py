"""Fig. 8: resolution against the iteration, Init-1.

python experiments/fig08_convergence.py RUN [RUN ...] --out FILE.png
"""

import figures

METHODS = (
    "unrefined",
    "unrefined (paper)",
    "oracle",
    "oracle (paper)",
    "joint",
    "joint (released)",
    "joint (paper)",
    "joint (paper, printed steps)",
)


if __name__ == "__main__":
    figures.main(__doc__, figures.convergence, METHODS)
