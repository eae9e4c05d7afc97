"""Errors of poses and maps against a truth.

A motion of the whole map together with its poses is no error and changes none, lost
particles do not drag the frame along, and a row says what its parts do.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import draw

from jaxrefine import evaluation, simulate
from jaxrefine.euler import euler_to_matrix, matrix_to_euler
from jaxrefine.geometry import Poses, rotvec_to_matrix, uniform_rotations
from jaxrefine.maps.align import move_map
from jaxrefine.maps.fsc import fsc

KEY = jax.random.key(0)


def test_volume_snr_db():
    truth = draw(8, 8, 8)
    for factor, decibels in [(0.9, 20.0), (0.0, 0.0), (1.01, 40.0)]:
        result = evaluation.volume_snr_db(truth, factor * truth)
        np.testing.assert_allclose(result, decibels, atol=1e-9)
    assert evaluation.volume_snr_db(truth, truth) == jnp.inf


def draw_poses(count, dtype=jnp.float64):
    keys = jax.random.split(jax.random.fold_in(KEY, 9), 2)
    rotations = uniform_rotations(keys[0], count, dtype)
    return Poses(rotations, 4 * jax.random.normal(keys[1], (count, 2), dtype))


def moved(poses):
    """The same images, as poses of a map that was turned and moved."""
    dtype = poses.rotations.dtype
    turn = euler_to_matrix(jnp.array([0.7, 1.9, -2.0], dtype))
    step = jnp.array([3.0, -1.5, 2.5], dtype)
    return Poses(poses.rotations @ turn, poses.shifts - poses.rotations[:, :2] @ step)


@pytest.mark.parametrize(("dtype", "atol"), [(jnp.float32, 2e-3), (jnp.float64, 1e-5)])
def test_moving_the_map_is_no_error(dtype, atol):
    truth = draw_poses(50, dtype)
    errors = jax.jit(evaluation.pose_errors)(moved(truth), truth)
    np.testing.assert_allclose(errors.angle_in_degrees, 0, atol=atol)
    np.testing.assert_allclose(errors.shift_in_pixels, 0, atol=atol)
    assert errors.angle_in_degrees.dtype == dtype


def test_errors_are_those_of_the_particles_that_are_off():
    """Two particles of many: the rest pins the frame, up to their small pull on it."""
    truth = draw_poses(400)
    turn = rotvec_to_matrix(jnp.array([0.0, 0.0, np.deg2rad(30)]))
    off = Poses(
        truth.rotations.at[3].set(turn @ truth.rotations[3]),
        truth.shifts.at[7].add(jnp.array([3.0, 4.0])),
    )
    errors = evaluation.pose_errors(moved(off), truth)
    expected = jnp.zeros(400).at[3].set(30)
    np.testing.assert_allclose(errors.angle_in_degrees, expected, atol=0.3)
    expected = jnp.zeros(400).at[7].set(5)
    np.testing.assert_allclose(errors.shift_in_pixels, expected, atol=0.1)


def test_lost_particles_do_not_drag_the_frame():
    """A quarter is off by half a turn about a point beside the origin."""
    truth = draw_poses(400)
    turn = jnp.diag(jnp.array([-1.0, -1.0, 1.0]))
    centre = jnp.array([4.0, -2.0, 3.0])
    lost = jnp.arange(400) < 100
    beside = truth.shifts + (truth.rotations @ (centre - turn @ centre))[:, :2]
    noisy = truth.shifts + 0.2 * jax.random.normal(KEY, truth.shifts.shape)
    estimate = Poses(
        jnp.where(lost[:, None, None], truth.rotations @ turn, truth.rotations),
        jnp.where(lost[:, None], beside, noisy),
    )
    errors = evaluation.pose_errors(estimate, truth)
    kept = errors.shift_in_pixels[100:]
    here = jnp.linalg.norm(noisy - truth.shifts, axis=-1)[100:]
    assert float(jnp.median(kept)) < 1.2 * float(jnp.median(here))
    np.testing.assert_allclose(errors.angle_in_degrees[100:], 0, atol=1e-3)


@pytest.mark.slow
def test_moving_the_map_changes_no_error():
    truth = draw_poses(60)
    turns = rotvec_to_matrix(0.05 * draw(60, 3, seed=5))
    noisy = Poses(
        turns @ truth.rotations, truth.shifts + 0.5 * draw(*truth.shifts.shape, seed=6)
    )
    still = evaluation.pose_errors(noisy, truth)
    other = evaluation.pose_errors(moved(noisy), truth)
    np.testing.assert_allclose(
        other.angle_in_degrees, still.angle_in_degrees, atol=1e-4
    )
    np.testing.assert_allclose(other.shift_in_pixels, still.shift_in_pixels, atol=1e-4)
    assert 0.3 < jnp.median(still.shift_in_pixels) < 0.9


def test_views_along_one_direction_are_no_trouble():
    """Depth is then unseen, and the least-squares system singular."""
    psi = 2 * np.pi * jnp.arange(20.0) / 20
    angles = jnp.stack([jnp.full(20, 0.3), jnp.full(20, 0.3), psi], axis=-1)
    truth = Poses(euler_to_matrix(angles), draw_poses(20).shifts)
    errors = evaluation.pose_errors(moved(truth), truth)
    np.testing.assert_allclose(errors.shift_in_pixels, 0, atol=1e-5)


def test_summary():
    errors = evaluation.PoseErrors(
        jnp.array([0.0, 1, 2, 3, 4, 5, 6, 7, 20, 90, 170]), jnp.arange(11.0) / 10
    )
    assert evaluation.summarise(errors) == pytest.approx(
        {
            "angle_error_in_degrees_median": 5.0,
            "angle_error_in_degrees_p90": 90.0,
            "angle_error_in_degrees_p95": 130.0,
            "fraction_within_5_degrees": 6 / 11,
            "fraction_within_10_degrees": 8 / 11,
            "shift_error_in_pixels_median": 0.5,
            "shift_error_in_pixels_p90": 0.9,
            "shift_error_in_pixels_p95": 0.95,
        }
    )


@pytest.mark.slow
def test_signed_differences_are_those_put_in():
    """Angles off by known amounts, in a frame that is turned and moved as a whole."""
    key = jax.random.key(7)
    rotations = simulate.equidistributed_rotations(key, 80, jnp.float64)
    angles = matrix_to_euler(rotations)
    angles = angles[(angles[:, 1] > 0.3) & (angles[:, 1] < 2.8)]
    error = 0.02 * jax.random.normal(key, angles.shape)
    error = error - jnp.median(error, axis=0)[None]
    off = 0.3 * jax.random.normal(jax.random.key(8), (len(angles), 2))
    frame = rotvec_to_matrix(jnp.array([0.3, -0.5, 0.2]))
    estimate = Poses(euler_to_matrix(angles - error) @ frame, -off)
    truth = Poses(euler_to_matrix(angles), jnp.zeros_like(off))
    turned, shifted = evaluation.pose_differences(estimate, truth)
    # The frame is found from noisy poses, to a fraction of their errors.
    np.testing.assert_allclose(turned, np.rad2deg(error), atol=0.8)
    np.testing.assert_allclose(shifted, off, atol=0.2)
    assert np.corrcoef(turned.ravel(), error.ravel())[0, 1] > 0.95


# --- assessments of a map with its poses

N = 20
ROTATION = rotvec_to_matrix(jnp.array([0.1, -0.15, 0.2]))
OFFSET = jnp.array([0.4, -0.7, 0.2])


@pytest.fixture(scope="module")
def case():
    """A true map and poses, and both of them turned and moved as a whole."""
    truth = simulate.blur(simulate.phantom(jax.random.key(0), N, jnp.float64), 1.0)
    rotations = simulate.equidistributed_rotations(jax.random.key(1), 60, jnp.float64)
    poses = Poses(rotations, jnp.zeros((60, 2)))
    turned = poses.rotations @ ROTATION
    moved = Poses(turned, -turned[:, :2] @ OFFSET)
    return truth, poses, move_map(truth, ROTATION, OFFSET), moved


@pytest.mark.slow
def test_moved_map_is_scored_alike(case):
    """Turn a map with its poses: the aligned curve stays, the raw one falls."""
    truth, poses, volume, moved = case
    straight = evaluation.assess(truth, poses, truth, poses)
    crooked = evaluation.assess(volume, moved, truth, poses)
    assert straight.row()["mean_fsc"] == pytest.approx(1)
    assert crooked.row()["mean_fsc"] < 0.8
    # The last shells are those that a turned box cuts off.
    np.testing.assert_allclose(
        crooked.aligned_curve[:-3], straight.aligned_curve[:-3], atol=0.02
    )
    expected = np.rad2deg(np.linalg.norm([0.1, -0.15, 0.2]))
    assert crooked.gauge_rotation_in_degrees == pytest.approx(expected, abs=1e-3)
    assert straight.gauge_rotation_in_degrees == pytest.approx(0, abs=1e-3)


def test_a_map_in_its_place_keeps_its_curve(case):
    """To Nyquist, noise included; but for the corners of its last shell."""
    truth, poses, _, _ = case
    noisy = truth + truth.std() * jax.random.normal(jax.random.key(3), (N,) * 3)
    found = evaluation.assess(noisy, poses, truth, poses)
    np.testing.assert_allclose(found.aligned_curve[:-1], found.curve[:-1], atol=2e-3)
    assert found.curve.min() < 0.5 < found.curve[2]


def test_a_row_is_what_its_parts_say(case):
    truth, poses, volume, moved = case
    noisy = volume + 0.3 * volume.std() * jax.random.normal(jax.random.key(2), (N,) * 3)
    turn = rotvec_to_matrix(jnp.array([0.01, 0.01, 0.01]))
    rough = Poses(turn @ moved.rotations, moved.shifts + 0.1)
    found = evaluation.assess(np.asarray(noisy), rough, truth, poses)
    row = found.row()
    assert row["mean_fsc"] == pytest.approx(float(np.mean(found.curve[1:])))
    assert row["mean_fsc_aligned"] == pytest.approx(
        float(np.mean(found.aligned_curve[1:]))
    )
    np.testing.assert_allclose(found.curve, fsc(noisy, truth), atol=1e-12)
    summary = evaluation.summarise(evaluation.pose_errors(rough, poses))
    assert {name: row[name] for name in summary} == summary
