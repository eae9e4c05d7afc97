"""Fig. 4: correlation with the true map, Init-1.

python experiments/fig04_fsc.py RUN [RUN ...] --out FILE.png
"""

import figures

METHODS = (
    "oracle",
    "joint",
    "joint (released)",
    "joint (paper)",
    "joint (paper, printed steps)",
    "RELION auto-refine, post-processed",
    "RELION auto-refine",
    "RELION, local searches, post-processed",
    "RELION, local searches",
    "RELION, true poses",
    "projection matching",
    "unrefined",
)


if __name__ == "__main__":
    figures.main(__doc__, figures.fsc, METHODS)
