"""Maps at given poses, and what their halves tell of them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrefine import simulate
from jaxrefine.data.particles import Particles
from jaxrefine.geometry import Poses
from jaxrefine.maps.fsc import fsc
from jaxrefine.refinement import reconstruction
from jaxrefine.refinement.config import RefineConfig


@pytest.mark.slow
def test_half_maps_agree_as_far_as_they_are_right():
    """Rosenthal and Henderson (J. Mol. Biol. 333, 2003): if they share but the signal,
    their correlation F tells that of their mean with the truth, sqrt(2 F / (1 + F)).
    """
    truth = simulate.phantom(jax.random.key(1), 24)
    data = simulate.make_dataset(
        jax.random.key(11), truth, 400, max_shift=1.0, max_angle_error=0.0, snr_db=-5.0
    )
    images = np.asarray(data.images, np.float32)
    made = reconstruction.reconstruct(
        Particles(images), data.truth, key=jax.random.key(3)
    )
    first, second = map(jnp.asarray, made.half_maps)
    shared = np.asarray(fsc(first, second))
    right = np.asarray(fsc((first + second) / 2, truth.astype(first.dtype)))
    agreed = shared > 0.2
    assert 6 < agreed.sum() < 10  # they do not agree everywhere
    told = np.sqrt(2 * shared[agreed] / (1 + shared[agreed]))
    np.testing.assert_allclose(told, right[agreed], atol=0.05)


def test_noise_that_occurs_twice_does_not_agree_with_itself():
    """Of images without a particle, each in two rows of a table.

    Half maps of independent noise have a correlation of 0, within its error; the copies
    make it large if they are dealt as if they were particles of their own.
    """
    count, n = 60, 24
    rng = np.random.default_rng(5)
    images = np.tile(rng.normal(size=(count, n, n)).astype(np.float32), (2, 1, 1))
    rotations = simulate.equidistributed_rotations(jax.random.key(2), count)
    poses = Poses(jnp.tile(rotations, (2, 1, 1)), jnp.zeros((2 * count, 2)))
    means = {}
    for name, cluster in (("kept", np.tile(np.arange(count), 2)), ("dealt", None)):
        particles = Particles(images, cluster=cluster)
        made = reconstruction.reconstruct(
            particles, poses, RefineConfig(tau=1.0), key=jax.random.key(3)
        )
        first, second = map(jnp.asarray, made.half_maps)
        means[name] = float(np.mean(fsc(first, second)[3:12]))
    assert abs(means["kept"]) < 0.05 and means["dealt"] > 0.2, means
