"""Checkpoints of a run: a line of JSON, the arrays of a pytree, and a checksum."""

import hashlib
import io
import json
from pathlib import Path
from typing import Any, BinaryIO

import equinox as eqx
from jaxtyping import PyTree

from jaxrefine.errors import InputError
from jaxrefine.io.atomic import atomic_path, existing_file

_NAME = "jaxrefine checkpoint"
_FORMAT = f"{_NAME} 3"
_DIGEST = "sha256"
_DIGEST_SIZE = hashlib.new(_DIGEST).digest_size


class DamagedCheckpoint(InputError):
    """Raised when a checkpoint cannot be read, is truncated, or was changed."""


class OtherCheckpoint(DamagedCheckpoint):
    """Raised when a checkpoint seems to be another version's, or else is damaged."""


def save_checkpoint(
    path: str | Path,
    tree: PyTree,
    metadata: dict[str, Any],
    previous: str | Path | None = None,
) -> None:
    """Write the leaves of a pytree.

    Arrays and Python numbers are stored. Other leaves are not; they are taken from
    `like` when the file is loaded. The file appears complete or not at all.

    Parameters
    ----------
    path
        The file.
    tree
        The pytree to store.
    metadata
        Any content that JSON can hold, such as the iteration and the configuration.
    previous
        Path in the same folder to which the replaced file is moved. Without it, the
        replaced file is lost.

    Raises
    ------
    InputError
        If the file cannot be written.
    """
    header = json.dumps({"format": _FORMAT, "metadata": metadata})
    with atomic_path(path, previous) as temporary, open(temporary, "wb") as file:
        content = _Digested(file)
        content.write(header.encode() + b"\n")
        try:
            eqx.tree_serialise_leaves(content, tree)
        except RuntimeError as error:
            # Equinox wraps the OSError of a full disk once for each level of the tree;
            # `atomic_path` has to see the OSError itself.
            cause = error
            while isinstance(cause, RuntimeError):
                cause = cause.__cause__
            raise error if cause is None else cause from None
        file.write(content.digest.digest())


class _Digested:
    """A write-only file that computes the digest of its content.

    It is not a real file, so NumPy calls `write` instead of ``ndarray.tofile``, whose
    errors do not tell the reason.
    """

    def __init__(self, file: BinaryIO):
        self._file, self.digest = file, hashlib.new(_DIGEST)

    def write(self, content: bytes) -> int:
        self.digest.update(content)
        return self._file.write(content)


def load_checkpoint(path: str | Path, like: PyTree) -> tuple[PyTree, dict[str, Any]]:
    """Read a file that `save_checkpoint` wrote.

    Parameters
    ----------
    path
        The file.
    like
        A pytree with the structure, shapes and types of the saved one; its arrays may
        be ``jax.ShapeDtypeStruct``.

    Returns
    -------
    tree
        `like` with its arrays and numbers replaced by the stored ones.
    metadata
        The dictionary that was saved.

    Raises
    ------
    DamagedCheckpoint
        If the file cannot be read, is truncated, or was changed after it was saved; an
        `OtherCheckpoint` if it may be whole, for another version of jaxrefine.
    InputError
        If the file is missing, was saved by another version of jaxrefine, or differs
        from `like` in structure, shapes or types.
    """
    path = existing_file(path)
    try:
        content = path.read_bytes()
    except OSError as error:
        reason = error.strerror or error
        raise DamagedCheckpoint(f"{path} cannot be read: {reason}") from error
    file, payload = io.BytesIO(content), memoryview(content)[:-_DIGEST_SIZE]
    form, metadata = _header(file.readline())
    digest = hashlib.new(_DIGEST, payload).digest()
    is_whole = digest == content[-_DIGEST_SIZE:]
    if form != _FORMAT and form.startswith(_NAME):
        said = f"{path} was saved by another version of jaxrefine"
        if is_whole:
            raise InputError(said)
        raise OtherCheckpoint(f"{said}, or is damaged")
    if not is_whole or form != _FORMAT:
        raise DamagedCheckpoint(f"{path} is not a complete checkpoint of jaxrefine")
    try:
        tree = eqx.tree_deserialise_leaves(file, like)
    except (RuntimeError, ValueError, TypeError, EOFError, OSError) as error:
        raise InputError(
            f"{path} was saved by a run whose arrays have another structure, shape or "
            "type"
        ) from error
    if file.tell() < len(payload):
        raise InputError(f"{path} holds more arrays than this run has")
    return tree, metadata


def _header(line: bytes) -> tuple[str, Any]:
    """Return the format and metadata in the first line; "" and None if it has none."""
    try:
        header = json.loads(line)
    except ValueError:
        header = None
    if not isinstance(header, dict):
        return "", None
    return str(header.get("format")), header.get("metadata")
