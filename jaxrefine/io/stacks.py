"""Images that a table names, ``000001@stack.mrcs``, read when they are asked for."""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import final

import numpy as np
from jaxtyping import Float32, Int

from jaxrefine.errors import InputError
from jaxrefine.io.mrc import map_stack
from jaxrefine.io.star import quoted

_FORMATS = (":mrcs", ":mrc")  # suffixes by which RELION may tell a stack's format
_OPEN_FILES = 16  # far below the usual limit of 1024 for a process
_DIGITS = 18  # Any number of so many digits fits in a 64-bit integer.


@final
@dataclass(frozen=True)
class StackImages:
    """Images in any number of stacks, of which at most 16 are open at once.

    Attributes
    ----------
    paths
        The stacks.
    file, index
        For each image, the index of its stack in `paths` and its index in the stack,
        both from 0.
    image_size
        Side of the images, in pixels.
    pixel_size_in_angstroms
        From the first stack's header: None if it is unset, NaN if it is not one
        positive number.
    """

    paths: tuple[Path, ...]
    file: Int[np.ndarray, " particles"] = field(repr=False)
    index: Int[np.ndarray, " particles"] = field(repr=False)
    image_size: int
    pixel_size_in_angstroms: float | None
    _map: Callable[[Path], tuple[np.ndarray, float | None]] = field(
        init=False,
        repr=False,
        default_factory=lambda: lru_cache(_OPEN_FILES)(map_stack),
    )

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
        InputError
            If an image is constant, or holds a value that is not finite.
        """
        indices = np.asarray(indices)
        images = np.empty((len(indices), *self.shape[1:]), np.float32)
        file, index = self.file[indices], self.index[indices]
        for number in np.unique(file):
            rows = np.flatnonzero(file == number)
            rows = rows[np.argsort(index[rows])]
            stack, _ = self._map(self.paths[number])
            with np.errstate(over="ignore", invalid="ignore"):
                images[rows] = stack[index[rows]]
        lowest, highest = images.min(axis=(1, 2)), images.max(axis=(1, 2))
        good = np.isfinite(lowest) & np.isfinite(highest) & (lowest < highest)
        if not good.all():
            bad = int(np.argmin(good))
            name = f"{index[bad] + 1:06d}@{self.paths[file[bad]]}"
            if lowest[bad] == highest[bad] and np.isfinite(lowest[bad]):
                raise InputError(
                    f"the image {name} must not be constant, got {lowest[bad]:g} "
                    "everywhere"
                )
            raise InputError(
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
    pairs = [split_name(name, table) for name in names]
    order = {stack: i for i, stack in enumerate(dict.fromkeys(s for _, s in pairs))}
    file = np.array([order[stack] for _, stack in pairs])
    index = np.array([number - 1 for number, _ in pairs])
    highest = np.zeros(len(order), np.int64)
    np.maximum.at(highest, file, index)
    unnumbered = {
        stack for name, (_, stack) in zip(names, pairs, strict=True) if "@" not in name
    }
    folders = search_folders(table, datadir)
    paths, size, pixel_size = {}, 0, None
    for stack, position in order.items():
        path = locate(stack, folders)
        if path is None and os.path.isabs(stack):
            raise InputError(
                f"{table} names {stack}, which does not exist; other folders are "
                "searched only for stacks with a relative path"
            )
        if path is None:
            further = "" if datadir is None else f", nor in {datadir}"
            raise InputError(
                f"{table} names {stack}, which is neither in {table.parent}, nor in "
                f"a folder above, nor in the working directory{further}"
            )
        paths[stack] = path
        images, stack_pixel_size = map_stack(path)
        if stack in unnumbered and len(images) > 1:
            raise InputError(
                f"{table} names {stack} without the number of an image, so it must "
                f"hold one image, got {len(images)} sections"
            )
        if highest[position] >= len(images):
            raise InputError(
                f"{table} names image {highest[position] + 1} of {path}, which has "
                f"only {len(images)}"
            )
        if position == 0:
            size, pixel_size = images.shape[1], stack_pixel_size
        elif images.shape[1] != size:
            raise InputError(
                f"{table}: all images must have the same size, got "
                f"{images.shape[1]} pixels ({path}) and {size} "
                f"({paths[pairs[0][1]]})"
            )
    files = tuple(paths[stack] for stack in order)
    return StackImages(files, file, index, size, pixel_size), paths


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
