"""Open and write files so that a failure is one clear sentence and no file is partial.

Files are written under a temporary name and then renamed, so that readers see either
the previous file or the complete new one.
"""

import os
import re
import stat
import tempfile
import uuid
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import final

from jaxrefine.errors import InputError

_TEMPORARY = re.compile(r"\..+\.[0-9a-f]{32}\.tmp")


def existing_file(path: str | Path) -> Path:
    """Return the path of an existing file.

    Raises
    ------
    InputError
        If the path does not exist, or is a symbolic link to nothing, is not a regular
        file, or cannot be accessed.
    """
    path = Path(path)
    try:
        mode = path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        raise InputError(f"{path} {broken_link(path) or 'does not exist'}") from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"cannot read {path}: {reason}") from error
    if stat.S_ISDIR(mode):
        raise InputError(f"{path} must be a file, got a folder")
    if not stat.S_ISREG(mode):
        raise InputError(f"{path} must be a regular file, got a pipe or a device")
    return path


def broken_link(path: Path) -> str | None:
    """Return which link of a path leads to nothing, in words that follow its name."""
    for place in (path, *path.parents):
        if place.is_symlink() and not place.exists():
            link = "is" if place == path else f"does not exist: {place} is"
            return f"{link} a symbolic link to {os.readlink(place)}, which is missing"
    return None


@contextmanager
def reading(path: str | Path) -> Iterator[None]:
    """Turn an ``OSError`` of the body into an `InputError` that names the file.

    Raises
    ------
    InputError
        If the body raises ``OSError``: no permission, a disk that does not answer.
    """
    try:
        yield
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}") from error


@contextmanager
def writing(path: str | Path) -> Iterator[None]:
    """Turn an ``OSError`` of the body into an `InputError` that names the file.

    Raises
    ------
    InputError
        If the body raises ``OSError``: no such folder, no permission, a full disk.
    """
    try:
        yield
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror or error}") from error


@contextmanager
def atomic_path(path: str | Path, previous: str | Path | None = None) -> Iterator[Path]:
    """Provide a temporary path in the same folder, which replaces `path` at the end.

    If the body raises, the temporary file is removed and `path` is left unchanged.
    Otherwise the file that is replaced is moved to `previous`, a path in the same
    folder, if that is given. The new file is flushed to disk before the old one is
    touched. A process that is killed may leave a temporary file behind, which
    :func:`leftovers` lists.

    Raises
    ------
    InputError
        If the file cannot be written: no such folder, no permission, a full disk.
    """
    path = Path(path)
    _refuse_special(path)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        with writing(path):
            yield temporary
            with open(temporary, "rb+") as file:
                os.fsync(file.fileno())
            if previous is not None and path.exists():
                os.replace(path, previous)
            os.replace(temporary, path)
            _flush_names(path.parent)
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def reserve(path: Path) -> None:
    """Allocate the disk blocks of a sparse file, on systems that support it.

    A full disk raises ``OSError`` here. Without the allocation, it would end the
    process by a signal when the file is filled in through a memory map.
    """
    if hasattr(os, "posix_fallocate"):
        with open(path, "rb+") as file:
            os.posix_fallocate(file.fileno(), 0, os.fstat(file.fileno()).st_size)


def check_writable(path: Path) -> None:
    """Check that a file can be written, and leave nothing behind.

    Raises
    ------
    InputError
        If it cannot be written, or if the path is not a regular file.
    """
    _refuse_special(path)
    with writing(path), tempfile.TemporaryFile(dir=path.parent):
        pass


def _refuse_special(path: Path) -> None:
    if os.path.exists(path) and not os.path.isfile(path):
        kind = "a folder" if os.path.isdir(path) else "not a regular file"
        raise InputError(f"cannot write {path}: it is {kind}")


@final
class Lock:
    """An exclusive lock on a folder, held for as long as this object lives."""

    def __init__(self, descriptor: int | None):
        if descriptor is not None:
            weakref.finalize(self, os.close, descriptor)


# The locks of this process by device and inode, so that it never waits for itself.
_held: weakref.WeakValueDictionary[tuple[int, int], Lock] = (
    weakref.WeakValueDictionary()
)


def lock(folder: Path) -> Lock:
    """Lock a folder for this process, where the file system supports it.

    Network file systems often do not, because a folder cannot be opened for writing.

    Raises
    ------
    InputError
        If another process has locked the folder.
    """
    status = os.stat(folder)
    key = (status.st_dev, status.st_ino)
    held = _held.get(key)
    if held is None:
        held = _held[key] = _acquire(folder)
    return held


def _acquire(folder: Path) -> Lock:
    try:
        import fcntl
    except ImportError:  # Windows
        return Lock(None)
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(descriptor)
        raise InputError(f"another process is writing to {folder}") from error
    except OSError:  # The file system does not support locks.
        pass
    return Lock(descriptor)


def leftovers(folder: Path) -> list[Path]:
    """Return the temporary files that :func:`atomic_path` left in a folder.

    The list is empty if the folder does not exist.
    """
    paths = folder.iterdir() if folder.is_dir() else ()
    return [path for path in paths if _TEMPORARY.fullmatch(path.name)]


def _flush_names(folder: Path) -> None:
    """Flush a folder's list of files to disk, on systems that support it."""
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
