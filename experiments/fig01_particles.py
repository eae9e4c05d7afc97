"""Fig. 1: noisy images, and slices of what is made of them.

python experiments/fig01_particles.py RUN [RUN ...] --out FILE.png
"""

import figures

MAPS = (
    "truth",
    "oracle",
    "joint",
    "unrefined",
)


if __name__ == "__main__":
    figures.main(__doc__, figures.maps, MAPS, surfaces=False, images=True)
