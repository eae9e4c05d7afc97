"""The scale of a map, and values in it that cannot be those of a particle."""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from jaxrefine._types import Volume
from jaxrefine.operators.ball import in_ball, squared_distances
from jaxrefine.operators.fourier import radii

# A map is that of some hot voxels if so few of them have more than this share of its
# power, and less than that is left of it after a low-pass: of the narrowest particle, a
# Gaussian with a standard deviation of one voxel, 0.25 is left, of a cube of 2 x 2 x 2
# voxels 0.06, and of separate voxels or white noise 0.008.
_FEW, _SHARE, _LEAST_SMOOTH = 64, 0.5, 0.1
_CUT_OFF = 1 / 8  # cycles per voxel, of that low-pass
# Power of a map's solvent after the low-pass, in units of that within the sphere that
# fits in the box. It is 1 for noise, 2.4 for a linear ramp.
_LOUDEST_SOLVENT = 0.5
_RIM = 0.8  # of the radius of that sphere, where its solvent begins at the latest
# Solvent of a map, in units of the range of its values. With the whole range, a map of
# FSC 0.89 becomes one of 0.80.
_LARGEST_SOLVENT = 0.25


def at_unit_scale(volume: Volume) -> Volume:
    """Return a map divided by a power of two, so that its largest value is near 1.

    Squares and sums of its values then stay within single precision. Its values keep
    all their bits.
    """
    _, exponent = jnp.frexp(jnp.max(jnp.abs(volume)))
    half = exponent // 2
    one = jnp.ones((), volume.dtype)
    # In two steps, as the inverse of the largest numbers is too small to be held.
    return volume * jnp.ldexp(one, -half) * jnp.ldexp(one, half - exponent)


def hot_voxel(volume: Volume | np.ndarray) -> float | None:
    """Return the value of the hottest voxel of a map that is some hot voxels.

    Up to 64 voxels then have most of the power, and a low-pass filter at an eighth of a
    cycle per voxel leaves nearly nothing of it, unlike that of any smooth density.

    Parameters
    ----------
    volume
        A map whose values are finite, of any scale.

    Returns
    -------
    The value; None if the map is no such map.
    """
    values = np.asarray(volume, np.float64)
    values = values - np.median(values)
    power = values.ravel() ** 2
    few = power[np.argpartition(power, -min(_FEW, power.size))[-_FEW:]]
    if not few.sum() > _SHARE * power.sum():
        return None
    if np.sum(_smooth(values) ** 2) > _LEAST_SMOOTH * np.sum(_unit(values) ** 2):
        return None
    return float(np.asarray(volume, np.float64).flat[np.argmax(power)])


def offset(volume: Float[Array | np.ndarray, "n n n"]) -> float | None:
    """Return the value of the solvent of a map that is not near zero; None if it is.

    The solvent is the median outside of the sphere that fits in the map, and near zero
    is up to a quarter of the map's range.

    Parameters
    ----------
    volume
        A map whose values are finite and not all the same, of any scale.
    """
    values = np.asarray(volume, np.float64)
    solvent = float(np.median(values[_corners(len(values))]))
    return solvent if abs(solvent) > _LARGEST_SOLVENT * np.ptp(values) else None


def has_no_particle(volume: Float[Array | np.ndarray, "n n n"]) -> bool:
    """Return whether no particle stands out in a map, as in noise or a linear ramp.

    After a low-pass filter at an eighth of a cycle per voxel, density outside of the
    sphere that fits in the map then has more than half the mean square of that within.
    Where nothing is outside, as in half maps, it is that beyond 0.8 of the radius.

    Parameters
    ----------
    volume
        A map whose values are finite, of any scale.
    """
    values = np.asarray(volume, np.float64)
    corners = _corners(len(values))
    within, solvent = ~corners, values[corners]
    power = _smooth(values - np.median(solvent)) ** 2
    if np.ptp(solvent) == 0:
        distances = np.asarray(squared_distances(len(values)))
        corners = within & (distances > (_RIM * len(values) / 2) ** 2)
    return bool(power[corners].mean() > _LOUDEST_SOLVENT * power[within].mean())


def _corners(n: int) -> Bool[np.ndarray, "n n n"]:
    """Return which voxels are outside of the sphere that fits in a box."""
    return ~np.asarray(in_ball(n))


def _unit(values: Float[np.ndarray, "n n n"]) -> Float[np.ndarray, "n n n"]:
    """Return values divided by the largest of them, unless all are zero."""
    return values / (np.abs(values).max() or 1.0)


def _smooth(values: Float[np.ndarray, "n n n"]) -> Float[np.ndarray, "n n n"]:
    """Return values after a low-pass filter, in units of the largest before."""
    n = len(values)
    kept = radii(n) <= max(_CUT_OFF * n, 1)
    spectrum = np.where(kept, np.fft.rfftn(_unit(values)), 0)
    return np.fft.irfftn(spectrum, s=values.shape, axes=(0, 1, 2))


def is_negative(volume: Volume | np.ndarray, errors: float = 0.0) -> bool:
    r"""Return whether the particle of a map seems to be darker than its solvent.

    Density then reaches farther below the mean than above it, in the third moment.

    Parameters
    ----------
    volume
        A map whose values are finite, of any scale.
    errors
        How far the moment must be below zero, in units of its standard error in
        Gaussian noise of the map's spectrum. With the autocorrelation :math:`R` of N
        voxels, the square of that is :math:`6 N \sum_d R(d)^3` for their sum.
    """
    values = np.asarray(volume, np.float64)
    values = _unit(values - values.mean())
    moment = np.sum(values**3)
    if not (errors and moment < 0):
        return bool(moment < 0)
    power = np.abs(np.fft.rfftn(values)) ** 2
    correlation = np.fft.irfftn(power, s=values.shape, axes=(0, 1, 2)) / values.size
    return bool(moment < -errors * np.sqrt(6 * values.size * np.sum(correlation**3)))
