"""``jaxrefine expand``: the rows are RELION's, and belong together afterwards."""

import shutil
import subprocess

import jax
import numpy as np
import pytest
from helpers import cryosparc_fields, write_cs

from jaxrefine import symmetry
from jaxrefine.cli._particles import half_sets
from jaxrefine.io import read_particles, read_poses, read_star, write_star

COUNT = 8  # of the data
ANGLES = [f"rlnAngle{each}" for each in ("Rot", "Tilt", "Psi")]


def rotations(path):
    return np.asarray(read_particles(path).poses.rotations)


def others(path):
    """Columns of the table that are not angles, and the other tables."""
    blocks = read_star(path)
    table = blocks.pop("particles")
    return {name: table[name] for name in table if name not in ANGLES}, blocks


@pytest.mark.parametrize("group", ["C3", "D2", "T"])
def test_every_operator_gives_a_row(data, run, group):
    star, out = data / "particles.star", data / "expanded.star"
    done = run("expand", star, "--symmetry", group.lower(), "--out", out)
    operators = symmetry.operators(group)
    order = len(operators)
    assert (done.code, done.err) == (0, "")
    assert done.out == f"{COUNT} particles, {order} rows each ({group}): {out}\n"
    expected = rotations(star)[:, None] @ operators
    np.testing.assert_allclose(
        rotations(out), expected.reshape(-1, 3, 3), rtol=0, atol=1e-7
    )
    (table, optics), (repeated, same) = others(star), others(out)
    assert optics == same
    assert repeated == {
        name: [text for text in column for _ in range(order)]
        for name, column in table.items()
    }
    # The row of the identity is the particle's own, to the letter.
    given, written = (read_star(path)["particles"] for path in (star, out))
    assert all(written[name][::order] == given[name] for name in ANGLES)


@pytest.mark.parametrize("group", ["C4", "D3", "O"])
def test_the_rows_are_relions(data, run, group):
    program = shutil.which("relion_particle_symmetry_expand")
    if program is None:
        pytest.skip("RELION is not installed")
    star, ours, theirs = (data / f"{x}.star" for x in ("particles", "ours", "theirs"))
    words = [program, "--i", star, "--o", theirs, "--sym", group]
    subprocess.run(words, check=True, capture_output=True)
    assert run("expand", star, "--symmetry", group, "--out", ours).code == 0
    (one, _), (other, _) = others(ours), others(theirs)
    assert one.keys() == other.keys()
    for name in one:
        if name in ("rlnImageName", "rlnMicrographName"):
            assert one[name] == other[name]
        else:
            found, expected = (np.array(x[name], float) for x in (one, other))
            np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-5)
    mine, relions = (
        rotations(path).reshape(COUNT, -1, 3, 3) for path in (ours, theirs)
    )
    assert mine.shape == relions.shape
    gaps = np.abs(mine[:, :, None] - relions[:, None]).max(axis=(-1, -2))
    # RELION's axes have six digits. Each row is one of the other table's, and back.
    assert gaps.min(axis=1).max() < 1e-4 and gaps.min(axis=2).max() < 1e-4


def test_the_rows_of_a_particle_are_dealt_together(data, run):
    out = data / "expanded.star"
    run("expand", data / "particles.star", "--symmetry", "D2", "--out", out)
    source = read_particles(out)
    cluster = source.particles.cluster
    np.testing.assert_array_equal(cluster, np.repeat(np.arange(COUNT), 4))
    assert source.shared == {"images": COUNT}
    subsets = half_sets(source, jax.random.key(0)).reshape(COUNT, 4)
    assert (subsets == subsets[:, :1]).all() and set(subsets[:, 0]) == {1, 2}


def test_half_sets_of_the_table_are_copied(data, run):
    star, out = data / "particles.star", data / "expanded.star"
    blocks = read_star(star)
    blocks["particles"]["rlnRandomSubset"] = ["1", "2"] * 4
    write_star(star, blocks)
    run("expand", star, "--symmetry", "C2", "--out", out)
    subsets = read_star(out)["particles"]["rlnRandomSubset"]
    assert subsets == ["1", "1", "2", "2"] * 4


def test_one_particle_and_another_folder(data, run):
    """A table of name-value pairs becomes one of rows; the stack is found from it."""
    star, folder = data / "one.star", data.parent / f"{data.name} elsewhere"
    table = read_star(data / "plain.star")["particles"]
    pairs = "".join(
        f"_{name} {texts[0]}\n"
        for name, texts in table.items()
        if name.startswith(("rlnAngle", "rlnImageName"))
    )
    star.write_text(f"data_particles\n\n{pairs}")
    folder.mkdir()
    assert run("expand", star, "--symmetry", "C7", "--out", folder / "x.star").code == 0
    assert len(read_particles(folder / "x.star")) == 7


def test_a_table_that_was_expanded_is_told_of(data, run):
    first, second = data / "first.star", data / "second.star"
    run("expand", data / "particles.star", "--symmetry", "C2", "--out", first)
    done = run("expand", first, "--symmetry", "C3", "--out", second)
    assert done.code == 0 and f"the {2 * COUNT} rows show {COUNT} images" in done.err
    assert len(read_particles(second)) == 6 * COUNT


def test_nothing_but_the_table_is_read(data, run):
    """Not the stacks, nor what the table says of how images were prepared."""
    star, folder = data / "particles.star", data.parent / f"{data.name} elsewhere"
    blocks = read_star(star)
    blocks["optics"]["rlnCtfDataAreCtfPremultiplied"] = ["1"]
    del blocks["optics"]["rlnImagePixelSize"], blocks["particles"]["rlnDefocusU"]
    names = blocks["particles"]["rlnImageName"]
    names[-1] = "000003@gone/others.mrcs"
    write_star(star, blocks)
    folder.mkdir()
    out = folder / "out.star"
    assert run("expand", star, "--symmetry", "C2", "--out", out).code == 0
    (table, optics), (repeated, same) = others(star), others(out)
    assert optics == same and len(repeated["rlnImageName"]) == 2 * COUNT
    assert repeated["rlnOriginXAngst"][::2] == table["rlnOriginXAngst"]
    # A stack that is there is found from the new folder; the other keeps its name.
    assert repeated["rlnImageName"][0] == f"000001@../{data.name}/particles.mrcs"
    assert repeated["rlnImageName"][-1] == names[-1]
    (data / "particles.mrcs").unlink()
    assert run("expand", star, "--symmetry", "C2", "--out", out).code == 0
    assert read_star(out)["particles"]["rlnImageName"][::2] == names


def test_a_table_of_cryosparc_needs_no_optics(tmp_path, run):
    fields = cryosparc_fields(COUNT, 16, 2.0)
    fields = {name: x for name, x in fields.items() if not name.startswith("ctf/")}
    star = write_cs(tmp_path / "particles.cs", fields)
    out = tmp_path / "out.star"
    done = run("expand", star, "--symmetry", "D2", "--out", out)
    assert done.code == 0, done.err
    assert "rlnDefocusU" not in read_star(out)["particles"]
    expected = np.tile(symmetry.operators("D2"), (COUNT, 1, 1))
    found = read_poses(out).rotations
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-7)


def test_bad_input_is_a_sentence(data, run):
    star, out = data / "particles.star", data / "out.star"
    blocks = read_star(star)
    for name in ANGLES:
        del blocks["particles"][name]
    write_star(data / "bare.star", blocks)
    before = sorted(data.iterdir())
    for words, told in (
        ([star, "--symmetry", "C1", "--out", out], "two operators or more, got C1"),
        ([star, "--symmetry", "X9", "--out", out], "symmetry must be C1 to C99"),
        ([star, "--symmetry", "C2", "--out", star], "it is an input"),
        ([star, "--symmetry", "C2", "--out", out / "x"], "is not a folder"),
        ([data / "bare.star", "--symmetry", "C2", "--out", out], "must have poses"),
        ([data / "no.star", "--symmetry", "C2", "--out", out], "does not exist"),
    ):
        run("expand", *words).assert_refused(told)
    assert sorted(data.iterdir()) == before
