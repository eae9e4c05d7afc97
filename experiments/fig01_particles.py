"""Fig. 1: noisy images, and slices of what is made of them.

python experiments/fig01_particles.py RUN [RUN ...] --out FILE.png
"""

import sys

import figures

MAPS = (
    "truth",
    "oracle",
    "joint",
    "unrefined",
)


if __name__ == "__main__":
    sys.exit(
        figures.main(
            __doc__,
            lambda runs: figures.maps(
                runs,
                MAPS,
                surfaces=False,
                images=True,
            ),
        )
    )
