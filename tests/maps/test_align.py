"""Rigid alignment of maps: the motion is found, and poses go along with it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import centred, lattice_points

from jaxrefine import geometry, simulate
from jaxrefine.euler import euler_to_matrix
from jaxrefine.geometry import Poses
from jaxrefine.maps.align import align_maps, move_map
from jaxrefine.maps.fsc import fsc, mean_fsc
from jaxrefine.operators import kbwf, slices
from jaxrefine.operators.gridding import Gridding

N, R = 24, 8
ROTATION = geometry.rotvec_to_matrix(jnp.array([0.04, -0.07, 0.05]))
TRANSLATION = jnp.array([0.7, -0.4, 0.3])


@pytest.fixture(scope="module")
def volume():
    return simulate.phantom(jax.random.key(0), N, jnp.float64)


@pytest.mark.slow
def test_the_moved_map_is_that_of_the_basis(volume):
    """At some voxels, against the sum of Kaiser-Bessel windows, eq. (2), typed out."""
    basis, smooth = kbwf.KBWF(), simulate.blur(volume, 1.5)
    coefficients = kbwf.expand(basis, smooth).ravel()
    points = jnp.asarray(lattice_points(centred(N)).T, float)
    inside = np.flatnonzero(np.abs(points).max(axis=1) < N // 4)
    voxels = np.random.default_rng(0).choice(inside, 200, replace=False)
    origins = (points[voxels] - TRANSLATION[None]) @ ROTATION.T
    there = kbwf.window(basis, origins[:, None] - points[None]) @ coefficients
    moved = move_map(smooth, ROTATION, TRANSLATION).ravel()[voxels]
    assert np.ptp(there) > 0.5 * float(smooth.max())
    np.testing.assert_allclose(moved, there, atol=2e-3 * float(smooth.max()))


@pytest.mark.slow
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
@pytest.mark.parametrize(("r_max", "level"), [(R, 0.3), (N // 2, 0.1)])
def test_the_motion_is_a_minimum_over_all_frequencies(volume, r_max, level):
    """Of the documented cost, over both of every pair, on maps that are noisy."""
    noise = jax.random.normal(jax.random.key(3), (2, N, N, N))
    noise = level * volume.std() * noise
    first, second = volume + noise[0], volume + noise[1]
    axis = np.fft.fftfreq(N, 1 / N)
    z, y, x = np.meshgrid(axis, axis, axis, indexing="ij")
    places = np.nonzero(x**2 + y**2 + z**2 <= r_max**2)
    lattice = jnp.asarray(np.stack([each[places] for each in (x, y, z)], axis=-1))
    target = jnp.fft.fftn(jnp.fft.ifftshift(second))[places]
    spectrum = Gridding().spectrum(first, r_max)
    rotation, translation = align_maps(first, second, r_max)

    @jax.jit
    def cost(step):
        turned = lattice @ (geometry.rotvec_to_matrix(step[:3]) @ rotation).T
        angle = -2 * np.pi / N * lattice @ (translation + step[3:])
        model = spectrum(*turned.T) * jax.lax.complex(jnp.cos(angle), jnp.sin(angle))
        scale = jnp.vdot(model, target).real / jnp.vdot(model, model).real
        gap = scale.astype(model.dtype) * model - target
        return jnp.sum(gap.real**2 + gap.imag**2)

    # How far it still is to the bottom along each axis, in radians and voxels.
    for step in 1e-4 * jnp.eye(6):
        before, here, after = (float(cost(k * step)) for k in (-1, 0, 1))
        assert min(before, after) > here
        assert abs(after - before) / (before - 2 * here + after) / 2 < 0.1


@pytest.mark.slow
def test_poses_go_along(volume):
    """Projections of the moved map at ``R G``, shifted back, are what they were."""
    angles = jnp.array([[0.3, 1.0, -0.4]])
    poses = Poses(euler_to_matrix(angles), jnp.array([[0.5, -0.2]]))
    turned = poses.rotations @ ROTATION
    moved = Poses(turned, poses.shifts - turned[:, :2] @ TRANSLATION)
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
    before = mean_fsc(fsc(first, second))
    found = move_map(second, *align_maps(second, first, R))
    assert mean_fsc(fsc(first, found)) > before + 0.1
