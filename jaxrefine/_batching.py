"""Particles in batches: memory is a parameter, results are not.

Batches are sliced out of the particles one at a time. (``jax.lax.map`` with a batch
size first copies them all into a new layout, and it stacks results where a running sum
would do.)
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool

from jaxrefine.errors import InputError


def sum_over_particles(
    function: Callable[..., Any], particles: Any, batch_size: int
) -> Any:
    """Sum ``function(particle)`` over the leading axis of a pytree of particles.

    ``batch_size`` particles are evaluated at a time; the peak memory is that of one
    batch, and only the running sum is kept.
    """

    def sum_of_batch(batch, new):
        # A product with weights rather than a sum: XLA would fuse the evaluation into a
        # reduction, which is a scalar loop on a CPU (slower by a factor of 10).
        def add_up(leaf):
            weights = new.astype(leaf.dtype)
            return jnp.tensordot(weights, leaf, 1, precision=jax.lax.Precision.HIGHEST)

        return jax.tree.map(add_up, jax.vmap(function)(batch))

    return sum_over_batches(sum_of_batch, particles, batch_size)


def sum_over_batches(
    function: Callable[[Any, Bool[Array, "batch"]], Any],
    particles: Any,
    batch_size: int,
) -> Any:
    """Sum ``function(batch, new)`` over batches of a pytree of particles.

    The last batch reaches back so as to be whole; ``new`` is false for those of its
    particles that have been in another.
    """
    count, size, batches = _plan(particles, batch_size)

    def add_batch(total, index):
        first, batch = _batch(particles, index, size, count)
        new = first + jnp.arange(size, dtype=index.dtype) >= index * size
        return jax.tree.map(jnp.add, total, function(batch, new)), None

    some = jax.tree.map(lambda leaf: leaf[:size], particles)
    shapes = jax.eval_shape(function, some, jnp.ones(size, bool))
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
