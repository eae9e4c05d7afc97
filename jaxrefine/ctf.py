"""The optics: an isotropic point-spread function (PSF) of the microscope.

The PSF ``h`` of eq. (1) enters the spatial engine only through its radial transfer
function. (Per-particle contrast-transfer functions belong to the slice engine.)
"""

from collections.abc import Callable

import equinox as eqx
import numpy as np

from jaxrefine.errors import InputError


class IsotropicPSF(eqx.Module):
    """An isotropic PSF, given in the Fourier domain.

    Parameters
    ----------
    transfer
        The 2-D Fourier transform of ``h``: maps radial frequencies in radians per
        pixel to real values, in NumPy.
    radius
        Radius in pixels beyond which ``h`` is negligible.
    """

    transfer: Callable[[np.ndarray], np.ndarray] = eqx.field(static=True)
    radius: float = eqx.field(static=True)


def gaussian_psf(width: float) -> IsotropicPSF:
    """Return a Gaussian PSF of unit mass.

    Parameters
    ----------
    width
        Standard deviation in pixels, positive. The PSF is cut at six of them.
    """
    if not width > 0:
        raise InputError(f"a Gaussian PSF wants a positive width, not {width}")
    return IsotropicPSF(lambda omega: np.exp(-0.5 * (width * omega) ** 2), 6.0 * width)
