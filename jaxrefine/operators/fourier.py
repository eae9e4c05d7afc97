"""The lattice of frequencies that ``rfftn`` of a cubic map has."""

import numpy as np
from jaxtyping import Float


def half_lattice(n: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the frequencies along z, y, x in cycles per box, shaped to broadcast."""
    full, half = np.fft.fftfreq(n, 1 / n), np.fft.rfftfreq(n, 1 / n)
    return full[:, None, None], full[:, None], half


def multiplicity(n: int) -> Float[np.ndarray, "{n}//2+1"]:
    """Return the number of frequencies of ``fftn`` that each one stands for, along x.

    It is 2, for the frequency and its mirror image, but 1 for frequency 0 and, if n is
    even, for n / 2, whose columns hold both.
    """
    half = half_lattice(n)[-1]
    return np.where((half == 0) | (2 * half == n), 1.0, 2.0)


def radii(n: int) -> Float[np.ndarray, "{n} {n} {n}//2+1"]:
    """Return the length of each frequency in cycles per box."""
    z, y, x = half_lattice(n)
    return np.sqrt(z**2 + y**2 + x**2)
