"""Rows of a table that share an image, a particle or a helical tube."""

import numpy as np
import pytest

from jaxrefine.io import read_particles, write_stack, write_star

COUNT, M = 6, 8


@pytest.fixture
def read(tmp_path):
    """Read a table of images in two stacks, with further columns."""
    images = np.random.default_rng(0).normal(size=(COUNT, M, M)).astype(np.float32)
    for name in "ab":
        write_stack(tmp_path / f"{name}.mrcs", images, 1.5)

    def read(names, **columns):
        table = {"rlnImageName": names, **columns}
        write_star(tmp_path / "p.star", {"": table})
        file = read_particles(tmp_path / "p.star")
        return file.particles.cluster, file.shared

    return read


def assert_same_parts(found, expected):
    """They group rows in the same way, by whatever numbers."""
    pairs = set(zip(found.tolist(), expected, strict=True))
    assert len(pairs) == len(set(expected)) == len(set(found.tolist()))


DIFFERENT = [f"{i}@{s}.mrcs" for s in "ab" for i in (1, 2, 3)]


def test_rows_that_share_nothing_are_no_clusters(read):
    """Whether their table has the columns of tubes and of sources, or not."""
    assert read(DIFFERENT) == (None, {})
    own = {"rlnImageOriginalName": ["1@o.mrcs", "2@o.mrcs", "", "", "None", "None"]}
    own |= {"rlnHelicalTubeID": ["1", "2", "3"] * 2}
    own |= {"rlnMicrographName": ["a", "a", "a", "b", "b", "b"]}
    assert read(DIFFERENT, **own) == (None, {})


def test_copies_of_an_image_are_found_however_it_is_written(read, tmp_path):
    (tmp_path / "link.mrcs").symlink_to(tmp_path / "a.mrcs")
    (tmp_path / "hard.mrcs").hardlink_to(tmp_path / "b.mrcs")
    names = ["1@a.mrcs", "1@b.mrcs", "000001@./a.mrcs", "1@link.mrcs", "2@a.mrcs"]
    for other in ("1@b.mrcs:mrcs", "1@hard.mrcs"):
        cluster, shared = read([*names, other])
        assert_same_parts(cluster, [0, 1, 0, 0, 2, 1])
        assert shared == {"images": 3}


def test_a_tube_is_one_of_its_micrograph(read):
    micrographs, tubes = ["a", "a", "a", "b", "b", "b"], ["1", "1", "2", "1", "1", "2"]
    columns = {"rlnMicrographName": micrographs, "rlnHelicalTubeID": tubes}
    cluster, shared = read(DIFFERENT, **columns)
    assert_same_parts(cluster, [0, 0, 1, 2, 2, 3])
    assert shared == {"helical tubes": 4}
    # Where the micrograph is not known, it is one of its stack.
    for names in ({}, {"rlnMicrographName": ["None", "", "None", "", "", "None"]}):
        cluster, shared = read(DIFFERENT, **names, rlnHelicalTubeID=tubes)
        assert_same_parts(cluster, [0, 0, 1, 2, 2, 3])
        assert shared == {"helical tubes": 4}


def test_a_tube_of_no_number_is_none(read):
    micrographs = {"rlnMicrographName": ["a"] * 6}
    for nothing in ("0", "0.000", "None", ""):
        tubes = {"rlnHelicalTubeID": [nothing] * 6}
        assert read(DIFFERENT, **tubes, **micrographs) == (None, {}), nothing
    tubes = {"rlnHelicalTubeID": ["3", "None", "None", "3", "", "0"]}
    cluster, shared = read(DIFFERENT, **tubes, **micrographs)
    assert_same_parts(cluster, [0, 1, 2, 0, 3, 4])
    # It may be counted from 0, and a constant may be the only tube.
    tubes = {"rlnHelicalTubeID": ["0", "1", "0", "1", "1", "0"]}
    cluster, shared = read(DIFFERENT, **tubes, **micrographs)
    assert_same_parts(cluster, [0, 1, 0, 1, 1, 0])
    assert shared == {"helical tubes": 2}
    assert read(DIFFERENT, **micrographs, rlnHelicalTubeID=["1"] * 6)[1] == {
        "helical tubes": 1
    }


@pytest.mark.parametrize(
    ("column", "values"),
    [
        ("rlnImageOriginalName", ["1@x", "2@x", "", "000001@./x:mrcs", "3@x", "2@x"]),
        ("rlnOriginalParticleName", ["1@x", "2@x", "", "1@x", "3@x", "2@x"]),
        ("jaxrefineSource", ["x", "y", "None", "x", "z", "y"]),
    ],
)
def test_images_that_were_made_of_one_are_one_particle(read, column, values):
    """Such as those that were subtracted from after symmetry expansion."""
    cluster, shared = read(DIFFERENT, **{column: values})
    assert_same_parts(cluster, [0, 1, 2, 0, 3, 1])
    assert shared == {"particles": 4}


def test_an_original_may_be_in_the_table(read):
    """As when a table is joined with copies, which may be originals of others."""
    originals = ["None", "1@a.mrcs", "000002@./a.mrcs", "", "9@a.mrcs", "1@b.mrcs"]
    cluster, shared = read(DIFFERENT, rlnImageOriginalName=originals)
    assert_same_parts(cluster, [0, 0, 0, 1, 2, 1])
    assert shared == {"particles": 3}


def test_the_name_of_an_original_must_be_that_of_an_image(read):
    for name in ("x.mrcs", "a micrograph", "0@x.mrcs", "?@x.mrcs"):
        assert read(DIFFERENT, rlnImageOriginalName=[name] * 6) == (None, {}), name


def test_a_particle_that_was_extracted_twice_is_one(read):
    """Its coordinates are a number, however it is written."""
    columns = {
        "rlnMicrographName": ["a", "a", "b", "a", "None", "None"],
        "rlnCoordinateX": ["10.5", "11", "10.5", "10.500", "10.5", "10.5"],
        "rlnCoordinateY": ["3", "3", "3", "3.0", "3", "3"],
    }
    cluster, shared = read(DIFFERENT, **columns)
    assert_same_parts(cluster, [0, 1, 2, 0, 3, 4])
    assert shared == {"particles": 5}
    columns["rlnMicrographName"] = ["a"] * 6
    for x in (["7"] * 6, ["0", "0", "0", "1", "2", "0"], ["?"] * 5 + ["1"]):
        columns |= {"rlnCoordinateX": x, "rlnCoordinateY": ["0"] * 6}
        assert read(DIFFERENT, **columns) == (None, {}), x


def test_whatever_is_shared_keeps_rows_together(read):
    """An image in two tubes joins them."""
    names = ["1@a.mrcs", "2@a.mrcs", "1@a.mrcs", "3@a.mrcs", "4@a.mrcs", "5@a.mrcs"]
    cluster, shared = read(names, rlnHelicalTubeID=["1", "1", "2", "2", "3", "4"])
    assert_same_parts(cluster, [0, 0, 0, 0, 1, 2])
    assert shared == {"images": 5, "helical tubes": 4}
