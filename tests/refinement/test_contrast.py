"""The sign of images and a map: told beyond doubt, or not at all."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import draw

from jaxrefine import simulate
from jaxrefine.data.particles import Particles
from jaxrefine.geometry import Poses
from jaxrefine.operators import slices
from jaxrefine.operators.gridding import Gridding
from jaxrefine.refinement.config import RefineConfig
from jaxrefine.refinement.contrast import contrast

N, P, CONFIG = 16, 300, RefineConfig(first_r_max=5)
DISC = slices.disc(N, 7)


@pytest.fixture(scope="module")
def scene():
    """A map of blobs off the centre, noiseless images of it, and their poses."""
    rng = np.random.default_rng(1)
    z, y, x = np.mgrid[:N, :N, :N] - N // 2
    volume = np.zeros((N, N, N))
    for a, b, c in rng.uniform(-4, 4, (6, 3)):
        volume += np.exp(-((x - a) ** 2 + (y - b) ** 2 + (z - c) ** 2) / 3)
    rotations = simulate.equidistributed_rotations(jax.random.key(1), P, jnp.float32)
    poses = Poses(rotations, jnp.zeros((P, 2), jnp.float32))
    spectrum = Gridding().spectrum(jnp.asarray(volume, jnp.float32), 7)
    images = slices.to_images(slices.project(spectrum, DISC, poses), DISC)
    return jnp.asarray(volume), poses, np.asarray(images)


def noisy(images, decibels, seed=2):
    sigma = images.std() * 10 ** (-decibels / 20)
    noise = np.random.default_rng(seed).normal(size=images.shape)
    return (images + sigma * noise).astype(np.float32)


def turned(poses, degrees):
    """Poses that are off by so many degrees about random axes."""
    axes = np.random.default_rng(3).normal(size=(P, 3))
    axes *= np.deg2rad(degrees) / np.linalg.norm(axes, axis=1, keepdims=True)
    skew = np.zeros((P, 3, 3))
    skew[:, [2, 0, 1], [1, 2, 0]], skew[:, [1, 2, 0], [2, 0, 1]] = axes, -axes
    turn = np.asarray(jax.scipy.linalg.expm(jnp.asarray(skew)), np.float32)
    return Poses(jnp.asarray(turn @ np.asarray(poses.rotations)), poses.shifts)


def test_images_of_a_map_correlate_with_it_entirely(scene):
    volume, poses, images = scene
    found = contrast(Particles(images), poses, volume, CONFIG)
    assert found.count == 256 and found.correlation == pytest.approx(1, abs=1e-3)
    assert not found.is_opposite and not found.is_chance


@pytest.mark.parametrize(("decibels", "degrees"), [(6, 0), (-8, 40), (-14, 40)])
def test_the_sign_is_beyond_doubt_where_poses_are_rough(scene, decibels, degrees):
    volume, poses, images = scene
    poses, images = turned(poses, degrees), noisy(images, decibels)
    bright = contrast(Particles(images), poses, volume, CONFIG)
    dark = contrast(Particles(-images), poses, volume, CONFIG)
    negative = contrast(Particles(images), poses, -volume, CONFIG)
    assert not bright.is_opposite and dark.is_opposite and negative.is_opposite
    assert not bright.is_chance
    few, some = Particles(images[:30]), poses.take(np.arange(30))
    assert not contrast(few, some, volume, CONFIG).is_chance
    assert dark.correlation == pytest.approx(-bright.correlation, abs=1e-6)
    assert negative.standard_error == pytest.approx(bright.standard_error, abs=1e-6)


def test_the_scales_of_images_and_map_do_not_matter(scene):
    volume, poses, images = scene
    images = noisy(images, -8)
    reference = contrast(Particles(images), poses, volume, CONFIG)
    for exponent in (-40, 40):
        scaled = Particles(images * np.float32(2.0 ** (exponent / 2)))
        found = contrast(scaled, poses, volume * 2.0 ** (2 * exponent), CONFIG)
        assert found.correlation == pytest.approx(reference.correlation, abs=1e-6)


def test_what_does_not_resemble_the_map_is_not_its_negative(scene):
    """Noise alone, and maps of noise: with either sign, there is doubt."""
    volume, poses, images = scene
    for seed in range(4):
        noise = Particles(noisy(0 * images + 1e-9 * images, -60, seed))
        other = draw(N, N, N, seed=seed)
        assert contrast(noise, poses, volume, CONFIG).is_chance
        for sign in (1, -1):
            assert not contrast(noise, poses, sign * volume, CONFIG).is_opposite
            sound = Particles(noisy(images, -8))
            assert not contrast(sound, poses, sign * other, CONFIG).is_opposite


def test_a_single_image_leaves_doubt(scene):
    volume, poses, images = scene
    one = np.arange(1)
    found = contrast(Particles(-images[:1]), poses.take(one), volume, CONFIG)
    assert found.correlation < -0.9 and not found.is_opposite
