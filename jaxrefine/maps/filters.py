"""Filters of maps that are radial in Fourier space."""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxrefine._types import Volume
from jaxrefine.errors import InputError
from jaxrefine.operators._fourier import radii


def filter_shells(volume: Volume, gain: Float[Array, "shells"]) -> Volume:
    """Multiply a map's spectrum by a gain per shell, linear between the shells.

    The gain at the last shell also holds beyond it.
    """
    n = volume.shape[0]
    shells = jnp.arange(gain.shape[0], dtype=gain.dtype)
    factor = jnp.interp(jnp.asarray(radii(n), gain.dtype), shells, gain)
    spectrum = jnp.fft.rfftn(volume)
    spectrum = jax.lax.complex(spectrum.real * factor, spectrum.imag * factor)
    return jnp.fft.irfftn(spectrum, s=volume.shape)


def low_pass(
    volume: Volume, pixel_size_in_angstroms: float, resolution_in_angstroms: float
) -> Volume:
    """Take away what lies beyond a resolution, as `postprocess.postprocess` does.

    Parameters
    ----------
    volume
        The map.
    pixel_size_in_angstroms, resolution_in_angstroms
        Edge of a voxel, and where the filter falls, as a cosine from a shell before
        to a shell after.

    Raises
    ------
    InputError
        If a number is not positive and finite.
    """
    check_positive("The pixel size", pixel_size_in_angstroms)
    check_positive("The low-pass", resolution_in_angstroms)
    n = volume.shape[0]
    cut_off = n * pixel_size_in_angstroms / resolution_in_angstroms
    return filtered(volume, cosine_edge(radii(n), cut_off))


def cosine_edge(frequency: np.ndarray, cut_off: float) -> np.ndarray:
    """Return a cosine from 1 at a shell before the cut-off to 0 at a shell after it."""
    return 0.5 + 0.5 * np.cos(np.pi * np.clip((frequency - cut_off + 1) / 2, 0, 1))


def filtered(volume: Volume, transfer: np.ndarray) -> Volume:
    """Multiply the spectrum of a map, as ``rfftn`` returns it."""
    spectrum = jnp.fft.rfftn(volume)
    spectrum = spectrum * jnp.asarray(transfer, spectrum.dtype)
    return jnp.fft.irfftn(spectrum, s=volume.shape)


def check_positive(name: str, value: float) -> None:
    """Refuse a number that is not positive and finite.

    Raises
    ------
    InputError
        Naming the number.
    """
    if not 0 < value < math.inf:
        raise InputError(f"{name} is {value:g} A; a positive number is wanted.")
