"""Radial filters of maps against the full transform.

A gain holds in its shells, linearly between them; a low-pass keeps what is below and
nothing beyond.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import draw, fft_radii

from jaxrefine.maps import filters

N = 16
filter_shells = jax.jit(filters.filter_shells)


@pytest.mark.parametrize("n", [15, 16])
def test_a_gain_of_ones_changes_nothing(n):
    volume = draw(n, n, n)
    value = filter_shells(volume, jnp.ones(n // 2 + 1))
    np.testing.assert_allclose(value, volume, atol=1e-14)


@pytest.mark.parametrize("n", [15, 16])
def test_the_gain_is_a_filter_in_fourier_space(n):
    """Linear between shells, the last one beyond; on the full transform."""
    gain = np.random.default_rng(1).uniform(size=n // 2 + 1)
    radius = fft_radii(n)
    low = np.minimum(np.floor(radius).astype(int), n // 2)
    high = np.minimum(low + 1, n // 2)
    between = radius - np.floor(radius)
    factor = (1 - between) * gain[low] + between * gain[high]
    volume = draw(n, n, n)
    exact = np.fft.ifftn(np.fft.fftn(volume) * factor)
    assert np.abs(exact.imag).max() < 1e-14
    value = filter_shells(volume, jnp.asarray(gain))
    np.testing.assert_allclose(value, exact.real, atol=1e-13)


def test_a_band_pass_keeps_its_shells():
    gain = np.zeros(N // 2 + 1)
    gain[3:6] = 1.0
    spectrum = np.fft.fftn(filter_shells(draw(N, N, N), jnp.asarray(gain)))
    before = np.fft.fftn(draw(N, N, N))
    radius = fft_radii(N)
    kept, gone = (radius >= 3) & (radius <= 5), (radius <= 2) | (radius >= 6)
    np.testing.assert_allclose(spectrum[kept], before[kept], atol=1e-12)
    np.testing.assert_allclose(spectrum[gone], 0, atol=1e-12)


def test_low_pass_keeps_what_is_below_and_nothing_beyond():
    volume, shell, voxel = draw(N, N, N), 5, 2.5
    smooth = filters.low_pass(volume, voxel, N * voxel / shell)
    before, after = (np.fft.fftn(np.asarray(v)) for v in (volume, smooth))
    radius = fft_radii(N)
    inside, beyond = radius <= shell - 1, radius >= shell + 1
    np.testing.assert_allclose(after[inside], before[inside], rtol=1e-4)
    assert np.abs(after[beyond]).max() < 1e-4 * np.abs(before).max()
    at = np.isclose(radius, shell)
    np.testing.assert_allclose(after[at], before[at] / 2, rtol=1e-4)
