"""Poses in RELION's files: units, signs, optics groups, old and new."""

from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from helpers import draw_rotations

from jaxrefine.errors import InputError
from jaxrefine.euler import euler_to_matrix
from jaxrefine.geometry import Poses
from jaxrefine.io import read_poses, read_star, write_new_particles, write_star


@pytest.fixture
def path(tmp_path):
    return tmp_path / "particles.star"


def in_degrees(angles):
    """Rotations of angles (rot, tilt, psi)."""
    return euler_to_matrix(jnp.deg2rad(jnp.asarray(angles)))


def pose_file(path: Path, **columns: list[str]) -> Path:
    angles = {f"rlnAngle{name}": ["10", "20"] for name in ("Rot", "Tilt", "Psi")}
    write_star(path, {"images": angles | columns})
    return path


def test_poses_come_back_to_the_digits_that_are_written(path):
    rng = np.random.default_rng(0)
    poses = Poses(draw_rotations(9), rng.normal(0, 5, (9, 2)))
    names = [f"{i:06d}@stack of mine.mrcs" for i in range(1, 10)]
    write_new_particles(path, poses, names, 64, 1.34)
    again = read_poses(path)
    # Three angles, each rounded in the sixth decimal of a degree.
    atol = 3 * np.deg2rad(5.1e-7)
    np.testing.assert_allclose(again.rotations, poses.rotations, atol=atol)
    np.testing.assert_allclose(again.shifts, poses.shifts, atol=5.1e-7 / 1.34)

    blocks = read_star(path)
    assert blocks["optics"] == {
        "rlnOpticsGroup": ["1"],
        "rlnOpticsGroupName": ["opticsGroup1"],
        "rlnImagePixelSize": ["1.340000"],
        "rlnImageSize": ["64"],
        "rlnImageDimensionality": ["2"],
    }
    assert blocks["particles"]["rlnImageName"] == names
    assert blocks["particles"]["rlnOpticsGroup"] == ["1"] * 9


def test_poses_are_written_with_relions_units_and_signs(path):
    """rot, tilt, psi in this order; a particle at +x has a negative origin."""
    poses = Poses(in_degrees([[10.0, 20.0, 30.0]]), np.array([[1.0, -2.0]]))
    write_new_particles(path, poses, ["1@a.mrcs"], 8, 1.5)
    particles = read_star(path)["particles"]
    assert particles["rlnAngleRot"] == ["10.000000"]
    assert particles["rlnAngleTilt"] == ["20.000000"]
    assert particles["rlnAnglePsi"] == ["30.000000"]
    assert particles["rlnOriginXAngst"] == ["-1.500000"]
    assert particles["rlnOriginYAngst"] == ["3.000000"]


def test_origins_may_be_in_pixels_or_missing(path):
    poses = read_poses(pose_file(path, rlnOriginX=["3", "-4"]))
    np.testing.assert_array_equal(poses.shifts, [[-3, 0], [4, 0]])
    expected = in_degrees([[10.0] * 3, [20.0] * 3])
    np.testing.assert_allclose(poses.rotations, expected, atol=1e-15)


def test_each_particle_has_the_pixel_of_its_optics_group(path):
    particles = read_star(pose_file(path))["images"]
    particles["rlnOriginYAngst"] = ["6", "6"]
    particles["rlnOriginY"] = ["99", "99"]
    particles["rlnOpticsGroup"] = ["2", "1"]
    optics = {"rlnOpticsGroup": ["1", "2"], "rlnImagePixelSize": ["1.5", "2"]}
    write_star(path, {"particles": particles, "optics": optics, "other": {}})
    np.testing.assert_array_equal(read_poses(path).shifts, [[0, -3], [0, -4]])


@pytest.mark.parametrize(
    "bad", ["zero", "nan", "inf", "1e39", "-1e300", "1_0", "\u0661", "1" * 400, ""]
)
def test_values_that_are_not_numbers_are_refused(path, bad):
    """Nor are Python's and other alphabets' numbers, nor those beyond float32."""
    pose_file(path, rlnOriginX=["1", bad])
    words = rf"{path}, column rlnOriginX: .*got '{bad[:9]}.*\(row 2\)$"
    with pytest.raises(InputError, match=words) as caught:
        read_poses(path)
    assert len(str(caught.value)) < len(str(path)) + 120


OPTICS = {"rlnOpticsGroup": ["1"], "rlnImagePixelSize": ["2"]}


@pytest.mark.parametrize(
    ("optics", "group", "words"),
    [
        (None, {}, "rlnImagePixelSize .* without a pixel size"),
        ({"rlnOpticsGroup": ["1"]}, {}, "rlnImagePixelSize .* without a pixel size"),
        (OPTICS, {}, "the table of particles must have the column rlnOpticsGroup"),
        (OPTICS, {"rlnOpticsGroup": ["1", "7"]}, "got particles of group 7"),
        (
            OPTICS | {"rlnImagePixelSize": ["0"]},
            {"rlnOpticsGroup": ["1", "1"]},
            r"must be a positive number .* got 0 A \(particle 1\)",
        ),
        (
            OPTICS | {"rlnImagePixelSize": ["1e-40"]},
            {"rlnOpticsGroup": ["1", "1"]},
            "in single precision, got 1e-40 A",
        ),
        (None, {"rlnPixelSize": ["1", "-2"]}, r"got -2 A \(particle 2\)"),
        (None, {"rlnPixelSize": ["1e-38", "1e-38"]}, "got 1e-38 A"),
    ],
)
def test_origins_in_angstroms_need_the_pixel_size(path, optics, group, words):
    blocks = read_star(pose_file(path, rlnOriginXAngst=["3", "3"], **group))
    if optics is not None:
        blocks["optics"] = optics
    write_star(path, blocks)
    with pytest.raises(InputError, match=words):
        read_poses(path)


@pytest.mark.parametrize("optics", [{}, {"optics": OPTICS}])
def test_a_pixel_size_of_the_particle_precedes_its_groups(path, optics):
    own = {"rlnImagePixelSize": ["1.5", "3"], "rlnOpticsGroup": ["1", "1"]}
    blocks = read_star(pose_file(path, rlnOriginXAngst=["3", "3"], **own))
    write_star(path, optics | {"particles": blocks["images"]})
    np.testing.assert_array_equal(read_poses(path).shifts, [[-2, 0], [-1, 0]])


def test_missing_angles_are_named(path):
    write_star(path, {"": {"rlnAngleTilt": ["1"]}})
    with pytest.raises(InputError, match="columns rlnAngleRot, rlnAnglePsi"):
        read_poses(path)


def test_two_blocks_that_could_be_particles_are_refused(path):
    write_star(path, {"a": {}, "b": {}})
    with pytest.raises(InputError, match="got the blocks 'a', 'b'"):
        read_poses(path)
    write_star(path, {f"b{i}": {} for i in range(5000)})
    with pytest.raises(InputError, match="'b3', 'b4', and 4995 more$"):
        read_poses(path)


def test_real_files_without_poses_are_refused(data_dir):
    for name in ("star/toy_projections_13", "star/empty_loop"):
        with pytest.raises(InputError, match="must have the columns rlnAngleRot"):
            read_poses(data_dir / f"{name}.star")


def test_real_origins_in_angstroms_become_pixels(data_dir):
    poses = read_poses(data_dir / "star" / "relion_style_particles.star")
    expected = in_degrees([-175.64627, 69.778893, 124.646599])
    np.testing.assert_allclose(poses.rotations[0], expected, atol=1e-15)
    shift = [-0.162908 / 0.725, -2.218803 / 0.725]
    np.testing.assert_allclose(poses.shifts[0], shift)


def test_relion_30_and_31_agree(data_dir):
    """The samples differ in two known ways, both in the files themselves.

    The 3.1 file carries the 3.0 file's origins as if they were Angstrom, at a pixel of
    1.4 A; and its particle 15 repeats particle 14.
    """
    folder = data_dir / "real_sample"
    old, new = (
        read_poses(folder / f"sample_particles_relion{version}.star")
        for version in (30, 31)
    )
    same = np.arange(17) != 14
    np.testing.assert_array_equal(new.rotations[same], old.rotations[same])
    np.testing.assert_allclose(1.4 * new.shifts[same], old.shifts[same], atol=1e-12)
    np.testing.assert_array_equal(new.rotations[14], new.rotations[13])
    assert np.ptp(old.shifts) > 1


def test_poses_that_relion_projected_at_are_the_known_ones(data_dir):
    folder = data_dir / "relion_oracle"
    shifted = read_poses(folder / "rln_proj_64_shifted.star")
    centred = read_poses(folder / "rln_proj_64_centered.star")
    expected = [[-6, -10], [-10, 5], [8, -11], [13, 3]]
    np.testing.assert_array_equal(shifted.shifts, expected)
    np.testing.assert_array_equal(centred.shifts, np.zeros((4, 2)))
    np.testing.assert_array_equal(shifted.rotations, centred.rotations)
    expected = in_degrees([235.820138, 113.08603, 50.468981])
    np.testing.assert_allclose(shifted.rotations[0], expected, atol=1e-15)
