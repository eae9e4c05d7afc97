"""The slice projector against the direct sum, the spatial one, and its adjoint.

The adjoint is that of the pixels' inner product, the normal kernel that of there and
back, and bands are a few that do not change.
"""

import jax.numpy as jnp
import numpy as np
import pytest
from helpers import (
    blobs,
    centred,
    draw,
    draw_complex,
    draw_poses,
    lattice_points,
    relative_error,
)

from jaxrefine.errors import InputError
from jaxrefine.geometry import Poses
from jaxrefine.operators import kbwf, normal, slices, spatial
from jaxrefine.operators.gridding import Finufft, Gridding, default_insertion

N, R_MAX, P = 16, 7, 4
# Relative error of these on white noise: see test_gridding.
FINE, FINE_ERROR = Gridding(4, 2.0), 2e-3
FAST = Gridding(2, 1.5)
BASIS = kbwf.KBWF()
DISC = slices.disc(N, R_MAX)
K = len(DISC.multiplicity)


def direct_images(c, poses, m, plane, basis=None):
    """Sum over all voxels and all frequencies of a plane: the definition of ``H``."""
    voxels = lattice_points(centred(len(c)))
    w = np.arange(-m, m + 1)
    wy, wx = np.meshgrid(w, w, indexing="ij")
    kept = plane(wx, wy)
    wx, wy = wx[kept], wy[kept]
    omega = 2 * np.pi / m * np.stack([wx, wy], axis=-1)
    pixel = centred(m)
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


@pytest.mark.slow
@pytest.mark.parametrize("n", [15, 16])
def test_project_is_the_direct_sum(n):
    """Every sign, origin, phase and factor: the definition on a full plane."""
    disc = slices.disc(n, R_MAX, BASIS)
    c, poses = draw(n, n, n), draw_poses(P)
    spectra = slices.project(FINE.spectrum(c, R_MAX), disc, poses)
    exact = direct_images(c, poses, n, lambda x, y: np.hypot(x, y) <= R_MAX, BASIS)
    assert relative_error(slices.to_images(spectra, disc), exact) < FINE_ERROR


def test_the_transfer_function_multiplies():
    spectrum, poses = FAST.spectrum(draw(N, N, N), R_MAX), draw_poses(P)
    transfer = draw(P, K, seed=4)
    plain = slices.project(spectrum, DISC, poses)
    value = slices.project(spectrum, DISC, poses, transfer)
    assert relative_error(value, transfer.astype(plain.dtype) * plain) < 1e-14


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
    assert relative_error(back, limited) < 1e-14
    assert relative_error(slices.image_spectra(back, disc), spectra) < 1e-14
    power = np.sum(np.abs(spectra) ** 2 * np.asarray(disc.quadrature), axis=1)
    np.testing.assert_allclose(power, np.sum(limited**2, axis=(1, 2)), rtol=1e-12)
    assert int(disc.multiplicity.sum()) == kept.sum()


@pytest.mark.parametrize(("across", "down"), [(2, -1), (-3, 4)])
def test_an_integer_shift_rolls_the_image(across, down):
    """Content sits at +t, as with the spatial projector, and cyclically."""
    spectrum, poses = FAST.spectrum(draw(N, N, N), R_MAX), draw_poses(P)
    moved = Poses(poses.rotations, poses.shifts + jnp.asarray([[across, down]], float))
    still, value = (
        slices.to_images(slices.project(spectrum, DISC, p), DISC)
        for p in (poses, moved)
    )
    assert relative_error(value, np.roll(still, (down, across), axis=(1, 2))) < 1e-12


def test_discs_are_in_the_order_of_radii():
    """So that a smaller one is the beginning; filled up with what counts nothing."""
    large, small = slices.disc(N, R_MAX), slices.disc(N, 4)
    radii = np.hypot(*np.asarray(large.frequencies).T)
    assert (np.diff(radii) >= 0).all()
    count = len(small.shells)
    np.testing.assert_array_equal(large.frequencies[:count], small.frequencies)
    filled = slices.disc(N, R_MAX, multiple=64)
    assert len(filled.shells) % 64 == 0
    for name in ("frequencies", "multiplicity", "rows", "columns", "shells"):
        whole, part = getattr(filled, name), getattr(large, name)
        np.testing.assert_array_equal(whole[: len(part)], part)
        np.testing.assert_array_equal(whole[len(part) :], 0)


def test_a_smaller_disc_is_a_mask():
    """Fewer frequencies of the same image, whatever band the spectrum holds."""
    c, poses = draw(N, N, N), draw_poses(P)
    small = slices.disc(N, 4)
    whole = slices.project(FAST.spectrum(c, R_MAX), DISC, poses)
    inside = np.linalg.norm(DISC.frequencies, axis=1) <= 4
    for r_max in (4, R_MAX):
        part = slices.project(FAST.spectrum(c, r_max), small, poses)
        assert relative_error(part, np.asarray(whole)[:, inside]) < 1e-13
    np.testing.assert_array_equal(small.frequencies, DISC.frequencies[inside])
    np.testing.assert_array_equal(small.shells, DISC.shells[inside])


def test_the_spatial_projector_agrees_on_band_limited_maps():
    """The one sums footprints over voxels, the other waves over frequencies.

    What the slices leave out: ``phi^ c^`` beyond the disc, which for blobs of width
    1.5 at 2 pi 11 / 24 is exp(-(1.5 * 2.9)**2 / 2) = 1e-4 of the centre.
    """
    n = 24
    c, poses = blobs(n, 1.5), draw_poses(2)
    disc = slices.disc(n, 11, BASIS)
    value = slices.to_images(slices.project(FINE.spectrum(c, 11), disc, poses), disc)
    exact = spatial.project(spatial.footprint(BASIS), c, poses, n)
    assert relative_error(value, exact) < 1e-3


@pytest.mark.parametrize(
    ("insertion", "forward", "tolerance"),
    [(FAST, FAST, 1e-12), (default_insertion(), FINE, FINE_ERROR)],
    ids=["gridding", "default"],
)
def test_backproject_is_the_adjoint(insertion, forward, tolerance):
    """For the pixels' inner product, with and without weights, in uneven batches."""
    c, poses, images = draw(N, N, N), draw_poses(P), draw(P, N, N, seed=9)
    spectra = slices.image_spectra(images, DISC)
    spectrum = forward.spectrum(c, R_MAX)
    for weights in (None, draw(P, K, seed=6)):
        seen = slices.to_images(slices.project(spectrum, DISC, poses, weights), DISC)
        back = slices.backproject(insertion, spectra, DISC, poses, weights, 3)
        scale = float(jnp.linalg.norm(seen) * jnp.linalg.norm(images))
        gap = float(np.vdot(seen, images)) - float(np.vdot(c, back))
        assert abs(gap) < tolerance * scale


@pytest.mark.parametrize("side", [15, 20])
def test_a_volume_of_another_side_has_the_same_spectrum(side):
    """Inserting is the adjoint of its slices, and the kernel that of there and back.

    The slices are explicit sums over its voxels, whose box has the images' length.
    """
    c, poses, images = draw(side, side, side), draw_poses(P), draw(P, N, N, seed=9)
    weights = draw(P, K, seed=6) ** 2
    voxels = lattice_points(centred(side))
    frequencies = np.asarray(DISC.frequencies)
    plane = np.pad(frequencies, ((0, 0), (0, 1)))
    turned = np.asarray(poses.rotations).transpose(0, 2, 1) @ plane.T
    waves = np.exp(-2j * np.pi / side * np.einsum("pdk,dv->pkv", turned, voxels))
    moved = np.asarray(poses.shifts) @ frequencies.T
    waves = waves * np.exp(-2j * np.pi / N * moved)[:, :, None]

    factor = np.asarray(weights) * np.asarray(DISC.quadrature)

    def inserted(spectra):
        values = factor * np.asarray(spectra)
        return np.einsum("pkv,pk->v", waves.conj(), values).real

    spectra = slices.image_spectra(images, DISC)
    back = slices.backproject(FINE, spectra, DISC, poses, weights, side=side)
    assert relative_error(back.ravel(), inserted(spectra)) < FINE_ERROR
    kernel = slices.normal_kernel(FINE, DISC, poses, weights, side=side)
    value = normal.apply_normal(normal.transfer(kernel), c)
    exact = inserted(waves @ np.asarray(c).ravel())
    assert relative_error(value.ravel(), exact) < 2 * FINE_ERROR


def test_the_normal_kernel_is_backproject_of_project():
    """The convolution is the whole of ``H^T A H``, up to the gridding's error."""
    c, poses, weights = draw(N, N, N), draw_poses(P), draw(P, K, seed=6) ** 2
    disc = slices.disc(N, R_MAX, BASIS)
    kernel = slices.normal_kernel(FINE, disc, poses, weights, 3)
    assert kernel.shape == (2 * N - 1,) * 3
    assert relative_error(kernel[::-1, ::-1, ::-1], kernel) < 1e-13
    value = normal.apply_normal(normal.transfer(kernel), c)
    spectra = slices.project(FINE.spectrum(c, R_MAX), disc, poses)
    exact = slices.backproject(FINE, spectra, disc, poses, weights)
    assert relative_error(value, exact) < 2 * FINE_ERROR


def test_finufft_inserts_the_same_kernel():
    pytest.importorskip("jax_finufft")
    poses = draw_poses(P)
    exact = slices.normal_kernel(FINE, DISC, poses)
    value = slices.normal_kernel(Finufft(1e-9), DISC, poses)
    assert relative_error(value, exact) < FINE_ERROR


def test_single_precision():
    single = jnp.float32
    spectrum = FAST.spectrum(draw(N, N, N, dtype=single), R_MAX)
    double = FAST.spectrum(draw(N, N, N), R_MAX)
    poses = draw_poses(P, dtype=single)
    projected = slices.project(spectrum, DISC, poses)
    assert projected.dtype == jnp.complex64
    assert relative_error(projected, slices.project(double, DISC, draw_poses(P))) < 1e-5
    for value in (
        slices.backproject(FAST, projected, DISC, poses),
        slices.normal_kernel(FAST, DISC, poses),
    ):
        assert value.dtype == single and bool(jnp.isfinite(value).all())


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


def test_a_volume_must_hold_the_band():
    images, poses = draw_complex(P, K), draw_poses(P)
    for insert in (
        lambda: slices.backproject(FAST, images, DISC, poses, side=13),
        lambda: slices.normal_kernel(FAST, DISC, poses, side=13),
    ):
        with pytest.raises(InputError, match="at least twice .* disc, 14, got 13"):
            insert()


def test_refusals():
    with pytest.raises(InputError, match="r_max must be from 1 to 7"):
        slices.disc(16, 8)
    with pytest.raises(InputError, match="side of 16 pixels, got 15"):
        slices.image_spectra(draw(1, 15, 15), DISC)
    poses = draw_poses(P)
    for spectrum in (
        FAST.spectrum(draw(N, N, N), 5),
        FAST.spectrum(draw(18, 18, 18), 8),
    ):
        with pytest.raises(InputError, match="side 16 up to at least 7 cycles"):
            slices.project(spectrum, DISC, poses)
    with pytest.raises(InputError, match="one pose for each of 3 images"):
        slices.backproject(FAST, draw_complex(3, K), DISC, poses)
