"""The state of a run on disk: a line of JSON, then the arrays of a pytree."""

import json
from pathlib import Path
from typing import Any

import equinox as eqx
from jaxtyping import PyTree

from jaxrefine.errors import InputError
from jaxrefine.io._atomic import atomic_path, existing_file

_FORMAT = "jaxrefine checkpoint 1"


def save_checkpoint(path: str | Path, tree: PyTree, metadata: dict[str, Any]) -> None:
    """Write the leaves of a pytree.

    Arrays and Python numbers are stored; other leaves are not, and come from `like`
    when the file is loaded. The file appears complete or not at all.

    Parameters
    ----------
    path
        The file.
    tree
        What to store.
    metadata
        Anything that JSON can hold: the iteration, the configuration.

    Raises
    ------
    InputError
        If the file cannot be written.
    """
    header = json.dumps({"format": _FORMAT, "metadata": metadata})
    with atomic_path(path) as temporary, open(temporary, "wb") as file:
        file.write(header.encode() + b"\n")
        eqx.tree_serialise_leaves(file, tree)


def load_checkpoint(path: str | Path, like: PyTree) -> tuple[PyTree, dict[str, Any]]:
    """Read what `save_checkpoint` wrote.

    Parameters
    ----------
    path
        The file.
    like
        A pytree of the structure, shapes and types that were saved; its arrays may be
        ``jax.ShapeDtypeStruct``.

    Returns
    -------
    tree
        `like` with its arrays and numbers replaced by the stored ones.
    metadata
        The dictionary that was saved.

    Raises
    ------
    InputError
        If the file is missing, is not a checkpoint, is truncated, or holds other
        shapes or types than `like`.
    """
    path = existing_file(path)
    with open(path, "rb") as file:
        try:
            header = json.loads(file.readline())
        except ValueError:
            header = None
        if not isinstance(header, dict) or header.get("format") != _FORMAT:
            raise InputError(f"{path} is not a jaxrefine checkpoint.")
        try:
            tree = eqx.tree_deserialise_leaves(file, like)
        except (RuntimeError, ValueError, TypeError, EOFError, OSError) as error:
            raise InputError(
                f"{path} is truncated, or was saved by a run of another shape or type."
            ) from error
        if file.read(1):
            raise InputError(f"{path} holds more arrays than this run has.")
    return tree, header["metadata"]
