"""The state of a run on disk: a line of JSON, the arrays of a pytree, a checksum."""

import hashlib
import io
import json
from pathlib import Path
from typing import Any, BinaryIO

import equinox as eqx
from jaxtyping import PyTree

from jaxrefine.errors import InputError
from jaxrefine.io._atomic import atomic_path, existing_file

_NAME = "jaxrefine checkpoint"
_FORMAT = f"{_NAME} 2"
_DIGEST = "sha256"
_DIGEST_SIZE = hashlib.new(_DIGEST).digest_size


class DamagedCheckpoint(InputError):
    """A checkpoint that is not what was once saved, or that cannot be read."""


def save_checkpoint(
    path: str | Path,
    tree: PyTree,
    metadata: dict[str, Any],
    previous: str | Path | None = None,
) -> None:
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
    previous
        Where to keep the file that is replaced, in the same folder; without it, it is
        lost.

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
            # Equinox says where in the tree it was; a full disk is the file's matter.
            reason = error
            while isinstance(reason, RuntimeError):
                reason = reason.__cause__
            raise error if reason is None else reason from None
        file.write(content.digest.digest())


class _Digested:
    """A file that is only written to, and the digest of what was.

    NumPy writes to it by `write`, whose errors have a reason, unlike ``tofile``'s.
    """

    def __init__(self, file: BinaryIO):
        self._file, self.digest = file, hashlib.new(_DIGEST)

    def write(self, content: bytes) -> int:
        self.digest.update(content)
        return self._file.write(content)


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
    DamagedCheckpoint
        If the file cannot be read, is truncated, or was changed since.
    InputError
        If the file is missing, is of another version, or holds another structure,
        shapes or types than `like`.
    """
    path = existing_file(path)
    try:
        content = path.read_bytes()
    except OSError as error:
        reason = error.strerror or error
        raise DamagedCheckpoint(f"{path} cannot be read: {reason}.") from error
    file, whole = io.BytesIO(content), memoryview(content)[:-_DIGEST_SIZE]
    form, metadata = _header(file.readline())
    if form != _FORMAT and form.startswith(_NAME):
        raise InputError(f"{path} was saved by another version of jaxrefine.")
    digest = hashlib.new(_DIGEST, whole).digest()
    if form != _FORMAT or digest != content[-_DIGEST_SIZE:]:
        raise DamagedCheckpoint(f"{path} is not a whole checkpoint of jaxrefine.")
    try:
        tree = eqx.tree_deserialise_leaves(file, like)
    except (RuntimeError, ValueError, TypeError, EOFError, OSError) as error:
        raise InputError(
            f"{path} was saved by a run of another structure, shape or type."
        ) from error
    if file.tell() < len(whole):
        raise InputError(f"{path} holds more arrays than this run has.")
    return tree, metadata


def _header(line: bytes) -> tuple[str, Any]:
    """Return the format and the metadata of the first line; "" and None without."""
    try:
        header = json.loads(line)
    except ValueError:
        header = None
    if not isinstance(header, dict):
        return "", None
    return str(header.get("format")), header.get("metadata")
