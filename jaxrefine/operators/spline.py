"""Functions of the plane as cubic splines on a grid.

A spline returns values together with *its own exact* derivatives, so that a cost and
its gradient agree to rounding, however accurately the spline represents the function
that it was made from.
"""

from typing import NamedTuple

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Float


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
    differences
        Their differences along x, indexed ``[y, x]``, and along y, indexed ``[x, y]``:
        the coefficients of the derivatives by the nodes, which are quadratic along one
        axis. The last column is zero, and not read.
    nodes_per_pixel
        Nodes of the grid per pixel.
    origin
        Index of the node at the coordinate 0 along each axis.
    """

    coefficients: Float[Array, "grid grid"]
    differences: Float[Array, "2 grid grid"]
    nodes_per_pixel: int = eqx.field(static=True)
    origin: int = eqx.field(static=True)

    @staticmethod
    def of(
        coefficients: Float[Array, "grid grid"], nodes_per_pixel: int, origin: int
    ) -> "Spline2D":
        """Make a spline of its coefficients."""
        both = jnp.stack([coefficients, coefficients.T])
        differences = jnp.pad(jnp.diff(both), ((0, 0), (0, 0), (0, 1)))
        return Spline2D(coefficients, differences, nodes_per_pixel, origin)

    def __call__(
        self, x: Float[Array, "..."], y: Float[Array, "..."]
    ) -> Float[Array, "..."]:
        """Evaluate at points given by their coordinates in pixels."""
        cells = _Cells(self.coefficients.shape[0], self.nodes_per_pixel, self.origin)
        column, along_x, _ = cells(x)
        row, along_y, _ = cells(y)
        weights = _cubic(along_y), _cubic(along_x)
        return _weighted_sum(self.coefficients, row, column, *weights)

    def slopes(self) -> "SplineSlope":
        """Return the derivatives by x and by y, per pixel, stacked for `jax.vmap`."""
        return SplineSlope(self.differences, self.nodes_per_pixel, self.origin)


class SplineSlope(eqx.Module):
    """The derivative of a spline along the first coordinate of its points.

    Attributes
    ----------
    differences
        Differences of the B-spline coefficients along the last axis.
    nodes_per_pixel, origin
        As those of the spline.
    """

    differences: Float[Array, "*axes grid grid"]
    nodes_per_pixel: int = eqx.field(static=True)
    origin: int = eqx.field(static=True)

    def __call__(
        self, along: Float[Array, "..."], across: Float[Array, "..."]
    ) -> Float[Array, "..."]:
        """Evaluate at points given by their coordinates in pixels."""
        cells = _Cells(self.differences.shape[-1], self.nodes_per_pixel, self.origin)
        column, f, inside = cells(along)
        row, g, _ = cells(across)
        scale = jnp.where(inside, jnp.asarray(self.nodes_per_pixel, f.dtype), 0.0)
        quadratic = ((1 - f) ** 2 / 2, 0.5 + f * (1 - f), f**2 / 2)
        weights = _cubic(g), [scale * weight for weight in quadratic]
        return _weighted_sum(self.differences, row, column, *weights)


class _Cells(NamedTuple):
    """The cells between the nodes along one axis of a spline's grid."""

    nodes: int
    nodes_per_pixel: int
    origin: int

    def __call__(self, position: Float[Array, "..."]):
        """Return a point's first of four nodes, place in its cell, and if it is inside.

        A point outside is taken to the first cell.
        """
        position = position * self.nodes_per_pixel + self.origin
        inside = (position >= 1.0) & (position < self.nodes - 3.0)
        position = jnp.where(inside, position, 1.0)
        cell = jnp.floor(position)
        return cell.astype(jnp.int32) - 1, position - cell, inside


def _cubic(f: Float[Array, "..."]) -> tuple[Float[Array, "..."], ...]:
    """Return the weights of the four nodes about a place in a cell."""
    g = 1.0 - f
    inner = 2 / 3 - f**2 * (1 - f / 2), 2 / 3 - g**2 * (1 - g / 2)
    return g**3 / 6, *inner, f**3 / 6


def _weighted_sum(table, row, column, row_weights, column_weights):
    """Sum the entries of a table from a row and a column on, with weights."""
    width = table.shape[-1]
    flat = table.reshape(-1)
    first = row * width + column
    total = jnp.zeros_like(row_weights[0])
    for i, row_weight in enumerate(row_weights):
        of_row = jnp.zeros_like(total)
        for j, column_weight in enumerate(column_weights):
            entry = flat.at[first + (i * width + j)].get(
                mode="promise_in_bounds", wrap_negative_indices=False
            )
            of_row = of_row + column_weight * entry
        total = total + row_weight * of_row
    return total


def spline_prefilter(size: int, dtype) -> Float[Array, "size"]:
    """Return the DFT of the cubic B-spline sampled at the integers.

    Dividing a spectrum by it, along each axis, turns samples into B-spline coefficients
    (Unser 1999).
    """
    return (2.0 + jnp.cos(2 * jnp.pi / size * jnp.arange(size, dtype=dtype))) / 3.0
