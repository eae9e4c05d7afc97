"""Fig. 9: the maps of Init-2, as surfaces and slices.

python experiments/fig09_slices.py RUN [RUN ...] --out FILE.png
"""

import figures

MAPS = (
    "truth",
    "initial map",
    "joint, post-processed",
    "RELION auto-refine, post-processed",
)


if __name__ == "__main__":
    figures.main(__doc__, figures.maps, MAPS, surfaces=True, images=True)
