"""``jaxrefine match``: the poses found are in the table, and what is refused."""

import shlex
from dataclasses import replace
from functools import partial
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from scipy.ndimage import gaussian_filter

from jaxrefine.cli import match, refine
from jaxrefine.cli.commands.match import MATCH, MatchSettings
from jaxrefine.cli.commands.refine import REFINE
from jaxrefine.cli.commands.shared import CryosparcSettings
from jaxrefine.cli.engine import Engine
from jaxrefine.ctf import CTF
from jaxrefine.euler import euler_to_matrix
from jaxrefine.geometry import Poses
from jaxrefine.io import (
    read_particles,
    read_poses,
    read_star,
    write_mrc,
    write_new_particles,
    write_stack,
    write_star,
)
from jaxrefine.operators import slices
from jaxrefine.operators.gridding import Gridding
from jaxrefine.poses import grid, matching

N, COUNT, PIXEL, STEP = 16, 6, 2.0, 30.0
OPTIONS = ("--angle-step", STEP, "--max-shift", 1, "--resolution", 32 / 5)
OPTIONS += ("--shift-step", 1)
ANGLES = ("rlnAngleRot", "rlnAngleTilt", "rlnAnglePsi")


@pytest.fixture(scope="module")
def scene():
    """A map, poses of the grid, and the images that they make."""
    rng = np.random.default_rng(0)
    k = np.arange(N) - N // 2
    window = np.exp(-(k[:, None, None] ** 2 + k[:, None] ** 2 + k**2) / 10)
    # Smooth, or it would be one of hot voxels.
    volume = window * gaussian_filter(rng.normal(size=(N, N, N)), 1.0)
    views = grid.directions(np.deg2rad(STEP))
    psi = np.deg2rad(STEP) * rng.integers(0, 12, (COUNT, 1))
    angles = np.concatenate([views[rng.integers(0, len(views), COUNT)], psi], axis=1)
    shifts = np.array([[1, 0], [0, 1], [-1, 0], [0, -1], [0, 0], [1, 0]], float)
    disc = slices.disc(N, N // 2 - 1)
    spectrum = Gridding().spectrum(jnp.asarray(volume), disc.r_max)
    truth = Poses(euler_to_matrix(jnp.asarray(angles)), shifts)
    images = slices.to_images(slices.project(spectrum, disc, truth), disc)
    return volume, truth, np.asarray(images, np.float32)


@pytest.fixture
def data(tmp_path, scene):
    """A folder with a map, images, and a table of other poses with another column."""
    volume, truth, images = scene
    folder = tmp_path / "data"
    folder.mkdir()
    write_mrc(folder / "ref.mrc", volume.astype(np.float32), PIXEL)
    write_stack(folder / "images.mrcs", images, PIXEL)
    names = [f"{i:06d}@images.mrcs" for i in range(1, COUNT + 1)]
    wrong = Poses(truth.rotations[::-1], truth.shifts - 3)
    path = folder / "particles.star"
    write_new_particles(path, wrong, names, N, PIXEL, CTF(0.0, 0.0))
    blocks = read_star(path)
    blocks["particles"]["other"] = [f"row {i}" for i in range(COUNT)]
    write_star(path, blocks)
    for column in (*ANGLES, "rlnOriginXAngst", "rlnOriginYAngst"):
        del blocks["particles"][column]
    write_star(folder / "poseless.star", blocks)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("name", ["particles", "poseless"])
def test_the_poses_are_found_and_written(data, tmp_path, scene, run, name, monkeypatch):
    """Also where the table has none."""
    monkeypatch.chdir(tmp_path)
    out, path = tmp_path / "out.star", data / f"{name}.star"
    words = [path, "--map", data / "ref.mrc", "--out", out, *OPTIONS]
    code, printed, err = run("match", *words)
    assert code == 0 and "matching: 1/1" in err
    assert f"{COUNT} particles, 30 degree steps" in printed
    written = read_poses(out)
    truth = scene[1]
    np.testing.assert_allclose(written.rotations, truth.rotations, atol=1e-5)
    np.testing.assert_array_equal(written.shifts, truth.shifts)

    before, after = read_star(path), read_star(out)
    scores, evidence, angle, shift = (
        np.array(after["particles"][column], float)
        for column in (
            "jaxrefineCorrelation",
            "jaxrefineEvidence",
            "jaxrefineAngleStd",
            "jaxrefineShiftStd",
        )
    )
    assert (scores > 0.9).all() and (scores <= 1).all()
    assert (evidence > 5).all()
    # Poses are known to a cell of the grid.
    assert (angle >= STEP / 2 - 1e-3).all() and (angle < STEP).all()
    assert (shift >= np.sqrt(1 / 6) - 1e-3).all() and (shift < 1).all()
    # The last line may be given as it is.
    words = shlex.split(printed.splitlines()[-1])
    assert words[:3] == ["jaxrefine", "refine", str(out)]
    arguments = refined(run, [*words[1:], "--trust-contrast"])
    expected = np.sqrt(np.mean(shift**2) / 2), np.sqrt(np.mean(angle**2) / 3)
    found = arguments[3].shift_spread, np.rad2deg(arguments[3].angle_spread)
    np.testing.assert_allclose(found, expected, rtol=0.05)
    assert after["optics"] == before["optics"]
    kept = before["particles"].keys() - {*ANGLES, "rlnImageName"}
    for column in kept - {"rlnOriginXAngst", "rlnOriginYAngst"}:
        assert after["particles"][column] == before["particles"][column]
    for column in before["particles"]:
        assert column in after["particles"]
    again = read_particles(out)
    np.testing.assert_array_equal(again.particles.images[np.arange(COUNT)], scene[2])


def refined(run, words):
    """Return what the engine of a refinement is given."""
    calls = []

    def stop(*arguments, **_):
        calls.append(arguments)
        raise KeyboardInterrupt

    engine = Engine(stop, stop, stop)
    stopping = [replace(REFINE, run=partial(refine.run, engine=engine))]
    assert run(*words, commands=stopping).code == 130
    return calls[0]


def known_so_well(count, config, angle, shift):
    """Return a result with poses that are known to an angle and a shift."""
    poses = Poses(np.tile(np.eye(3), (count, 1, 1)), np.zeros((count, 2)))
    return matching.Match(
        poses,
        scores=jnp.full(count, 0.5),
        log_likelihood=jnp.full(count, 2.0),
        angle_std=jnp.full(count, np.deg2rad(angle)),
        shift_std=jnp.full(count, shift),
        search=matching.search_of(config, N),
    )


def matched(run, words, angle, shift):
    """Return the lines that are printed where poses are known so well."""

    def found(particles, volume, config, **_):
        return known_so_well(len(particles), config, angle, shift)

    standing_in = [replace(MATCH, run=partial(match.run, match=found))]
    code, printed, err = run("match", *words, commands=standing_in)
    assert code == 0, err
    return printed.splitlines()


def test_how_to_go_on_is_a_whole_command(data, tmp_path, run):
    """With all that `refine` must know as well, and nothing that it would refuse."""
    folder = tmp_path / "my folder"
    folder.mkdir()
    out = folder / "out.star"
    same = ["--map", str(data / "ref.mrc"), "--symmetry", "D2", "--no-ctf", "--invert"]
    same += ["--trust-contrast", "--particle-diameter", "24", "--mask-images"]
    same += ["--datadir", str(folder), "--map-voxel-size", "2", "--resample"]
    own = ["--out", out, "--max-shift", "3", "--angle-step", "30"]
    lines = matched(run, [data / "particles.star", *same, *own], 9.0, 1.0)
    words = shlex.split(lines[-1])
    assert words[:3] == ["jaxrefine", "refine", str(out)]
    expected = [*same, "--out", "refined", "--angle-spread", "5.2"]
    assert sorted(words[3:]) == sorted([*expected, "--shift-spread", "0.71"])
    words[words.index("refined")] = str(tmp_path / "refined")
    config = refined(run, words[1:])[3]
    assert config.symmetry == "D2" and config.particle_diameter == 0.75


def test_how_to_go_on_says_no_more_than_is_known(data, tmp_path, run):
    """No prior that is wider than `refine`'s, or of shifts that were not looked for."""
    words = [data / "particles.star", "--map", data / "ref.mrc", "--trust-contrast"]
    words += ["--out", tmp_path / "out.star", "--angle-step", "30"]
    *_, known, command = matched(run, words, 60.0, 1.0)
    assert "many poses are not known" in known and "25.8 degrees" in known
    assert "--angle-spread" not in command and "--shift-spread 0.71" in command
    *_, known, command = matched(run, [*words, "--max-shift", "0"], 9.0, 0.0)
    assert "with how well the poses are known" in known
    assert "--angle-spread 5.2" in command and "--shift-spread" not in command


def test_how_to_go_on_from_a_table_of_cryosparc():
    """What is written is a STAR file, which has no passthrough file and no classes."""
    settings = MatchSettings(
        particles=Path("particles.cs"),
        map=Path("ref.mrc"),
        out=Path("out.star"),
        cryosparc=CryosparcSettings(passthrough=Path("other.cs"), class_=1),
    )
    result = known_so_well(COUNT, matching.MatchConfig(), 9.0, 1.0)
    assert match._advice(result, settings).splitlines()[-1] == (
        "jaxrefine refine out.star --map ref.mrc --out refined "
        "--angle-spread 5.2 --shift-spread 0.71"
    )


def test_bad_input_is_a_sentence_and_nothing_is_written(data, tmp_path, run):
    volume = np.ones((N, N, N), np.float32)
    write_mrc(data / "small.mrc", volume[1:, 1:, 1:], PIXEL)
    write_mrc(data / "fine.mrc", volume, PIXEL / 2)
    write_mrc(data / "zero.mrc", 0 * volume, PIXEL)
    before = {path: path.read_bytes() for path in data.iterdir()}
    star, ref, out = data / "particles.star", data / "ref.mrc", tmp_path / "out.star"
    usual = {"--map": ref, "--out": out}
    for changes, words in (
        ({"--out": star}, "particles.star: it is an input"),
        ({"--out": ref}, "ref.mrc: it is an input"),
        ({"--out": data / "images.mrcs"}, "images.mrcs: it is an input"),
        ({"--out": tmp_path}, "it is a folder"),
        ({"--out": tmp_path / "no" / "out.star"}, "no is not a folder"),
        ({"--map": data / "small.mrc"}, "15^3 voxels"),
        ({"--map": data / "fine.mrc"}, "voxels of 1 A"),
        ({"--map": data / "zero.mrc"}, "zero everywhere"),
        ({"--map": data / "absent.mrc"}, "absent.mrc does not exist"),
        (
            {"--angle-step": 0},
            "--angle-step must be more than 0 and at most 90",
        ),
        ({"--max-shift": -1}, "--max-shift must be at least 0 pixels, got -1"),
        ({"--shift-step": 0}, "--shift-step must be more than 0 pixels, got 0"),
        ({"--shift-spread": 0}, "--shift-spread must be more than 0 pixels, got 0"),
        ({"--max-shift": 9}, "--max-shift must be at most half of the images' side, 8"),
        ({"--symmetry": "X2"}, "symmetry must be C1 to C99"),
        ({"--particle-diameter": 33}, "--particle-diameter must be at most the box"),
        ({"--memory": 0.001}, "--memory must be at least 0."),
        ({"--memory": 0.001}, "got 0.001 GiB; 0.59 GiB, the largest part, are for JAX"),
        (
            {"--memory": 0.001, "--angle-step": 1, "--symmetry": "C2"},
            "the largest part, are for the projections along all directions",
        ),
        ({"--angle-step": 0.01}, "1.5e+13 orientations (0.01 degrees apart) with"),
        ({"--shift-step": 1e-5}, "must make a search that can end, got"),
        (
            {"--shift-step": 1e-3, "--memory": 1},
            "shifts (0.001 pixels apart) of images of 16 pixels, 1 at a time, got 1",
        ),
        ({"--shift-step": 2, "--max-shift": 1}, "must be at most the largest one, 1"),
        ({"--batch-size": 0}, "--batch-size must be at least 1, got 0"),
        ({"--resolution": 1}, "--resolution must be from 4.57 to 32 angstroms"),
        ({"--resolution": "nan"}, "--resolution must be a finite number"),
    ):
        arguments = [x for pair in (usual | changes).items() for x in pair]
        run("match", star, *arguments).assert_refused(words)
    arguments = [x for pair in usual.items() for x in pair]
    absent = run("match", data / "absent.star", *arguments)
    absent.assert_refused("absent.star does not exist")
    assert {path: path.read_bytes() for path in data.iterdir()} == before
    assert not out.exists()
