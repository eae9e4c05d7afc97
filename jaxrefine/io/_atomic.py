"""Opening files so that a user gets a sentence, and never half a file."""

import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from jaxrefine.errors import InputError


def existing_file(path: str | Path) -> Path:
    """Return the path of a file that exists.

    Raises
    ------
    InputError
        If nothing is there, or something other than a file.
    """
    path = Path(path)
    if path.is_dir():
        raise InputError(f"{path} is a folder; a file is wanted.")
    if not path.is_file():
        raise InputError(f"{path} does not exist.")
    return path


@contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """Give a temporary path in the same folder, which replaces `path` at the end.

    When the body raises, the temporary file is removed and whatever was at `path`
    stays as it was.

    Raises
    ------
    InputError
        If the system refuses: no such folder, no permission, a full disk.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    except OSError as error:
        raise InputError(f"Cannot write {path}: {error.strerror or error}.") from error
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
