"""The scale of a map, and values in it that cannot be those of a particle."""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxrefine._types import Volume

# Share of a map's power in a single voxel from which the map is that voxel. The tip of
# a Gaussian as narrow as a grid can hold has less than a fifth.
_HOT_SHARE = 0.5
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
    """Return the value of a voxel that has most of a map's power; None if none has.

    Parameters
    ----------
    volume
        A map whose values are finite, of any scale.
    """
    values = np.asarray(volume, np.float64)
    power = (values - np.median(values)) ** 2
    largest = np.argmax(power)
    if power.flat[largest] > _HOT_SHARE * power.sum():
        return float(values.flat[largest])
    return None


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
    n = len(values)
    square = (np.arange(n) - n // 2) ** 2
    radius = square[:, None, None] + square[:, None] + square
    solvent = float(np.median(values[radius > (n / 2) ** 2]))
    return solvent if abs(solvent) > _LARGEST_SOLVENT * np.ptp(values) else None


def is_negative(volume: Volume | np.ndarray) -> bool:
    """Return whether the particle of a map seems to be darker than its solvent.

    Density then reaches farther below the median than above it, in the third moment.
    """
    values = np.asarray(volume, np.float64)
    values = values - np.median(values)
    largest = np.abs(values).max()
    return bool(largest > 0 and np.sum((values / largest) ** 3) < 0)
