"""Rigid alignment of maps: the motion is found, and poses go along with it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrefine import geometry, kbwf, metrics, simulate, slices
from jaxrefine.alignment import align_maps, move_map
from jaxrefine.geometry import Poses
from jaxrefine.gridding import Gridding

N, R = 24, 8
ROTATION = geometry.rotvec_to_matrix(jnp.array([0.04, -0.07, 0.05]))
TRANSLATION = jnp.array([0.7, -0.4, 0.3])


@pytest.fixture(scope="module")
def volume():
    return simulate.phantom(jax.random.key(0), N, jnp.float64)


def test_the_moved_map_is_that_of_the_basis(volume):
    """Another way to move a map: by its coefficients in Kaiser-Bessel windows."""
    basis = kbwf.KBWF()
    smooth = simulate.blur(volume, 1.5)
    there = kbwf.evaluate_moved(
        basis, kbwf.expand(basis, smooth), ROTATION, TRANSLATION
    )
    np.testing.assert_allclose(
        move_map(smooth, ROTATION, TRANSLATION), there, atol=2e-3 * float(smooth.max())
    )


def test_the_motion_is_found(volume):
    moved = move_map(volume, ROTATION, TRANSLATION)
    rotation, translation = align_maps(3 * volume, moved, R)
    np.testing.assert_allclose(rotation, ROTATION, atol=2e-4)
    np.testing.assert_allclose(translation, TRANSLATION, atol=5e-3)


def test_noise_moves_it_little(volume):
    noise = 0.3 * float(volume.std()) * jax.random.normal(jax.random.key(1), (N,) * 3)
    rotation, translation = align_maps(
        volume + noise, move_map(volume, ROTATION, TRANSLATION), R
    )
    assert geometry.geodesic_distance(rotation, ROTATION) < np.deg2rad(0.5)
    assert jnp.linalg.norm(translation - TRANSLATION) < 0.1


@pytest.mark.slow
def test_poses_go_along(volume):
    """Projections of the moved map at ``R G``, shifted back, are what they were."""
    angles = jnp.array([[0.3, 1.0, -0.4]])
    poses = Poses(angles, jnp.array([[0.5, -0.2]]))
    turned = poses.rotations @ ROTATION
    moved = Poses(
        geometry.matrix_to_euler(turned),
        poses.shifts - turned[:, :2] @ TRANSLATION,
    )
    disc = slices.disc(N, R)
    there = move_map(volume, ROTATION, TRANSLATION)
    before, after = (
        slices.project(Gridding().spectrum(v, R), disc, p)
        for v, p in ((volume, poses), (there, moved))
    )
    scale = float(jnp.abs(before).max())
    np.testing.assert_allclose(after, before, atol=2e-3 * scale)


def test_an_empty_map_stays_where_it_is(volume):
    rotation, translation = align_maps(jnp.zeros_like(volume), volume, R)
    np.testing.assert_array_equal(rotation, np.eye(3))
    np.testing.assert_array_equal(translation, 0)


def test_the_correlation_rises(volume):
    noise = jax.random.normal(jax.random.key(2), (2, N, N, N))
    noise = 0.3 * float(volume.std()) * noise
    first = volume + noise[0]
    second = move_map(volume, ROTATION, TRANSLATION) + noise[1]
    before = metrics.mean_fsc(metrics.fsc(first, second))
    found = move_map(second, *align_maps(second, first, R))
    assert metrics.mean_fsc(metrics.fsc(first, found)) > before + 0.1
