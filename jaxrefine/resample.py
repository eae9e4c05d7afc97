"""Changing the number of voxels that a map is sampled on."""

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxrefine._types import Volume
from jaxrefine.errors import InputError


@eqx.filter_jit
def fourier_crop(volume: Volume, size: int) -> Float[Array, "{size} {size} {size}"]:
    """Resample a periodic map on fewer voxels, without its highest frequencies.

    The box stays, voxels grow by ``n / size``. Densities keep their values: a map
    without frequencies of ``size / 2`` periods per box or more is sampled exactly. The
    origin stays the sample ``n // 2``.

    Parameters
    ----------
    volume
        The map, of side ``n``, odd or even.
    size
        The new side, from 1 to ``n``, odd or even.

    Raises
    ------
    InputError
        If ``size`` is out of range.
    """
    n = volume.shape[0]
    if not 1 <= size <= n:
        raise InputError(f"A map of {n}^3 can be cropped to 1 to {n}, not to {size}.")
    spectrum = jnp.fft.fftshift(jnp.fft.fftn(jnp.fft.ifftshift(volume)))
    kept = slice(n // 2 - size // 2, n // 2 - size // 2 + size)
    kept = jnp.fft.ifftshift(spectrum[kept, kept, kept])
    cropped = jnp.fft.fftshift(jnp.fft.ifftn(kept)).real
    return cropped * (size / n) ** 3
