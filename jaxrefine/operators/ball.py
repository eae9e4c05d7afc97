"""The largest ball in a cubic box, around its centre, the voxel ``n // 2``.

Every image shows it whole; the corners of the box are seen from some directions only.
"""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float


def squared_distances(n: int, dtype: Any = None) -> Float[Array, "n n n"]:
    """Return the squared distances of all voxels from the centre, in voxels."""
    # Traced where it is part of a program, so that none holds a map of constants.
    square = (jnp.arange(n, dtype=dtype or jnp.result_type(float)) - n // 2) ** 2
    return square[:, None, None] + square[None, :, None] + square[None, None, :]


def in_ball(n: int) -> Bool[Array, "n n n"]:
    """Return which voxels are at most ``n / 2`` from the centre."""
    return squared_distances(n) <= (n / 2) ** 2
