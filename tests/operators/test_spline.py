"""Cubic splines: partition of unity, order of accuracy, derivatives, and outside."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrefine.operators import kbwf, spatial
from jaxrefine.operators.spline import Spline2D, spline_prefilter

every_dtype = pytest.mark.parametrize("dtype", [jnp.float64, jnp.float32])


def random_spline(nodes_per_pixel=2, dtype=jnp.float64, grid=16):
    values = np.random.default_rng(1).normal(size=(grid, grid))
    return Spline2D.of(jnp.asarray(values, dtype), nodes_per_pixel, grid // 2)


def points(count=500, reach=7.0, dtype=jnp.float64, seed=2):
    xy = np.random.default_rng(seed).uniform(-reach, reach, (2, count))
    return jnp.asarray(xy, dtype)


def value_and_gradient(surface, x, y):
    """The value, and the derivatives by x and y."""
    points = jnp.stack([x, y]), jnp.stack([y, x])
    slopes = jax.vmap(lambda slope, *points: slope(*points))(surface.slopes(), *points)
    return surface(x, y), *slopes


@every_dtype
def test_spline_weights_are_a_partition_of_unity(dtype):
    ones = Spline2D.of(jnp.ones((12, 12), dtype), 2, 6)
    value, along_x, along_y = value_and_gradient(ones, *points(dtype=dtype))
    assert value.dtype == dtype
    atol = {jnp.float64: 1e-15, jnp.float32: 1e-6}[dtype]
    np.testing.assert_allclose(value, 1, atol=atol)
    np.testing.assert_allclose(along_x, 0, atol=4 * atol)
    np.testing.assert_allclose(along_y, 0, atol=4 * atol)


@pytest.mark.parametrize("nodes", [1, 2, 3])
def test_spline_reproduces_quadratics(nodes):
    """``sum_i i b(p - i) = p`` and ``sum_i i^2 b(p - i) = p^2 + 1/3``, on each axis."""
    i = np.arange(24.0)
    spline = Spline2D.of(jnp.asarray(np.outer(i, i**2)), nodes, 12)
    x, y = points(reach=8 / nodes)
    value, along_x, along_y = value_and_gradient(spline, x, y)
    row, column = y * nodes + 12, x * nodes + 12
    np.testing.assert_allclose(value, row * (column**2 + 1 / 3), rtol=1e-12)
    np.testing.assert_allclose(along_x, row * 2 * column * nodes, rtol=1e-12)
    np.testing.assert_allclose(along_y, (column**2 + 1 / 3) * nodes, rtol=1e-12)


@pytest.mark.parametrize("size", [8, 9])
def test_prefilter_turns_samples_into_coefficients(size):
    bspline = np.zeros(size)
    bspline[[-1, 0, 1]] = 1 / 6, 4 / 6, 1 / 6
    prefilter = spline_prefilter(size, jnp.float64)
    np.testing.assert_allclose(prefilter, np.fft.fft(bspline), atol=1e-15)
    samples = np.random.default_rng(0).normal(size=(size, size))
    spectrum = np.fft.fft2(samples) / np.outer(prefilter, prefilter)
    spline = Spline2D.of(jnp.asarray(np.fft.ifft2(spectrum).real), 1, 0)
    nodes = jnp.arange(1.0, size - 3)
    x, y = jnp.meshgrid(nodes, nodes)
    inner = slice(1, size - 3)
    np.testing.assert_allclose(spline(x, y), samples[inner, inner], atol=1e-13)


@every_dtype
def test_spline_gradient_is_its_derivative(dtype):
    """Inside, outside and in the margins."""
    spline = random_spline(dtype=dtype)
    x, y = points(dtype=dtype)
    value, along_x, along_y = value_and_gradient(spline, x, y)
    by_x, by_y = jax.vmap(jax.grad(lambda x, y: spline(x, y), argnums=(0, 1)))(x, y)
    atol = {jnp.float64: 1e-11, jnp.float32: 1e-4}[dtype]
    np.testing.assert_allclose(value, spline(x, y), rtol=0, atol=atol)
    np.testing.assert_allclose(along_x, by_x, rtol=0, atol=atol)
    np.testing.assert_allclose(along_y, by_y, rtol=0, atol=atol)


def test_spline_and_its_gradient_are_continuous_across_cells():
    spline = random_spline()
    nodes = np.arange(-6, 4) / 2
    y = jnp.asarray(np.random.default_rng(3).uniform(-2.5, 1.5, nodes.size))
    h = 1e-9
    below = value_and_gradient(spline, jnp.asarray(nodes - h), y)
    above = value_and_gradient(spline, jnp.asarray(nodes + h), y)
    # The second derivative is at most 4 x 4 (nodes per pixel squared, second
    # differences of unit coefficients) times a few, so 2 h of it is below 1e-6.
    for left, right in zip(below, above, strict=True):
        np.testing.assert_allclose(left, right, rtol=0, atol=1e-6)


def test_spline_is_constant_outside_with_zero_gradient():
    spline = random_spline()
    far = jnp.asarray([[8.0, 50.0], [-40.0, -8.0], [1e4, 1e4]])
    value, along_x, along_y = value_and_gradient(spline, far[:, 0], far[:, 1])
    assert np.all(value == value[0])
    assert np.all(along_x == 0) and np.all(along_y == 0)
    # Beyond one side only, it is constant along that side's normal.
    x, y = jnp.asarray([6.0, 7.0, 100.0]), jnp.full(3, 0.3)
    value, along_x, _ = value_and_gradient(spline, x, y)
    assert np.all(value == value[0]) and np.all(along_x == 0)


@pytest.mark.slow
def test_spline_filter_is_of_fourth_order_and_its_gradient_of_third():
    m = 12
    footprint = spatial.footprint(kbwf.KBWF(), tolerance=1e-13)
    image = jnp.asarray(np.random.default_rng(4).normal(size=(m, m)))
    x, y = points(2000, 9.0)
    exact = value_and_gradient(spatial.PixelFilter(footprint)(image), x, y)
    errors = []
    for nodes in [2, 4, 8]:
        filtered = spatial.spline_filter(footprint, m, nodes)(image)
        found = value_and_gradient(filtered, x, y)
        errors.append(
            [
                float(jnp.linalg.norm(f - e) / jnp.linalg.norm(e))
                for f, e in zip(found, exact, strict=True)
            ]
        )
    orders = np.log2(np.array(errors)[:-1] / np.array(errors)[1:])
    assert np.all(orders[:, 0] > 3.5), orders
    assert np.all(orders[:, 1:] > 2.6), orders
    # White noise, the hardest image: measured 9e-4 and 4e-5 of the norm.
    assert errors[0][0] < 1.5e-3 and errors[1][0] < 8e-5, errors
