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
from jaxrefine.euler import euler_to_matrix
from jaxrefine.geometry import Poses
from jaxrefine.io import (
    read_mrc,
    read_particles,
    write_mrc,
    write_new_particles,
    write_stack,
)

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
    [(20, 2.0, "20^3 voxels"), (16, 2.25, "voxels of 2.25 A"), (18, 1.6, "18^3")],
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


@pytest.mark.parametrize(
    "words", [["match"], ["reconstruct"], ["refine", "--preset", "paper"]]
)
def test_a_diameter_that_nothing_uses(data, command, engine, words):
    refused = command(*words, "--particle-diameter", 20)
    assert_refused(data, refused, "--particle-diameter must be given with --normalise")
    assert not engine.calls


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
    yield lambda: write(soft, 2.25), ("voxels of 2.25 A", "--resample brings")
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
