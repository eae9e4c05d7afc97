"""Files that a command is to write: whether it can is known before its work begins."""

from pathlib import Path

from jaxrefine import io
from jaxrefine.errors import InputError


def check_writable(out: Path) -> None:
    """Refuse a file that cannot be made.

    Raises
    ------
    InputError
        If there is no such folder, it takes no files, or what has this name is no
        regular file.
    """
    if not out.parent.is_dir():
        raise InputError(f"Cannot write {out}: {out.parent} is not a folder.")
    io.check_writable(out)


def check_output(out: Path, *inputs: Path) -> None:
    """Refuse to write over an input.

    Raises
    ------
    InputError
        If the file to write is one of the inputs.
    """
    for path in inputs:
        if out.exists() and path.exists() and out.samefile(path):
            raise InputError(f"Cannot write {out}: it is an input.")
