"""The window's closed forms against quadrature, SciPy and automatic derivatives."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import gaussian
from scipy.integrate import quad
from scipy.special import iv, j0

from jaxrefine.errors import InputError
from jaxrefine.io import read_mrc
from jaxrefine.operators import kbwf
from jaxrefine.operators.kbwf import KBWF

BASES = [KBWF(), KBWF(2.0, 10.8, 2), KBWF(2.0, 19.0, 2), KBWF(3.0, 8.0, 1)]
BASES = [*BASES, KBWF(3.0, 12.0, 3)]
NARROW = kbwf.SIMULATION_BASIS
every_basis = pytest.mark.parametrize("basis", BASES, ids=str)
# float32: 20 units of rounding, of the largest value; exp(19) multiplies them.
TOLERANCE = {jnp.float64: 1e-13, jnp.float32: 5e-6}
every_dtype = pytest.mark.parametrize("dtype", TOLERANCE)


def window_by_scipy(basis, r):
    """Eq. (3) as printed."""
    beta = np.sqrt(np.maximum(1 - (r / basis.radius) ** 2, 0))
    peak = iv(basis.order, basis.taper)
    return beta**basis.order * iv(basis.order, basis.taper * beta) / peak


def xray_by_scipy(basis, r):
    """Eq. (23) as printed."""
    m, alpha = basis.order, basis.taper
    beta = np.sqrt(np.maximum(1 - (r / basis.radius) ** 2, 0))
    amplitude = np.sqrt(2 * np.pi / alpha) / iv(m, alpha)
    return basis.radius * amplitude * beta ** (m + 0.5) * iv(m + 0.5, alpha * beta)


def radii(basis):
    a = basis.radius
    return np.concatenate(
        [[0.0, 1e-9], np.linspace(0.01, 1.3 * a, 97), [a - 1e-6, a, a + 1e-6]]
    )


def points_at(r, dimensions, seed=0):
    direction = np.random.default_rng(seed).normal(size=(len(r), dimensions))
    direction /= np.linalg.norm(direction, axis=-1, keepdims=True)
    return r[:, None] * direction


@every_dtype
@every_basis
def test_window_is_equation_3(basis, dtype):
    points = points_at(radii(basis), 3).astype(dtype)
    value = kbwf.window(basis, jnp.asarray(points))
    assert value.dtype == dtype
    exact = window_by_scipy(basis, np.linalg.norm(points.astype(float), axis=-1))
    np.testing.assert_allclose(value, exact, rtol=0, atol=TOLERANCE[dtype])
    assert kbwf.window(basis, jnp.zeros(3, dtype)) == pytest.approx(1, abs=2e-6)


@every_dtype
@every_basis
def test_xray_transform_is_equation_23(basis, dtype):
    points = points_at(radii(basis), 2).astype(dtype)
    value = kbwf.xray_transform(basis, jnp.asarray(points))
    assert value.dtype == dtype
    r = np.linalg.norm(points.astype(float), axis=-1)
    exact = xray_by_scipy(basis, r)
    atol = TOLERANCE[dtype] * exact.max()
    np.testing.assert_allclose(value, exact, rtol=0, atol=atol)
    assert np.all(value[r >= basis.radius * (1 + 1e-9)] == 0)


@every_basis
def test_xray_transform_is_the_line_integral_of_the_window(basis):
    r = basis.radius * np.array([0, 0.1, 0.33, 0.5, 0.77, 0.95, 0.999])
    integrals = [
        quad(
            lambda z, r=r: window_by_scipy(basis, np.hypot(r, z)),
            -np.sqrt(basis.radius**2 - r**2),
            np.sqrt(basis.radius**2 - r**2),
            epsabs=1e-13,
            epsrel=1e-13,
            limit=200,
        )[0]
        for r in r
    ]
    value = kbwf.xray_transform(basis, jnp.asarray(points_at(r, 2)))
    np.testing.assert_allclose(value, integrals, rtol=0, atol=1e-10 * integrals[0])


@every_dtype
@every_basis
def test_equation_24_is_the_gradient_of_23(basis, dtype):
    points = jnp.asarray(points_at(radii(basis), 2), dtype)
    gradient = kbwf.xray_transform_gradient(basis, points)
    automatic = jax.vmap(jax.grad(lambda y: kbwf.xray_transform(basis, y)))(points)
    assert gradient.dtype == dtype
    atol = TOLERANCE[dtype] * np.full((len(points), 1), jnp.max(jnp.abs(gradient)))
    if basis.order == 1:
        # At the edge 1 - (r/a)^2 is rounding, of which this gradient is a square root.
        atol[-2] /= np.sqrt(TOLERANCE[dtype])
    assert np.all(np.abs(gradient - automatic) <= atol)
    assert np.all(gradient[0] == 0)
    outside = np.linalg.norm(points, axis=-1) >= basis.radius * (1 + 1e-6)
    assert outside.any() and np.all(gradient[outside] == 0)


@every_basis
def test_equation_24_is_the_slope_of_the_line_integral(basis):
    """Central differences of the printed eq. (23), away from the edge."""
    r, h = np.linspace(0.05, 0.9, 18) * basis.radius, 1e-3
    slope = (xray_by_scipy(basis, r + h) - xray_by_scipy(basis, r - h)) / (2 * h)
    half = (xray_by_scipy(basis, r + h / 2) - xray_by_scipy(basis, r - h / 2)) / h
    points = np.stack([np.zeros_like(r), r], axis=-1)
    gradient = kbwf.xray_transform_gradient(basis, jnp.asarray(points))
    # After one Richardson step the differences err by h^4 ~ 1e-12 and eps / h ~ 1e-12.
    atol = 1e-9 * np.abs(slope).max()
    np.testing.assert_allclose(gradient[:, 1], (4 * half - slope) / 3, atol=atol)
    np.testing.assert_allclose(gradient[:, 0], 0, atol=1e-15)


@every_dtype
@every_basis
def test_derivatives_are_finite_at_the_centre_the_edge_and_outside(basis, dtype):
    r = basis.radius * np.array([0, 1 - 1e-6, 1 - 1e-15, 1, 1 + 1e-15, 1 + 1e-6, 3])
    for function, dimensions in [
        (kbwf.window, 3),
        (kbwf.xray_transform, 2),
        (kbwf.xray_transform_gradient, 2),
    ]:
        points = np.zeros((len(r), dimensions))
        points[:, 0] = r
        derivative = jax.vmap(jax.jacfwd(lambda p, f=function: f(basis, p)))
        assert np.all(np.isfinite(derivative(jnp.asarray(points, dtype))))
    slope = jax.grad(lambda p: kbwf.window(basis, p))
    assert np.all(slope(jnp.zeros(3)) == 0)
    beyond = jnp.asarray([basis.radius * 1.001, 0.0, 0.0])
    assert np.all(slope(beyond) == 0)


@every_basis
def test_fourier_transform_is_the_radial_integral(basis):
    """In three dimensions of the window, and in two of its X-ray transform."""
    nodes, weights = np.polynomial.legendre.leggauss(400)
    # r = a sin(t) takes away the root at the edge, where quadrature would be slow.
    t, weights = np.pi / 4 * (nodes + 1), np.pi / 4 * weights
    r, weights = basis.radius * np.sin(t), weights * basis.radius * np.cos(t)
    omega = np.concatenate([[0.0], np.linspace(0.01, 4 * np.pi, 60)])
    omega = np.append(omega, basis.taper / basis.radius)
    phase = np.outer(omega, r)
    space = (
        4
        * np.pi
        * np.sinc(phase / np.pi)
        @ (window_by_scipy(basis, r) * r**2 * weights)
    )
    plane = 2 * np.pi * j0(phase) @ (xray_by_scipy(basis, r) * r * weights)
    value = kbwf.fourier_transform(basis, jnp.asarray(omega))
    np.testing.assert_allclose(value, space, rtol=0, atol=1e-12 * space[0])
    np.testing.assert_allclose(value, plane, rtol=0, atol=1e-12 * space[0])


@every_basis
def test_fourier_transform_in_float32(basis):
    omega = jnp.linspace(0, 3 * np.pi, 50)
    exact = kbwf.fourier_transform(basis, omega)
    value = kbwf.fourier_transform(basis, omega.astype(jnp.float32))
    assert value.dtype == jnp.float32
    np.testing.assert_allclose(value, exact, rtol=0, atol=5e-6 * float(exact[0]))


def dense_evaluation(basis, c):
    axis = np.arange(c.shape[0])
    k = np.stack(np.meshgrid(axis, axis, axis, indexing="ij"), axis=-1).reshape(-1, 3)
    distance = np.linalg.norm(k[:, None] - k[None], axis=-1)
    return (window_by_scipy(basis, distance) @ c.ravel()).reshape(c.shape)


@every_dtype
@pytest.mark.parametrize("n", [1, 3, 6, 7])
@pytest.mark.parametrize("basis", [KBWF(), NARROW, KBWF(2.5, 8.0, 1)], ids=str)
def test_evaluate_is_the_double_sum(basis, n, dtype):
    """Also where the window is wider than the volume."""
    c = np.random.default_rng(n).normal(size=(n, n, n)).astype(dtype)
    value = kbwf.evaluate(basis, jnp.asarray(c))
    assert value.dtype == dtype
    exact = dense_evaluation(basis, c.astype(float))
    atol = TOLERANCE[dtype] * np.abs(exact).max()
    np.testing.assert_allclose(value, exact, rtol=0, atol=atol)


def blob(n, width):
    """Off centre: negligible at the faces, and band-limited to rounding."""
    return gaussian(n, (0.3, -0.7, 1.1), width)


@pytest.mark.parametrize("regularisation", [1e-2, 1e-4, 1e-8])
@pytest.mark.parametrize(
    ("basis", "width"), [(NARROW, 1.5), (KBWF(), 2.5)], ids=["narrow", "paper"]
)
def test_expand_errs_by_what_the_regularisation_takes(basis, width, regularisation):
    """Tikhonov leaves the fraction ``r / (|T|^2 / T_0^2 + r)`` of each frequency.

    ``T`` is the response of the sampled window, here the closed form (its
    aliases change the prediction by 2 %).
    """
    n = 32
    volume = blob(n, width)
    back = kbwf.evaluate(basis, kbwf.expand(basis, volume, regularisation))
    error = np.linalg.norm(back - volume) / np.linalg.norm(volume)
    k = 2 * np.pi * np.fft.fftfreq(n)
    z, y, x = np.meshgrid(k, k, k, indexing="ij")
    omega = jnp.asarray(np.sqrt(x**2 + y**2 + z**2))
    response = np.array(kbwf.fourier_transform(basis, omega))
    response /= response[0, 0, 0]
    lost = regularisation / (response**2 + regularisation)
    power = np.abs(np.fft.fftn(volume)) ** 2
    predicted = np.sqrt(np.sum(lost**2 * power) / np.sum(power))
    # 1e-8: what the cut at the faces leaves (the coefficients' own tails).
    assert 0.95 * predicted - 1e-8 < error < 1.05 * predicted + 1e-8


def test_expand_in_float32():
    volume = blob(24, 1.5)
    exact = kbwf.expand(NARROW, volume)
    value = kbwf.expand(NARROW, volume.astype(jnp.float32))
    assert value.dtype == jnp.float32
    np.testing.assert_allclose(value, exact, rtol=0, atol=1e-5 * float(exact.max()))


def test_simulation_basis_holds_a_real_map(data_dir):
    volume = jnp.asarray(read_mrc(data_dir / "hjc_46.mrc")[0], jnp.float64)
    back = kbwf.evaluate(NARROW, kbwf.expand(NARROW, volume))
    assert np.linalg.norm(back - volume) < 1e-3 * np.linalg.norm(volume)


@pytest.mark.parametrize(
    "parameters",
    [
        {"radius": 0.0},
        {"radius": -1.0},
        {"radius": float("nan")},
        {"radius": float("inf")},
        {"taper": 4.9},
        {"taper": 80.1},
        {"order": 0},
        {"order": 7},
    ],
    ids=str,
)
def test_bad_parameters_are_named(parameters):
    ((name, value),) = parameters.items()
    with pytest.raises(InputError, match=rf"a positive radius.*{name}={value}"):
        KBWF(**parameters)
