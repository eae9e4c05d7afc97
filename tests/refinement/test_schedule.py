"""The schedule of band limits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrefine import simulate
from jaxrefine.data.particles import Particles
from jaxrefine.geometry import Poses
from jaxrefine.maps import folds
from jaxrefine.maps.fsc import fsc
from jaxrefine.operators import slices
from jaxrefine.refinement import insertion, map_step, schedule
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


@pytest.mark.parametrize("size", [16, 64, 95, 96, 127, 128, 200, 256, 360])
def test_a_smaller_map_holds_the_next_band(size):
    """Whatever the next band limit turns out to be; and it is worth while."""
    for r_max in range(1, (size - 1) // 2 + 1):
        side = schedule.map_side(r_max, size)
        assert side == size or (size >= 96 and 2 * side <= size)
        assert (side - 1) // 2 > min(2 * r_max, (size - 1) // 2) or side == size
    assert (schedule.map_side(7, size) < size) == (size >= 96)


@pytest.mark.parametrize("n", [48, 49])
def test_maps_of_fewer_voxels_are_as_good(n):
    """In the shells that they have; in the others they are empty, and known to be.

    From there, maps with all voxels are as good as if they had been made at once.
    """
    side = 24
    truth = simulate.phantom(jax.random.key(0), n)
    dataset = simulate.make_dataset(
        jax.random.key(1),
        truth,
        60,
        max_shift=1.0,
        max_angle_error=0.0,
        snr_db=0.0,
        project=simulate.slice_projector(truth),
    )
    everyone = np.ones(60, bool)
    config = RefineConfig()
    particle_set = make_particle_set(
        Particles(np.asarray(dataset.images)), dataset.truth, jax.random.key(2), config
    )
    start = map_step.start(particle_set, simulate.blur(truth, 3.0))
    scores = {}
    for each in (side, n):
        sums = insertion.sum_up(
            particle_set, start.hypotheses, start.noise, everyone, each
        )
        state = map_step.update_maps(particle_set, start, folds.folds(sums))
        state = map_step.assess(particle_set, state, each)
        scores[each] = np.asarray(fsc(state.mean_map, truth))
        if each == side:
            assert not np.any(state.fold_fsc[side // 2 :])
            assert not np.any(state.gain[side // 2 :])
            level = (float(dataset.sigma) * n) ** 2
            np.testing.assert_allclose(state.noise[0, side // 2 :], level, rtol=0.2)
            whole = insertion.sum_up(
                particle_set, start.hypotheses, start.noise, everyone
            )
            state = map_step.finer(particle_set, state, whole)
            scores["finer"] = np.asarray(fsc(state.mean_map, truth))
            assert np.all(state.fold_fsc[1 : n // 2 - 2] > 0.05)
    low = slice(1, side // 2 - 1)
    assert np.mean(scores[side][low]) > np.mean(scores[n][low]) - 0.01
    assert np.mean(scores[n][low]) > 0.9
    every = slice(1, (n - 1) // 2)
    assert np.mean(scores["finer"][every]) > np.mean(scores[n][every]) - 0.01
