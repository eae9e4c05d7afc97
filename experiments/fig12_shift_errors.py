"""Fig. 12: densities of the errors of the shifts, Init-2.

python experiments/fig12_shift_errors.py RUN [RUN ...] --out FILE.png
"""

import figures

if __name__ == "__main__":
    figures.main(__doc__, figures.densities, figures.POSES, figures.SHIFTS, "pixel")
