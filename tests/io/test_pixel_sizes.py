"""Optics groups with pixels of different sizes, from the table to the map and back.

The particle is a sum of Gaussians in Angstrom, projected by its formula: at any pixel
size, and by no code of the package.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrefine import cli
from jaxrefine.data.preprocess import LARGEST_STEP, Resampled
from jaxrefine.errors import InputError
from jaxrefine.euler import euler_to_matrix, matrix_to_euler
from jaxrefine.geometry import Poses
from jaxrefine.io import (
    read_json,
    read_mrc,
    read_particles,
    read_star,
    read_table,
    write_mrc,
    write_particles,
    write_stack,
    write_star,
)
from jaxrefine.maps.fsc import fsc
from jaxrefine.simulate import equidistributed_rotations

M, COUNT = 32, 60
SIZES = np.array([2.0, 1.84])  # of the optics groups
PIXEL, STEP = 2.0, 2.0 / 1.84
WIDTH = 3.6  # Angstrom: at both Nyquist frequencies the spectrum has fallen to 1e-7
RNG = np.random.default_rng(0)
CENTRES = RNG.uniform(-6, 6, size=(6, 3))  # (x, y, z)


def axis(pixel):
    return (np.arange(M) - M // 2) * pixel


def project(rotations, moves, pixel):
    """Return line integrals; moves are of the particle in the image, in Angstrom."""
    flat = np.einsum("pij,cj->pci", rotations, CENTRES)[:, :, :2] + moves[:, None]
    x, y = (axis(pixel) - flat[:, :, [i]] for i in range(2))
    along = np.exp(-(np.stack([x, y]) ** 2) / (2 * WIDTH**2))
    return WIDTH * np.sqrt(2 * np.pi) * np.einsum("pcx,pcy->pyx", *along)


def density(pixel):
    waves = [
        np.exp(-((axis(pixel) - c) ** 2) / (2 * WIDTH**2)) for c in CENTRES.T[..., None]
    ]
    return np.einsum("cx,cy,cz->zyx", *waves)


class Merged:
    """A data set of two optics groups, in turns."""

    def __init__(self, folder):
        self.folder, self.group = folder, np.arange(COUNT) % 2
        self.rotations = np.asarray(equidistributed_rotations(jax.random.key(0), COUNT))
        self.moves = RNG.uniform(-3, 3, (COUNT, 2))
        self.clean = project(self.rotations, self.moves, PIXEL)
        # As if both had been normalised: values in proportion to the pixel.
        other = project(self.rotations, self.moves, SIZES[1]) / STEP
        own = np.where(self.group[:, None, None] == 0, self.clean, other)
        self.path = self.write("merged", own, SIZES)
        self.same = self.write("same", self.clean, [PIXEL, PIXEL])

    def write(self, name, images, sizes):
        write_stack(self.folder / f"{name}.mrcs", images.astype(np.float32), sizes[0])
        angles = np.rad2deg(matrix_to_euler(jnp.asarray(self.rotations)))
        texts = {
            f"rlnAngle{kind}": values
            for kind, values in zip(("Rot", "Tilt", "Psi"), angles.T, strict=True)
        } | {f"rlnOrigin{a}Angst": -self.moves[:, i] for i, a in enumerate("XY")}
        table = {
            "rlnImageName": [f"{i}@{name}.mrcs" for i in range(1, COUNT + 1)],
            "rlnOpticsGroup": [str(each + 1) for each in self.group],
            **{key: [f"{each:.9f}" for each in v] for key, v in texts.items()},
        }
        optics = {
            "rlnOpticsGroup": ["1", "2"],
            "rlnImagePixelSize": [str(size) for size in sizes],
        }
        path = self.folder / f"{name}.star"
        write_star(path, {"optics": optics, "particles": table})
        return path


@pytest.fixture(scope="module")
def merged(tmp_path_factory):
    return Merged(tmp_path_factory.mktemp("merged"))


def test_images_are_what_a_camera_of_the_largest_pixels_sees(merged):
    file = read_particles(merged.path)
    images = file.particles.images
    assert isinstance(images, Resampled)
    assert file.particles.pixel_size_in_angstroms == PIXEL
    chosen = np.array([7, 2, 3, 0])
    error = images[chosen] - merged.clean[chosen]
    assert np.abs(error).max() <= 1e-4 * merged.clean.max()
    raw = images.source[chosen]
    np.testing.assert_array_equal(images[chosen][[1, 3]], raw[[1, 3]])
    assert np.abs(raw - merged.clean[chosen]).max() > 0.05 * merged.clean.max()


def test_a_table_of_one_size_is_left_alone(merged):
    file = read_particles(merged.same)
    assert not isinstance(file.particles.images, Resampled)


def test_shifts_are_in_the_pixels_of_the_images(merged):
    file = read_particles(merged.path)
    np.testing.assert_allclose(file.poses.shifts, merged.moves / PIXEL, atol=1e-8)


def test_poses_are_written_in_the_units_of_the_table(merged, tmp_path):
    """Origins in Angstrom, and in the pixels of the particle's own stack."""
    blocks = read_table(merged.path).blocks
    old = [
        f"{-x / SIZES[g]:.9f}"
        for x, g in zip(merged.moves[:, 0], merged.group, strict=True)
    ]
    blocks["particles"]["rlnOriginX"] = old
    both = merged.folder / "both.star"
    write_star(both, blocks)
    file = read_particles(both)
    write_particles(tmp_path / "same.star", file, file.poses)
    kept = read_star(tmp_path / "same.star")["particles"]
    for name in ("rlnOriginX", "rlnOriginXAngst", "rlnOriginYAngst", "rlnAnglePsi"):
        assert kept[name] == blocks["particles"][name]
    write_particles(
        tmp_path / "moved.star",
        file,
        Poses(file.poses.rotations, file.poses.shifts + 1),
    )
    moved = read_star(tmp_path / "moved.star")["particles"]
    there = -merged.moves[:, 0] - PIXEL
    in_angstroms = np.array(moved["rlnOriginXAngst"], float)
    np.testing.assert_allclose(in_angstroms, there, atol=1e-5)
    own = there / SIZES[merged.group]
    np.testing.assert_allclose(np.array(moved["rlnOriginX"], float), own, atol=1e-5)


def test_old_tables_have_a_pixel_size_for_each_particle(merged, tmp_path):
    """Origins in pixels, of each image's own, without optics groups."""
    table = dict(read_star(merged.path)["particles"])
    size = SIZES[merged.group]
    for i, letter in enumerate("XY"):
        del table[f"rlnOrigin{letter}Angst"]
        table[f"rlnOrigin{letter}"] = [f"{x:.9f}" for x in -merged.moves[:, i] / size]
    del table["rlnOpticsGroup"]
    table["rlnPixelSize"] = [str(each) for each in size]
    write_star(merged.folder / "old.star", {"": table})
    file = read_particles(merged.folder / "old.star")
    np.testing.assert_allclose(file.poses.shifts, merged.moves / PIXEL, atol=1e-8)
    write_particles(tmp_path / "same.star", file, file.poses)
    assert read_star(tmp_path / "same.star")[""]["rlnOriginX"] == table["rlnOriginX"]


@pytest.mark.slow
def test_the_map_is_that_of_one_pixel_size(merged, tmp_path, capsys):
    maps = []
    for path in (merged.path, merged.same):
        out = tmp_path / f"{path.stem}.mrc"
        assert cli.main(["reconstruct", str(path), "--out", str(out)]) == 0
        volume, voxel = read_mrc(out)
        assert voxel == pytest.approx(PIXEL)
        maps.append(volume)
    said = capsys.readouterr().err
    assert "pixels of 1.84 A and more are resampled to 2 A" in said
    assert said.count("resampled") == 1
    assert np.abs(maps[0] - maps[1]).max() <= 5e-3 * maps[1].max()
    curve = fsc(*map(jnp.float64, (maps[0], density(PIXEL))))
    assert float(curve[1:7].min()) > 0.99


def test_poses_are_compared_in_one_pixel_size(merged, capsys):
    """A frame that is 10 A away is no error, in the pixels of either."""
    table = dict(read_table(merged.path).blocks)
    particles = dict(table["particles"])
    moves = merged.moves + merged.rotations[:, :2] @ np.array([10.0, -4.0, 6.0])
    for i, letter in enumerate("XY"):
        particles[f"rlnOrigin{letter}Angst"] = [f"{-x:.9f}" for x in moves[:, i]]
    away = merged.folder / "away.star"
    write_star(away, {**table, "particles": particles})
    out = merged.folder / "errors.json"
    words = ["evaluate", str(away), str(merged.path), "--json", str(out)]
    assert cli.main(words) == 0
    capsys.readouterr()
    assert read_json(out)["shift_error_in_pixels_p95"] < 1e-3


@pytest.mark.slow
def test_poses_are_refined_across_pixel_sizes(merged, tmp_path):
    """From ten degrees off; Angstroms come out where they were."""
    write_mrc(tmp_path / "init.mrc", density(PIXEL).astype(np.float32), PIXEL)
    file = read_particles(merged.path)
    off = RNG.normal(scale=0.1, size=(COUNT, 3))
    rough = Poses(
        euler_to_matrix(matrix_to_euler(file.poses.rotations) + off),
        0 * file.poses.shifts,
    )
    write_particles(merged.folder / "rough.star", file, rough)
    command = f"refine {merged.folder}/rough.star --map {tmp_path}/init.mrc"
    command += f" --out {tmp_path}/out --max-angle 25 --max-shift 6 --iterations 4"
    assert cli.main(command.split()) == 0
    found = read_star(tmp_path / "out/particles.star")["particles"]
    for i, letter in enumerate("XY"):
        origin = np.array(found[f"rlnOrigin{letter}Angst"], float)
        assert np.median(np.abs(origin + merged.moves[:, i])) < 0.3


def test_white_noise_stays_white_and_as_strong():
    """But for the lowest frequencies, which see that the margin repeats."""
    noise = RNG.normal(size=(4000, M, M)).astype(np.float32)
    images = Resampled(noise, np.full(len(noise), 32 / 31))[np.arange(len(noise))]
    power = np.mean(np.abs(np.fft.rfft2(images)) ** 2, axis=0) / M**2
    kept = np.s_[: M // 2 - 1, : M // 2 - 1]
    assert power[kept].mean() == pytest.approx(1.0, abs=0.03)
    assert np.abs(power[kept] - 1).max() < 0.2


@pytest.mark.parametrize(
    ("step", "words"),
    [
        ([1.0, 1.1], "each of 3 images, got 2"),
        ([1.0, 1.1, 0.9], "got 0.9 to 1.1"),
        ([1.0, 1.1, LARGEST_STEP + 0.01], "got 1 to 1.26"),
        ([1.0, 1.1, np.nan], "got nan"),
    ],
)
def test_steps_out_of_range_are_refused(step, words):
    with pytest.raises(InputError, match=words):
        Resampled(np.zeros((3, M, M)), np.array(step))


def test_sizes_too_far_apart_are_refused(merged):
    blocks = read_table(merged.path).blocks
    blocks["optics"]["rlnImagePixelSize"] = ["2.0", "1.5"]
    write_star(merged.folder / "far.star", blocks)
    with pytest.raises(InputError, match="by at most 25%, got 1.5 to 2 A"):
        read_particles(merged.folder / "far.star")
