"""Particles in batches: memory is a parameter, results are not.

Batches are sliced out of the particles one at a time. (``jax.lax.map`` with a batch
size first copies them all into a new layout, and it stacks results where a running sum
would do.)
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxrefine.errors import InputError


def sum_over_particles(
    function: Callable[..., Any], particles: Any, batch_size: int
) -> Any:
    """Sum ``function(particle)`` over the leading axis of a pytree of particles.

    ``batch_size`` particles are evaluated at a time; the peak memory is that of one
    batch, and only the running sum is kept.
    """
    count, size, batches = _plan(particles, batch_size)

    def add_batch(total, index):
        first, batch = _batch(particles, index, size, count)
        new = first + jnp.arange(size, dtype=index.dtype) >= index * size
        values = jax.vmap(function)(batch)

        # A product with weights rather than a sum: XLA would fuse the evaluation into a
        # reduction, which is a scalar loop on a CPU (slower by a factor of 10).
        def add(total, leaf):
            weights = new.astype(leaf.dtype)
            highest = jax.lax.Precision.HIGHEST
            return total + jnp.tensordot(weights, leaf, 1, precision=highest)

        return jax.tree.map(add, total, values), None

    one = jax.tree.map(lambda leaf: leaf[0], particles)
    shapes = jax.eval_shape(function, one)
    zero = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
    indices = jnp.arange(batches, dtype=jnp.int32)
    return jax.lax.scan(add_batch, zero, indices)[0]


def map_over_particles(
    function: Callable[..., Any], particles: Any, batch_size: int
) -> Any:
    """Stack ``function(particle)`` over the leading axis of a pytree of particles."""
    count, size, batches = _plan(particles, batch_size)

    def one_batch(index):
        return jax.vmap(function)(_batch(particles, index, size, count)[1])

    results = jax.lax.map(one_batch, jnp.arange(batches, dtype=jnp.int32))
    rest = count - (batches - 1) * size

    def join(leaf):
        whole = leaf[:-1].reshape(-1, *leaf.shape[2:])
        return jnp.concatenate([whole, leaf[-1, size - rest :]])

    return jax.tree.map(join, results)


def _plan(particles: Any, batch_size: int) -> tuple[int, int, int]:
    """Return the numbers of particles, of particles in a batch, and of batches."""
    count = jax.tree.leaves(particles)[0].shape[0]
    if count < 1 or batch_size < 1:
        raise InputError(
            "at least one particle and a batch of at least one are wanted, not "
            f"{count} particles in batches of {batch_size}"
        )
    size = min(batch_size, count)
    return count, size, -(-count // size)


def _batch(particles: Any, index: jax.Array, size: int, count: int):
    """Slice out a batch; the last one reaches back so as to be whole."""
    first = jnp.minimum(index * size, count - size)
    batch = jax.tree.map(
        lambda leaf: jax.lax.dynamic_slice_in_dim(leaf, first, size), particles
    )
    return first, batch
