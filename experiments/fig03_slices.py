"""Fig. 3: the maps of Init-1, as surfaces and slices.

python experiments/fig03_slices.py RUN [RUN ...] --out FILE.png
"""

import figures

MAPS = (
    "truth",
    "initial map",
    "unrefined",
    "joint",
    "joint (paper)",
    "oracle",
    "RELION auto-refine, post-processed",
    "RELION, local searches, post-processed",
)


if __name__ == "__main__":
    figures.main(__doc__, figures.maps, MAPS, surfaces=True, images=True)
