"""The entire Bessel functions against SciPy, and their derivative law."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import iv, jv

from jaxrefine.operators import _bessel

HALF_ORDERS = [-1, 0, 1, 2, 3, 4, 5]
ORDERS = [0, 1, 2, 3, 4]
# Measured 4e-14 (float64) and 2e-5 (float32), both at the highest orders and at the
# switch |s| = 16, where the upward recurrence has lost the most digits.
TOLERANCE = {jnp.float64: 2e-13, jnp.float32: 3e-4}
SWITCH = 16.0
AROUND_SWITCH = SWITCH * np.array([1 - 1e-6, 1 - 1e-15, 1, 1 + 1e-15, 1 + 1e-6])
POSITIVE = np.concatenate([np.linspace(0.01, 400, 401), AROUND_SWITCH, [1e-4, 6400]])


def exact(order, s):
    """``z**-v I_v(z)``, ``|z|**-v J_v(|z|)``, and their common limit at zero."""
    z = np.sqrt(np.abs(s))
    at_zero = 0.5**order / math.gamma(order + 1)
    with np.errstate(all="ignore"):
        value = np.where(s > 0, iv(order, z), jv(order, z)) / z**order
    return np.where(s == 0, at_zero, value)


def envelope(order, s):
    """What rounding is relative to: the value, or J's amplitude between its zeros."""
    oscillation = np.minimum(1.0, np.maximum(np.abs(s), 1e-9) ** (-order / 2 - 0.25))
    oscillation = oscillation * exact(order, np.zeros(()))
    return np.maximum(np.abs(exact(order, s)), np.where(s < 0, oscillation, 0))


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("n", HALF_ORDERS)
def test_half_integer_is_scipys(n, dtype):
    s = np.concatenate([-POSITIVE[::-1], [0.0], POSITIVE]).astype(dtype)
    value = _bessel.half_integer(n, jnp.asarray(s))
    assert value.dtype == dtype
    value, s = np.asarray(value, float), s.astype(float)
    error = np.abs(value - exact(n + 0.5, s)) / envelope(n + 0.5, s)
    # An argument rounded to eps moves the value by eps |s Lambda'/Lambda| <= eps |z|/2.
    conditioning = 1 + np.sqrt(np.abs(s)) / 20
    assert np.max(error / conditioning) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("n", ORDERS)
def test_integer_is_scipys(n, dtype):
    s = np.concatenate([[0.0], POSITIVE]).astype(dtype)
    value = _bessel.integer(n, jnp.asarray(s))
    assert value.dtype == dtype
    value, s = np.asarray(value, float), s.astype(float)
    error = np.abs(value / exact(n, s) - 1) / (1 + np.sqrt(s) / 20)
    assert np.max(error) < TOLERANCE[dtype]


FUNCTIONS = [
    *(pytest.param(_bessel.half_integer, n, 0.5, -400) for n in HALF_ORDERS),
    *(pytest.param(_bessel.integer, n, 0.0, 1) for n in ORDERS),
]


@pytest.mark.parametrize(("function", "n", "half", "lowest"), FUNCTIONS)
def test_derivative_is_half_the_next_order(function, n, half, lowest):
    s = np.concatenate([np.linspace(lowest, 400, 203), AROUND_SWITCH])
    slope = jax.vmap(jax.grad(lambda s: function(n, s)))(jnp.asarray(s))
    np.testing.assert_allclose(slope, 0.5 * function(n + 1, jnp.asarray(s)), rtol=1e-14)
    # SciPy's values have no switch, so their differences test both sides of ours.
    h = 1e-3 * (np.abs(s) + 10)
    order = n + half

    def difference(h):
        return (exact(order, s + h) - exact(order, s - h)) / (2 * h)

    richardson = (4 * difference(h / 2) - difference(h)) / 3
    # Rounding of the difference: eps Lambda / h, at most 1e-13 of the value here.
    scale = np.maximum(envelope(order + 1, s), envelope(order, s))
    assert np.max(np.abs(slope - richardson) / scale) < 1e-9


@pytest.mark.parametrize(("function", "n", "half", "lowest"), FUNCTIONS)
def test_higher_derivatives_at_zero(function, n, half, lowest):
    derivative = lambda s: function(n, s)  # noqa: E731
    for times in range(1, 4):
        derivative = jax.grad(derivative)
        expected = 0.5**times * exact(n + half + times, np.zeros(()))
        np.testing.assert_allclose(derivative(jnp.zeros(())), expected, rtol=1e-14)


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_far_arguments_neither_overflow_nor_spoil_gradients(dtype):
    """For ``s << 0``, cosh of the unused branch would be infinite."""
    s = jnp.asarray([-1e6, -1e4, 6400.0], dtype)
    for n in HALF_ORDERS:
        value, slope = jax.vmap(
            jax.value_and_grad(lambda s, n=n: _bessel.half_integer(n, s))
        )(s)
        assert np.all(np.isfinite(value)) and np.all(np.isfinite(slope))
