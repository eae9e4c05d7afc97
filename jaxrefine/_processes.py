"""Several processes that compute one result, on one machine or on many.

Each of them runs the same program on the same particles, after
``jax.distributed.initialize``. What takes long is shared out among them, and its
results are then brought to all; everything else each of them computes by itself. With
one process, nothing here does anything.
"""

import platform
import zlib
from typing import Any, TypeVar

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import PyTree

from jaxrefine.errors import LostProcess

_T = TypeVar("_T")


def part(count: int, parts: int, index: int) -> range:
    """Return which of ``count`` things belong to one of several equal parts.

    The last parts are shorter, or empty, if the things cannot be shared out equally.
    """
    size = -(-count // parts)
    return range(count)[size * index : size * (index + 1)]


def gather(tree: PyTree) -> Any:
    """Join the arrays of all processes along their first axis, in the processes' order.

    Parameters
    ----------
    tree
        A pytree of arrays, of the same shapes in every process.

    Returns
    -------
    The joined arrays, in NumPy arrays.

    Raises
    ------
    LostProcess
        If another process has ended.
    """
    tree = jax.tree.map(np.asarray, tree)
    count = jax.process_count()
    if count == 1:
        return tree
    # One device of each process takes part, so that nothing is copied to the others.
    firsts = [
        next(device for device in jax.devices() if device.process_index == index)
        for index in range(count)
    ]
    mesh = Mesh(np.array(firsts), ("processes",))
    apart, everywhere = (
        NamedSharding(mesh, spec)
        for spec in (PartitionSpec("processes"), PartitionSpec())
    )

    def joined(leaf: np.ndarray) -> np.ndarray:
        whole = jax.make_array_from_process_local_data(
            apart, leaf, (count * leaf.shape[0], *leaf.shape[1:])
        )
        return np.asarray(_copied(whole, everywhere).addressable_data(0))

    try:
        return jax.tree.map(joined, tree)
    except jax.errors.JaxRuntimeError as error:
        raise LostProcess(
            "another process has ended, or cannot be reached any more"
        ) from error


def of_first(tree: _T) -> _T:
    """Return what the first process has, bit for bit.

    Parameters
    ----------
    tree
        A pytree of arrays, of the same shapes and types in every process.

    Raises
    ------
    LostProcess
        If another process has ended.
    """
    if jax.process_count() == 1:
        return tree
    leaves, structure = jax.tree.flatten(tree)
    first = [gather(np.asarray(leaf)[None])[0] for leaf in leaves]
    return jax.tree.unflatten(structure, map(jax.numpy.asarray, first))


def text_of_first(text: str) -> str:
    """Return the text that the first process has."""
    if jax.process_count() == 1:
        return text
    content = np.frombuffer(text.encode(), np.uint8)
    size = int(of_first(np.asarray(len(content), np.int32)))
    padded = np.zeros(size, np.uint8)
    padded[: len(content)] = content[:size]
    return np.asarray(of_first(padded)).tobytes().decode()


def on_this_machine() -> int:
    """Return how many of the processes are on the machine of this one."""
    name = np.array([zlib.crc32(platform.node().encode())], np.uint32)
    return int(np.sum(gather(name) == name))


def _copied(whole: jax.Array, sharding: NamedSharding) -> jax.Array:
    """Return a copy of an array on other devices, of other processes, too."""
    return jax.jit(_same, out_shardings=sharding)(whole)


def _same(leaf: jax.Array) -> jax.Array:
    return leaf
