"""Visits to particles: what is computed of each image, block by block on all devices.

A visit calls a function on blocks of particles of a fixed size. The blocks are shared
out among all processes, and those of a batch among the devices of a process, each of
which takes its own one after the other. What comes out for a particle depends on its
block alone, to the last bit, and neither on how many blocks are visited at a time nor
on where.
"""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Int, PyTree

from jaxrefine._processes import gather, part
from jaxrefine._types import Images
from jaxrefine._watch import Stage
from jaxrefine.ctf import CTF
from jaxrefine.data.observation import View, batches
from jaxrefine.data.particles import Particles
from jaxrefine.operators.gridding import Spectrum

BLOCK = 64
"""Particles of a block."""

# Blocks that there is room for on a device, at least. The compiler would treat a single
# one in a way of its own, with other rounding errors.
_FEWEST = 2

Block = Callable[..., PyTree]
"""``function(common, images, ctf, group, exists, own)`` of a block of particles.

It is given what is common to all particles; the images of ``p`` particles, their optics
and the groups that they belong to; which of them exist, as the last block is filled up;
and what belongs to each of them. Its results have a leading axis ``p``.
"""


def whole_batch(batch_size: int, devices: int) -> int:
    """Return a number of particles, rounded up to whole blocks for every device."""
    least = _FEWEST * BLOCK * devices
    return least * max(1, -(-batch_size // least))


def visit(
    function: Block,
    common: PyTree,
    particles: Particles,
    chosen: Int[np.ndarray, " chosen"],
    own: PyTree,
    batch_size: int,
    stage: Stage | None = None,
) -> Any:
    """Call a function on blocks of particles, a batch of blocks at a time.

    Parameters
    ----------
    function
        A function, or a pytree that can be called. It is compiled once for each
        structure of its arguments.
    common
        Its first argument, the same for all particles.
    particles, chosen
        All particles, and which of them to visit, in this order: one at least. A
        particle may be chosen several times.
    own
        What belongs to each of the chosen: a pytree with this leading axis.
    batch_size
        Particles at a time, rounded up to whole blocks. Memory grows with it; it
        changes no result.
    stage
        Told how many particles have been visited.

    Returns
    -------
    The results of the chosen particles, in NumPy arrays.
    """
    processes, index = jax.process_count(), jax.process_index()
    blocks = -(-len(chosen) // BLOCK)
    each = BLOCK * len(part(blocks, processes, 0))
    # A process that has none of the blocks visits one particle, which is not kept.
    rows = np.arange(len(chosen))[each * index : each * (index + 1)]
    rows = rows if len(rows) else np.zeros(1, int)
    done = 0

    def tell(count: int) -> None:
        """Tell of all processes what has been done in this one."""
        nonlocal done
        before, done = done, done + count
        if stage is not None:
            whole = len(chosen)
            stage.advance(done * whole // len(rows) - before * whole // len(rows))

    # Cut on the host: JAX would compile a program for each size.
    own = jax.tree.map(lambda leaf: np.asarray(leaf)[rows], own)
    here = (particles, chosen[rows], own)
    found = _visit_here(function, common, *here, batch_size, tell)
    if processes == 1:
        return found
    found = jax.tree.map(lambda leaf: np.resize(leaf, (each, *leaf.shape[1:])), found)
    return jax.tree.map(lambda leaf: leaf[: len(chosen)], gather(found))


def _visit_here(
    function: Block,
    common: PyTree,
    particles: Particles,
    chosen: Int[np.ndarray, " chosen"],
    own: PyTree,
    batch_size: int,
    tell: Callable[[int], None],
) -> Any:
    """Visit particles on the devices of this process; see `visit`."""
    devices = jax.local_devices()
    mesh = jax.make_mesh((len(devices),), ("particles",), devices=devices)
    everywhere, apart = (
        NamedSharding(mesh, PartitionSpec(*axes)) for axes in ((), ("particles",))
    )
    arrays, static = eqx.partition((function, common), eqx.is_array)
    shared = eqx.combine(jax.device_put(arrays, everywhere), static)
    size = whole_batch(min(batch_size, len(chosen)), mesh.size)
    # Devices take turns with the blocks, so that all have some of a last, short batch.
    order = np.arange(size).reshape(-1, mesh.size, BLOCK).swapaxes(0, 1).ravel()
    back = np.argsort(order)

    results, latest = [], []

    def finish(values: Any, count: int) -> None:
        """Wait for a batch, and bring its particles into their order."""
        ordered = jax.tree.map(lambda leaf: np.asarray(leaf)[back][:count], values)
        results.append(ordered)
        tell(count)

    for places, count in batches(np.arange(len(chosen)), size):
        exists = np.arange(size) < count
        rows = chosen[places]
        # Those that only fill up the batch are not read again.
        repeated = order % count
        images, ctf = jax.tree.map(
            lambda leaf, at=repeated: np.asarray(leaf)[at],
            particles.batch(rows[:count]),
        )
        group = np.asarray(particles.group_of(rows), np.int32)
        of_batch = jax.tree.map(lambda leaf, at=places[order]: leaf[at], own)
        batch = (images, ctf, group[order], exists[order], of_batch)
        batch = jax.device_put(batch, apart)
        # A batch is read while the one before is computed, and no more are waiting.
        if latest:
            finish(*latest.pop())
        latest.append((visit_blocks(mesh, shared, batch), count))
    finish(*latest.pop())
    return jax.tree.map(lambda *leaves: np.concatenate(leaves), *results)


@eqx.filter_jit
def visit_blocks(
    mesh: Mesh,
    shared: tuple[Block, PyTree],
    batch: tuple[Images, CTF | None, Int[Array, "p"], Bool[Array, "p"], PyTree],
) -> PyTree:
    """Visit blocks, every device its own, one after the other; see `visit`.

    Blocks that only fill up the batch are not visited.
    """
    arrays, static = eqx.partition(shared, eqx.is_array)

    # Compiled on its own, it is traced once for its shapes and its results.
    @jax.jit
    def visit_block(arrays, batch, index):
        function, common = eqx.combine(arrays, static)
        own = jax.tree.map(
            lambda leaf: jax.lax.dynamic_slice_in_dim(leaf, index * BLOCK, BLOCK), batch
        )
        return function(common, *own)

    def on_device(arrays, batch):
        def add(index, results):
            def put(leaf, values):
                return jax.lax.dynamic_update_slice_in_dim(
                    leaf, values, index * BLOCK, 0
                )

            return jax.tree.map(put, results, visit_block(arrays, batch, index))

        exists = batch[3]
        first = jnp.zeros((), jnp.int32)
        shapes = visit_block.eval_shape(arrays, batch, first)
        empty = jax.tree.map(
            lambda leaf: jnp.zeros((len(exists), *leaf.shape[1:]), leaf.dtype), shapes
        )
        rounds = (jnp.sum(exists, dtype=jnp.int32) + BLOCK - 1) // BLOCK
        return jax.lax.fori_loop(first, rounds, add, empty)

    return jax.shard_map(
        on_device,
        mesh=mesh,
        in_specs=(PartitionSpec(), PartitionSpec("particles")),
        out_specs=PartitionSpec("particles"),
        check_vma=False,
    )(arrays, batch)


class Comparison(eqx.Module):
    """The block function that compares each image with a map at one candidate.

    Parameters
    ----------
    compare
        ``compare(reference, observation, *candidate)``, a function of one candidate: a
        function, or a pytree that can be called.
    """

    compare: Callable[..., PyTree]

    def __call__(
        self,
        common: tuple[Spectrum, View],
        images: Images,
        ctf: CTF | None,
        group: Int[Array, "p"],
        exists: Bool[Array, "p"],
        candidates: tuple[PyTree, ...],
    ) -> PyTree:
        """Compare the candidates of a block, one for each of ``p`` images."""
        del exists
        reference, view = common

        def compare_one(seen, candidate):
            return self.compare(reference, view.observation(*seen), *candidate)

        return jax.vmap(compare_one)(view.seen(images, ctf, group), candidates)
