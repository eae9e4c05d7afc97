"""Opening files so that a user gets a sentence, and never half a file."""

import os
import re
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
    """Return the path of a file that exists.

    Raises
    ------
    InputError
        If nothing is there, or something other than a file, or if the system refuses
        to look.
    """
    path = Path(path)
    try:
        is_folder, is_file = path.is_dir(), path.is_file()
    except OSError as error:
        raise InputError(f"Cannot read {path}: {error.strerror or error}.") from error
    if is_folder:
        raise InputError(f"{path} is a folder; a file is wanted.")
    if not is_file:
        raise InputError(f"{path} does not exist.")
    return path


@contextmanager
def writing(path: str | Path) -> Iterator[None]:
    """Turn the system's refusal to write into a sentence.

    Raises
    ------
    InputError
        If the system refuses: no such folder, no permission, a full disk.
    """
    try:
        yield
    except OSError as error:
        raise InputError(f"Cannot write {path}: {error.strerror or error}.") from error


@contextmanager
def atomic_path(path: str | Path, previous: str | Path | None = None) -> Iterator[Path]:
    """Give a temporary path in the same folder, which replaces `path` at the end.

    When the body raises, the temporary file is removed and whatever was at `path`
    stays as it was; else that is kept at `previous`, in the same folder, if one is
    given. The new file has reached the disk before the old one is touched. A process
    that is killed may leave a temporary file, one of :func:`leftovers`.

    Raises
    ------
    InputError
        If the system refuses: no such folder, no permission, a full disk.
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
    """Give a file the room on the disk that it says it has, on systems that can.

    A full disk is an ``OSError`` here. When a file with holes is filled in through a
    memory map, it is a signal that ends the process.
    """
    if hasattr(os, "posix_fallocate"):
        with open(path, "rb+") as file:
            os.posix_fallocate(file.fileno(), 0, os.fstat(file.fileno()).st_size)


def check_writable(path: Path) -> None:
    """Try whether a file can be written, and leave nothing behind.

    Raises
    ------
    InputError
        If it cannot, or something other than a file is there.
    """
    _refuse_special(path)
    with writing(path), tempfile.TemporaryFile(dir=path.parent):
        pass


def _refuse_special(path: Path) -> None:
    if os.path.exists(path) and not os.path.isfile(path):
        kind = "a folder" if os.path.isdir(path) else "not a regular file"
        raise InputError(f"Cannot write {path}: it is {kind}.")


@final
class Lock:
    """A folder that no other process holds, for as long as this object lives."""

    def __init__(self, descriptor: int | None):
        if descriptor is not None:
            weakref.finalize(self, os.close, descriptor)


# What this process holds, by device and inode: a process does not stand in its own way.
_held: weakref.WeakValueDictionary[tuple[int, int], Lock] = (
    weakref.WeakValueDictionary()
)


def lock(folder: Path) -> Lock:
    """Hold a folder for this process, where the file system can do so.

    Network file systems often cannot, since a folder cannot be opened for writing.

    Raises
    ------
    InputError
        If another process holds it.
    """
    status = os.stat(folder)
    key = (status.st_dev, status.st_ino)
    found = _held.get(key)
    if found is None:
        found = _held[key] = _locked(folder)
    return found


def _locked(folder: Path) -> Lock:
    try:
        import fcntl
    except ImportError:  # Windows
        return Lock(None)
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(descriptor)
        raise InputError(f"Another process is writing to {folder}.") from error
    except OSError:  # not on this file system
        pass
    return Lock(descriptor)


def leftovers(folder: Path) -> list[Path]:
    """Return the temporary files of :func:`atomic_path` in a folder, if it is one."""
    inside = folder.iterdir() if folder.is_dir() else ()
    return [path for path in inside if _TEMPORARY.fullmatch(path.name)]


def _flush_names(folder: Path) -> None:
    """Bring a folder's list of files to the disk, on systems that can be asked to."""
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
