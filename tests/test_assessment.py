"""Assessments: what they say does not depend on the map's frame."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrefine import evaluation, geometry, simulate
from jaxrefine.geometry import Poses
from jaxrefine.maps.align import move_map
from jaxrefine.maps.fsc import fsc
from jaxrefine.operators import kbwf

N = 20
ROTATION = geometry.rotvec_to_matrix(jnp.array([0.1, -0.15, 0.2]))
OFFSET = jnp.array([0.4, -0.7, 0.2])


@pytest.fixture(scope="module")
def case():
    """A true map and poses, and both of them turned and moved as a whole."""
    truth = simulate.blur(simulate.phantom(jax.random.key(0), N, jnp.float64), 1.0)
    angles = geometry.equidistributed_angles(jax.random.key(1), 60, jnp.float64)
    poses = Poses(angles, jnp.zeros((60, 2)))
    turned = poses.rotations @ ROTATION
    moved = Poses(geometry.matrix_to_euler(turned), -turned[:, :2] @ OFFSET)
    return truth, poses, move_map(truth, ROTATION, OFFSET), moved


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
    assert crooked.gauge_rotation_deg == pytest.approx(expected, abs=1e-3)
    assert straight.gauge_rotation_deg == pytest.approx(0, abs=1e-3)


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
    rough = Poses(moved.angles + 0.01, moved.shifts + 0.1)
    found = evaluation.assess(np.asarray(noisy), rough, truth, poses)
    row = found.row()
    assert row["mean_fsc"] == pytest.approx(float(np.mean(found.curve[1:])))
    assert row["mean_fsc_aligned"] == pytest.approx(
        float(np.mean(found.aligned_curve[1:]))
    )
    np.testing.assert_allclose(found.curve, fsc(noisy, truth), atol=1e-12)
    pair = (rough.angles, rough.shifts, poses.angles, poses.shifts)
    summary = evaluation.summarise(evaluation.pose_errors(*pair))
    assert {name: row[name] for name in summary} == summary


@pytest.mark.slow
def test_evaluate_moved_moves_the_map():
    """Against the sum over the basis typed out, at every voxel."""
    basis, n = kbwf.KBWF(radius=2.0, taper=10.8), 7
    c = jax.random.normal(jax.random.key(2), (n, n, n))
    rotation = geometry.rotvec_to_matrix(jnp.array([0.4, 1.0, -0.3]))
    d = jnp.array([0.3, -0.2, 0.6])
    k = np.stack(np.meshgrid(*[np.arange(n) - n // 2] * 3, indexing="ij")[::-1], -1)
    k = jnp.asarray(k.reshape(-1, 3), float)
    where = (k - d[None]) @ rotation.T
    dense = kbwf.window(basis, where[:, None] - k[None]) @ c.ravel()
    moved = kbwf.evaluate_moved(basis, c, rotation, d)
    np.testing.assert_allclose(moved.ravel(), dense, atol=1e-5)
