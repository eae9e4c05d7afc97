"""Functions of the plane as cubic splines on a grid.

A spline returns values together with *its own exact* derivatives, so that a cost and
its gradient agree to rounding, however accurately the spline represents the function
that it was made from.
"""

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


class Spline2D(eqx.Module):
    """A function of the plane as a cubic B-spline on a square grid.

    It is twice continuously differentiable. The error of a smooth function is of fourth
    order in the spacing of the nodes, and that of its gradient of third order (Unser,
    IEEE Signal Process. Mag. 16, 1999). Beyond the grid, the spline has the value of
    the first nodes, so a grid should extend to where the function vanishes.

    Attributes
    ----------
    coefficients
        B-spline coefficients, indexed ``[y, x]``.
    nodes_per_pixel
        Nodes of the grid per pixel.
    origin
        Index of the node at the coordinate 0 along each axis.
    """

    coefficients: Float[Array, "grid grid"]
    nodes_per_pixel: int = eqx.field(static=True)
    origin: int = eqx.field(static=True)

    def __call__(
        self, x: Float[Array, "..."], y: Float[Array, "..."]
    ) -> Float[Array, "..."]:
        """Evaluate at points given by their coordinates in pixels."""
        return self._evaluate(x, y, jnp.zeros(2, bool))

    def slope(
        self, x: Float[Array, "..."], y: Float[Array, "..."], axis: Int[Array, ""]
    ) -> Float[Array, "..."]:
        """Evaluate the derivative along x (axis 0) or y (axis 1), per pixel.

        The axis is traced, so that both derivatives can be a batch of one program.
        Written as two expressions they would share the coefficients that they read, and
        XLA would write all of those to memory.
        """
        return self._evaluate(x, y, jnp.arange(2) == axis)

    def _evaluate(self, x, y, by: Bool[Array, "2"]):
        """Evaluate the spline, or its derivative with respect to x or y."""
        column, x_weights = self._locate(x, by[0])
        row, y_weights = self._locate(y, by[1])
        width = self.coefficients.shape[1]
        flat = self.coefficients.reshape(-1)
        first = row * width + column
        total = jnp.zeros_like(x)
        for i, y_weight in enumerate(y_weights):
            along_x = jnp.zeros_like(x)
            for j, x_weight in enumerate(x_weights):
                tap = flat.at[first + (i * width + j)].get(mode="promise_in_bounds")
                along_x = along_x + x_weight * tap
            total = total + y_weight * along_x
        return total

    def _locate(self, position: Float[Array, "..."], derivative: Bool[Array, ""]):
        """Return the first of four nodes about a point, and their weights."""
        last = self.coefficients.shape[0] - 3.0
        position = position * self.nodes_per_pixel + self.origin
        inside = (position >= 1.0) & (position < last)
        position = jnp.where(inside, position, 1.0)
        cell = jnp.floor(position)
        f = position - cell
        g = 1.0 - f
        values = (
            g**3 / 6,
            2 / 3 - f**2 * (1 - f / 2),
            2 / 3 - g**2 * (1 - g / 2),
            f**3 / 6,
        )
        slopes = (-(g**2) / 2, f * (1.5 * f - 2), g * (2 - 1.5 * g), f**2 / 2)
        scale = jnp.where(inside, jnp.asarray(self.nodes_per_pixel, f.dtype), 0.0)
        weights = [
            jnp.where(derivative, scale * slope, value)
            for value, slope in zip(values, slopes, strict=True)
        ]
        return cell.astype(jnp.int32) - 1, weights


def spline_prefilter(size: int, dtype) -> Float[Array, "size"]:
    """Return the DFT of the cubic B-spline sampled at the integers.

    Dividing a spectrum by it, along each axis, turns samples into B-spline coefficients
    (Unser 1999).
    """
    return (2.0 + jnp.cos(2 * jnp.pi / size * jnp.arange(size, dtype=dtype))) / 3.0
