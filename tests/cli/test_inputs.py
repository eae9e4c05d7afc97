"""What commands read: masks of maps and of images, and maps on other grids.

The engines are stopped as soon as they have been given their inputs.
"""

import json
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest

from jaxrefine.cli import match, reconstruct, refine
from jaxrefine.cli.commands.match import MATCH
from jaxrefine.cli.commands.reconstruct import RECONSTRUCT
from jaxrefine.cli.commands.refine import REFINE
from jaxrefine.cli.engine import Engine
from jaxrefine.ctf import CTF
from jaxrefine.errors import InputError
from jaxrefine.euler import euler_to_matrix
from jaxrefine.geometry import Poses
from jaxrefine.io import (
    read_mrc,
    read_particles,
    read_star,
    write_mrc,
    write_new_particles,
    write_stack,
    write_star,
)
from jaxrefine.poses.matching import MatchConfig

N, COUNT, PIXEL = 16, 8, 2.0


def away(n, voxel, centre=(0.0, 0.0, 0.0)):
    """The distance of every voxel from a place, angstroms."""
    at = (np.arange(n) - n // 2) * voxel
    z, y, x = ((at - c) ** 2 for c in centre)
    return np.sqrt(z[:, None, None] + y[:, None] + x)


def blob(n, voxel):
    return np.exp(-0.5 * (away(n, voxel, (1.5, -1.0, 0.5)) / 3) ** 2)


def ball(n, voxel):
    """A mask with an edge of 6 A."""
    return 0.5 + 0.5 * np.cos(np.pi * np.clip((away(n, voxel) - 6) / 6, 0, 1))


@pytest.fixture
def data(tmp_path):
    """A folder with images, poses, a map and a mask."""
    rng = np.random.default_rng(0)
    images = rng.normal(size=(COUNT, N, N)).astype(np.float32)
    write_stack(tmp_path / "images.mrcs", images, PIXEL)
    write_mrc(tmp_path / "map.mrc", blob(N, PIXEL), PIXEL)
    write_mrc(tmp_path / "mask.mrc", ball(N, PIXEL), PIXEL)
    angles, shifts = rng.uniform(-1, 1, (COUNT, 3)), rng.uniform(-2, 2, (COUNT, 2))
    poses = Poses(euler_to_matrix(jnp.asarray(angles)), shifts)
    names = [f"{i:06d}@images.mrcs" for i in range(1, COUNT + 1)]
    star = tmp_path / "particles.star"
    write_new_particles(star, poses, names, N, PIXEL, CTF(0.0, 0.0))
    return tmp_path


@pytest.fixture
def engine():
    """Engines that stop at their first call, and what they were given."""
    calls = []

    def stop(*arguments, **options):
        calls.append((arguments, options))
        raise KeyboardInterrupt

    return SimpleNamespace(calls=calls, stop=stop)


@pytest.fixture
def command(data, run, engine):
    """Run a command on the data, with the engine above."""
    all_stop = Engine(engine.stop, engine.stop, engine.stop)
    commands = [
        replace(each, run=partial(implementation, **stand_in))
        for each, implementation, stand_in in (
            (REFINE, refine.run, {"engine": all_stop}),
            (RECONSTRUCT, reconstruct.run, {"engine": all_stop}),
            (MATCH, match.run, {"match": engine.stop}),
        )
    ]

    def on_the_data(name, *further):
        words = [name, data / "particles.star", "--out", data / f"{name}.star"]
        words += [] if name == "reconstruct" else ["--map", data / "map.mrc"]
        return run(*words, *further, commands=commands)

    return on_the_data


def assert_refused(data, result, *words):
    result.assert_refused(*words)
    assert not list(data.glob("*.star/*")) and not (data / "match.star").exists()


@pytest.mark.parametrize(
    ("n", "voxel", "words"),
    [
        (20, 2.0, "20^3 voxels"),
        (16, 2.25, "16^3 voxels of 2.25 A"),
        (18, 1.6, "18^3 voxels of 1.6 A"),
    ],
)
@pytest.mark.parametrize("name", ["refine", "match"])
def test_a_map_on_another_grid(data, command, engine, name, n, voxel, words):
    """It is refused, with a way out; resampled, it is what it was."""
    write_mrc(data / "map.mrc", blob(n, voxel), voxel)
    offer = "map.mrc must have", f"got {words}", "images of", "; --resample brings it"
    assert_refused(data, command(name), *offer)
    assert command(name, "--resample").code == 130
    ((arguments, _),) = engine.calls
    found = arguments[2 if name == "refine" else 1]
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, blob(N, PIXEL), atol=1e-3)


def test_a_map_that_does_not_say_its_voxels(data, command, engine):
    """It may have the images'; of another side it is not resampled by a guess."""

    def unset(path):
        content = bytearray(path.read_bytes())
        content[40:52] = bytes(12)  # the header's cell
        path.write_bytes(content)

    unset(data / "map.mrc")
    assert command("match").code == 130
    np.testing.assert_array_equal(
        engine.calls[0][0][1], blob(N, PIXEL).astype(np.float32)
    )
    write_mrc(data / "map.mrc", blob(20, 2.0), 2.0)
    unset(data / "map.mrc")
    words = "map.mrc must give its voxel size in its header", "20^3 voxels"
    assert_refused(data, command("match", "--resample"), *words)


@pytest.mark.parametrize("words", [["reconstruct"], ["refine", "--preset", "paper"]])
def test_a_diameter_that_nothing_uses(data, command, engine, words):
    refused = command(*words, "--particle-diameter", 20)
    assert_refused(data, refused, "--particle-diameter must be given with --normalise")
    assert not engine.calls


def test_a_diameter_sets_how_particles_are_matched(data, command, engine):
    """Angles, pixels and cycles per box, from degrees, pixels and angstroms."""
    options = ["--particle-diameter", 20, "--resolution", 6.4, "--symmetry", "d2"]
    options += ["--angle-step", 30, "--shift-spread", 0.5, "--batch-size", 3]
    assert command("match", *options).code == 130
    box = N * PIXEL
    assert engine.calls[0][0][2] == MatchConfig(
        np.deg2rad(30),
        r_max=int(box / 6.4),
        batch_size=3,
        particle_diameter=20 / box,
        shift_spread=0.5,
        symmetry="D2",
    )


def test_a_map_on_the_same_grid_keeps_its_bits(data, command, engine):
    assert command("refine", "--resample", "--mask", data / "mask.mrc").code == 130
    ((arguments, options),) = engine.calls
    np.testing.assert_array_equal(arguments[2], read_mrc(data / "map.mrc")[0])
    np.testing.assert_array_equal(options["mask"], read_mrc(data / "mask.mrc")[0])


def test_a_mask_is_resampled_and_stays_one(data, command, engine):
    write_mrc(data / "mask.mrc", ball(20, 1.7), 1.7)
    assert command("refine", "--resample", "--mask", data / "mask.mrc").code == 130
    mask = np.asarray(engine.calls[0][1]["mask"])
    assert mask.min() >= 0 and mask.max() <= 1
    np.testing.assert_allclose(mask, ball(N, PIXEL), atol=0.02)
    # A sharp one would overshoot.
    write_mrc(data / "sharp.mrc", (ball(20, 1.7) > 0.5).astype(np.float32), 1.7)
    options = ["--resample", "--mask", data / "sharp.mrc", "--out", data / "other"]
    assert command("refine", *options).code == 130
    mask = np.asarray(engine.calls[1][1]["mask"])
    assert mask.min() == 0 and mask.max() == 1


def test_the_folder_knows_its_mask(data, command, engine):
    options = ["--mask", data / "mask.mrc", "--resample", "--mask-images"]
    assert command("refine", *options).code == 130
    settings = json.loads((data / "refine.star/run.json").read_text())["settings"]
    assert settings["resample"] is True and settings["mask_images"] is True
    assert len(settings["mask"]) == 64
    for fewer, words in (
        (options[:2], "mask_images, resample"),
        (options[2:], "mask"),
    ):
        command("refine", *fewer).assert_refused(f"other settings ({words})")
    write_mrc(data / "mask.mrc", ball(N, PIXEL) ** 2, PIXEL)
    command("refine", *options).assert_refused("other settings (mask)")
    assert len(engine.calls) == 1


def masks(data):
    soft, write = ball(N, PIXEL), partial(write_mrc, data / "bad.mrc")
    yield lambda: write(ball(18, PIXEL), PIXEL), ("18^3 voxels", "--resample brings")
    yield lambda: write(soft, 2.25), ("got 16^3 voxels of 2.25 A", "--resample brings")
    yield lambda: write(1.5 * soft, PIXEL), ("bad.mrc must have values", "got 0 to 1.5")
    yield (
        lambda: write(soft - 0.5, PIXEL),
        ("bad.mrc must have values", "got -0.5 to 0.5"),
    )
    yield lambda: write(0 * soft, PIXEL), ("bad.mrc must have values", "got 0 to 0")
    yield lambda: (data / "bad.mrc").unlink(), ("bad.mrc does not exist",)


def test_masks_that_are_none(data, command, engine):
    for make, words in masks(data):
        make()
        assert_refused(data, command("refine", "--mask", data / "bad.mrc"), *words)
    assert not engine.calls


@pytest.mark.parametrize("preset", ["paper", "released"])
def test_the_published_presets_know_no_mask(data, command, preset):
    for options in (["--mask", data / "mask.mrc"], ["--mask-images"]):
        words = (
            f"{options[0]} must be given with --preset default, got --preset {preset}"
        )
        assert_refused(data, command("refine", "--preset", preset, *options), words)


@pytest.mark.parametrize(
    ("options", "end"), [(["--particle-diameter", 4], 6), ([], 11)]
)
@pytest.mark.parametrize("name", ["refine", "reconstruct", "match"])
def test_images_are_masked_about_the_given_positions(
    data, command, engine, name, options, end
):
    """Up to 5 pixels beyond the diameter; ``match`` knows no positions."""
    assert command(name, "--mask-images", "--normalise", *options).code == 130
    particles = engine.calls[0][0][0]
    assert particles.noise_share == particles.images.noise_share
    images, _ = particles.batch(np.arange(COUNT))
    shifts = np.asarray(read_particles(data / "particles.star").poses.shifts)
    axis = np.arange(N) - N // 2
    for image, (x, y) in zip(np.asarray(images), shifts, strict=True):
        if name == "match":
            x = y = 0.0
        radius = np.hypot(axis - x, (axis - y)[:, None])
        assert not image[radius >= end].any()
        assert image[radius < end - 0.1].all()


# --- rows that are not independent, and those that cannot be used


def rewrite(data, **columns):
    """Change columns of the table of particles."""
    blocks = read_star(data / "particles.star")
    blocks["particles"] |= {name: list(map(str, x)) for name, x in columns.items()}
    write_star(data / "particles.star", blocks)


TUBES = [1, 1, 1, 2, 2, 3, 3, 4]


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("refine", []),
        ("refine", ["--half-sets"]),
        ("reconstruct", []),
        ("reconstruct", ["--half-sets"]),
    ],
)
def test_rows_of_a_tube_are_kept_together_and_it_is_said(
    data, command, engine, name, options
):
    rewrite(data, rlnHelicalTubeID=TUBES)
    result = command(name, *options)
    where = "one half set and one fold" if options else "one fold"
    words = "particles.star: the 8 rows are of 4 helical tubes; rows of the same one "
    assert result.code == 130 and f"{words}are kept together, in {where}" in result.err
    assert "the half sets have" not in result.err
    ((arguments, further),) = engine.calls
    np.testing.assert_array_equal(arguments[0].cluster, np.array(TUBES) - 1)
    if options:
        subsets = further["subsets"]
        for tube in set(TUBES):
            assert len(set(subsets[np.array(TUBES) == tube])) == 1
        assert sorted(subsets) == [1] * 4 + [2] * 4
    else:
        assert further["subsets"] is None


def grow(data, count):
    """Repeat the particles, with images of their own."""
    images = np.random.default_rng(1).normal(size=(count, N, N)).astype(np.float32)
    write_stack(data / "images.mrcs", images, PIXEL)
    blocks = read_star(data / "particles.star")
    table = blocks["particles"]
    for name, values in table.items():
        table[name] = [values[i % COUNT] for i in range(count)]
    table["rlnImageName"] = [f"{i:06d}@images.mrcs" for i in range(1, count + 1)]
    write_star(data / "particles.star", blocks)


@pytest.mark.parametrize("name", ["refine", "reconstruct"])
def test_one_tube_is_dealt_into_folds_and_not_into_half_sets(
    data, command, engine, name
):
    """As a column that is constant says, which numbers no tubes perhaps."""
    rewrite(data, rlnHelicalTubeID=[1] * COUNT)
    result = command(name)
    assert result.code == 130 and len(engine.calls) == 1
    assert "particles.star: the 8 rows are of 1 helical tube\n" in result.err
    assert "more than two thirds of the rows are of one helical tube" in result.err
    assert "remove the column rlnHelicalTubeID if it numbers no tubes" in result.err
    words = (
        "particles.star: the half sets must have at least 4 particles each, got 8 and "
        "0: rows of one helical tube are kept together; remove the column "
        "rlnHelicalTubeID if it does not number tubes, or give half sets of your own "
        "(column rlnRandomSubset)",
    )
    out = ["--out", data / "half.star"]
    command(name, "--half-sets", *out).assert_refused(*words)
    assert not (data / "half.star").exists()
    # Half sets of the table are used as they are, and each may be a tube.
    halves = [1] * 4 + [2] * 4
    rewrite(data, rlnRandomSubset=halves, rlnHelicalTubeID=halves)
    result = command(name, "--half-sets", *out)
    assert result.code == 130 and "divide" not in result.err
    assert "more than two thirds of the rows of a half set are of one" in result.err
    np.testing.assert_array_equal(engine.calls[-1][1]["subsets"], halves)
    rewrite(data, rlnHelicalTubeID=[0] * COUNT)
    result = command(name, "--half-sets", "--out", data / "none.star")
    assert result.code == 130 and "helical tube" not in result.err


@pytest.mark.parametrize("name", ["refine", "reconstruct"])
def test_half_sets_that_are_unequal_are_told_of_or_refused(data, command, engine, name):
    grow(data, 24)
    rewrite(data, rlnHelicalTubeID=[1] * 18 + [2] * 4 + [3, 4])
    result = command(name, "--half-sets")
    assert result.code == 130
    words = "the half sets have 18 and 6 particles, as rows of one helical tube are "
    assert f"particles.star: {words}kept together" in result.err
    assert "more than two thirds of the rows of a half set" in result.err
    sizes = np.bincount(engine.calls[-1][1]["subsets"])[1:]
    assert sorted(sizes) == [6, 18]
    rewrite(data, rlnHelicalTubeID=[1] * 21 + [2, 3, 4])
    out = ["--out", data / "other.star"]
    refused = command(name, "--half-sets", *out)
    refused.assert_refused("at least 4 particles each, got 21 and 3: rows of")
    rewrite(data, rlnRandomSubset=[1] * 21 + [2] * 3)
    words = "the half sets of the table (column rlnRandomSubset) must have", "21 and 3"
    command(name, "--half-sets", *out).assert_refused(*words)
    assert not (data / "other.star").exists() and len(engine.calls) == 1


@pytest.mark.parametrize("name", ["refine", "reconstruct"])
def test_a_half_set_that_is_left_out_is_refused(data, command, engine, name):
    rewrite(data, rlnRandomSubset=[1] * 4 + [2] * 4)
    spoil(data, i5=0.0, i6=0.0, i7=0.0, i8=0.0)
    words = "the half sets of the table", "got 4 and 0 that can be used"
    assert_refused(data, command(name, "--half-sets"), *words)
    assert not engine.calls and command(name).code == 130


@pytest.mark.parametrize("name", ["refine", "reconstruct"])
def test_half_sets_that_divide_an_image_are_kept_with_a_warning(
    data, command, engine, name
):
    subsets = np.array([1, 2] * 4)
    names = [f"{i:06d}@images.mrcs" for i in (1, 1, 2, 3, 2, 4, 5, 6)]
    rewrite(data, rlnImageName=names, rlnRandomSubset=subsets)
    without = command("reconstruct")
    assert without.code == 130 and "half sets of the table" not in without.err
    result = command(name, "--half-sets")
    words = "of the table (column rlnRandomSubset) divide 1 of 6 such groups of rows"
    assert result.code == 130 and words in result.err
    assert "the 8 rows show 6 images; rows of" in result.err
    np.testing.assert_array_equal(engine.calls[-1][1]["subsets"], subsets)
    rewrite(data, rlnRandomSubset=[1, 1, 2, 1, 2, 2, 1, 2])
    again = command(name, "--half-sets", "--out", data / "again.mrc")
    assert again.code == 130 and "half sets of the table" not in again.err


def spoil(data, **values):
    """Set images, counted from 1, to a value, or a pixel of them to NaN."""
    path = data / "images.mrcs"
    content = bytearray(path.read_bytes())
    for name, value in values.items():
        place = 1024 + 4 * N * N * (int(name[1:]) - 1)
        new = np.full(1 if np.isnan(value) else N * N, value, np.float32).tobytes()
        content[place : place + len(new)] = new
    path.write_bytes(content)


@pytest.mark.parametrize("name", ["refine", "reconstruct", "match"])
def test_single_images_that_cannot_be_used_are_left_out(data, command, engine, name):
    originals = read_particles(data / "particles.star").particles.batch(
        np.arange(COUNT)
    )[0]
    spoil(data, i2=0.0, i5=np.nan)
    result = command(name)
    assert result.code == 130
    assert "particles.star: 2 of 8 images cannot be used: the image 000002@" in (
        result.err
    )
    assert "must not be constant, got 0 everywhere; the image 000005@" in result.err
    ((arguments, _),) = engine.calls
    images, _ = arguments[0].batch(np.arange(6))
    np.testing.assert_array_equal(images, originals[np.array([0, 2, 3, 5, 6, 7])])
    if name != "match":
        shifts = read_particles(data / "particles.star").poses.shifts
        np.testing.assert_array_equal(
            arguments[1].shifts, shifts[np.array([0, 2, 3, 5, 6, 7])]
        )


@pytest.mark.parametrize("name", ["refine", "reconstruct", "match"])
def test_images_are_counted_while_they_are_looked_at(data, command, engine, name):
    assert f"images: {COUNT}/{COUNT} [" in command(name).err


def test_a_stack_that_cannot_be_read_leaves_no_image_out(
    data, command, engine, monkeypatch
):
    """That a disk does not answer says nothing of its images."""

    def fail(*_):
        raise InputError("cannot read images.mrcs: Input/output error")

    monkeypatch.setattr("jaxrefine.io.mrc.Stack.__getitem__", fail)
    assert_refused(data, command("match"), "cannot read images.mrcs: Input/output")
    assert not engine.calls


def test_optics_that_are_not_used_may_be_bad(data, command, engine):
    rewrite(data, rlnDefocusU=["?"] * COUNT, rlnCtfScalefactor=["nan"] * COUNT)
    assert_refused(data, command("match"), "the value must be a finite number")
    assert command("match", "--no-ctf").code == 130
    assert engine.calls[0][0][0].ctf is None


def test_an_image_without_a_background_is_left_out(data, command, engine):
    """It cannot be normalised, though it is not constant."""
    image = np.zeros((N, N), np.float32)
    image[N // 2, N // 2] = 1
    path = data / "images.mrcs"
    content = bytearray(path.read_bytes())
    content[1024 : 1024 + image.nbytes] = image.tobytes()
    path.write_bytes(content)
    kept = command("reconstruct")
    assert kept.code == 130 and "cannot be used" not in kept.err
    result = command("reconstruct", "--normalise")
    assert "1 of 8 images cannot be used: image 0 (from 0) must vary" in result.err
    assert [len(arguments[0]) for arguments, _ in engine.calls] == [8, 7]


@pytest.mark.parametrize("name", ["refine", "reconstruct", "match"])
@pytest.mark.parametrize("value", [0.0, np.nan])
def test_a_set_of_images_that_cannot_be_used_is_refused(
    data, command, engine, name, value
):
    spoil(data, **{f"i{i}": value for i in range(1, COUNT + 1)})
    words = "8 of 8 images cannot be used: the image 000001@", "and 7 more"
    assert_refused(data, command(name), *words)
    assert not engine.calls


def test_particles_outside_of_their_images_are_left_out(data, command, engine):
    """On the border one is still inside; matching uses no positions."""
    border = N // 2 * PIXEL
    x = [0, border, -border, border + 0.1, 0, 500, 1, 2]
    y = [0, 0, border, 0, -3 * border, 0, 1, 2]
    rewrite(data, rlnOriginXAngst=x, rlnOriginYAngst=y)
    for name in ("refine", "reconstruct"):
        result = command(name)
        words = "3 of 8 particles are outside of their images: they must be at most 8 "
        assert result.code == 130 and words in result.err
        assert "got 8.1 pixels for particle 4; these particles are" in result.err
        found = engine.calls[-1][0][1].shifts * -PIXEL
        kept = np.array([0, 1, 2, 6, 7])
        np.testing.assert_allclose(found[:, 0], np.array(x)[kept])
    matched = command("match")
    assert matched.code == 130 and "outside of their" not in matched.err
    rewrite(data, rlnOriginXAngst=[500] * COUNT)
    command("reconstruct").assert_refused("8 of 8 particles are outside of their")


# --- headers that are wrong


@pytest.mark.parametrize("side", [N, 20])
def test_a_header_of_one_angstrom_is_doubted(data, command, engine, side):
    """As programs write that know no voxel size: it is not resampled by it."""
    voxel = N * PIXEL / side
    write_mrc(data / "map.mrc", blob(side, voxel), 1.0)
    for options in ([], ["--resample"]):
        for name in ("refine", "match"):
            words = (
                "got a header with voxels of 1 A, as programs write",
                "say it with --map-voxel-size, and add --resample if it is not 2",
            )
            assert_refused(data, command(name, *options), *words)
    assert command("match", "--map-voxel-size", voxel, "--resample").code == 130
    np.testing.assert_allclose(engine.calls[0][0][1], blob(N, PIXEL), atol=2e-3)
    # It may be right for all that.
    write_mrc(data / "map.mrc", blob(side, 1.0), 1.0)
    assert command("match", "--map-voxel-size", 1, "--resample").code == 130
    center = np.s_[6:11, 6:11, 6:11]
    np.testing.assert_allclose(
        engine.calls[1][0][1][center], blob(N, PIXEL)[center], atol=0.02
    )


def test_a_mask_of_the_images_side_with_a_header_of_one_angstrom(data, command, engine):
    """It is on their grid, whatever is said of a map of another side."""
    write_mrc(data / "map.mrc", blob(20, 1.7), 1.0)
    write_mrc(data / "mask.mrc", ball(N, PIXEL), 1.0)
    options = ["--map-voxel-size", 1.7, "--resample", "--mask", data / "mask.mrc"]
    assert command("refine", *options).code == 130
    arguments, further = engine.calls[-1]
    np.testing.assert_allclose(arguments[2], blob(N, PIXEL), atol=2e-3)
    np.testing.assert_allclose(further["mask"], ball(N, PIXEL), rtol=1e-6, atol=1e-6)


def test_a_header_can_be_overruled(data, command, engine):
    """For the map, and for a mask of as many voxels; one of others has its own."""
    write_mrc(data / "map.mrc", blob(20, 1.7), 3.0)
    for side, voxel, header in ((20, 1.7, 9.0), (24, 1.5, 1.5)):
        write_mrc(data / "mask.mrc", ball(side, voxel), header)
        options = ["--map-voxel-size", 1.7, "--resample", "--mask", data / "mask.mrc"]
        out = data / f"out{side}"
        assert command("refine", *options, "--out", out).code == 130
        arguments, further = engine.calls[-1]
        np.testing.assert_allclose(arguments[2], blob(N, PIXEL), atol=2e-3)
        np.testing.assert_allclose(further["mask"], ball(N, PIXEL), atol=0.02)
    words = "got 16^3 voxels of 1.7 A; --resample brings it to that grid"
    write_mrc(data / "map.mrc", blob(N, 1.7), PIXEL)
    assert_refused(data, command("match", "--map-voxel-size", 1.7), words)
    for bad in (0, -1, "nan"):
        refused = command("match", "--map-voxel-size", bad)
        assert_refused(data, refused, "--map-voxel-size must be")
