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

_FORMATS = (":mrcs", ":mrc")  # by which RELION may tell how a stack is to be read
_OPEN_FILES = 16
_DIGITS = 18  # of a number that a 64-bit integer holds


@final
@dataclass(frozen=True)
class StackImages:
    """Images in any number of stacks, of which at most 16 are open at once.

    Attributes
    ----------
    paths
        The stacks.
    file, index
        Of each image, its stack's place in `paths` and its own in the stack, from 0.
    image_size
        Side of the images, in pixels.
    pixel_size_in_angstroms
        What the first stack's header says; None if it is unset.
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
        """Numbers of images, rows and columns."""
        return (len(self.file), self.image_size, self.image_size)

    def __getitem__(
        self, indices: Int[np.ndarray, " chosen"]
    ) -> Float32[np.ndarray, "chosen m m"]:
        """Read the images of an array of indices.

        Raises
        ------
        InputError
            If an image is constant, or holds a value that is not finite.
        """
        indices = np.asarray(indices)
        images = np.empty((len(indices), *self.shape[1:]), np.float32)
        file, index = self.file[indices], self.index[indices]
        for each in np.unique(file):
            rows = np.flatnonzero(file == each)
            rows = rows[np.argsort(index[rows])]
            stack, _ = self._map(self.paths[each])
            with np.errstate(over="ignore", invalid="ignore"):
                images[rows] = stack[index[rows]]
        least, most = images.min(axis=(1, 2)), images.max(axis=(1, 2))
        good = np.isfinite(least) & np.isfinite(most) & (least < most)
        if not good.all():
            bad = int(np.argmin(good))
            name = f"{index[bad] + 1:06d}@{self.paths[file[bad]]}"
            if least[bad] == most[bad] and np.isfinite(least[bad]):
                raise InputError(f"The image {name} is {least[bad]:g} everywhere.")
            raise InputError(f"The image {name} holds a value that is not finite.")
        return images


def open_images(
    names: Sequence[str], table: Path, datadir: str | Path | None = None
) -> tuple[StackImages, dict[str, Path]]:
    """Find the images that a table names, and look at the headers of their stacks.

    Parameters
    ----------
    names
        ``000001@stack.mrcs``, counted from 1, or ``image.mrc`` alone.
    table, datadir
        The table, and a folder: stacks are looked for in `search_folders` of them.

    Returns
    -------
    images
        The images, unread.
    found
        The path of each stack, by its name in the table.

    Raises
    ------
    InputError
        If a stack is missing, damaged or has fewer images than the table names, if an
        image without a number is a stack or a volume, or if the images are of different
        sizes.
    """
    parts = [split_name(name, table) for name in names]
    places = {stack: i for i, stack in enumerate(dict.fromkeys(s for _, s in parts))}
    file = np.array([places[stack] for _, stack in parts])
    index = np.array([number - 1 for number, _ in parts])
    highest = np.zeros(len(places), np.int64)
    np.maximum.at(highest, file, index)
    named = zip(names, parts, strict=True)
    bare = {stack for name, (_, stack) in named if "@" not in name}
    folders = search_folders(table, datadir)
    found, size, pixel = {}, 0, None
    for stack, place in places.items():
        path = locate(stack, folders)
        if path is None and os.path.isabs(stack):
            raise InputError(
                f"{table} names {stack}, where there is no file; other folders are "
                "searched only for stacks whose path is relative."
            )
        if path is None:
            further = "" if datadir is None else f", nor in {datadir}"
            raise InputError(
                f"{table} names {stack}, which is neither in {table.parent}, nor in "
                f"a folder above, nor in the working directory{further}."
            )
        found[stack] = path
        images, its_pixel = map_stack(path)
        if stack in bare and len(images) > 1:
            raise InputError(
                f"{table} names {stack} as one image, which has {len(images)} "
                "sections; single particles are wanted, of a stack with their number "
                "and @."
            )
        if highest[place] >= len(images):
            raise InputError(
                f"{table} names image {highest[place] + 1} of {path}, which has "
                f"{len(images)}."
            )
        if place == 0:
            size, pixel = images.shape[1], its_pixel
        elif images.shape[1] != size:
            raise InputError(
                f"{table} names images of {images.shape[1]} pixels ({path}) and of "
                f"{size} ({found[parts[0][1]]}); one size is wanted."
            )
    paths = tuple(found[stack] for stack in places)
    return StackImages(paths, file, index, size, pixel), found


def split_name(name: str, table: str | Path) -> tuple[int, str]:
    """Return the number, from 1, and the stack of an image's name.

    RELION's mark of a format after the stack, ``:mrcs``, is left out.

    Parameters
    ----------
    name
        ``000001@stack.mrcs``, or ``image.mrc`` alone, which is number 1.
    table
        The table that has the name, for the sentence.

    Raises
    ------
    InputError
        If the name is neither.
    """
    number, at, stack = name.partition("@")
    if not at:
        number, stack = "1", name
    for mark in _FORMATS:
        stack = stack.removesuffix(mark)
    whole = number.isascii() and number.isdigit() and len(number) <= _DIGITS
    if not (whole and int(number) >= 1 and stack):
        raise InputError(
            f"{table} names the image {name!r}; a number from 1, @ and a stack are "
            "wanted."
        )
    return int(number), stack


def search_folders(table: Path, datadir: str | Path | None = None) -> list[Path]:
    """Return where the stacks of a table are looked for, in this order.

    In `datadir`, the table's folder, the working directory, and the folders above the
    table's: RELION and cryoSPARC name a stack by its path from the project's folder.

    Raises
    ------
    InputError
        If `datadir` is not a folder.
    """
    given = [] if datadir is None else [Path(datadir)]
    for folder in given:
        if not os.path.isdir(folder):
            raise InputError(f"{folder} is not a folder to look for stacks in.")
    return [*given, table.parent, Path(), *folders_above(table)]


def folders_above(table: Path) -> Sequence[Path]:
    """Return the folders above a table's own, nearest first."""
    return Path(os.path.abspath(table)).parents[1:]


def locate(stack: str, folders: Sequence[Path]) -> Path | None:
    """Return the path of a stack, in the first folder that has it."""
    for folder in folders:
        path = folder / stack
        if os.path.isfile(path):  # unlike Path's, False for names that are too long
            # As the system does: the folder above a link's is that of its target.
            above = ".." in path.parts
            return Path(os.path.realpath(path.parent)) / path.name if above else path
    return None


def names_from(
    table: Path, old_table: Path, stacks: Mapping[str, Path]
) -> dict[str, str]:
    """Return the names of the stacks in a table that lies elsewhere than the old one.

    Parameters
    ----------
    table, old_table
        The tables.
    stacks
        The path of each stack, by its name in the old table.

    Returns
    -------
    The new name of each, by its name in the old table. From one folder, that of the new
    table or one above, all of them are found.

    Raises
    ------
    InputError
        If a name is no text that a STAR file can hold.
    """
    folders = [table.parent, *folders_above(table)]
    again = {stack: locate(stack, folders) for stack in stacks}
    if all(path and path.samefile(stacks[stack]) for stack, path in again.items()):
        for folder in folders:
            if all(_same(folder / stack, found) for stack, found in stacks.items()):
                return {stack: stack for stack in stacks}

    def rename(stack: str, found: Path) -> str:
        if os.path.isabs(stack):
            return stack
        absolute = os.path.abspath(found)
        if _same(old_table.parent / stack, found):
            relative = os.path.relpath(absolute, os.path.abspath(table.parent))
            return relative if _same(table.parent / relative, found) else absolute
        return absolute

    renamed = {stack: rename(stack, found) for stack, found in stacks.items()}
    for name in renamed.values():
        quoted(name, f"Cannot write {table}")
    return renamed


def _same(path: Path, other: Path) -> bool:
    there = os.path.exists(path) and os.path.exists(other)
    return there and os.path.samefile(path, other)
