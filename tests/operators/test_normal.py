"""The normal operator: every shortcut against the dense sum it replaces."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import (
    assert_close,
    centred,
    draw,
    draw_angles,
    draw_rotations,
    lattice_points,
    toeplitz,
)

from jaxrefine.euler import euler_to_matrix, projection_jacobian
from jaxrefine.geometry import Poses
from jaxrefine.maps import tv
from jaxrefine.operators import kbwf, normal, spatial

BASIS = kbwf.KBWF()
TIGHT = spatial.footprint(BASIS, tolerance=1e-13)
TOLERANCE = {jnp.float64: 1e-12, jnp.float32: 2e-5}
every_parity = pytest.mark.parametrize("n", [4, 5])
every_size_and_dtype = pytest.mark.parametrize(
    ("n", "dtype"), [(3, jnp.float64), (6, jnp.float64), (6, jnp.float32)]
)


_values = jax.jit(lambda series, squared: series(squared))
_slopes = jax.jit(lambda series, squared: series.slope(squared))


def lattice(n):
    """The points ``(x, y, z)`` of ``[-(n-1), n-1]**3``, indexed ``[z, y, x]``."""
    k = np.arange(-(n - 1), n)
    z, y, x = np.meshgrid(k, k, k, indexing="ij")
    return np.stack([x, y, z], axis=-1)


def direct_kernel(footprint, rotations, n):
    rows = np.asarray(rotations, float)[:, :2]
    seen = np.einsum("pij,...j->p...i", rows, lattice(n))
    squared = jnp.asarray(np.sum(seen**2, axis=-1))
    values = _values(footprint.autocorrelation, squared)
    return np.asarray(values).sum(axis=0)


@pytest.mark.parametrize(
    ("n", "dtype"),
    [(1, jnp.float64), (3, jnp.float64), (6, jnp.float64), (6, jnp.float32)],
)
def test_kernel_is_equation_32(n, dtype):
    """The tube misses nothing, also where it is wider than the grid."""
    axes = jnp.asarray([[0, 0, 0], [0, np.pi / 2, 0], [np.pi / 2, np.pi / 2, 1]])
    diagonal = jnp.asarray([[np.pi / 4, np.arccos(3**-0.5), 0], [0, np.pi / 4, 0]])
    special = euler_to_matrix(jnp.concatenate([axes, diagonal]))
    rotations = jnp.concatenate([draw_rotations(3), special]).astype(dtype)
    value = normal.kernel(TIGHT, rotations, n)
    assert value.dtype == dtype
    exact = direct_kernel(TIGHT, rotations, n)
    assert_close(value, exact, TOLERANCE[dtype])


@pytest.mark.parametrize("n", [4, 7])
def test_kernel_is_even_and_additive(n):
    rotations = draw_rotations(5)
    value = normal.kernel(TIGHT, rotations, n)
    assert_close(value, value[::-1, ::-1, ::-1], 1e-14)
    first, rest = (normal.kernel(TIGHT, r, n) for r in jnp.split(rotations, [2]))
    assert_close(value, first + rest, 1e-14)


def dense_projection(rotation, shift, n, half, spacing):
    """The matrix of eq. (4) on a grid of the image plane, ``(pixels, n**3)``."""
    seen = np.asarray(rotation)[:2] @ lattice_points(centred(n))
    axis = np.arange(-half, half + spacing, spacing)
    pixels = np.stack(np.meshgrid(axis, axis), axis=-1).reshape(-1, 1, 2)
    points = jnp.asarray(pixels - seen.T - np.asarray(shift))
    return np.asarray(_xray_transform(points))


_xray_transform = jax.jit(lambda points: kbwf.xray_transform(BASIS, points))


def dense_normal(rotations, shifts, n, spacing):
    """``H^T H`` with the image plane sampled at a spacing, times the pixel's area."""
    # Every footprint lies inside: sqrt(3) n / 2 for the volume, then shift and radius.
    half = int(np.ceil(0.87 * n + np.abs(shifts).max() + BASIS.radius)) + 1
    total = np.zeros((n**3, n**3))
    for rotation, shift in zip(rotations, shifts, strict=True):
        h = dense_projection(rotation, shift, n, half, spacing)
        total += h.T @ h * spacing**2
    return total


def aliasing_bound(spacing):
    r"""Bound what one particle's sum over pixels can differ from the integral.

    With ``f(x) = psi(x - y) psi(x - y')``, Poisson's summation formula gives
    ``h^2 sum_m f(h m) - int f = sum_{j != 0} f^(2 pi j / h)``, and ``f^`` is the
    convolution of two spectra of modulus ``|phi^|``, hence
    ``|error| <= (2 pi)^-2 sum_{j != 0} int |phi^(w)| |phi^(2 pi j / h - w)| dw``.
    """
    step, reach, jmax = 0.1, 25.0, 3
    axis = np.arange(-reach, reach, step)

    def spectrum(x, y):
        omega = jnp.asarray(np.hypot(x[None, :], y[:, None]))
        return np.abs(kbwf.fourier_transform(BASIS, omega))

    total, here = 0.0, spectrum(axis, axis)
    for jx, jy in np.ndindex(jmax + 1, jmax + 1):
        if jx or jy:
            period = 2 * np.pi / spacing
            there = spectrum(axis - period * jx, axis - period * jy)
            # The four quadrants are alike; the axes belong to two of them.
            total += (4 if jx and jy else 2) * np.sum(here * there)
    return total * step**2 / (2 * np.pi) ** 2


SHIFTS = np.array([[0.0, 0.0], [0.31, -0.77], [1.5, 0.5]])


def test_normal_operator_is_dense_at_unit_spacing_within_the_aliasing_bound():
    """The derived bound, for shifts of every fraction of a pixel: w ignores them."""
    n, rotations = 5, draw_rotations(3)
    kernel = toeplitz(normal.kernel(TIGHT, rotations, n))
    peak = kernel.max()
    bound = len(rotations) * aliasing_bound(1.0)
    # The bound is what design.md calls "up to 1e-3 of the peak".
    assert bound < 2e-3 * peak
    errors = [
        np.abs(dense_normal(rotations, shifts, n, 1.0) - kernel).max()
        for shifts in (SHIFTS, 0 * SHIFTS, SHIFTS[::-1] + 3.21)
    ]
    assert max(errors) < bound
    # A voxel on a pixel's centre attains it: there all the aliases are in phase.
    assert max(errors) > 0.99 * bound


@every_parity
def test_normal_operator_is_dense_at_half_pixel_spacing(n):
    """Where the sum over pixels is the integral, ``H^T H = w *`` tightly."""
    rotations = draw_rotations(3)
    kernel = toeplitz(normal.kernel(TIGHT, rotations, n))
    assert 3 * aliasing_bound(0.5) < 1e-8 * kernel.max()
    assert_close(dense_normal(rotations, SHIFTS, n, 0.5), kernel, 1e-8)


@pytest.mark.parametrize(
    ("n", "dtype"),
    [(1, jnp.float64), (4, jnp.float64), (5, jnp.float64), (5, jnp.float32)],
)
def test_apply_normal_is_the_dense_convolution(n, dtype):
    kernel = normal.kernel(TIGHT, draw_rotations(3, dtype=dtype), n)
    c = draw(n, n, n, dtype=dtype)
    value = normal.apply_normal(normal.transfer(kernel), c)
    assert value.dtype == dtype
    exact = toeplitz(kernel).astype(float) @ np.asarray(c, float).ravel()
    assert_close(value, exact.reshape(n, n, n), TOLERANCE[dtype])


@every_parity
def test_apply_normal_convolves_with_any_even_kernel(n):
    """Not only with tubes: the padding leaves no wrap-around at the corners."""
    kernel = draw(2 * n - 1, 2 * n - 1, 2 * n - 1)
    kernel = kernel + kernel[::-1, ::-1, ::-1]
    c = draw(n, n, n)
    exact = (toeplitz(kernel) @ np.asarray(c).ravel()).reshape(n, n, n)
    assert_close(normal.apply_normal(normal.transfer(kernel), c), exact, 1e-12)


@every_parity
def test_normal_operator_is_positive_semidefinite(n):
    kernel = normal.kernel(TIGHT, draw_rotations(1), n)
    transfer = normal.transfer(kernel)
    eigenvalues = np.linalg.eigvalsh(toeplitz(kernel))
    assert eigenvalues.min() > -1e-12 * eigenvalues.max()
    for seed in range(5):
        c = draw(n, n, n, seed=seed)
        assert jnp.vdot(c, normal.apply_normal(transfer, c)) > 0


@pytest.mark.parametrize("n", [1, 4, 5, 7])
def test_transfer_is_the_full_transform(n):
    kernel = normal.kernel(TIGHT, draw_rotations(3), n)
    transfer = normal.transfer(kernel)
    size = transfer.shape[0]
    assert size >= 2 * n - 1 and transfer.shape == (size, size, size // 2 + 1)
    padded = np.zeros((size,) * 3)
    padded[: 2 * n - 1, : 2 * n - 1, : 2 * n - 1] = kernel
    full = np.fft.fftn(np.roll(padded, -(n - 1), axis=(0, 1, 2)))
    assert np.abs(full.imag).max() < 1e-12 * np.abs(full).max()
    assert_close(transfer, full.real[..., : size // 2 + 1], 1e-12)


def test_transfer_is_negative_somewhere_and_must_not_be_clipped():
    """The tube is cut by the box, so its transform on the padded grid rings."""
    n = 8
    kernel = normal.kernel(TIGHT, draw_rotations(1), n)
    transfer = normal.transfer(kernel)
    assert jnp.min(transfer) < -0.01 * jnp.max(transfer)
    c = draw(n, n, n)
    exact = (toeplitz(kernel) @ np.asarray(c).ravel()).reshape(n, n, n)
    clipped = normal.apply_normal(jnp.maximum(transfer, 0.0), c)
    assert np.linalg.norm(clipped - exact) > 0.01 * np.linalg.norm(exact)


@every_parity
def test_autocorrelation_is_the_double_sum(n):
    c = draw(n, n, n)
    value = normal.autocorrelation(c)
    padded = np.zeros((3 * n - 2,) * 3)
    padded[n - 1 : 2 * n - 1, n - 1 : 2 * n - 1, n - 1 : 2 * n - 1] = c
    exact = np.empty((2 * n - 1,) * 3)
    for z, y, x in np.ndindex(exact.shape):
        exact[z, y, x] = np.sum(padded[z : z + n, y : y + n, x : x + n] * c)
    assert_close(value, exact, 1e-13)


def tube_of(c, radius=TIGHT.autocorrelation.radius):
    return normal.tube_samples(normal.autocorrelation(c), radius)


@every_size_and_dtype
def test_sum_over_tube_is_the_quadratic_form(n, dtype):
    c, rotations = draw(n, n, n, dtype=dtype), draw_rotations(4, dtype=dtype)
    series, samples = TIGHT.autocorrelation, tube_of(c)

    @jax.jit
    def both(rotation):
        transfer = normal.transfer(normal.kernel(TIGHT, rotation[None], n))
        exact = jnp.vdot(c, normal.apply_normal(transfer, c))
        return normal.sum_over_tube(samples, series, rotation), exact

    value, exact = jax.lax.map(both, rotations)
    assert value.dtype == dtype
    # Terms of both signs: rounding is relative to the sum of magnitudes.
    scale = float(jnp.vdot(c, c)) * float(series(jnp.zeros(())))
    np.testing.assert_allclose(value, exact, rtol=0, atol=TOLERANCE[dtype] * scale)


def direct_gradient(c, series, matrix):
    """``sum_k A[k] 2 f'(|M k|^2) (M k) k^T`` over the whole grid."""
    k = lattice(c.shape[0]).reshape(-1, 3)
    weights = np.asarray(normal.autocorrelation(c)).ravel()
    seen = k @ np.asarray(matrix, float).T
    squared = jnp.asarray(np.sum(seen**2, axis=-1))
    slope = 2 * weights * np.asarray(_slopes(series, squared))
    return (slope[:, None] * seen).T @ k


@every_size_and_dtype
def test_gradient_over_tube_is_the_derivative(n, dtype):
    """For each dominant axis: the columns come back in the order x, y, z."""
    series, c = TIGHT.autocorrelation, draw(n, n, n, dtype=dtype)
    samples = tube_of(c)
    rotations = draw_rotations(12, seed=5, dtype=dtype)
    value, gradient = jax.jit(
        jax.vmap(lambda r: normal.sum_over_tube_and_gradient(samples, series, r))
    )(rotations)
    same, automatic = jax.jit(
        jax.vmap(jax.value_and_grad(lambda r: normal.sum_over_tube(samples, series, r)))
    )(rotations)
    assert gradient.dtype == dtype
    tolerance = {jnp.float64: 1e-10, jnp.float32: 1e-3}[dtype]
    assert_close(value, same, tolerance)
    assert_close(gradient, automatic[:, :2], tolerance)
    assert np.all(automatic[:, 2] == 0)
    for rotation, columns in zip(rotations, gradient, strict=True):
        assert_close(columns, direct_gradient(c, series, rotation[:2]), tolerance)
    assert set(np.argmax(np.abs(rotations[:, 2]), axis=-1)) == {0, 1, 2}


def test_gradient_over_tube_gives_the_slope_along_each_angle():
    """Chain rule with dM / dtheta, against differences of the dense quadratic form."""
    n, h = 6, 1e-4
    c, angle = draw(n, n, n), draw_angles(1)[0]

    def quadratic(angle):
        kernel = direct_kernel(TIGHT, euler_to_matrix(angle)[None], n)
        return np.vdot(kernel, normal.autocorrelation(c))

    def difference(step, h):
        return (quadratic(angle + h * step) - quadratic(angle - h * step)) / (2 * h)

    _, gradient = normal.sum_over_tube_and_gradient(
        tube_of(c), TIGHT.autocorrelation, euler_to_matrix(angle)
    )
    jacobian = projection_jacobian(angle)
    slopes = jnp.einsum("aij,ij->a", jacobian, gradient)
    for slope, step in zip(slopes, jnp.eye(3), strict=True):
        richardson = (4 * difference(step, h / 2) - difference(step, h)) / 3
        # eps / h = 2e-12 of the value, which is some 1e3 times the slope at worst.
        assert abs(slope - richardson) < 1e-8 * quadratic(angle)
    # An in-plane turn changes nothing.
    assert abs(slopes[2]) < 1e-12 * quadratic(angle)


@pytest.mark.parametrize("n", [1, 4, 5])
def test_circulant_is_the_nearest_one(n):
    """T. Chan's eigenvalues are ``f^* A f`` for the Fourier modes ``f``."""
    kernel = normal.kernel(TIGHT, draw_rotations(3), n)
    value = normal.circulant_eigenvalues(kernel)
    fourier = np.fft.fft(np.eye(n)) / np.sqrt(n)
    modes = np.kron(np.kron(fourier, fourier), fourier)
    exact = np.einsum("qi,ij,qj->q", modes, toeplitz(kernel), modes.conj()).real
    assert_close(value, exact.reshape(n, n, n)[..., : n // 2 + 1], 1e-12)
    assert jnp.min(value) > 0


@pytest.mark.parametrize(
    ("n", "dtype"), [(4, jnp.float64), (5, jnp.float64), (5, jnp.float32)]
)
def test_preconditioned_conjugate_gradient_solves_the_same_system(n, dtype):
    kernel = normal.kernel(TIGHT, draw_rotations(6, dtype=dtype), n)
    transfer, peak = normal.transfer(kernel), jnp.max(kernel)
    rho, shift = peak * 0.5, peak * 0.01

    def operator(c):
        smooth = tv.gradient_adjoint(tv.gradient(c))
        return normal.apply_normal(transfer, c) + rho * smooth + shift * c

    inverse = normal.circulant_inverse(normal.circulant_eigenvalues(kernel), rho, shift)
    b = draw(n, n, n, dtype=dtype)
    identity = jnp.eye(n**3, dtype=dtype).reshape(-1, n, n, n)
    matrix = np.asarray(jax.jit(jax.vmap(operator))(identity), float).reshape(
        n**3, n**3
    )
    exact = np.linalg.solve(matrix, np.asarray(b, float).ravel()).reshape(n, n, n)
    tolerance = {jnp.float64: 1e-12, jnp.float32: 1e-6}[dtype]
    solve = jax.jit(
        lambda b: jax.scipy.sparse.linalg.cg(operator, b, tol=tolerance, M=inverse)[0]
    )
    solution = solve(b)
    # The residual's tolerance, times the condition number of some hundreds.
    assert_close(solution, exact, 1e3 * tolerance)
    # A preconditioner must be symmetric and positive.
    preconditioner = np.asarray(jax.jit(jax.vmap(inverse))(identity), float)
    preconditioner = preconditioner.reshape(n**3, n**3)
    assert_close(preconditioner, preconditioner.T, TOLERANCE[dtype])
    assert np.linalg.eigvalsh(preconditioner).min() > 0
    # And it must help: fewer distinct eigenvalues of any size.
    plain, helped = np.linalg.cond(matrix), np.linalg.cond(preconditioner @ matrix)
    assert helped < plain


def test_what_leaves_the_image_is_still_counted():
    """``w * c`` knows no image edge: a map that fills the box needs larger images."""
    n = 12
    poses = Poses(draw_rotations(3), jnp.zeros((3, 2)))
    kernel = normal.kernel(TIGHT, poses.rotations, n)
    c = draw(n, n, n)
    quadratic = float(jnp.vdot(c, normal.apply_normal(normal.transfer(kernel), c)))

    def seen(image_size):
        return float(jnp.sum(spatial.project(TIGHT, c, poses, image_size) ** 2))

    # Wide enough for the box's diagonal and the footprint, only the aliasing bound of
    # the kernel (1.5e-3 of its peak, per particle and pair of coefficients) is left.
    assert seen(32) == pytest.approx(quadratic, rel=1e-2)
    assert seen(n) < 0.95 * quadratic
