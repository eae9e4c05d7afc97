"""Resampling of maps on other grids with the same origin."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxrefine._types import Volume
from jaxrefine.errors import InputError

_ROUNDING = 1e-6  # Allowed for rounding errors, in samples and in cycles per box.


@eqx.filter_jit
def fourier_crop(volume: Volume, size: int) -> Float[Array, "{size} {size} {size}"]:
    """Resample a periodic map on fewer voxels, by removing its highest frequencies.

    The box keeps its length, so voxels grow by ``n / size``. Densities keep their
    values: a map without frequencies of ``size / 2`` cycles per box or more is sampled
    exactly. The origin is the sample ``n // 2`` before, and ``size // 2`` after.

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
        raise InputError(f"size must be from 1 to {n}, the map's side, got {size}")
    spectrum = jnp.fft.fftshift(jnp.fft.fftn(jnp.fft.ifftshift(volume)))
    low = slice(n // 2 - size // 2, n // 2 - size // 2 + size)
    low_frequencies = jnp.fft.ifftshift(spectrum[low, low, low])
    cropped = jnp.fft.fftshift(jnp.fft.ifftn(low_frequencies)).real
    return cropped * (size / n) ** 3


def resample(
    volume: Volume, voxel: float, size: int, pixel: float
) -> Float[Array, "{size} {size} {size}"]:
    r"""Sample a map on a grid with another voxel size and another side.

    The map is interpolated by the trigonometric polynomial through its samples, without
    frequencies beyond the new Nyquist frequency, and is zero farther than half a voxel
    from its outermost samples. Along each axis, with x and j in old voxels from the
    origin,

    .. math:: V(x) = \frac1n \sum_{|k| \le n/2} c_k \sum_j V_j\,
       e^{2\pi i k (x - j) / n},

    where :math:`c_k` is 1 below the lower of the two Nyquist frequencies, 1/2 at it and
    0 beyond. Densities keep their values: a map that is band-limited on both grids is
    sampled exactly. The origin is the sample ``n // 2`` before, and ``size // 2``
    after.

    Parameters
    ----------
    volume
        The map, of side ``n``, odd or even.
    voxel, pixel
        Edges of its voxels and of the new voxels, in the same unit.
    size
        The new side, odd or even.

    Raises
    ------
    InputError
        If ``voxel``, ``pixel`` or ``size`` is not positive.
    """
    if not (voxel > 0 and size > 0 and pixel > 0):
        raise InputError(
            "voxel, size and pixel must be positive, got "
            f"voxel={voxel:g}, size={size}, pixel={pixel:g}"
        )
    n = volume.shape[0]
    positions = (np.arange(size) - size // 2) * (pixel / voxel)
    inside = np.abs(positions + (1 - n % 2) / 2) < n / 2 + _ROUNDING
    interpolation = interpolation_matrix(n, size, pixel / voxel) * inside[:, None]
    matrix = jnp.asarray(interpolation, volume.dtype)
    return jnp.einsum(
        "zi,yj,xk,ijk->zyx",
        *(matrix, matrix, matrix, volume),
        precision=jax.lax.Precision.HIGHEST,
    )


def interpolation_matrix(
    n: int, size: int, step: float
) -> Float[np.ndarray, "{size} {n}"]:
    """Return the matrix that resamples a periodic row of ``n`` samples.

    It evaluates the trigonometric polynomial of :func:`resample`, without frequencies
    beyond the Nyquist frequency of the new samples.

    Parameters
    ----------
    n, size
        Number of samples before and after. The origins are the samples ``n // 2`` and
        ``size // 2``.
    step
        Distance of the new samples in units of the old one.
    """
    k = np.arange(-(n // 2), n // 2 + 1)
    sources = np.arange(n) - n // 2
    targets = (np.arange(size) - size // 2) * step
    beyond = np.abs(k) - n / 2 * min(1.0, 1 / step)
    weight = np.where(beyond < -_ROUNDING, 1.0, np.where(beyond < _ROUNDING, 0.5, 0.0))
    waves = weight / n * np.exp(2j * np.pi / n * np.outer(targets, k))
    return (waves @ np.exp(-2j * np.pi / n * np.outer(k, sources))).real
