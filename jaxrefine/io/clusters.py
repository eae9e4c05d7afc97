"""Rows of a table that are not independent: copies of an image, segments of a tube.

The segments of a helical tube overlap, and RELION's refinement of helices keeps them in
one half set (``Experiment::divideParticlesInRandomHalves``). The copies of a particle
that symmetry expansion or a joined table makes share all of their noise.
"""

import os
from collections.abc import Hashable, Iterator, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Int

from jaxrefine.errors import InputError
from jaxrefine.io.columns import parsed
from jaxrefine.io.stacks import StackImages, split_name
from jaxrefine.io.star import Table

SOURCE = "jaxrefineSource"
"""Column: the particle that the rows of an expanded cryoSPARC table are copies of."""

UNKNOWN = "None"
"""What stands in a column for a source that is not known."""

_UNKNOWN = {"", UNKNOWN}
# Columns: the image that a particle was made from, by subtraction or extraction.
_ORIGINALS = ("rlnImageOriginalName", "rlnOriginalParticleName")


def clusters(
    table: Table, images: StackImages, path: Path
) -> tuple[Int[np.ndarray, " rows"] | None, dict[str, int]]:
    """Find the rows of a table that are not independent of each other.

    Parameters
    ----------
    table, images, path
        A table of particles, the images that it names, and its file.

    Returns
    -------
    cluster
        The cluster of each row, from 0; None if every row is independent.
    counts
        How many different images, particles and helical tubes the rows are of, by these
        words; only those that bring rows together.
    """
    count = len(images.file)
    cluster, counts, labels = np.arange(count), {}, []
    for word, label in _labels(table, images, path):
        # A row of which a label is not known has one of its own.
        labels.append([(row,) if x is None else x for row, x in enumerate(label)])
        joined = _joined(labels)
        if joined.max() < cluster.max():
            is_tube, cluster = word == "helical tubes", joined
            counts[word] = len(set(labels[-1])) if is_tube else int(joined.max()) + 1
    return (cluster if counts else None), counts


def _labels(
    table: Table, images: StackImages, path: Path
) -> Iterator[tuple[str, Sequence[Hashable]]]:
    """Yield what rows may share, in a word, and a label of each row; None for unknown.

    Two rows with one label share it. Labels of images and of originals are of one kind,
    as the original of one row may be the image of another.
    """
    count = len(images.file)
    status = [os.stat(stack.path) for stack in images.stacks]
    files = [("file", each.st_dev, each.st_ino) for each in status]
    numbers = (images.index + 1).tolist()
    file = [files[i] for i in images.file.tolist()]
    yield "images", list(zip(numbers, file, strict=True))
    for column in filter(table.__contains__, _ORIGINALS):
        stacks = (split_name(name, path)[1] for name in table["rlnImageName"])
        named = dict(zip(stacks, file, strict=True))
        named = {os.path.normpath(stack): each for stack, each in named.items()}
        originals = [_image(name, path) for name in table[column]]
        yield (
            "particles",
            [each and (each[0], named.get(each[1], each[1])) for each in originals],
        )
    if SOURCE in table:
        sources = table[SOURCE]
        yield "particles", [None if x in _UNKNOWN else ("source", x) for x in sources]
    micrographs = table.get("rlnMicrographName", [""] * count)
    coordinates = _coordinates(table)
    if coordinates is not None:
        yield (
            "particles",
            [
                None if micrograph in _UNKNOWN or x is None else (micrograph, *x)
                for micrograph, x in zip(micrographs, coordinates, strict=True)
            ],
        )
    if "rlnHelicalTubeID" in table:
        tubes = table["rlnHelicalTubeID"]
        if not parsed(tubes).any():  # RELION's number of what is no tube
            tubes = [""] * count
        yield (
            "helical tubes",
            [
                None
                if tube in _UNKNOWN
                else (tube, stack if micrograph in _UNKNOWN else micrograph)
                for tube, micrograph, stack in zip(
                    tubes, micrographs, file, strict=True
                )
            ],
        )


def _image(name: str, path: Path) -> tuple[int, str] | None:
    """Return the number and the stack of a name; None if it names no single image."""
    if "@" not in name:
        return None
    try:
        number, stack = split_name(name, path)
    except InputError:
        return None
    return number, os.path.normpath(stack)


def _coordinates(table: Table) -> list[tuple[float, float] | None] | None:
    """Return where each particle is in its micrograph; None if that is not known.

    Columns that hold one value only say nothing, nor does the corner of a micrograph.
    """
    names = ("rlnCoordinateX", "rlnCoordinateY")
    if not table.keys() >= set(names):
        return None
    x, y = (parsed(table[name]) for name in names)
    if len(set(zip(x.tolist(), y.tolist(), strict=True))) == 1:
        return None
    known = np.isfinite(x) & np.isfinite(y) & ((x != 0) | (y != 0))
    pairs = zip(x.tolist(), y.tolist(), known.tolist(), strict=True)
    return [(a, b) if is_known else None for a, b, is_known in pairs]


def _joined(labels: Sequence[Sequence[Hashable]]) -> Int[np.ndarray, " rows"]:
    """Return the finest clusters in which rows that share a label are together.

    They are the connected parts of the graph that has a node for each row and each
    label, and in which a row is linked to its labels.
    """
    from scipy.sparse import coo_array, csgraph  # slow to import

    count = len(labels[0])
    number: dict[Hashable, int] = {}
    nodes = [number.setdefault(x, len(number)) for label in labels for x in label]
    links = (np.tile(np.arange(count), len(labels)), count + np.array(nodes))
    total = count + len(number)
    graph = coo_array((np.ones(len(nodes), bool), links), (total, total))
    _, part = csgraph.connected_components(graph, directed=False)
    return np.unique(part[:count], return_inverse=True)[1]
