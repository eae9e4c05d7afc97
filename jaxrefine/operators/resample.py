"""Sampling maps on other grids about the same origin."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxrefine._types import Volume
from jaxrefine.errors import InputError

_ROUNDING = 1e-6  # of a sample, or of a period per box


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


def resample(
    volume: Volume, voxel: float, size: int, pixel: float
) -> Float[Array, "{size} {size} {size}"]:
    r"""Sample a map on a grid of other voxels and another side.

    The map is the trigonometric polynomial through its samples, without frequencies
    beyond the new Nyquist frequency, and zero beyond half a voxel from its outermost
    samples. Along each axis, with x and j in old voxels from the origin,

    .. math:: V(x) = \frac1n \sum_{|k| \le n/2} c_k \sum_j V_j\,
       e^{2\pi i k (x - j) / n},

    where :math:`c_k` is 1, but 1/2 at the lower Nyquist frequency and 0 beyond it.
    Densities keep their values: a map that is band-limited on both grids is sampled
    exactly. The origin stays the sample ``n // 2``.

    Parameters
    ----------
    volume
        The map, of side ``n``, odd or even.
    voxel, pixel
        Edges of its voxels and of the new ones, in one unit.
    size
        The new side, odd or even.

    Raises
    ------
    InputError
        If a number is not positive.
    """
    if not (voxel > 0 and size > 0 and pixel > 0):
        raise InputError(
            f"A map with voxels of {voxel:g} was to be sampled on {size}^3 voxels of "
            f"{pixel:g}; positive numbers are wanted."
        )
    n = volume.shape[0]
    new = (np.arange(size) - size // 2) * (pixel / voxel)
    inside = np.abs(new + (1 - n % 2) / 2) < n / 2 + _ROUNDING
    along = interpolation_matrix(n, size, pixel / voxel) * inside[:, None]
    matrix = jnp.asarray(along, volume.dtype)
    return jnp.einsum(
        "zi,yj,xk,ijk->zyx",
        *(matrix, matrix, matrix, volume),
        precision=jax.lax.Precision.HIGHEST,
    )


def interpolation_matrix(
    n: int, size: int, step: float
) -> Float[np.ndarray, "{size} {n}"]:
    """Return what samples a periodic row of ``n`` at ``size`` places, ``step`` apart.

    The row is the trigonometric polynomial of `resample`, without frequencies beyond
    those of the new samples. The origins of both are their samples ``n // 2``.
    """
    k = np.arange(-(n // 2), n // 2 + 1)
    old = np.arange(n) - n // 2
    new = (np.arange(size) - size // 2) * step
    beyond = np.abs(k) - n / 2 * min(1.0, 1 / step)
    share = np.where(beyond < -_ROUNDING, 1.0, np.where(beyond < _ROUNDING, 0.5, 0.0))
    waves = share / n * np.exp(2j * np.pi / n * np.outer(new, k))
    return (waves @ np.exp(-2j * np.pi / n * np.outer(k, old))).real
