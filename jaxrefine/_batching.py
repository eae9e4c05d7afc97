"""Maps and sums over particles in batches of a given size, and side by side.

The batch size determines the memory, and does not affect the results. Batches are
sliced out of the particles one at a time. (``jax.lax.map`` with a batch size first
copies all particles into a new layout, and stacks results where a running sum is
enough.)
"""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool

from jaxrefine.errors import InputError

_T = TypeVar("_T")


def side_by_side(functions: Sequence[Callable[[], _T]]) -> list[_T]:
    """Call functions that have nothing to do with each other, each in its own thread.

    Much of a volume update runs on one core: a second one does another fold meanwhile.
    What JAX has been told for this thread alone, such as by ``jax.default_device``, is
    not known in the others. An error is raised when all of them have ended.

    Returns
    -------
    Their results, in their order.
    """
    with ThreadPoolExecutor(len(functions)) as threads:
        futures = [threads.submit(function) for function in functions]
        return [future.result() for future in futures]


def sum_over_particles(
    function: Callable[..., Any], particles: Any, batch_size: int
) -> Any:
    """Sum ``function(particle)`` over the leading axis of a pytree of particles.

    ``batch_size`` particles are evaluated at a time, so the peak memory is that of one
    batch and of the running sum.

    Raises
    ------
    InputError
        If there are no particles, or the batch size is not positive.
    """

    def sum_of_batch(batch, is_new):
        # A product with weights rather than a sum, because XLA would fuse the
        # evaluation into a reduction, which is a scalar loop on a CPU (slower by a
        # factor of 10).
        def add_up(leaf):
            weights = is_new.astype(leaf.dtype)
            return jnp.tensordot(weights, leaf, 1, precision=jax.lax.Precision.HIGHEST)

        return jax.tree.map(add_up, jax.vmap(function)(batch))

    return sum_over_batches(sum_of_batch, particles, batch_size)


def sum_over_batches(
    function: Callable[[Any, Bool[Array, "batch"]], Any],
    particles: Any,
    batch_size: int,
) -> Any:
    """Sum ``function(batch, is_new)`` over batches of a pytree of particles.

    All batches have the same size: the last one overlaps with the one before if needed.
    ``is_new`` is false for its particles that were in the batch before.

    Raises
    ------
    InputError
        If there are no particles, or the batch size is not positive.
    """
    count, size, batches = _plan(particles, batch_size)

    def add_batch(total, index):
        first, batch = _batch(particles, index, size, count)
        is_new = first + jnp.arange(size, dtype=index.dtype) >= index * size
        return jax.tree.map(jnp.add, total, function(batch, is_new)), None

    example = jax.tree.map(lambda leaf: leaf[:size], particles)
    shapes = jax.eval_shape(function, example, jnp.ones(size, bool))
    zero = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
    indices = jnp.arange(batches, dtype=jnp.int32)
    return jax.lax.scan(add_batch, zero, indices)[0]


def map_over_particles(
    function: Callable[..., Any], particles: Any, batch_size: int
) -> Any:
    """Stack ``function(particle)`` over the leading axis of a pytree of particles.

    ``batch_size`` particles are evaluated at a time.

    Raises
    ------
    InputError
        If there are no particles, or the batch size is not positive.
    """
    count, size, batches = _plan(particles, batch_size)

    def map_batch(index):
        return jax.vmap(function)(_batch(particles, index, size, count)[1])

    results = jax.lax.map(map_batch, jnp.arange(batches, dtype=jnp.int32))
    remainder = count - (batches - 1) * size

    def join(leaf):
        full_batches = leaf[:-1].reshape(-1, *leaf.shape[2:])
        return jnp.concatenate([full_batches, leaf[-1, size - remainder :]])

    return jax.tree.map(join, results)


def for_active(
    function: Callable[..., Any],
    active: Bool[Array, "n"],
    size: int,
    arguments: Any,
    otherwise: Any,
) -> Any:
    """Evaluate ``function(*arguments)`` where it is active, ``size`` at a time.

    Those that are active are gathered first; others only fill up the last round.

    Parameters
    ----------
    function
        A function of one row.
    active
        Which rows to evaluate.
    size
        How many are evaluated at a time; the memory grows with it.
    arguments
        A tuple of pytrees with a leading axis ``n``.
    otherwise
        The results of the other rows, with a leading axis ``n``.

    Returns
    -------
    The results of all rows.
    """
    count = active.shape[0]
    size = min(size, count)
    order = jnp.argsort(~active, stable=True).astype(jnp.int32)
    # The last rows are filled up with a row that does not exist: it is read as the last
    # one, and not written.
    order = jnp.where(jnp.sort(~active), count, order)
    order = jnp.concatenate([order, jnp.full(-count % size, count, jnp.int32)])
    rounds = (jnp.sum(active.astype(jnp.int32)) + size - 1) // size

    def evaluate(index, results):
        rows = jax.lax.dynamic_slice_in_dim(order, index * size, size)
        read = jnp.minimum(rows, count - 1)
        chosen = jax.tree.map(lambda leaf: leaf[read], arguments)
        values = jax.vmap(function)(*chosen)
        return jax.tree.map(
            lambda leaf, value: leaf.at[rows].set(value, mode="drop"), results, values
        )

    return jax.lax.fori_loop(0, rounds, evaluate, otherwise)


def _plan(particles: Any, batch_size: int) -> tuple[int, int, int]:
    """Return the numbers of particles, of particles in a batch, and of batches."""
    count = jax.tree.leaves(particles)[0].shape[0]
    if count < 1 or batch_size < 1:
        raise InputError(
            "there must be at least one particle and a batch size of at least 1, got "
            f"{count} particles and a batch size of {batch_size}"
        )
    size = min(batch_size, count)
    return count, size, -(-count // size)


def _batch(particles: Any, index: jax.Array, size: int, count: int):
    """Return a batch and its first index; the last one overlaps with the one before."""
    first = jnp.minimum(index * size, count - size)
    batch = jax.tree.map(
        lambda leaf: jax.lax.dynamic_slice_in_dim(leaf, first, size), particles
    )
    return first, batch
