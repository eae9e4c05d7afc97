"""The modulation transfer function of a detector, which all images have in them."""

from dataclasses import dataclass
from typing import final

import numpy as np
from jaxtyping import Float


@final
@dataclass(frozen=True)
class ModulationTransfer:
    """The share of each frequency's amplitude that a detector records.

    Attributes
    ----------
    frequencies
        Frequencies in cycles per pixel of the detector, which increase from 0 or more.
        Its Nyquist frequency is 0.5.
    values
        The transfer at them, more than 0.
    pixel_size_in_angstroms
        Edge of a physical pixel of the detector, on the scale of the specimen: before
        binning, and not of super-resolution.
    """

    frequencies: Float[np.ndarray, " rows"]
    values: Float[np.ndarray, " rows"]
    pixel_size_in_angstroms: float

    def __call__(
        self, frequencies: Float[np.ndarray, "*shape"]
    ) -> Float[np.ndarray, "*shape"]:
        """Return the transfer at frequencies in cycles per angstrom.

        It is interpolated linearly, and constant before the first row and beyond the
        last one. For many evenly spaced rows this is what RELION does. With few or
        uneven rows it differs: RELION takes the first value throughout the first
        interval, and finds the row by the mean spacing of all.
        """
        on_detector = frequencies * self.pixel_size_in_angstroms
        return np.interp(on_detector, self.frequencies, self.values)
