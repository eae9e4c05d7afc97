"""Files that a command writes: whether it can is known before its work begins."""

from pathlib import Path

from jaxrefine import io
from jaxrefine.errors import InputError


def check_can_be_written(path: Path) -> None:
    """Refuse a file that cannot be made.

    Raises
    ------
    InputError
        If its folder does not exist or takes no files, or what has this name is not a
        regular file.
    """
    if not path.parent.is_dir():
        raise InputError(f"cannot write {path}: {path.parent} is not a folder")
    io.check_writable(path)


def check_is_no_input(path: Path, *inputs: Path) -> None:
    """Refuse to write over an input.

    Raises
    ------
    InputError
        If the file to write is one of the inputs.
    """
    for each in inputs:
        if path.exists() and each.exists() and path.samefile(each):
            raise InputError(f"cannot write {path}: it is an input")
