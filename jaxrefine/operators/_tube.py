r"""Lattice points near a line: the voxels that a footprint of finite radius can touch.

A footprint of radius ``r`` centred on the image point ``y`` meets the voxel ``k`` only
if :math:`\|M k - y\| < r`: a tube around a line in the viewing direction. The tube
crosses every lattice plane perpendicular to the direction's dominant axis in an ellipse
that fits a square window of fixed size, so sums over a tube cost O(n r^2) and have
static shapes.

An array is stored in the three cyclic orders of its axes (:func:`cyclic_copies`), and
the columns of a rotation are cycled in the same way, so that the same code visits the
planes of any axis.
"""

import math

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxrefine._types import Volume


class Line(eqx.Module):
    """A viewing line, its axes cycled so that the dominant one comes last.

    Attributes
    ----------
    axis
        Dominant axis of the viewing direction: 0, 1, 2 for x, y, z.
    projection
        ``M`` with its columns cycled.
    direction
        Viewing direction with its components cycled; the last is the largest.
    """

    axis: Int[Array, ""]
    projection: Float[Array, "2 3"]
    direction: Float[Array, "3"]


def viewing_line(rotation: Float[Array, "3 3"]) -> Line:
    """Return the line of sight of a pose: the third row of its rotation."""
    axis = jnp.argmax(jnp.abs(rotation[2])).astype(jnp.int32)
    order = (axis + jnp.arange(1, 4, dtype=axis.dtype)) % 3
    cycled = rotation[:, order]
    return Line(axis, cycled[:2], cycled[2])


def uncycle(line: Line, columns: Float[Array, "2 3"]) -> Float[Array, "2 3"]:
    """Reorder the columns of a matrix from a line's cycled order to x, y, z."""
    order = (jnp.arange(2, 5, dtype=line.axis.dtype) - line.axis) % 3
    return columns[:, order]


def cyclic_copies(array: Volume) -> Float[Array, "3 n n n"]:
    """Stack the three cyclic axis orders; entry ``a`` has the axis ``a`` first.

    Entry ``a`` is indexed ``[a, a+2, a+1]`` (cyclically, in x, y, z), the reverse of
    the order in which :class:`Line` cycles columns.
    """
    return jnp.stack(
        [array.transpose(2, 0, 1), array.transpose(1, 2, 0), array], axis=0
    )


def merge_copies(copies: Float[Array, "3 n n n"]) -> Volume:
    """Sum three accumulators in cyclic orders: the adjoint of :func:`cyclic_copies`."""
    return copies[0].transpose(1, 2, 0) + copies[1].transpose(2, 0, 1) + copies[2]


def window_size(radius: float) -> int:
    """Return the side of a window that covers the tube's ellipse in any plane.

    Along the axis ``u``, the ellipse extends by ``r * sqrt(1 - d_v**2) / d_w`` (for the
    direction ``d`` with the dominant component ``w``), which is at most ``sqrt(2) r``.
    """
    return math.floor(2 * math.sqrt(2) * radius) + 1


def window_corner(
    line: Line,
    x: Float[Array, "..."],
    y: Float[Array, "..."],
    plane: Float[Array, "..."],
    radius: float,
) -> tuple[Int[Array, "..."], Int[Array, "..."]]:
    """Return the first lattice point ``(u, v)`` of the window around a line in planes.

    The line is the set of ``k`` with ``M k = (x, y)``; ``plane`` is the coordinate
    along the dominant axis. The three broadcast against each other.
    """
    base = [line.projection[0, j] * x + line.projection[1, j] * y for j in range(3)]
    distance = (plane - base[2]) / line.direction[2]
    reach = math.sqrt(2) * radius
    u, v = (
        jnp.ceil(base[j] + distance * line.direction[j] - reach).astype(jnp.int32)
        for j in range(2)
    )
    return u, v


def window_span(first: Int[Array, "..."], side: int, dtype) -> Float[Array, "... side"]:
    """Return the coordinates along a side of windows, given their first points."""
    span = jnp.arange(side, dtype=dtype)
    return first.astype(dtype)[..., None] + jnp.expand_dims(span, range(first.ndim))


def project_lattice(
    projection: Float[Array, "2 3"],
    u: Float[Array, "..."],
    v: Float[Array, "..."],
    w: Float[Array, "..."],
) -> tuple[Float[Array, "..."], Float[Array, "..."]]:
    """Apply ``M`` to points given by coordinates that broadcast, in full precision."""
    x, y = (row[0] * u + row[1] * v + row[2] * w for row in projection)
    return x, y
