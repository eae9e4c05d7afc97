"""Radial series: how exact they are, and their slopes, which are derivatives."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrefine.operators import kbwf
from jaxrefine.operators.radial import radial_series

BASIS = kbwf.KBWF()
# float32: the series alternates, so rounding is relative to the peak.
TOLERANCE = {jnp.float64: 1e-12, jnp.float32: 1e-5}
every_dtype = pytest.mark.parametrize("dtype", TOLERANCE)


def profile(radii):
    points = jnp.stack([jnp.asarray(radii), jnp.zeros(len(radii))], axis=-1)
    return np.asarray(kbwf.xray_transform(BASIS, points))


def series(tolerance=1e-13):
    return radial_series(profile, BASIS.radius, tolerance)


def test_series_errs_by_its_tolerance():
    r = np.linspace(0, BASIS.radius, 1001)
    exact = profile(r)
    errors, terms = [], []
    for tolerance in [1e-2, 1e-4, 1e-6, 1e-8, 1e-10, 1e-12]:
        short = series(tolerance)
        error = np.max(np.abs(short(jnp.asarray(r**2)) - exact)) / exact.max()
        # The terms left out fall geometrically: their sum is a few of the first.
        assert error < 10 * tolerance
        errors.append(error)
        terms.append(len(short.coefficients))
    assert np.all(np.diff(errors) < 0) and np.all(np.diff(terms) > 0)
    assert terms[-1] < 60


@every_dtype
def test_series_is_zero_outside(dtype):
    r2 = jnp.asarray([16.0, 16.01, 25.0, 1e6], dtype)
    assert np.all(series()(r2) == 0) and np.all(series().slope(r2) == 0)


@every_dtype
def test_series_slope_is_its_derivative(dtype):
    f = series()
    r2 = jnp.asarray(np.linspace(0, 20, 301), dtype)
    slope, automatic = f.slope(r2), jax.vmap(jax.grad(f))(r2)
    assert f(r2).dtype == slope.dtype == dtype
    # A series of N terms amplifies rounding by up to N^2 in its derivative.
    atol = 30 * TOLERANCE[dtype] * float(jnp.max(jnp.abs(slope)))
    np.testing.assert_allclose(slope, automatic, rtol=0, atol=atol)
    exact = series().slope(r2.astype(jnp.float64))
    np.testing.assert_allclose(slope, exact, rtol=0, atol=atol)


def test_series_slope_is_equation_24():
    """``grad f(|y|^2) = 2 f' y``: the series' slope is the closed-form gradient."""
    y = np.random.default_rng(0).uniform(-3, 3, (200, 2))
    slope = series().slope(jnp.asarray(np.sum(y**2, axis=-1)))
    gradient = kbwf.xray_transform_gradient(BASIS, jnp.asarray(y))
    # 1e-13 of the value, times the square of the number of terms.
    np.testing.assert_allclose(2 * slope[:, None] * y, gradient, rtol=0, atol=1e-9)
