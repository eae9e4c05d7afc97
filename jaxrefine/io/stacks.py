"""Images that a table names, ``000001@stack.mrcs``, read when they are asked for."""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import final

import numpy as np
from jaxtyping import Float32, Int

from jaxrefine.errors import InputError
from jaxrefine.io.mrc import map_stack

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
        If a stack is missing, damaged or has fewer images than the table names, or if
        the images are of different sizes.
    """
    parts = [split_name(name, table) for name in names]
    places = {stack: i for i, stack in enumerate(dict.fromkeys(s for _, s in parts))}
    file = np.array([places[stack] for _, stack in parts])
    index = np.array([number - 1 for number, _ in parts])
    highest = np.zeros(len(places), np.int64)
    np.maximum.at(highest, file, index)
    folders = search_folders(table, datadir)
    found, size, pixel = {}, 0, None
    for stack, place in places.items():
        path = locate(stack, folders)
        if path is None:
            further = "" if datadir is None else f", nor in {datadir}"
            raise InputError(
                f"{table} names {stack}, which is neither in {table.parent}, nor in "
                f"a folder above, nor in the working directory{further}."
            )
        found[stack] = path
        images, its_pixel = map_stack(path)
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
    """Return the number, from 1, and the stack of an image's name."""
    number, at, stack = name.partition("@")
    if not at and name:
        return 1, name
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
        if not folder.is_dir():
            raise InputError(f"{folder} is not a folder to look for stacks in.")
    return [*given, table.parent, Path(), *folders_above(table)]


def folders_above(table: Path) -> Sequence[Path]:
    """Return the folders above a table's own, nearest first."""
    return Path(os.path.abspath(table)).parents[1:]


def locate(stack: str, folders: Sequence[Path]) -> Path | None:
    """Return the path of a stack, in the first folder that has it."""
    for folder in folders:
        path = folder / stack
        if path.is_file():
            # As the system does: the folder above a link's is that of its target.
            above = ".." in path.parts
            return Path(os.path.realpath(path.parent)) / path.name if above else path
    return None
