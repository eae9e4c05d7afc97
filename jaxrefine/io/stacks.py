"""Images that a table names, ``000001@stack.mrcs``, read when they are asked for."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import final

import numpy as np
from jaxtyping import Float32, Int

from jaxrefine.errors import InputError, UnusableImage
from jaxrefine.io.atomic import broken_link
from jaxrefine.io.mrc import Stack, open_stack
from jaxrefine.io.star import quoted

_FORMATS = (":mrcs", ":mrc")  # suffixes by which RELION may tell a stack's format
_DIGITS = 18  # Any number of so many digits fits in a 64-bit integer.


@final
@dataclass(frozen=True)
class StackImages:
    """Images in any number of stacks, of which one at a time is open.

    Attributes
    ----------
    stacks
        The stacks.
    file, index
        For each image, the index of its stack in `stacks` and its index in the stack,
        both from 0.
    """

    stacks: tuple[Stack, ...] = field(repr=False)
    file: Int[np.ndarray, " particles"] = field(repr=False)
    index: Int[np.ndarray, " particles"] = field(repr=False)

    @property
    def image_size(self) -> int:
        """Side of the images, in pixels."""
        return self.stacks[0].shape[1]

    @property
    def pixel_size_in_angstroms(self) -> float | None:
        """From the first stack's header, see `mrc.Stack`."""
        return self.stacks[0].pixel_size_in_angstroms

    @property
    def shape(self) -> tuple[int, int, int]:
        """Number of images, rows and columns."""
        return (len(self.file), self.image_size, self.image_size)

    def __getitem__(
        self, indices: Int[np.ndarray, " chosen"]
    ) -> Float32[np.ndarray, "chosen m m"]:
        """Read the images at an array of indices, as float32 ``(len(indices), m, m)``.

        Raises
        ------
        UnusableImage
            If an image is constant, or holds a value that is not finite.
        InputError
            If a stack cannot be read or has become shorter.
        """
        indices = np.asarray(indices)
        images = np.empty((len(indices), *self.shape[1:]), np.float32)
        file, index = self.file[indices], self.index[indices]
        for number in np.unique(file):
            rows = np.flatnonzero(file == number)
            rows = rows[np.argsort(index[rows])]
            with np.errstate(over="ignore", invalid="ignore"):
                images[rows] = self.stacks[number][index[rows]]
        lowest, highest = images.min(axis=(1, 2)), images.max(axis=(1, 2))
        good = np.isfinite(lowest) & np.isfinite(highest) & (lowest < highest)
        if not good.all():
            bad = int(np.argmin(good))
            name = f"{index[bad] + 1:06d}@{self.stacks[file[bad]].path}"
            if lowest[bad] == highest[bad] and np.isfinite(lowest[bad]):
                raise UnusableImage(
                    f"the image {name} must not be constant, got {lowest[bad]:g} "
                    "everywhere"
                )
            raise UnusableImage(
                f"the image {name} must be finite, got a value that is not"
            )
        return images


def open_images(
    names: Sequence[str], table: Path, datadir: str | Path | None = None
) -> tuple[StackImages, dict[str, Path]]:
    """Find the stacks of the images that a table names, and check their headers.

    Parameters
    ----------
    names
        ``000001@stack.mrcs``, counted from 1, or ``image.mrc`` alone.
    table, datadir
        The table and an optional folder; stacks are looked for in the folders that
        `search_folders` returns for them.

    Returns
    -------
    images
        The images, which are not read yet.
    paths
        The path of each stack, by its name in the table.

    Raises
    ------
    InputError
        If a stack is missing, damaged or has fewer images than the table names, if an
        image without a number is a stack or a volume, or if the images differ in size.
    """
    order: dict[str, int] = {}
    unnumbered = set()
    file, index = np.empty((2, len(names)), np.int64)
    for row, name in enumerate(names):
        number, stack = split_name(name, table)
        file[row], index[row] = order.setdefault(stack, len(order)), number - 1
        if "@" not in name:
            unnumbered.add(stack)
    highest = np.zeros(len(order), np.int64)
    np.maximum.at(highest, file, index)
    folders = search_folders(table, datadir)
    stacks: dict[str, Stack] = {}
    for stack, position in order.items():
        path = locate(stack, folders)
        if path is None:
            reason = _obstacle(stack, folders) or _absence(stack, table, datadir)
            raise InputError(f"{table} names {stack}, which {reason}")
        stacks[stack] = opened = open_stack(path)
        if stack in unnumbered and len(opened) > 1:
            raise InputError(
                f"{table} names {stack} without the number of an image, so it must "
                f"hold one image, got {len(opened)} sections"
            )
        if highest[position] >= len(opened):
            raise InputError(
                f"{table} names image {highest[position] + 1} of {path}, which has "
                f"only {len(opened)}"
            )
        first = next(iter(stacks.values()))
        if opened.shape[1] != first.shape[1]:
            raise InputError(
                f"{table}: all images must have the same size, got "
                f"{opened.shape[1]} pixels ({path}) and {first.shape[1]} "
                f"({first.path})"
            )
    images = StackImages(tuple(stacks.values()), file, index)
    return images, {stack: opened.path for stack, opened in stacks.items()}


def split_name(name: str, table: str | Path) -> tuple[int, str]:
    """Split an image's name into its number, from 1, and its stack.

    RELION's suffix for the format of a stack, ``:mrcs``, is removed.

    Parameters
    ----------
    name
        ``000001@stack.mrcs``, or ``image.mrc`` alone, which is number 1.
    table
        The table that has the name, for the error message.

    Raises
    ------
    InputError
        If the name has neither form.
    """
    number, at, stack = name.partition("@")
    if not at:
        number, stack = "1", name
    for suffix in _FORMATS:
        stack = stack.removesuffix(suffix)
    is_number = number.isascii() and number.isdigit() and len(number) <= _DIGITS
    if not (is_number and int(number) >= 1 and stack):
        raise InputError(
            f"{table}: an image's name must be a number from 1, @ and a stack, got "
            f"{name!r}"
        )
    return int(number), stack


def search_folders(table: Path, datadir: str | Path | None = None) -> list[Path]:
    """Return the folders in which the stacks of a table are looked for, in order.

    These are `datadir`, the table's folder, the working directory, and the folders
    above the table's, because RELION and cryoSPARC name a stack by its path from the
    project's folder.

    Raises
    ------
    InputError
        If `datadir` is not a folder.
    """
    first = [] if datadir is None else [Path(datadir)]
    for folder in first:
        if not os.path.isdir(folder):
            raise InputError(f"datadir must be a folder, got {folder}")
    return [*first, table.parent, Path(), *folders_above(table)]


def folders_above(table: Path) -> Sequence[Path]:
    """Return the folders above a table's own, nearest first."""
    return Path(os.path.abspath(table)).parents[1:]


def locate(stack: str, folders: Sequence[Path]) -> Path | None:
    """Return the path of a stack in the first folder that has it; None if none does."""
    for folder in folders:
        path = folder / stack
        # Unlike Path.is_file, this is False for a name that is too long.
        if os.path.isfile(path):
            # The system resolves ".." after a symbolic link from the link's target.
            has_parent = ".." in path.parts
            resolved = Path(os.path.realpath(path.parent)) / path.name
            return resolved if has_parent else path
    return None


def _obstacle(stack: str, folders: Sequence[Path]) -> str | None:
    """Return why a stack that is there cannot be used; None if it is nowhere."""
    for folder in folders:
        path = folder / stack
        try:
            is_folder = path.stat() and path.is_dir()
        except (FileNotFoundError, NotADirectoryError):
            reason = broken_link(path)
            if reason is not None:
                return f"{reason} ({path})"
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            return f"cannot be read: {reason} ({path})"
        else:
            return f"is {'a folder' if is_folder else 'not a regular file'} ({path})"
    return None


def _absence(stack: str, table: Path, datadir: str | Path | None) -> str:
    """Return what is to be said of a stack that is in none of the folders."""
    if "\\" in stack:
        likely = locate(stack.replace("\\", "/"), search_folders(table, datadir))
        there = f" ({likely} is there)" if likely else ""
        return (
            "has the backslashes of a path of Windows and does not exist here; names "
            f"of folders must be separated by /{there}"
        )
    if os.path.isabs(stack):
        return (
            "does not exist; other folders are searched only for stacks with a "
            "relative path"
        )
    further = "" if datadir is None else f", nor in {datadir}"
    return (
        f"is neither in {table.parent}, nor in a folder above, nor in the working "
        f"directory{further}"
    )


def names_from(
    table: Path, source_table: Path, stacks: Mapping[str, Path]
) -> dict[str, str]:
    """Return the names of the stacks for a table in another folder than `source_table`.

    Parameters
    ----------
    table, source_table
        The table that is written, and the one that was read.
    stacks
        The path of each stack, by its name in the table that was read.

    Returns
    -------
    The new name of each stack, by its old one. Names are kept if all of them lead to
    the same stacks from one folder: that of the new table, the working directory, in
    which RELION would be started, or one above the new table. Otherwise, a
    stack whose path is relative to the old table gets its path relative to the new one,
    and any other its absolute path.

    Raises
    ------
    InputError
        If a STAR file cannot hold a name.
    """
    folders = search_folders(table)
    relocated = {stack: locate(stack, folders) for stack in stacks}
    if all(path and path.samefile(stacks[stack]) for stack, path in relocated.items()):
        for folder in folders:
            if all(_same(folder / stack, path) for stack, path in stacks.items()):
                return {stack: stack for stack in stacks}

    def rename(stack: str, path: Path) -> str:
        if os.path.isabs(stack):
            return stack
        absolute = os.path.abspath(path)
        if _same(source_table.parent / stack, path):
            relative = os.path.relpath(absolute, os.path.abspath(table.parent))
            return relative if _same(table.parent / relative, path) else absolute
        return absolute

    renamed = {stack: rename(stack, path) for stack, path in stacks.items()}
    for name in renamed.values():
        quoted(name, f"cannot write {table}")
    return renamed


def _same(path: Path, other: Path) -> bool:
    both_exist = os.path.exists(path) and os.path.exists(other)
    return both_exist and os.path.samefile(path, other)
