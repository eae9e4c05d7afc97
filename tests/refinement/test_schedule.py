"""The schedule of band limits."""

import jax
import jax.numpy as jnp
import numpy as np

from jaxrefine.data.particles import Particles
from jaxrefine.geometry import Poses
from jaxrefine.operators import slices
from jaxrefine.refinement import schedule
from jaxrefine.refinement.config import RefineConfig
from jaxrefine.refinement.sets import make_particle_set


def test_the_largest_band_limit_is_kept():
    count, side = 8, 24
    images = np.zeros((count, side, side), np.float32)
    poses = Poses(jnp.tile(jnp.eye(3), (count, 1, 1)), jnp.zeros((count, 2)))
    for most, expected in ((None, 8), (7, 6), (11, 8)):
        config = RefineConfig(first_r_max=4, max_r_max=most)
        particle_set = make_particle_set(
            Particles(images), poses, jax.random.key(0), config
        )
        reached = schedule.next_band_limit(4, 11.0, particle_set)
        assert reached == slices.bucket(expected, side), (most, reached)
