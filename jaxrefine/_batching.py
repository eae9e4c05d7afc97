"""Particles in batches: memory is a parameter, results are not."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp


def sum_over_particles(
    function: Callable[..., Any], particles: Any, batch_size: int
) -> Any:
    """Sum ``function(particle)`` over the leading axis of a pytree of particles.

    ``batch_size`` particles are evaluated at a time; the peak memory is that of one
    batch, and only the running sum is kept. (``jax.lax.map`` would stack all results
    before they could be summed.)
    """
    count = jax.tree.leaves(particles)[0].shape[0]
    batch_size = min(batch_size, count)
    whole = count - count % batch_size

    def batch_sum(batch):
        # A product with ones rather than a sum: XLA would fuse the evaluation into a
        # reduction, which is a scalar loop on a CPU (slower by a factor of 10).
        def total(leaf):
            ones = jnp.ones(leaf.shape[0], leaf.dtype)
            return jnp.tensordot(ones, leaf, 1, precision=jax.lax.Precision.HIGHEST)

        return jax.tree.map(total, jax.vmap(function)(batch))

    def accumulate(total, batch):
        return jax.tree.map(jnp.add, total, batch_sum(batch)), None

    batches = jax.tree.map(
        lambda leaf: leaf[:whole].reshape(-1, batch_size, *leaf.shape[1:]), particles
    )
    rest = jax.tree.map(lambda leaf: leaf[whole:], particles)
    first = batch_sum(jax.tree.map(lambda leaf: leaf[0], batches))
    total, _ = jax.lax.scan(
        accumulate, first, jax.tree.map(lambda leaf: leaf[1:], batches)
    )
    return total if whole == count else accumulate(total, rest)[0]
