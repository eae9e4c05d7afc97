"""Filters of maps that are radial in Fourier space."""

import math

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxrefine._types import Volume
from jaxrefine.errors import InputError
from jaxrefine.operators.fourier import radii


@eqx.filter_jit
def filter_shells(volume: Volume, gain: Float[Array, "shells"]) -> Volume:
    """Multiply a map's spectrum by a gain for each shell.

    Parameters
    ----------
    volume
        The map, of shape ``(n, n, n)``.
    gain
        Gain at 0, 1, ... cycles per box. It is interpolated linearly between the
        shells, and constant beyond the last one.
    """
    n = volume.shape[0]
    shells = jnp.arange(gain.shape[0], dtype=gain.dtype)
    factor = jnp.interp(jnp.asarray(radii(n), gain.dtype), shells, gain)
    spectrum = jnp.fft.rfftn(volume)
    spectrum = jax.lax.complex(spectrum.real * factor, spectrum.imag * factor)
    return jnp.fft.irfftn(spectrum, s=volume.shape)


def low_pass(
    volume: Volume, voxel_size_in_angstroms: float, resolution_in_angstroms: float
) -> Volume:
    """Remove the frequencies beyond a resolution, as `postprocess.postprocess` does.

    Parameters
    ----------
    volume
        The map, of shape ``(n, n, n)``.
    voxel_size_in_angstroms
        Edge of a voxel.
    resolution_in_angstroms
        Period at the cut-off. The filter falls from 1 to 0 as a cosine, from one shell
        before the cut-off to one shell after it.

    Raises
    ------
    InputError
        If the voxel size or the resolution is not positive and finite.
    """
    check_positive("the voxel size", voxel_size_in_angstroms)
    check_positive("the low-pass resolution", resolution_in_angstroms)
    n = volume.shape[0]
    cut_off = n * voxel_size_in_angstroms / resolution_in_angstroms
    return filtered(volume, cosine_edge(radii(n), cut_off))


def cosine_edge(frequency: np.ndarray, cut_off: float) -> np.ndarray:
    """Return a filter that falls from 1 to 0 as a cosine around the cut-off.

    It is 1 up to one shell before the cut-off and 0 from one shell after it; both
    arguments are in cycles per box.
    """
    return 0.5 + 0.5 * np.cos(np.pi * np.clip((frequency - cut_off + 1) / 2, 0, 1))


def filtered(volume: Volume, transfer: np.ndarray) -> Volume:
    """Multiply the spectrum of a map by a transfer, of the shape that ``rfftn`` has."""
    spectrum = jnp.fft.rfftn(volume)
    spectrum = spectrum * jnp.asarray(transfer, spectrum.dtype)
    return jnp.fft.irfftn(spectrum, s=volume.shape)


def check_positive(name: str, value: float) -> None:
    """Check that a length in angstroms is positive and finite.

    Raises
    ------
    InputError
        If it is not; the message begins with `name`.
    """
    if not 0 < value < math.inf:
        raise InputError(f"{name} must be positive, got {value:g} A")
