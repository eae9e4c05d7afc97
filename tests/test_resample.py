"""Resampling of maps, exact on band-limited functions."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxrefine.errors import InputError
from jaxrefine.resample import fourier_crop


def waves(n, seed=0):
    """A sum of waves of up to three periods per box, sampled about ``n // 2``."""
    rng = np.random.default_rng(seed)
    at = (np.arange(n) - n // 2) / n
    z, y, x = np.meshgrid(at, at, at, indexing="ij")
    volume = np.full((n, n, n), 0.7)
    for _ in range(6):
        kx, ky, kz = rng.integers(-3, 4, 3)
        phase = 2 * np.pi * (kx * x + ky * y + kz * z) + rng.uniform(0, 6)
        volume += rng.normal() * np.cos(phase)
    return jnp.asarray(volume)


@pytest.mark.parametrize("n", [12, 13])
@pytest.mark.parametrize("size", [7, 8, 11, 12])
def test_band_limited_maps_are_sampled_exactly(n, size):
    """Origin and densities stay, for every parity of the two sides."""
    np.testing.assert_allclose(fourier_crop(waves(n), size), waves(size), atol=1e-12)


@pytest.mark.parametrize("n", [8, 9])
def test_cropping_to_the_same_size_changes_nothing(n):
    volume = jnp.asarray(np.random.default_rng(0).normal(size=(n, n, n)))
    np.testing.assert_allclose(fourier_crop(volume, n), volume, atol=1e-12)


@pytest.mark.parametrize("size", [0, 9, -1])
def test_sizes_out_of_range(size):
    with pytest.raises(InputError, match=f"8\\^3 can be cropped .* not to {size}"):
        fourier_crop(waves(8), size)
