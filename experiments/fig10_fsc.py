"""Fig. 10: correlation with the true map, Init-2.

python experiments/fig10_fsc.py RUN [RUN ...] --out FILE.png
"""

import figures

METHODS = (
    "oracle",
    "joint, post-processed",
    "joint",
    "joint, matched first, post-processed",
    "joint, matched first",
    "RELION auto-refine, post-processed",
    "RELION auto-refine",
    "RELION, true poses",
    "unrefined",
)


if __name__ == "__main__":
    figures.main(__doc__, figures.fsc, METHODS)
