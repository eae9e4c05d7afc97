"""Rows of a table that are not independent: copies of an image, segments of a tube.

The segments of a helical tube overlap, and RELION's refinement of helices keeps them in
one half set (``Experiment::divideParticlesInRandomHalves``). The copies of a particle
that symmetry expansion or a joined table makes share all of their noise.
"""

import os
from collections.abc import Hashable, Iterator, Sequence

import numpy as np
from jaxtyping import Int

from jaxrefine.io.stacks import StackImages
from jaxrefine.io.star import Table

SOURCE = "jaxrefineSource"
"""Column: the particle that the rows of an expanded cryoSPARC table are copies of."""

UNKNOWN = "None"
"""What stands in a column for a source that is not known."""


def clusters(
    table: Table, images: StackImages
) -> tuple[Int[np.ndarray, " rows"] | None, dict[str, int]]:
    """Find the rows of a table that are not independent of each other.

    Parameters
    ----------
    table, images
        A table of particles, and the images that it names.

    Returns
    -------
    cluster
        The cluster of each row, from 0; None if every row is independent.
    counts
        How many different images, particles and helical tubes the rows are of, by these
        words; only those that bring rows together.
    """
    count = len(images.file)
    cluster, counts = np.arange(count), {}
    for word, label in _labels(table, images):
        found = int(label.max()) + 1
        if found < len(set(zip(label.tolist(), cluster.tolist(), strict=True))):
            counts[word] = found
            cluster = _joined(cluster, label)
    return (cluster if counts else None), counts


def _labels(
    table: Table, images: StackImages
) -> Iterator[tuple[str, Int[np.ndarray, " rows"]]]:
    """Yield what rows may share, in a word, and a number from 0 for each row."""
    paths = (stack.path for stack in images.stacks)
    files = _numbered([os.path.realpath(path) for path in paths])
    highest = int(images.index.max()) + 1
    image = files[images.file] * highest + images.index
    yield "images", np.unique(image, return_inverse=True)[1]
    for column in (SOURCE, "rlnImageOriginalName"):
        if column in table:
            sources = [
                row if name in ("", UNKNOWN) else name
                for row, name in enumerate(table[column])
            ]
            yield "particles", _numbered(sources)
    if "rlnHelicalTubeID" in table:
        micrographs = table.get("rlnMicrographName", [""] * len(images.file))
        tubes = zip(micrographs, table["rlnHelicalTubeID"], strict=True)
        yield "helical tubes", _numbered(list(tubes))


def _numbered(values: Sequence[Hashable]) -> Int[np.ndarray, " values"]:
    """Return a number for each value, the same for equal ones, from 0 without gaps."""
    number = {value: i for i, value in enumerate(dict.fromkeys(values))}
    return np.array([number[value] for value in values])


def _joined(
    first: Int[np.ndarray, " rows"], second: Int[np.ndarray, " rows"]
) -> Int[np.ndarray, " rows"]:
    """Return the finest clusters in which rows that share either number are together.

    They are the connected parts of the graph that has a node for each number, and in
    which a row links its two.
    """
    from scipy.sparse import coo_array, csgraph  # slow to import

    nodes = int(first.max()) + 1
    links = (first, nodes + second)
    nodes += int(second.max()) + 1
    graph = coo_array((np.ones(len(first), bool), links), (nodes, nodes))
    _, part = csgraph.connected_components(graph, directed=False)
    return np.unique(part[first], return_inverse=True)[1]
