"""Resampling of maps, exact on band-limited functions."""

import jax.numpy as jnp
import numpy as np
import pytest
from helpers import draw, gaussian

from jaxrefine.errors import InputError
from jaxrefine.operators.resample import fourier_crop, resample


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
    volume = draw(n, n, n)
    np.testing.assert_allclose(fourier_crop(volume, n), volume, atol=1e-12)


@pytest.mark.parametrize("size", [0, 9, -1])
def test_sizes_out_of_range(size):
    with pytest.raises(InputError, match=f"size must be from 1 to 8, .* got {size}"):
        fourier_crop(waves(8), size)


@pytest.mark.parametrize(("n", "size"), [(12, 7), (13, 9), (12, 11), (13, 13)])
def test_in_the_same_box_it_is_fourier_cropping(n, size):
    """Of any map, where the new side is odd."""
    found = resample(draw(n, n, n), 1.3, size, 1.3 * n / size)
    np.testing.assert_allclose(found, fourier_crop(draw(n, n, n), size), atol=1e-12)


@pytest.mark.parametrize(
    ("n", "size"), [(12, 7), (13, 8), (12, 16), (12, 24), (13, 15), (13, 16)]
)
def test_in_the_same_box_band_limited_maps_are_exact(n, size):
    """On finer grids as on coarser ones, whatever the parity."""
    found = resample(waves(n), 1.3, size, 1.3 * n / size)
    np.testing.assert_allclose(found, waves(size), atol=1e-12)


@pytest.mark.parametrize("n", [8, 9])
@pytest.mark.parametrize("size", [5, 6, 8, 9, 12, 13])
def test_with_the_same_voxels_it_crops_or_pads(n, size):
    """Samples keep their bits but for rounding, and their places about the origin."""
    volume, expected = draw(n, n, n), np.zeros((size,) * 3)
    low, high = min(n // 2, size // 2), min(n - n // 2, size - size // 2)
    old, new = (slice(side // 2 - low, side // 2 + high) for side in (n, size))
    expected[new, new, new] = volume[old, old, old]
    np.testing.assert_allclose(resample(volume, 1.7, size, 1.7), expected, atol=1e-12)


def blob(n, voxel):
    """A Gaussian, off centre, of standard deviation 2.7."""
    return gaussian(n, (1.0, -2.0, 1.5), 2.7, voxel)


@pytest.mark.parametrize(
    ("size", "pixel"), [(18, 1.7), (31, 1.1), (24, 1.5), (64, 0.9)]
)
def test_a_blob_stays_where_it_is(size, pixel):
    """With the size that it has in angstroms, and its density."""
    found = resample(blob(20, 1.5), 1.5, size, pixel)
    np.testing.assert_allclose(found, blob(size, pixel), atol=1e-4)
    single = resample(blob(20, 1.5).astype(jnp.float32), 1.5, size, pixel)
    assert single.dtype == jnp.float32
    np.testing.assert_allclose(single, found, atol=1e-6)


@pytest.mark.parametrize("bad", [(0.0, 8, 1.0), (1.0, 0, 1.0), (1.0, 8, float("nan"))])
def test_grids_that_are_none(bad):
    with pytest.raises(InputError, match="voxel, size and pixel must be positive"):
        resample(waves(8), *bad)
