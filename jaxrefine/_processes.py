"""Several processes that compute one result, on one machine or on many.

Each of them runs the same program on the same particles, after
``jax.distributed.initialize``. What takes long is shared out among them, and its
results are then brought to all; everything else each of them computes by itself. With
one process, nothing here does anything.
"""

import json
import platform
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import PyTree

from jaxrefine._arrays import on_device
from jaxrefine.errors import InputError, LostProcess

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
    apart, everywhere = _shardings()

    def joined(leaf: np.ndarray) -> np.ndarray:
        whole = jax.make_array_from_process_local_data(
            apart, leaf, (count * leaf.shape[0], *leaf.shape[1:])
        )
        copy = jax.jit(_same, out_shardings=everywhere)(whole)
        return np.asarray(copy.addressable_data(0))

    with _losses():
        return jax.tree.map(joined, tree)


def of_process(tree: _T, source: int) -> _T:
    """Return what one of the processes has, bit for bit.

    Parameters
    ----------
    tree
        A pytree of arrays, of the same shapes and types in every process.
    source
        The number of the process.

    Raises
    ------
    LostProcess
        If another process has ended.
    """
    count = jax.process_count()
    if count == 1:
        return tree
    apart, everywhere = _shardings()

    def sent(leaf: Any) -> jax.Array:
        values = np.ascontiguousarray(leaf)
        # Whole numbers, whose sum with zeros keeps every bit.
        bits = values.view(f"u{values.dtype.itemsize}").reshape(1, *values.shape)
        if jax.process_index() != source:
            bits = np.zeros_like(bits)
        each = jax.make_array_from_process_local_data(
            apart, bits, (count, *values.shape)
        )
        total = jax.jit(_total, out_shardings=everywhere)(each)
        found = np.asarray(total.addressable_data(0)).view(values.dtype)
        return on_device(found.reshape(np.shape(leaf)))

    with _losses():
        return jax.tree.map(sent, tree)


def of_first(tree: _T) -> _T:
    """Return what the first process has, bit for bit; see `of_process`."""
    return of_process(tree, 0)


def wait_for_first() -> None:
    """Wait until the first process calls this function, too."""
    of_first(np.zeros((), bool))


def text_of_first(text: str) -> str:
    """Return the text that the first process has."""
    if jax.process_count() == 1:
        return text
    content = np.frombuffer(text.encode(), np.uint8)
    size = int(of_first(np.asarray(len(content), np.int32)))
    padded = np.zeros(size, np.uint8)
    padded[: len(content)] = content[:size]
    return np.asarray(of_first(padded)).tobytes().decode()


def check_same(settings: dict[str, Any]) -> None:
    """Check that all processes do the same.

    Parameters
    ----------
    settings
        All that the results depend on, as JSON can hold it.

    Raises
    ------
    InputError
        If settings of this process differ from those of the first one.
    """
    own = json.loads(json.dumps(settings))
    first = json.loads(text_of_first(json.dumps(settings)))
    changed = [
        name for name in sorted(own.keys() | first) if own.get(name) != first.get(name)
    ]
    if changed:
        raise InputError(
            f"process {jax.process_index()} must have the options, files and versions "
            f"of process 0, got others ({', '.join(changed)})"
        )


def on_this_machine() -> int:
    """Return how many of the processes are on the machine of this one."""
    name = np.array([zlib.crc32(platform.node().encode())], np.uint32)
    return int(np.sum(gather(name) == name))


def _shardings() -> tuple[NamedSharding, NamedSharding]:
    """Return how an array is shared out among processes, and how all have all of it.

    One device of each process takes part, so that nothing is copied to the others.
    """
    firsts = [
        next(device for device in jax.devices() if device.process_index == index)
        for index in range(jax.process_count())
    ]
    mesh = Mesh(np.array(firsts), ("processes",))
    return (
        NamedSharding(mesh, PartitionSpec("processes")),
        NamedSharding(mesh, PartitionSpec()),
    )


@contextmanager
def _losses() -> Iterator[None]:
    """Turn what the loss of another process raises into `LostProcess`."""
    try:
        yield
    except (jax.errors.JaxRuntimeError, ValueError) as error:
        if "RESOURCE_EXHAUSTED" in str(error):
            raise
        raise LostProcess(
            "another process has ended, or cannot be reached any more"
        ) from error


def _same(leaf: jax.Array) -> jax.Array:
    return leaf


def _total(each: jax.Array) -> jax.Array:
    return jnp.sum(each, axis=0, dtype=each.dtype)
