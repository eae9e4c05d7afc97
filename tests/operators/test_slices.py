"""The slice projector against the direct sum, the spatial one, and autodiff."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrefine import geometry
from jaxrefine._batching import map_over_particles
from jaxrefine.errors import InputError
from jaxrefine.geometry import Poses
from jaxrefine.operators import kbwf, normal, slices, spatial
from jaxrefine.operators.gridding import Finufft, Gridding, default_insertion
from jaxrefine.poses import likelihood

N, R_MAX, P = 16, 7, 4
# Relative error of these on white noise: see test_gridding.
FINE, FINE_ERROR = Gridding(4, 2.0), 2e-3
FAST = Gridding(2, 1.5)
BASIS = kbwf.KBWF()
equations = eqx.filter_jit(likelihood.normal_equations)
with_gradient = eqx.filter_jit(likelihood.cost_and_gradient)


def draw(*shape, seed=0, dtype=jnp.float64):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def draw_complex(*shape, seed=0, dtype=jnp.float64):
    return jax.lax.complex(
        draw(*shape, seed=seed, dtype=dtype), draw(*shape, seed=seed + 1, dtype=dtype)
    )


def draw_poses(count=P, seed=1, dtype=jnp.float64):
    rng = np.random.default_rng(seed)
    angles = rng.uniform(-np.pi, np.pi, (count, 3))
    shifts = rng.uniform(-2, 2, (count, 2))
    return Poses(jnp.asarray(angles, dtype), jnp.asarray(shifts, dtype))


def relative(value, exact):
    value, exact = np.asarray(value), np.asarray(exact)
    return np.linalg.norm(value - exact) / np.linalg.norm(exact)


DISC = slices.disc(N, R_MAX)
K = len(DISC.multiplicity)


def direct_images(c, poses, m, plane, basis=None):
    """Sum over all voxels and all frequencies of a plane: the definition of ``H``."""
    n = len(c)
    k = np.arange(n) - n // 2
    z, y, x = np.meshgrid(k, k, k, indexing="ij")
    voxels = np.stack([x.ravel(), y.ravel(), z.ravel()])
    w = np.arange(-m, m + 1)
    wy, wx = np.meshgrid(w, w, indexing="ij")
    kept = plane(wx, wy)
    wx, wy = wx[kept], wy[kept]
    omega = 2 * np.pi / m * np.stack([wx, wy], axis=-1)
    pixel = np.arange(m) - m // 2
    envelope = np.ones(len(wx))
    if basis is not None:
        radii = jnp.asarray(np.linalg.norm(omega, axis=-1))
        envelope = np.asarray(kbwf.fourier_transform(basis, radii))
    images = []
    for matrix, shift in zip(poses.rotations, poses.shifts, strict=True):
        seen = np.asarray(matrix)[:2] @ voxels + np.asarray(shift)[:, None]
        spectrum = np.exp(-1j * omega @ seen) @ np.asarray(c).ravel() * envelope
        waves_x = np.exp(1j * omega[:, 0, None] * pixel)
        waves_y = np.exp(1j * omega[:, 1, None] * pixel)
        image = np.einsum("k,ky,kx->yx", spectrum, waves_y, waves_x) / m**2
        images.append(image.real)
    return np.stack(images)


@pytest.mark.parametrize("n", [15, 16])
def test_project_is_the_direct_sum(n):
    """Every sign, origin, phase and factor: the definition on a full plane."""
    disc = slices.disc(n, R_MAX, BASIS)
    c, poses = draw(n, n, n), draw_poses()
    spectra = slices.project(FINE.spectrum(c, R_MAX), disc, poses)
    exact = direct_images(c, poses, n, lambda x, y: np.hypot(x, y) <= R_MAX, BASIS)
    assert relative(slices.to_images(spectra, disc), exact) < FINE_ERROR


def test_the_transfer_function_multiplies():
    spectrum, poses = FAST.spectrum(draw(N, N, N), R_MAX), draw_poses()
    transfer = draw(P, K, seed=4)
    plain = slices.project(spectrum, DISC, poses)
    value = slices.project(spectrum, DISC, poses, transfer)
    assert relative(value, transfer.astype(plain.dtype) * plain) < 1e-14


@pytest.mark.parametrize("m", [15, 16])
def test_images_and_spectra(m):
    """There and back is the band limit, Parseval's identity included."""
    disc = slices.disc(m, (m - 1) // 2)
    images = draw(P, m, m)
    spectra = slices.image_spectra(images, disc)
    axis = np.fft.fftfreq(m) * m
    kept = np.hypot(axis[:, None], axis) <= disc.r_max
    limited = np.fft.ifft2(np.fft.fft2(images) * kept).real
    back = slices.to_images(spectra, disc)
    assert relative(back, limited) < 1e-14
    assert relative(slices.image_spectra(back, disc), spectra) < 1e-14
    power = np.sum(np.abs(spectra) ** 2 * np.asarray(disc.quadrature), axis=1)
    np.testing.assert_allclose(power, np.sum(limited**2, axis=(1, 2)), rtol=1e-12)
    assert int(disc.multiplicity.sum()) == kept.sum()


@pytest.mark.parametrize(("across", "down"), [(2, -1), (-3, 4)])
def test_an_integer_shift_rolls_the_image(across, down):
    """Content sits at +t, as with the spatial projector, and cyclically."""
    spectrum, poses = FAST.spectrum(draw(N, N, N), R_MAX), draw_poses()
    moved = Poses(poses.angles, poses.shifts + jnp.asarray([[across, down]], float))
    still, value = (
        slices.to_images(slices.project(spectrum, DISC, p), DISC)
        for p in (poses, moved)
    )
    assert relative(value, np.roll(still, (down, across), axis=(1, 2))) < 1e-12


def test_a_smaller_disc_is_a_mask():
    """Fewer frequencies of the same image, whatever band the spectrum holds."""
    c, poses = draw(N, N, N), draw_poses()
    small = slices.disc(N, 4)
    whole = slices.project(FAST.spectrum(c, R_MAX), DISC, poses)
    inside = np.linalg.norm(DISC.frequencies, axis=1) <= 4
    for r_max in (4, R_MAX):
        part = slices.project(FAST.spectrum(c, r_max), small, poses)
        assert relative(part, np.asarray(whole)[:, inside]) < 1e-13
    np.testing.assert_array_equal(small.frequencies, DISC.frequencies[inside])
    np.testing.assert_array_equal(small.shells, DISC.shells[inside])


def smooth_map(n, width, seed=3):
    """Blobs near the middle: nothing beyond Nyquist, nothing near the edge."""
    rng = np.random.default_rng(seed)
    k = np.arange(n) - n // 2
    z, y, x = np.meshgrid(k, k, k, indexing="ij")
    total = np.zeros((n, n, n))
    for _ in range(4):
        centre, height = rng.uniform(-2, 2, 3), rng.normal()
        squared = sum((a - b) ** 2 for a, b in zip((x, y, z), centre, strict=True))
        total += height * np.exp(-squared / (2 * width**2))
    return jnp.asarray(total)


def test_the_spatial_projector_agrees_on_band_limited_maps():
    """The one sums footprints over voxels, the other waves over frequencies.

    What the slices leave out: ``phi^ c^`` beyond the disc, which for blobs of width
    1.5 at 2 pi 11 / 24 is exp(-(1.5 * 2.9)**2 / 2) = 1e-4 of the centre.
    """
    n = 24
    c, poses = smooth_map(n, 1.5), draw_poses(2)
    disc = slices.disc(n, 11, BASIS)
    value = slices.to_images(slices.project(FINE.spectrum(c, 11), disc, poses), disc)
    exact = spatial.project(spatial.footprint(BASIS), c, poses, n)
    assert relative(value, exact) < 1e-3


@pytest.mark.parametrize(
    ("insertion", "forward", "tolerance"),
    [(FAST, FAST, 1e-12), (default_insertion(), FINE, FINE_ERROR)],
    ids=["gridding", "default"],
)
def test_backproject_is_the_adjoint(insertion, forward, tolerance):
    """For the pixels' inner product, with and without weights, in uneven batches."""
    c, poses, images = draw(N, N, N), draw_poses(), draw(P, N, N, seed=9)
    spectra = slices.image_spectra(images, DISC)
    spectrum = forward.spectrum(c, R_MAX)
    for weights in (None, draw(P, K, seed=6)):
        seen = slices.to_images(slices.project(spectrum, DISC, poses, weights), DISC)
        back = slices.backproject(insertion, spectra, DISC, poses, weights, 3)
        scale = float(jnp.linalg.norm(seen) * jnp.linalg.norm(images))
        assert abs(np.vdot(seen, images) - np.vdot(c, back)) < tolerance * scale


def test_the_normal_kernel_is_backproject_of_project():
    """The convolution is the whole of ``H^T A H``, up to the gridding's error."""
    c, poses, weights = draw(N, N, N), draw_poses(), draw(P, K, seed=6) ** 2
    disc = slices.disc(N, R_MAX, BASIS)
    kernel = slices.normal_kernel(FINE, disc, poses, weights, 3)
    assert kernel.shape == (2 * N - 1,) * 3
    assert relative(kernel[::-1, ::-1, ::-1], kernel) < 1e-13
    value = normal.apply_normal(normal.transfer(kernel), c)
    spectra = slices.project(FINE.spectrum(c, R_MAX), disc, poses)
    exact = slices.backproject(FINE, spectra, disc, poses, weights)
    assert relative(value, exact) < 2 * FINE_ERROR


def test_finufft_inserts_the_same_kernel():
    pytest.importorskip("jax_finufft")
    poses = draw_poses()
    exact = slices.normal_kernel(FINE, DISC, poses)
    value = slices.normal_kernel(Finufft(1e-9), DISC, poses)
    assert relative(value, exact) < FINE_ERROR


def particle(dtype=jnp.float64, transfer=True):
    """A particle not at its best pose."""
    poses = draw_poses(dtype=dtype)
    factor = jnp.cos(draw(K, seed=5, dtype=dtype)) if transfer else None
    weights = DISC.quadrature.astype(dtype) * (1 + draw(K, seed=6, dtype=dtype) ** 2)
    data = 8 * draw_complex(K, seed=7, dtype=dtype)
    return data, poses.rotations[0], poses.shifts[0], factor, weights


def model(spectrum, rotation, shift, transfer):
    """The slice in the open: no trick but the interpolated spectrum."""
    omega = DISC.frequencies
    k = omega @ rotation[:2]
    angle = -2 * np.pi / N * (omega @ shift)
    phases = jax.lax.complex(jnp.cos(angle), jnp.sin(angle))
    gain = (DISC.envelope * transfer).astype(phases.dtype)
    return phases * gain * spectrum(k[:, 0], k[:, 1], k[:, 2])


def moved(particle, step):
    data, rotation, shift, transfer, weights = particle
    rotation = geometry.rotvec_to_matrix(step[:3]) @ rotation
    return data, rotation, shift + step[3:], transfer, weights


@pytest.mark.parametrize("transfer", [True, False])
def test_cost_gradient_and_normal_equations(transfer):
    """The gradient is ``jax.grad`` of the cost, ``J`` is ``jacfwd`` of the slice."""
    spectrum = FAST.spectrum(draw(N, N, N), R_MAX)
    one = particle(transfer=transfer)
    data, _, _, factor, weights = one
    factor = jnp.ones(K) if factor is None else factor

    def residual(step):
        _, rotation, shift, _, _ = moved(one, step)
        return model(spectrum, rotation, shift, factor) - data

    step = jnp.zeros(5)
    r = np.asarray(jax.jit(residual)(step))
    w = np.asarray(weights)
    energy = np.sum(w * np.abs(r) ** 2) / 2
    jacobian = np.asarray(jax.jit(jax.jacfwd(residual))(step))
    slope = (jacobian.conj() * w[:, None]).T @ r
    square = (jacobian.conj() * w[:, None]).T @ jacobian

    cost = jax.jit(lambda s: likelihood.cost(spectrum, DISC, *moved(one, s)))
    np.testing.assert_allclose(cost(step), energy, rtol=1e-12)
    by_grad = jax.grad(cost)(step)
    assert relative(by_grad, slope.real) < 1e-10
    value, gradient = with_gradient(spectrum, DISC, *one)
    np.testing.assert_allclose(value, energy, rtol=1e-12)
    assert relative(gradient, slope.real) < 1e-10
    value, gradient, curvature = equations(spectrum, DISC, *one)
    np.testing.assert_allclose(value, energy, rtol=1e-12)
    assert relative(gradient, slope.real) < 1e-10
    assert relative(curvature, square.real) < 1e-10


def test_gauss_newton_finds_the_pose():
    """From two degrees and half a pixel away, to rounding, in a few steps."""
    c = smooth_map(N, 1.0)
    spectrum = Gridding(4, 1.75).spectrum(c, R_MAX)
    _, rotation, shift, _, weights = particle()
    truth = jax.jit(model)(spectrum, rotation, shift, jnp.ones(K))
    start = jnp.asarray([0.02, -0.02, 0.02, 0.3, -0.4])
    at = moved((truth, rotation, shift, None, weights), start)
    for _ in range(8):
        _, gradient, curvature = equations(spectrum, DISC, *at)
        at = moved(at, -jnp.linalg.solve(curvature, gradient))
    assert float(jnp.abs(at[1] - rotation).max()) < 1e-8
    assert float(jnp.abs(at[2] - shift).max()) < 1e-8


def test_batches_of_particles_are_the_particles():
    spectrum = FAST.spectrum(draw(N, N, N), R_MAX)
    poses = draw_poses(5)
    weights = jnp.broadcast_to(DISC.quadrature, (5, K))
    data = draw_complex(5, K)
    all_of = (data, poses.rotations, poses.shifts, None, weights)
    together = map_over_particles(
        lambda one: likelihood.normal_equations(spectrum, DISC, *one), all_of, 2
    )
    for p in (0, 4):
        one = jax.tree.map(lambda leaf, p=p: leaf[p], all_of)
        alone = equations(spectrum, DISC, *one)
        for value, exact in zip(together, alone, strict=True):
            np.testing.assert_allclose(value[p], exact, rtol=1e-12, atol=1e-12)


def test_single_precision():
    single = jnp.float32
    spectrum = FAST.spectrum(draw(N, N, N, dtype=single), R_MAX)
    double = FAST.spectrum(draw(N, N, N), R_MAX)
    poses = draw_poses(dtype=single)
    projected = slices.project(spectrum, DISC, poses)
    assert projected.dtype == jnp.complex64
    assert relative(projected, slices.project(double, DISC, draw_poses())) < 1e-5
    for value in (
        slices.backproject(FAST, projected, DISC, poses),
        slices.normal_kernel(FAST, DISC, poses),
    ):
        assert value.dtype == single and bool(jnp.isfinite(value).all())
    results = equations(spectrum, DISC, *particle(single))
    exact = equations(double, DISC, *particle())
    for value, reference in zip(results, exact, strict=True):
        assert value.dtype == single
        assert relative(value, reference) < 1e-4


def test_buckets():
    """Few, themselves fixed, monotone; never above what was asked nor far below."""
    for m in (15, 64, 90, 256, 512):
        last = (m - 1) // 2
        rounded = [slices.bucket(r, m) for r in range(1, last + 3)]
        assert rounded == sorted(rounded)
        assert rounded[-3:] == [last] * 3
        assert len({b for b in rounded if b >= 0.8**13 * last}) <= 14
        assert [slices.bucket(b, m) for b in rounded] == rounded
        for r, b in enumerate(rounded, 1):
            assert 0.8 * min(r, last) - 1 <= b <= r


def test_refusals():
    with pytest.raises(InputError, match="r_max from 1 to 7"):
        slices.disc(16, 8)
    with pytest.raises(InputError, match="side 16, not 15"):
        slices.image_spectra(draw(1, 15, 15), DISC)
    poses = draw_poses()
    for spectrum in (
        FAST.spectrum(draw(N, N, N), 5),
        FAST.spectrum(draw(18, 18, 18), 8),
    ):
        with pytest.raises(InputError, match="side 16 up to 7 cycles"):
            slices.project(spectrum, DISC, poses)
    with pytest.raises(InputError, match="3 images want as many poses"):
        slices.backproject(FAST, draw_complex(3, K), DISC, poses)
