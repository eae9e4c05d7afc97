"""The interpolated spectrum against the direct sum, its adjoint, its derivative."""

import functools
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import draw, draw_complex, relative_error

from jaxrefine.errors import InputError
from jaxrefine.operators.gridding import (
    Finufft,
    Frequencies,
    Gridding,
    default_insertion,
)

SIZES = [(16, 7), (15, 7), (12, 6)]
# Relative errors on white noise in the whole box, the hardest volume there is: twice
# the larger of what the design of the window foresees for a ball of white noise and
# what benchmarks/slices.py measures.
ACCURACY = {(2, 2.0): 0.1, (3, 1.5): 3e-2, (4, 1.75): 3e-3, (5, 2.0): 3e-4}


@jax.jit
def evaluate(spectrum, points):
    return spectrum(*points)


@jax.jit
def derivative(spectrum, points, direction):
    return jax.jvp(spectrum, points, direction)[1]


def draw_points(r_max) -> Frequencies:
    """Points of the ball, the last of them on its edge, at zero, and on the axes."""
    rng = np.random.default_rng(5)
    points = rng.normal(size=(3, 200))
    radii = rng.uniform(size=200) ** (1 / 3)
    radii[:20] = 1
    points *= r_max * radii / np.linalg.norm(points, axis=0)
    special = r_max * np.concatenate([np.eye(3), -np.eye(3), np.zeros((3, 1))], axis=1)
    points = np.concatenate([points, special.reshape(3, -1)], axis=1)
    x, y, z = (jnp.asarray(axis) for axis in points)
    return x, y, z


def direct(volume, points):
    """The defining sum, a matrix product over the voxels."""
    n = len(volume)
    k = np.arange(n) - n // 2
    waves = [np.exp(-2j * np.pi / n * np.outer(axis, k)) for axis in points]
    return np.einsum("zyx,px,py,pz->p", volume, *waves, optimize=True)


@pytest.mark.parametrize(("n", "r_max"), SIZES)
@pytest.mark.parametrize("way", ACCURACY)
def test_spectrum_is_the_direct_sum(way, n, r_max):
    """Also up to Nyquist, where the samples wrap around."""
    volume, points = draw(n, n, n), draw_points(r_max)
    spectrum = Gridding(*way).spectrum(volume, r_max)
    error = relative_error(evaluate(spectrum, points), direct(volume, points))
    assert error < ACCURACY[way], error


@pytest.mark.slow
def test_wider_windows_and_finer_grids_are_more_accurate():
    volume, points = draw(16, 16, 16), draw_points(7)
    exact = direct(volume, points)

    def error(width, oversampling):
        spectrum = Gridding(width, oversampling).spectrum(volume, 7)
        return relative_error(evaluate(spectrum, points), exact)

    by_width = [error(width, 2.0) for width in (2, 4, 6)]
    by_grid = [error(4, oversampling) for oversampling in (1.25, 2.0, 3.0)]
    assert np.all(np.diff(np.log(by_width)) < -2), by_width
    assert np.all(np.diff(np.log(by_grid)) < -1), by_grid


@pytest.mark.parametrize(("n", "r_max"), SIZES)
@pytest.mark.parametrize("way", [Gridding(3, 1.5), Gridding(4, 1.25)], ids=repr)
def test_insertion_is_the_adjoint_of_the_spectrum(way, n, r_max):
    volume, points = draw(n, n, n), draw_points(r_max)
    values = draw_complex(len(points[0]), seed=3)
    inserted = way.adjoint(points, values, n, r_max)
    assert inserted.shape == (n, n, n)
    left = np.vdot(values, evaluate(way.spectrum(volume, r_max), points)).real
    right = np.vdot(inserted, volume)
    scale = np.linalg.norm(values) * np.linalg.norm(direct(volume, points))
    assert abs(left - right) < 1e-13 * scale


@pytest.mark.slow
def test_finufft_is_the_adjoint_of_the_direct_sum():
    """And what Gridding makes of the same values, to its accuracy."""
    pytest.importorskip("jax_finufft")
    for n, r_max in SIZES:
        points = draw_points(r_max)
        values = draw_complex(len(points[0]), seed=3)
        k = np.arange(n) - n // 2
        waves = [np.exp(2j * np.pi / n * np.outer(axis, k)) for axis in points]
        exact = np.einsum("p,px,py,pz->zyx", values, *waves, optimize=True).real
        inserted = Finufft(1e-9).adjoint(points, values, n, r_max)
        assert relative_error(inserted, exact) < 1e-8
        gridded = Gridding(5, 2.0).adjoint(points, values, n, r_max)
        assert relative_error(gridded, np.asarray(inserted)) < ACCURACY[5, 2.0]


@pytest.mark.slow
@pytest.mark.parametrize("way", [Gridding(2, 2.0), Gridding(3, 1.5), Gridding(4, 1.75)])
def test_slopes_are_the_derivatives_of_the_interpolant(way):
    """Exactly, against forward differentiation, along two directions at once."""
    n, r_max = 12, 5
    spectrum = way.spectrum(draw(n, n, n), r_max)
    points = jax.tree.map(lambda axis: axis[:100], draw_points(r_max))
    directions = [tuple(draw(3, 100, seed=seed)) for seed in (8, 9)]
    value, *slopes = jax.jit(lambda s, p, d: s.value_and_slopes(p, d))(
        spectrum, points, tuple(directions)
    )
    assert relative_error(value, np.asarray(evaluate(spectrum, points))) < 1e-13
    values = draw_complex(100, seed=11)
    along = jax.jit(lambda s, *a: s.slopes_along(*a))(
        spectrum, values, points, tuple(directions)
    )
    for direction, slope, pulled in zip(directions, slopes, along, strict=True):
        exact = np.asarray(derivative(spectrum, points, direction))
        assert relative_error(slope, exact) < 1e-12
        assert relative_error(pulled, np.real(np.conj(values) * exact)) < 1e-12


def test_slopes_are_the_slopes_of_the_spectrum():
    """And not only of the interpolant: a derivative costs one order of accuracy."""
    n, r_max = 12, 5
    volume, points = draw(n, n, n), draw_points(r_max)
    direction = (jnp.ones_like(points[0]), 0 * points[0], 0 * points[0])
    k = np.arange(n) - n // 2
    exact = direct(np.asarray(volume) * (-2j * np.pi / n) * k, points)
    spectrum = Gridding(5, 2.0).spectrum(volume, r_max)
    slope = spectrum.value_and_slopes(points, (direction,))[1]
    assert relative_error(slope, exact) < 2e-3


@pytest.mark.parametrize("width", [2, 3, 4])
def test_interpolant_is_continuous_and_hermitian(width):
    """Across the samples' cells, across the plane where points are mirrored."""
    n, r_max = 12, 5
    spectrum = Gridding(width, 1.5).spectrum(draw(n, n, n), r_max)
    scale = float(jnp.abs(evaluate(spectrum, draw_points(r_max))).max())
    t = jnp.linspace(-4.9, 4.9, 197)
    for line in [(t, 0.1 * t, 0 * t + 0.2), (0 * t, t, 0.3 * t), (0.2 * t, 0.1 * t, t)]:
        value = evaluate(spectrum, line)
        mirror = evaluate(spectrum, tuple(-axis for axis in line))
        assert float(jnp.abs(value - jnp.conj(mirror)).max()) < 1e-12 * scale
    # The samples are 12 / 18 apart: the cells' walls are at the multiples of 1/3.
    wall = jnp.arange(-14, 15) / 3
    for axis in range(3):
        at = [jnp.full_like(wall, 0.17)] * 3
        sides = []
        for step in (-1e-9, 1e-9):
            at[axis] = wall + step
            sides.append(evaluate(spectrum, tuple(at)))
        assert float(jnp.abs(sides[0] - sides[1]).max()) < 1e-6 * scale


def test_a_smaller_band_has_the_same_values_in_a_smaller_array():
    volume = draw(16, 16, 16)
    points = draw_points(3)
    small, large = (Gridding(4, 1.5).spectrum(volume, r) for r in (3, 7))
    np.testing.assert_allclose(
        evaluate(small, points), evaluate(large, points), rtol=0, atol=1e-11
    )
    sizes = [sum(x.size for x in jax.tree.leaves(s)) for s in (small, large)]
    assert sizes[0] < sizes[1] / 4


def test_single_precision_stays_single_and_as_accurate():
    n, r_max = 16, 7
    volume, points = draw(n, n, n), draw_points(r_max)
    exact = direct(volume, points)
    way = Gridding(4, 1.75)
    points = jax.tree.map(lambda axis: axis.astype(jnp.float32), points)
    value = evaluate(way.spectrum(volume.astype(jnp.float32), r_max), points)
    assert value.dtype == jnp.complex64
    assert relative_error(value, exact) < ACCURACY[4, 1.75]
    values = draw_complex(len(points[0]), dtype=jnp.float32)
    inserted = way.adjoint(points, values, n, r_max)
    assert inserted.dtype == jnp.float32 and bool(jnp.isfinite(inserted).all())


def test_bad_parameters_and_a_missing_package_are_refused(monkeypatch):
    with pytest.raises(InputError, match="width from 2 to 8"):
        Gridding(1)
    with pytest.raises(InputError, match="oversampling=1"):
        Gridding(4, 1.0)
    with pytest.raises(InputError, match="r_max must be from 1 to 8"):
        Gridding().spectrum(jnp.zeros((16, 16, 16)), 9)
    monkeypatch.setitem(sys.modules, "jax_finufft", None)
    with pytest.raises(InputError, match="pip install jax-finufft"):
        Finufft()


def test_a_grid_that_indices_cannot_reach_is_refused():
    """A 32-bit index reaches 2**31 samples; nothing is allocated to find out."""
    way = Gridding()

    def adjoint(n):
        points = (jax.ShapeDtypeStruct((5,), jnp.float32),) * 3
        values = jax.ShapeDtypeStruct((5,), jnp.complex64)
        insert = functools.partial(way.adjoint, n=n, r_max=(n - 1) // 2)
        return jax.eval_shape(insert, points, values)

    def spectrum(n):
        volume = jax.ShapeDtypeStruct((n, n, n), jnp.float32)
        return jax.eval_shape(lambda v: way.spectrum(v, (n - 1) // 2), volume)

    assert adjoint(900).shape == (900, 900, 900)
    (samples,) = jax.tree.leaves(spectrum(900))
    assert 2**30 < samples.size < 2**31
    words = "^the grid must have at most .* got 16.. x 16.. x .* for a box of side 928"
    for call in (adjoint, spectrum):
        with pytest.raises(InputError, match=words):
            call(928)


def test_default_insertion_needs_no_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "jax_finufft", None)
    assert isinstance(default_insertion(), Gridding)
