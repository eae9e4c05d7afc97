"""``jaxrefine evaluate``: errors of poses, matched by what the images are."""

import json
import re

import jax.numpy as jnp
import numpy as np
import pytest
from helpers import write_cs

from jaxrefine import evaluation, symmetry
from jaxrefine.euler import euler_to_matrix
from jaxrefine.geometry import Poses, matrix_to_rotvec, rotvec_to_matrix
from jaxrefine.io import write_new_particles, write_star

COUNT = 30
RNG = np.random.default_rng(0)
ANGLES = RNG.uniform(-np.pi, np.pi, (COUNT, 3))
ROTATIONS = np.asarray(euler_to_matrix(jnp.asarray(ANGLES)))
SHIFTS = RNG.uniform(-3, 3, (COUNT, 2))
NAMES = [f"{i:06d}@images.mrcs" for i in range(1, COUNT + 1)]


def turned(degrees):
    """Every pose turned by as much, about an axis of its own."""
    axes = RNG.normal(size=(COUNT, 3))
    axes *= np.deg2rad(degrees) / np.linalg.norm(axes, axis=1, keepdims=True)
    turns = rotvec_to_matrix(jnp.asarray(axes))
    return np.asarray(turns) @ ROTATIONS


def write(path, rotations=ROTATIONS, shifts=SHIFTS, names=NAMES):
    path.parent.mkdir(exist_ok=True)
    write_new_particles(path, Poses(rotations, shifts), list(names), 32, 1.5)
    return path


@pytest.fixture(scope="module")
def noisy():
    """Poses that are off, and the errors that the library finds."""
    rotations = turned(RNG.uniform(0, 12, (COUNT, 1)))
    shifts = SHIFTS + RNG.normal(0, 0.3, SHIFTS.shape)
    errors = evaluation.pose_errors(Poses(rotations, shifts), Poses(ROTATIONS, SHIFTS))
    return rotations, shifts, evaluation.summarise(errors)


def test_shifts_are_compared_in_the_results_pixels(tmp_path, run):
    """Of binned images, say; a table without a pixel size is taken as it is."""
    paths, out = (tmp_path / "a.star", tmp_path / "b.star"), tmp_path / "errors.json"
    names = ["rlnAngleRot", "rlnAngleTilt", "rlnAnglePsi", "rlnOriginX", "rlnOriginY"]
    for sizes, factor in (((3.0, 1.5), 2.0), ((None, 1.5), 1.0)):
        both = zip(paths, sizes, (SHIFTS / factor, SHIFTS), strict=True)
        for path, size, shifts in both:
            values = np.concatenate([np.rad2deg(ANGLES), -shifts], axis=1)
            table = dict(zip(names, values.T, strict=True))
            if size is not None:
                table["rlnPixelSize"] = np.full(COUNT, size)
            write_star(path, {"": table})
        assert run("evaluate", *paths, "--json", out)[0] == 0
        assert json.loads(out.read_text())["shift_error_in_pixels_p95"] < 1e-3


def test_a_table_is_not_written_over(tmp_path, run):
    paths = write(tmp_path / "a.star"), write(tmp_path / "b.star")
    before = [path.read_bytes() for path in paths]
    for path in paths:
        code, _, err = run("evaluate", *paths, "--json", path)
        assert code == 2 and "it is an input" in err
    assert [path.read_bytes() for path in paths] == before


def test_the_truth_is_without_error(tmp_path, run):
    """In any global frame, too."""
    frame = np.asarray(rotvec_to_matrix(jnp.array([0.4, -1.0, 0.3])))
    paths = write(tmp_path / "a.star", ROTATIONS @ frame), write(tmp_path / "b.star")
    code, _, err = run("evaluate", *paths, "--json", tmp_path / "out.json")
    assert (code, err) == (0, "")
    content = json.loads((tmp_path / "out.json").read_text())
    assert content["particles"] == COUNT and content["matched_by"] == "image name"
    for figure in ("median", "p90", "p95"):
        assert content[f"angle_error_in_degrees_{figure}"] == pytest.approx(0, abs=1e-4)
        assert content[f"shift_error_in_pixels_{figure}"] == pytest.approx(0, abs=1e-4)
    assert (
        content["fraction_within_5_degrees"]
        == content["fraction_within_10_degrees"]
        == 1
    )


def test_the_order_of_the_particles_does_not_matter(tmp_path, run, noisy):
    rotations, shifts, expected = noisy
    order = RNG.permutation(COUNT)
    names = [NAMES[i] for i in order]
    result = write(tmp_path / "result.star", rotations[order], shifts[order], names)
    truth = write(tmp_path / "truth.star")
    code, out, _ = run("evaluate", result, truth, "--json", tmp_path / "out.json")
    content = json.loads((tmp_path / "out.json").read_text())
    assert code == 0
    for name, value in expected.items():
        assert content[name] == pytest.approx(value, abs=1e-3), name
    assert (
        0
        < content["fraction_within_5_degrees"]
        < content["fraction_within_10_degrees"]
        < 1
    )
    assert f"{expected['angle_error_in_degrees_p95']:.3f}" in out
    assert f"{expected['shift_error_in_pixels_median']:.3f}" in out


def test_images_are_recognised_in_another_folder(tmp_path, run, noisy):
    """A result in a folder of its own names the stack by another path."""
    rotations, shifts, expected = noisy
    names = [name.replace("@", "@../data/") for name in NAMES[::-1]]
    result = write(tmp_path / "out/r.star", rotations[::-1], shifts[::-1], names)
    truth = write(tmp_path / "data/truth.star")
    code, out, _ = run("evaluate", result, truth)
    assert code == 0 and "matched by image name" in out
    assert f"{expected['angle_error_in_degrees_median']:.3f}" in out


def test_a_part_of_the_particles(tmp_path, run):
    result = write(tmp_path / "r.star", ROTATIONS[3:9], SHIFTS[3:9], NAMES[3:9])
    code, out, _ = run("evaluate", result, write(tmp_path / "truth.star"))
    assert code == 0 and out.startswith("6 particles, matched by image name")
    assert "100.0 % within 5 degrees" in out


@pytest.mark.parametrize(
    ("names", "true_names"),
    [([f"{n}x" for n in NAMES], NAMES), ([NAMES[0]] * COUNT, [NAMES[0]] * COUNT)],
)
def test_by_order_if_names_do_not_tell(tmp_path, run, names, true_names):
    """Other names, or one that all of the true particles have."""
    result = write(tmp_path / "r.star", names=names)
    truth = write(tmp_path / "truth.star", names=true_names)
    code, out, _ = run("evaluate", result, truth, "--json", tmp_path / "out.json")
    assert code == 0 and "matched by order, as the image names do not match" in out
    assert "100.0 % within 5 degrees" in out
    assert "order" in json.loads((tmp_path / "out.json").read_text())["matched_by"]


@pytest.mark.parametrize("copies", [2, 5])
def test_rows_of_one_image_are_compared_with_its_pose(tmp_path, run, noisy, copies):
    """In any order, and whichever of the tables has them."""
    rotations, shifts, expected = noisy
    order = RNG.permutation(np.tile(np.arange(COUNT), copies))
    names = [NAMES[i] for i in order]
    several = write(tmp_path / "several.star", rotations[order], shifts[order], names)
    alone = write(tmp_path / "alone.star", rotations, shifts)
    truth = write(tmp_path / "truth.star")
    again = RNG.permutation(order)
    true_names = [NAMES[i] for i in again]
    truths = write(tmp_path / "t.star", ROTATIONS[again], SHIFTS[again], true_names)
    for result, true in ((several, truth), (several, truths), (alone, truths)):
        code, out, _ = run("evaluate", result, true, "--json", tmp_path / "out.json")
        nearest = f", the nearest of up to {copies} copies" if result is alone else ""
        assert code == 0 and f"matched by image name{nearest}\n" in out
        content = json.loads((tmp_path / "out.json").read_text())
        for figure in ("angle_error_in_degrees", "shift_error_in_pixels"):
            name = f"{figure}_median"
            assert content[name] == pytest.approx(expected[name], abs=2e-3), name
        assert content["particles"] == (COUNT if result is alone else len(order))


@pytest.mark.parametrize("group", ["C2", "D2"])
def test_copies_with_poses_of_their_own_are_matched_by_their_poses(
    tmp_path, run, group
):
    """As symmetry expansion makes them: equal tables in another order are equal."""
    operators = np.asarray(symmetry.operators(group))
    rotations = np.einsum("pij,sjk->spik", ROTATIONS, operators).reshape(-1, 3, 3)
    rows = np.tile(np.arange(COUNT), len(operators))
    frame = np.asarray(rotvec_to_matrix(jnp.array([0.4, -1.0, 0.3])))
    names = np.array(NAMES)[rows]
    truth = write(tmp_path / "truth.star", rotations, SHIFTS[rows], names)
    order = RNG.permutation(len(rows))
    result = write(
        tmp_path / "r.star",
        rotations[order] @ frame,
        SHIFTS[rows][order],
        names[order],
    )
    code, _, _ = run("evaluate", result, truth, "--json", tmp_path / "out.json")
    content = json.loads((tmp_path / "out.json").read_text())
    assert code == 0 and content["matched_by"] == "image name"
    assert content["angle_error_in_degrees_p95"] == pytest.approx(0, abs=1e-3)
    assert content["shift_error_in_pixels_p95"] == pytest.approx(0, abs=1e-3)


def test_any_number_of_rows_may_be_of_one_image(tmp_path, run):
    """All are compared with its true pose, also if they are all of the result."""
    truth = write(tmp_path / "truth.star")
    for rows in (np.zeros(301, int), np.append(np.zeros(301, int), 5)):
        names = np.array(NAMES)[rows]
        result = write(tmp_path / "r.star", ROTATIONS[rows], SHIFTS[rows], names)
        code, out, _ = run("evaluate", result, truth)
        assert code == 0 and f"{len(rows)} particles, matched by image name\n" in out
        assert "100.0 % within 5 degrees" in out


def test_copies_that_differ_by_their_shifts_are_matched_by_these(tmp_path, run):
    """As of one image that was centred on two parts of a particle."""
    rows, move = (
        np.repeat(np.arange(COUNT), 2),
        np.tile([[0.0, 0.0], [4.0, 1.0]], (30, 1)),
    )
    names, shifts = np.array(NAMES)[rows], SHIFTS[rows] + move
    truth = write(tmp_path / "truth.star", ROTATIONS[rows], shifts, names)
    for order in (RNG.permutation(len(rows)), np.arange(1, len(rows), 2)):
        found = ROTATIONS[rows[order]], shifts[order], names[order]
        result = write(tmp_path / "r.star", *found)
        assert run("evaluate", result, truth, "--json", tmp_path / "o.json").code == 0
        content = json.loads((tmp_path / "o.json").read_text())
        assert content["shift_error_in_pixels_p95"] == pytest.approx(0, abs=1e-3)


def test_as_many_copies_are_matched_one_to_one(tmp_path, run):
    """If all rows of an image have the pose of one copy, the others were not found."""
    operators = np.asarray(symmetry.operators("C2"))
    rotations = np.einsum("pij,sjk->psik", ROTATIONS, operators)
    names = np.repeat(NAMES, 2)
    shifts = np.repeat(SHIFTS, 2, axis=0)
    truth = write(tmp_path / "t.star", rotations.reshape(-1, 3, 3), shifts, names)
    collapsed = rotations.copy()
    collapsed[:10, 1] = collapsed[:10, 0]
    result = write(tmp_path / "r.star", collapsed.reshape(-1, 3, 3), shifts, names)
    code, out, _ = run("evaluate", result, truth)
    assert code == 0 and "matched by image name\n" in out
    assert "83.3 % within 5 degrees" in out  # 50 of 60


def test_files_without_names(tmp_path, run):
    columns = zip(("Rot", "Tilt", "Psi"), np.rad2deg(ANGLES).T, strict=True)
    table = {f"rlnAngle{k}": [f"{x:.6f}" for x in v] for k, v in columns}
    write_star(tmp_path / "r.star", {"": table})
    truth = write(tmp_path / "truth.star", shifts=0 * SHIFTS)
    code, out, _ = run("evaluate", tmp_path / "r.star", truth)
    assert code == 0 and "by order" in out and "100.0 % within 5" in out


def test_a_table_of_cryosparc(tmp_path, run):
    """It has the transposes of RELION's matrices, and origins in its own pixels."""
    columns = {
        "blob/path": np.array([b"images.mrcs"] * COUNT),
        "blob/idx": np.arange(COUNT, dtype=np.uint32),
        "blob/psize_A": np.full(COUNT, 1.5, np.float32),
        "blob/shape": np.full((COUNT, 2), 32, np.uint32),
        "alignments3D/pose": -np.asarray(matrix_to_rotvec(jnp.asarray(ROTATIONS))),
        "alignments3D/shift": -SHIFTS,
    }
    write_cs(tmp_path / "a.cs", columns)
    code, out, err = run("evaluate", tmp_path / "a.cs", write(tmp_path / "b.star"))
    assert (code, err) == (0, "")
    assert "matched by image name" in out and "100.0 % within 5 degrees" in out
    assert re.search(r"angle error, degrees +0\.000 +0\.000", out)


def test_equivalent_poses_are_one(tmp_path, run, noisy):
    """A symmetric map's poses may be any of the equivalents, in any frame of it."""
    rotations, shifts, expected = noisy
    group = symmetry.operators("O")
    frame = np.asarray(rotvec_to_matrix(jnp.array([0.4, -1.0, 0.3])))
    equivalent = np.asarray(group[RNG.integers(24, size=COUNT)])
    result = write(tmp_path / "r.star", rotations @ frame, shifts)
    truth = write(tmp_path / "t.star", ROTATIONS @ equivalent)
    words = (result, truth, "--json", tmp_path / "out.json")
    assert run("evaluate", *words, "--symmetry", "o")[0] == 0
    content = json.loads((tmp_path / "out.json").read_text())
    for name, value in expected.items():
        assert content[name] == pytest.approx(value, abs=1e-3), name
    assert run("evaluate", *words)[0] == 0
    plain = json.loads((tmp_path / "out.json").read_text())
    assert plain["angle_error_in_degrees_median"] > 40


def test_bad_input_is_a_sentence(tmp_path, run):
    truth = write(tmp_path / "truth.star")
    other = write(
        tmp_path / "o.star", ROTATIONS[:9], SHIFTS[:9], [f"{n}x" for n in NAMES[:9]]
    )
    empty = write(tmp_path / "e.star", ROTATIONS[:0], SHIFTS[:0], [])
    write_star(tmp_path / "p.star", {"": {"rlnImageName": NAMES}})
    for arguments, words in (
        ([other, truth], "by their order, got 30 for 9"),
        ([empty, truth], "e.star must hold particles"),
        ([truth, empty], "e.star must hold particles"),
        ([tmp_path / "absent.star", truth], "does not exist"),
        ([tmp_path / "p.star", truth], "must have the columns rlnAngleRot"),
        ([truth, truth, "--symmetry", "Q"], "symmetry"),
        ([truth, truth, "--json", tmp_path / "no/out.json"], "not a folder"),
    ):
        run("evaluate", *arguments).assert_refused(words)
