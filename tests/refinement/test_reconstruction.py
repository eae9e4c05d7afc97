"""Maps at given poses, and what their halves tell of them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrefine import simulate
from jaxrefine.data.particles import Particles
from jaxrefine.maps.fsc import fsc
from jaxrefine.refinement import reconstruction


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
