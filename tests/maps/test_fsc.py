"""The Fourier shell correlation against a loop over frequencies, and its readings.

It is one for a scaled copy, small for independent noise, the share of the signal
between the two, and safe where a map is empty; crossings are those read by hand.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import draw, fft_radii

from jaxrefine.maps.fsc import (
    crossing,
    fsc,
    mean_fsc,
    resolution,
    resolution_in_angstroms,
)

SIZES = [5, 6, 9, 12]


def brute_force_fsc(a, b):
    """Visit every frequency of the full transform, one by one."""
    n = a.shape[0]
    a_hat, b_hat = np.fft.fftn(a), np.fft.fftn(b)
    k = np.fft.fftfreq(n, 1 / n)
    sums = np.zeros((3, n // 2 + 1))
    for index in np.ndindex(n, n, n):
        r = round(np.sqrt(sum(k[i] ** 2 for i in index)))
        if r <= n // 2:
            x, y = a_hat[index], b_hat[index]
            sums[:, r] += (x * y.conjugate()).real, abs(x) ** 2, abs(y) ** 2
    return sums[0] / np.sqrt(sums[1] * sums[2])


def shell_counts(n):
    return np.bincount(np.rint(fft_radii(n)).astype(int).ravel())[: n // 2 + 1]


@pytest.mark.parametrize("n", SIZES)
def test_fsc_is_the_double_loop(n):
    a, b = draw(n, n, n), draw(n, n, n) + 0.7 * draw(n, n, n, seed=1)
    np.testing.assert_allclose(fsc(a, b), brute_force_fsc(a, b), atol=1e-12)


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("scale", [1.0, 1e-3, 250.0])
def test_fsc_with_a_scaled_copy_is_one(n, scale):
    a = draw(n, n, n)
    np.testing.assert_allclose(fsc(a, scale * a), 1, rtol=1e-12)
    np.testing.assert_allclose(fsc(a, -scale * a), -1, rtol=1e-12)


def test_fsc_in_float32():
    a, b = (draw(16, 16, 16, seed=s, dtype=jnp.float32) for s in (0, 1))
    curve = jax.jit(fsc)(a, a + b)
    assert curve.dtype == jnp.float32
    exact = fsc(a.astype(jnp.float64), (a + b).astype(jnp.float64))
    np.testing.assert_allclose(curve, exact, atol=1e-5)
    np.testing.assert_allclose(fsc(a, 1e-14 * a), 1, rtol=1e-5)
    np.testing.assert_allclose(fsc(1e-14 * a, 1e-14 * a), 1, rtol=1e-5)


@pytest.mark.parametrize("n", [31, 32])
def test_fsc_of_independent_noise_is_small(n):
    """Over N frequencies, half of them independent, its deviation is 1 / sqrt(N)."""
    curve = np.asarray(fsc(draw(n, n, n, seed=0), draw(n, n, n, seed=1)))
    assert np.all(np.abs(curve) < 4 / np.sqrt(shell_counts(n)))
    normalised = curve[1:] * np.sqrt(shell_counts(n)[1:])
    assert 0.5 < np.std(normalised) < 1.6


def test_fsc_expects_the_signal_share():
    """A signal and the same signal plus as much noise: 1 / sqrt(2) on average."""
    n = 32
    curve = fsc(draw(n, n, n, seed=0), draw(n, n, n, seed=0) + draw(n, n, n, seed=1))
    within = 4 / np.sqrt(shell_counts(n))
    assert np.all(np.abs(curve - np.sqrt(0.5)) < within)


def test_fsc_of_an_empty_volume_is_zero():
    a = draw(8, 8, 8)
    np.testing.assert_array_equal(fsc(a, jnp.zeros_like(a)), np.zeros(5))
    gradient = jax.grad(lambda b: jnp.sum(fsc(a, b)))(jnp.zeros_like(a))
    assert jnp.all(jnp.isfinite(gradient))


def test_the_mask_multiplies_both_volumes():
    n = 8
    a, b = draw(n, n, n, seed=0), draw(n, n, n, seed=1)
    mask = (draw(n, n, n, seed=2) > 0).astype(a.dtype)
    expected = fsc(a * mask, b * mask)
    np.testing.assert_allclose(fsc(a, b, mask), expected)
    hidden = a + (1 - mask) * b
    np.testing.assert_allclose(fsc(a, hidden, mask), 1, rtol=1e-12)


def test_mean_fsc_leaves_out_shell_zero():
    assert mean_fsc(jnp.array([100.0, 1.0, 0.5, 0.0])) == 0.5


@pytest.mark.parametrize(
    ("curve", "threshold", "radius"),
    [
        ([1.0, 1.0, 1.0, 0.0, 0.0], 0.5, 2.5),
        ([1.0, 0.9, 0.6, 0.2, 0.9], 0.5, 2.25),
        ([1.0, 1.0, 0.5, 0.0, 0.0], 0.5, 2.0),
        ([1.0, 1.0, 0.9, 0.8, 0.7], 0.5, 4.0),
        ([1.0, 1.0, 0.9, 0.8, 0.5], 0.5, 4.0),
        ([0.0, 1.0, 1.0, 1.0, 0.0], 0.5, 3.5),
        ([1.0, 0.4, 0.9, 0.9, 0.9], 0.5, 1.0),
        ([1.0, 1.0, 1.0, 0.243, 0.043], 0.143, 3.5),
        ([1.0, 1.0, 1.0, -1.0, 1.0], 0.5, 2.25),
    ],
)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
def test_crossing_of_curves_by_hand(curve, threshold, radius, dtype):
    result = jax.jit(crossing)(jnp.array(curve, dtype), threshold)
    np.testing.assert_allclose(result, radius, rtol=1e-6)
    assert result.dtype == dtype


def test_crossing_of_a_broken_curve_is_no_success():
    assert jnp.isnan(crossing(jnp.array([1.0, 0.9, jnp.nan, 0.9]), 0.5))
    assert crossing(jnp.full(4, jnp.nan), 0.5) == 1


def test_resolution_at_nyquist_is_two_voxels():
    assert resolution_in_angstroms(32.0, 64, 1.5) == 3.0
    assert resolution_in_angstroms(jnp.asarray(16.0), 64, 1.5) == 6.0


def test_the_resolution_and_whether_it_is_a_bound():
    """Interpolated, or that of the last shell that is complete: 15 of a side of 32."""
    line, ones = np.linspace(1, 0, 17), np.ones(17)
    for curve, n, threshold, period, bound in (
        (line, 32, 0.143, 80 / (16 * 0.857), False),
        (line, 32, 0.5, 10, False),
        (ones, 32, 0.143, 80 / 15, True),
        (np.append(ones[:16], 0), 32, 0.143, 80 / 15, True),  # 16 is not complete
        (np.append(ones[:15], [0, 0]), 32, 0.143, 80 / 14.857, False),
        (ones, 33, 0.143, 82.5 / 16, True),
        (ones[:2], 2, 0.143, 5, True),
    ):
        found = resolution(curve, n, 2.5, threshold)
        assert found.in_angstroms == pytest.approx(period, rel=1e-6)
        assert found.is_a_bound == bound
    assert resolution(ones, 32, 2.5).text() == "5.33 A or better"
    assert resolution(line, 32, 2.5, 0.5).text("Å") == "10.00 Å"
