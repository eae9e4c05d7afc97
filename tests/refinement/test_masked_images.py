"""What a refinement believes of images that are 0 outside of a circle."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import COARSE

from jaxrefine import evaluation, simulate
from jaxrefine.data.particles import Particles
from jaxrefine.data.preprocess import Masked
from jaxrefine.geometry import Poses
from jaxrefine.operators import slices
from jaxrefine.operators.gridding import Gridding
from jaxrefine.refinement import loop

pytestmark = pytest.mark.slow

N, LAST, P, DIAMETER = 32, 15, 400, 14.0
SINGLE, KEY = jnp.float32, jax.random.key(3)
CONFIG = dataclasses.replace(
    COARSE,
    angle_spread=0.5,
    shift_spread=2.0,
    iterations=1,
    first_r_max=LAST,
    search_r_max=LAST,
    multi_start=(),
    hypotheses=1,
    tau=1.0,
    batch_size=100,
)


@pytest.fixture(scope="module")
def scene():
    """A map within 6 voxels of the middle, poses, images, and the noise's spread."""
    rng = np.random.default_rng(3)
    z, y, x = np.mgrid[:N, :N, :N] - N // 2
    places = rng.uniform(-2.5, 2.5, (8, 3))
    squares = [(x - a) ** 2 + (y - b) ** 2 + (z - c) ** 2 for a, b, c in places]
    volume = jnp.asarray(sum(np.exp(-square / 2) for square in squares), SINGLE)
    poses = Poses(
        simulate.equidistributed_rotations(jax.random.key(1), P, SINGLE),
        jnp.zeros((P, 2), SINGLE),
    )
    disc = slices.disc(N, LAST)
    clean = slices.project(Gridding(4, 2.0).spectrum(volume, LAST), disc, poses)
    clean = np.asarray(slices.to_images(clean, disc))
    sigma = 0.7 * float(np.std(clean))
    images = clean + sigma * rng.normal(size=clean.shape)
    return volume, poses, images.astype(np.float32), sigma


def refined(scene, particles):
    volume, poses, _, _ = scene
    return loop.refine(particles, poses, volume, CONFIG, key=KEY)


@pytest.fixture(scope="module")
def whole(scene):
    return refined(scene, Particles(scene[2]))


@pytest.fixture(scope="module")
def masked(scene):
    images = Masked(scene[2], DIAMETER, np.zeros((P, 2)))
    assert 0.15 < images.noise_share < 0.35
    return refined(scene, Particles(images))


def test_the_noise_is_that_in_the_circle(scene, whole, masked):
    for result in (whole, masked):
        (state,) = result.state.set_states
        found = np.mean(np.asarray(state.noise)[0, 2:LAST])
        assert found == pytest.approx((scene[3] * N) ** 2, rel=0.1)


def test_a_mask_adds_no_information(whole, masked):
    """About the poses: what it takes away is noise that says nothing about them."""
    ratio = [
        np.median(np.trace(result.covariances[:, some, some], axis1=1, axis2=2))
        for result in (whole, masked)
        for some in (slice(0, 3), slice(3, 5))
    ]
    np.testing.assert_allclose(ratio[2:], ratio[:2], rtol=0.25)


def test_error_bars_are_honest(scene, masked):
    """Mean squares are what is expected, or less: masked maps are quieter, too."""
    truth = scene[1]
    errors = evaluation.pose_errors(masked.poses, truth)
    variances = np.diagonal(masked.covariances, axis1=1, axis2=2)
    for error, expected in (
        (np.deg2rad(errors.angle_in_degrees), variances[:, :3].sum(axis=1)),
        (errors.shift_in_pixels, variances[:, 3:].sum(axis=1)),
    ):
        assert 0.4 < np.mean(np.asarray(error) ** 2) / np.mean(expected) < 1.2


def test_a_better_start_of_the_noise(scene):
    """Before any map is made, too."""
    images = Masked(scene[2], DIAMETER, np.zeros((P, 2)))
    particles = Particles(images)
    (state,) = loop.init(particles, scene[1], scene[0], CONFIG, key=KEY).set_states
    found = np.asarray(state.noise)[0, LAST]
    assert found == pytest.approx((scene[3] * N) ** 2, rel=0.1)
