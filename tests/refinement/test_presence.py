"""Which images show a particle, when all poses were searched for."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import COARSE

from jaxrefine import simulate
from jaxrefine.data.particles import Particles
from jaxrefine.geometry import Poses
from jaxrefine.maps.fsc import fsc, mean_fsc
from jaxrefine.operators import slices
from jaxrefine.operators.gridding import Gridding
from jaxrefine.poses.matching import match
from jaxrefine.refinement import loop

pytestmark = pytest.mark.slow

N, COUNT, LAST, SNR_DB = 24, 48, 11, -5.0
IS_NOISE = np.arange(2 * COUNT) >= COUNT
CONFIG = dataclasses.replace(
    COARSE,
    iterations=2,
    first_r_max=LAST,
    search_r_max=LAST,
    candidates=16,
    batch_size=64,
)


class Scene:
    """As many images of noise as of particles, with poses from a map of these."""

    def __init__(self):
        self.truth = simulate.phantom(jax.random.key(0), N)
        angles, shifts, noise = jax.random.split(jax.random.key(1), 3)
        poses = Poses(
            simulate.equidistributed_rotations(angles, COUNT, jnp.float32),
            simulate.random_shifts(shifts, COUNT, 1.0, jnp.float32),
        )
        disc = slices.disc(N, LAST)
        spectrum = Gridding(4, 2.0).spectrum(self.truth, LAST)
        clean = slices.to_images(slices.project(spectrum, disc, poses), disc)
        sigma = simulate.noise_std(clean, SNR_DB)
        both = jnp.concatenate([clean, jnp.zeros_like(clean)])
        self.images = np.array(simulate.add_noise(noise, both, sigma), np.float32)
        self.map = simulate.blur(self.truth, 1.5)
        self.matched = match(Particles(self.images), self.map).poses

    def refine(self, chosen, **changes):
        particles = Particles(self.images).take(np.flatnonzero(chosen))
        poses = self.matched.take(np.flatnonzero(chosen))
        config = dataclasses.replace(CONFIG, **changes)
        return loop.refine(particles, poses, self.map, config, key=jax.random.key(2))

    def fsc(self, volume):
        return float(mean_fsc(fsc(jnp.asarray(volume), self.truth)))


@pytest.fixture(scope="module")
def scene():
    return Scene()


@pytest.fixture(scope="module")
def mixed(scene):
    return scene.refine(np.ones(2 * COUNT, bool))


@pytest.fixture(scope="module")
def alone(scene):
    return scene.refine(~IS_NOISE)


def test_a_mixed_set_is_told_apart(mixed):
    """Nine in ten images of noise, at least, and at most one particle in twenty."""
    assert np.mean(mixed.undetermined[IS_NOISE]) >= 0.9
    assert np.mean(mixed.undetermined[~IS_NOISE]) <= 0.05


def test_particles_alone_are_not_taken_for_noise(alone):
    assert np.mean(alone.undetermined) <= 0.05


def test_its_map_is_that_of_the_particles(scene, mixed, alone):
    """As good as the map of the particles alone, to within 0.03 of mean FSC."""
    assert scene.fsc(mixed.volume) > scene.fsc(alone.volume) - 0.03


@pytest.mark.parametrize("angle_spread", [0.1, 0.45])
def test_noise_alone_is_noise(scene, angle_spread):
    """However well the poses that were searched for are said to be known."""
    found = scene.refine(IS_NOISE, angle_spread=angle_spread)
    assert np.mean(found.undetermined) >= 0.9
    kept = found.undetermined
    np.testing.assert_array_equal(
        found.poses.rotations[kept], scene.matched.rotations[IS_NOISE][kept]
    )
