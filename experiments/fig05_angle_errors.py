"""Fig. 5: densities of the errors of the Euler angles, Init-1.

python experiments/fig05_angle_errors.py RUN [RUN ...] --out FILE.png
"""

import figures

if __name__ == "__main__":
    figures.main(__doc__, figures.densities, figures.POSES, figures.ANGLES, "degree")
