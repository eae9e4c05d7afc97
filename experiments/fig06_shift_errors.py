"""Fig. 6: densities of the errors of the shifts, Init-1.

python experiments/fig06_shift_errors.py RUN [RUN ...] --out FILE.png
"""

import figures

if __name__ == "__main__":
    figures.main(__doc__, figures.densities, figures.POSES, figures.SHIFTS, "pixel")
