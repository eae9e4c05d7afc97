"""Radial functions of compact support as Chebyshev series.

A series returns values together with *its own exact* derivatives, so that a cost and
its gradient agree to rounding, however accurately the series represents the function
that it was made from.
"""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float
from numpy.polynomial import chebyshev

from jaxrefine.errors import InputError

_MAX_DEGREE = 400  # Footprints of smooth windows need a few dozen terms.


class RadialSeries(eqx.Module):
    """A radial function of compact support, as a Chebyshev series in ``r**2``.

    A smooth isotropic function is a smooth function of the squared radius, so a few
    dozen terms represent it to rounding. Their evaluation needs arithmetic only, which
    every device does much faster than looking up a table, and has no singularity at the
    centre.

    Attributes
    ----------
    coefficients, slope_coefficients
        Chebyshev coefficients of the function and of its derivative with respect to the
        squared radius.
    radius
        Support radius in pixels.
    """

    coefficients: Float[Array, "terms"]
    slope_coefficients: Float[Array, "terms-1"]
    radius: float = eqx.field(static=True)

    def __call__(self, squared_radius: Float[Array, "..."]) -> Float[Array, "..."]:
        """Evaluate the function; zero outside the support."""
        return self._series(self.coefficients, squared_radius)

    def slope(self, squared_radius: Float[Array, "..."]) -> Float[Array, "..."]:
        """Evaluate the derivative with respect to the *squared* radius."""
        return self._series(self.slope_coefficients, squared_radius)

    def _series(self, coefficients, squared_radius):
        inside = squared_radius < self.radius**2
        position = jnp.where(inside, squared_radius, 0.0) * (2 / self.radius**2) - 1.0
        return jnp.where(inside, _clenshaw(coefficients, position), 0.0)


def _clenshaw(coefficients: Float[Array, "terms"], x: Float[Array, "..."]):
    """Sum a Chebyshev series at points of [-1, 1] by Clenshaw's recurrence."""
    coefficients = coefficients.astype(x.dtype)
    next_sum = second_next_sum = jnp.zeros_like(x)
    for k in range(coefficients.shape[0] - 1, 0, -1):
        current = 2.0 * x * next_sum - second_next_sum + coefficients[k]
        next_sum, second_next_sum = current, next_sum
    return x * next_sum - second_next_sum + coefficients[0]


def radial_series(
    function: Callable[[np.ndarray], np.ndarray], radius: float, tolerance: float
) -> RadialSeries:
    """Interpolate a radial function by a Chebyshev series of sufficient length.

    Parameters
    ----------
    function
        Maps radii in ``[0, radius]`` to values, in NumPy and double precision.
    radius
        Support radius; the function is taken as zero outside.
    tolerance
        Terms at the end of the series below this fraction of the largest are dropped.
        The remaining error is of the order of the tolerance.

    Raises
    ------
    InputError
        If 400 terms do not reach the tolerance.
    """

    def at_node(node: Any) -> Any:
        return function(radius * np.sqrt(np.maximum(node + 1, 0) / 2))

    series = chebyshev.chebinterpolate(at_node, _MAX_DEGREE)
    significant = np.flatnonzero(np.abs(series) > tolerance * np.abs(series).max())
    if significant[-1] == _MAX_DEGREE:
        raise InputError(
            f"tolerance must be one that {_MAX_DEGREE} terms of a series reach, got "
            f"{tolerance:g}"
        )
    series = series[: max(significant[-1] + 1, 2)]
    slope = chebyshev.chebder(series) * (2 / radius**2)
    return RadialSeries(jnp.asarray(series), jnp.asarray(slope), radius)
