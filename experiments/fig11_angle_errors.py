"""Fig. 11: densities of the errors of the Euler angles, Init-2.

python experiments/fig11_angle_errors.py RUN [RUN ...] --out FILE.png
"""

import figures

if __name__ == "__main__":
    figures.main(__doc__, figures.densities, figures.POSES, figures.ANGLES, "degree")
