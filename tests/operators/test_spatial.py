"""The spatial projector against its dense matrix, its symmetries, and RELION."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import (
    assert_close,
    centred,
    draw,
    draw_angles,
    draw_poses,
    draw_rotations,
    lattice_points,
)
from scipy.special import j0

from jaxrefine import ctf
from jaxrefine.errors import InputError
from jaxrefine.euler import euler_to_matrix
from jaxrefine.geometry import Poses
from jaxrefine.io import read_mrc, read_poses, read_stack
from jaxrefine.operators import kbwf, spatial

BASIS, NARROW = kbwf.KBWF(), kbwf.SIMULATION_BASIS
TIGHT = spatial.footprint(BASIS, tolerance=1e-13)
NARROW_TIGHT = spatial.footprint(NARROW, tolerance=1e-13)
# Relative to the largest value. The series holds the footprint to 1e-13; in float32 a
# lattice point is known to 1e-6 voxels and the footprint to 1e-6 of its peak.
TOLERANCE = {jnp.float64: 1e-12, jnp.float32: 1e-5}


def dense(basis, rotation, shift, n, m):
    """The matrix of eq. (4) for one pose, ``(m, m, n, n, n)``, in closed form."""
    seen = np.asarray(rotation, float)[:2] @ lattice_points(centred(n))
    pixels = np.stack(np.meshgrid(centred(m), centred(m), indexing="xy"), axis=-1)
    points = pixels[:, :, None, :] - seen.T - np.asarray(shift, float)
    values = kbwf.xray_transform(basis, jnp.asarray(points))
    return np.asarray(values).reshape(m, m, n, n, n)


def dense_projections(basis, c, poses, m):
    c, n = np.asarray(c, float), c.shape[0]
    each = [
        np.tensordot(dense(basis, rotation, shift, n, m), c, 3)
        for rotation, shift in zip(poses.rotations, poses.shifts, strict=True)
    ]
    return np.stack(each)


def dense_backprojection(basis, images, poses, n):
    images = np.asarray(images, float)
    return sum(
        np.tensordot(image, dense(basis, rotation, shift, n, len(image)), 2)
        for image, rotation, shift in zip(
            images, poses.rotations, poses.shifts, strict=True
        )
    )


@pytest.mark.parametrize(
    ("n", "m", "dtype"),
    [
        (7, 9, jnp.float64),
        (7, 9, jnp.float32),
        (6, 4, jnp.float64),
        (3, 8, jnp.float64),
        (1, 5, jnp.float64),
    ],
)
def test_project_and_backproject_are_the_dense_sums(n, m, dtype):
    """Odd and even, images smaller and larger, windows wider than the volume."""
    poses, c = draw_poses(3, dtype=dtype), draw(n, n, n, dtype=dtype)
    value = spatial.project(TIGHT, c, poses, m)
    assert value.dtype == dtype and value.shape == (3, m, m)
    assert_close(value, dense_projections(BASIS, c, poses, m), TOLERANCE[dtype])
    images = draw(3, m, m, seed=2, dtype=dtype)
    back = spatial.backproject(spatial.PixelFilter(TIGHT), images, poses, n)
    assert back.dtype == dtype and back.shape == (n, n, n)
    assert_close(back, dense_backprojection(BASIS, images, poses, n), TOLERANCE[dtype])


SPECIAL_ANGLES = np.pi / 4 * np.array([[0, 0, 0], [0, 2, 0], [2, 2, 4], [1, 2, 0]])


def test_project_and_backproject_along_axes_and_diagonals():
    diagonal = np.array([[np.pi / 4, np.arccos(3**-0.5), 0.2], [0, np.pi, 1.0]])
    angles = np.concatenate([SPECIAL_ANGLES, diagonal])
    poses = Poses(euler_to_matrix(jnp.asarray(angles)), jnp.zeros((6, 2)))
    c, images = draw(5, 5, 5), draw(6, 7, 7, seed=3)
    exact = dense_projections(NARROW, c, poses, 7)
    assert_close(spatial.project(NARROW_TIGHT, c, poses, 7), exact, 1e-12)
    back = spatial.backproject(spatial.PixelFilter(NARROW_TIGHT), images, poses, 5)
    assert_close(back, dense_backprojection(NARROW, images, poses, 5), 1e-12)


def test_shifts_that_push_the_particle_out_of_the_image():
    n, m = 5, 8
    shifts = [[6.3, -5.0], [9.0, 0.2], [40.0, 0.0], [-1e3, 1e3], [0.0, -1e6]]
    poses = Poses(draw_rotations(5), jnp.asarray(shifts))
    c, images = draw(n, n, n), draw(5, m, m, seed=4)
    value = spatial.project(TIGHT, c, poses, m)
    assert_close(value, dense_projections(BASIS, c, poses, m), 1e-12)
    assert np.any(value[0] != 0) and np.all(value[2:] == 0)
    image_filter = spatial.PixelFilter(TIGHT)
    back = spatial.backproject(image_filter, images, poses, n)
    assert_close(back, dense_backprojection(BASIS, images, poses, n), 1e-12)
    gone = poses.take(np.arange(2, 5))
    assert np.all(spatial.backproject(image_filter, images[2:], gone, n) == 0)


@pytest.mark.parametrize(
    ("n", "m", "dtype"),
    [(6, 9, jnp.float64), (7, 6, jnp.float64), (7, 6, jnp.float32)],
)
def test_backproject_is_the_adjoint_of_project(n, m, dtype):
    """Also with the default footprint: the weights are the same numbers."""
    footprint = spatial.footprint(BASIS)
    poses, c = draw_poses(3, dtype=dtype), draw(n, n, n, dtype=dtype)
    images = draw(3, m, m, seed=5, dtype=dtype)

    def forward(c):
        return spatial.project(footprint, c, poses, m)

    back = spatial.backproject(spatial.PixelFilter(footprint), images, poses, n)
    projections = forward(c)
    scale = float(jnp.linalg.norm(projections) * jnp.linalg.norm(images))
    difference = jnp.vdot(projections, images) - jnp.vdot(c, back)
    assert abs(difference) < TOLERANCE[dtype] * scale
    (transposed,) = jax.linear_transpose(forward, c)(images)
    assert_close(back, transposed, TOLERANCE[dtype])


@pytest.mark.slow
@pytest.mark.parametrize("batch_size", [1, 2])
def test_batches_do_not_change_the_result(batch_size):
    n, m = 6, 7
    poses, c, images = draw_poses(5), draw(n, n, n), draw(5, m, m, seed=6)
    image_filter = spatial.PixelFilter(NARROW_TIGHT)
    value = spatial.project(NARROW_TIGHT, c, poses, m, batch_size=batch_size)
    back = spatial.backproject(image_filter, images, poses, n, batch_size=batch_size)
    assert_close(value, spatial.project(NARROW_TIGHT, c, poses, m), 1e-14)
    assert_close(back, spatial.backproject(image_filter, images, poses, n), 1e-14)


@pytest.mark.parametrize(("across", "down"), [(2, -1), (-3, 4)])
def test_an_integer_shift_moves_the_image(across, down):
    """Content sits at +t: column index up with x, row index up with y."""
    n, m = 6, 15
    poses, c = draw_poses(2), draw(n, n, n)
    moved = Poses(poses.rotations, poses.shifts + jnp.asarray([[across, down]], float))
    still = spatial.project(TIGHT, c, poses, m)
    value = spatial.project(TIGHT, c, moved, m)
    rolled = np.roll(still, (down, across), axis=(1, 2))
    rows = slice(max(down, 0), m + min(down, 0))
    columns = slice(max(across, 0), m + min(across, 0))
    assert_close(value[:, rows, columns], rolled[:, rows, columns], 1e-12)


def test_a_quarter_turn_in_plane_turns_the_image():
    """psi + 90 degrees takes the image point (x, y) to (y, -x)."""
    n, m = 6, 11
    angles, c = draw_angles(3), draw(n, n, n)
    turned = angles + jnp.asarray([[0, 0, np.pi / 2]])
    still, value = (
        spatial.project(TIGHT, c, Poses(euler_to_matrix(a), jnp.zeros((3, 2))), m)
        for a in (angles, turned)
    )
    assert_close(value, np.transpose(still, (0, 2, 1))[:, ::-1, :], 1e-12)


def test_the_opposite_view_is_the_mirror_image():
    """Seen from behind (tilt + 180 degrees), x is reversed and y is not."""
    n, m = 6, 11
    angles, c = draw_angles(3).at[:, 2].set(0.0), draw(n, n, n)
    behind = angles + jnp.asarray([[0, np.pi, 0]])
    front, value = (
        spatial.project(TIGHT, c, Poses(euler_to_matrix(a), jnp.zeros((3, 2))), m)
        for a in (angles, behind)
    )
    assert_close(value, front[:, :, ::-1], 1e-12)


@pytest.mark.parametrize("basis", [BASIS, NARROW], ids=["paper", "narrow"])
def test_every_view_has_the_same_mass(basis):
    """The sum over pixels is the integral, up to the aliases at ``2 pi j``.

    By Poisson's formula ``sum_m psi(m - y) = sum_j psi^(2 pi j) exp(i 2 pi j.y)``.
    """
    footprint = spatial.footprint(basis, tolerance=1e-13)
    n, m = 5, 21
    c = draw(n, n, n)
    j = np.arange(-40, 41)
    omega = 2 * np.pi * np.hypot(*np.meshgrid(j, j))
    spectrum = np.abs(kbwf.fourier_transform(basis, jnp.asarray(omega)))
    mass, aliases = spectrum[40, 40], spectrum.sum() - spectrum[40, 40]
    sums = spatial.project(footprint, c, draw_poses(4), m).sum(axis=(1, 2))
    error = np.abs(np.asarray(sums) - mass * float(c.sum()))
    # 1e-12: the rounding of a sum over the image.
    allowed = (aliases + 1e-12 * mass) * float(jnp.abs(c).sum())
    assert np.all(error < allowed)
    assert allowed < 0.01 * mass * float(jnp.abs(c).sum())


def test_footprint_without_psf_is_the_closed_form():
    for basis, footprint in [(BASIS, TIGHT), (NARROW, NARROW_TIGHT)]:
        r = np.linspace(0, basis.radius * 1.1, 300)
        points = jnp.asarray(np.stack([r, 0 * r], axis=-1))
        exact = kbwf.xray_transform(basis, points)
        assert_close(footprint.profile(jnp.asarray(r**2)), exact, 3e-13)


def convolution(f, g, reach, r, spacing):
    """Convolve two radial functions by the trapezoidal rule, in the plane.

    Exact up to the spectra's product beyond ``2 pi / spacing``.
    """
    axis = np.arange(-reach, reach + spacing, spacing)
    x, y = np.meshgrid(axis, axis)
    left = f(np.hypot(x, y))
    return np.array([np.sum(left * g(np.hypot(x - s, y))) for s in r]) * spacing**2


@pytest.mark.parametrize("basis", [BASIS, NARROW], ids=["paper", "narrow"])
def test_autocorrelation_is_the_numerical_one(basis):
    footprint = spatial.footprint(basis, tolerance=1e-13)

    def psi(r):
        points = jnp.asarray(np.stack([r, np.zeros_like(r)], axis=-1))
        return np.asarray(kbwf.xray_transform(basis, points))

    r = np.linspace(0, 2.1 * basis.radius, 12)
    exact = convolution(psi, psi, basis.radius, r, 1 / 16)
    value = footprint.autocorrelation(jnp.asarray(r**2))
    # The tail of the spectrum cut by the quadrature and aliased by the sum.
    assert_close(value, exact, 1e-9)


@pytest.mark.parametrize("width", [0.5, 1.3])
def test_footprint_with_a_gaussian_psf_is_the_convolution(width):
    footprint = spatial.footprint(NARROW, ctf.gaussian_psf(width), tolerance=1e-11)

    def psi(r):
        points = jnp.asarray(np.stack([r, np.zeros_like(r)], axis=-1))
        return np.asarray(kbwf.xray_transform(NARROW, points))

    def gaussian(r):
        return np.exp(-((r / width) ** 2) / 2) / (2 * np.pi * width**2)

    r = np.linspace(0, NARROW.radius + 6 * width - 0.01, 15)
    exact = convolution(psi, gaussian, NARROW.radius, r, 1 / 16)
    # The reference's aliases: the spectrum of phi at 2 pi 16 is 4e-10 of its peak.
    assert_close(footprint.profile(jnp.asarray(r**2)), exact, 5e-9)
    # Its autocorrelation: again a Hankel transform, here by an unrelated rule.
    omega, step = np.linspace(0, 30, 6001, retstep=True)
    spectrum = np.asarray(kbwf.fourier_transform(NARROW, jnp.asarray(omega)))
    power = (spectrum * np.exp(-0.5 * (width * omega) ** 2)) ** 2 * omega * step
    exact = j0(np.outer(r, omega)) @ power / (2 * np.pi)
    # The trapezoidal rule's end correction at zero: step^2 / 12 of the peak density.
    assert_close(footprint.autocorrelation(jnp.asarray(r**2)), exact, 1e-5)


def test_project_with_a_psf_is_the_blurred_projection():
    """Blurring the sampled image agrees, up to what sampling has aliased."""
    width, n, m = 1.0, 4, 41
    c, poses = draw(n, n, n), draw_poses(2)
    blurred = spatial.footprint(BASIS, ctf.gaussian_psf(width), tolerance=1e-10)
    value = spatial.project(blurred, c, poses, m)
    sharp = np.asarray(spatial.project(TIGHT, c, poses, m))
    omega = 2 * np.pi * np.fft.fftfreq(m)
    transfer = np.exp(-0.5 * width**2 * (omega[:, None] ** 2 + omega**2))
    filtered = np.fft.ifft2(np.fft.fft2(sharp) * transfer).real
    # Around pi, phi^ is 2 % of its peak and the blur leaves exp(-pi^2 / 2) = 0.7 %.
    assert_close(value, filtered, 2e-3)


@pytest.mark.parametrize(
    ("m", "dtype"), [(8, jnp.float64), (9, jnp.float64), (8, jnp.float32)]
)
def test_spline_filter_backprojects_to_its_accuracy(m, dtype):
    n = 6
    poses, images = draw_poses(3, dtype=dtype), draw(3, m, m, seed=7, dtype=dtype)
    exact = spatial.backproject(spatial.PixelFilter(TIGHT), images, poses, n)
    # White noise is the hardest image; see test_spline.
    for nodes, error in [(2, 3e-3), (4, 2e-4)]:
        image_filter = spatial.spline_filter(TIGHT, m, nodes)
        back = spatial.backproject(image_filter, images, poses, n)
        assert back.dtype == dtype
        assert_close(back, exact, error)


def test_spline_filter_refuses_images_of_another_size():
    with pytest.raises(InputError, match="side of 8 pixels, got 9"):
        spatial.spline_filter(TIGHT, 8)(jnp.zeros((9, 9)))


def test_pixel_sum_gradient_is_its_derivative():
    """Also near the rim of footprints, and outside of the image."""
    surface = spatial.PixelFilter(TIGHT)(draw(9, 9))
    x, y = draw(2, 100) * 5.0
    points = jnp.stack([x, y]), jnp.stack([y, x])
    derivatives = jax.vmap(lambda slope, *points: slope(*points))
    along_x, along_y = derivatives(surface.slopes(), *points)
    slopes = jax.grad(lambda x, y: surface(x, y), argnums=(0, 1))
    by_x, by_y = jax.jit(jax.vmap(slopes))(x, y)
    assert_close(along_x, by_x, 1e-11)
    assert_close(along_y, by_y, 1e-11)


# --- where coefficients may differ from zero


def test_a_support_lists_the_voxels_of_a_mask():
    mask = np.random.default_rng(5).random((5, 5, 5)) < 0.3
    support, c = spatial.Support.of(mask), draw(5, 5, 5)
    z, y, x = np.nonzero(mask)
    np.testing.assert_array_equal(support.points, np.stack([x, y, z]) - 2)
    np.testing.assert_array_equal(support.restrict(c), np.asarray(c)[mask])
    np.testing.assert_array_equal(
        support.extend(support.restrict(c)), np.where(mask, c, 0)
    )


@pytest.mark.parametrize("n", [6, 7])
def test_the_inscribed_ball_fits_in_the_cube(n):
    """It is the same from all sides, and one more voxel would stick out."""
    support = spatial.Support.ball(n)
    radius = np.linalg.norm(support.points, axis=0)
    assert radius.max() <= n / 2
    axis = np.arange(-n, n + 1)
    z, y, x = np.meshgrid(axis, axis, axis)
    inside = (x**2 + y**2 + z**2 <= (n / 2) ** 2) & (np.maximum(x, y) < n / 2)
    assert len(radius) == np.sum(inside & (z < n / 2))


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (np.zeros((4, 4, 4), bool), "at least one voxel, got none"),
        (np.ones((4, 4, 5), bool), "must have shape"),
        (np.ones((4, 4, 4)), "must be a mask of booleans, got float64"),
    ],
)
def test_a_support_refuses_what_is_no_mask(mask, message):
    with pytest.raises(InputError, match=message):
        spatial.Support.of(mask)


def fourier_crop(volume, n):
    """Resample to ``n`` voxels a side, the origin staying at ``side // 2``."""
    spectrum = np.fft.fftshift(np.fft.fftn(np.fft.ifftshift(volume)))
    first = volume.shape[0] // 2 - n // 2
    window = slice(first, first + n)
    cropped = np.fft.ifftshift(spectrum[window, window, window])
    return np.fft.fftshift(np.fft.ifftn(cropped)).real


def fold(images, m):
    """Sum the periods of length ``m`` of larger images, origin on origin."""
    index = (centred(images.shape[-1]) + m // 2) % m
    folded = np.zeros((len(images), m, m))
    rows, columns = index[:, None], index
    np.add.at(folded, np.s_[:, rows, columns], images)  # pyright: ignore[reportArgumentType]
    return folded


@pytest.mark.parametrize("name", ["centered", "shifted"])
def test_relion_agrees(name, data_dir):
    """Angles, axes, origin and shift sign, against ``relion_project``.

    RELION shifts cyclically, and this ribosome fills its box: what leaves on one side
    comes back on the other. So we project on a larger image and fold it.
    """
    oracle = data_dir / "relion_oracle"
    volume = fourier_crop(read_mrc(oracle / "clean70SRibosome_vol_65p.mrc")[0], 64)
    images = read_stack(oracle / f"rln_proj_64_{name}.mrcs")[0]
    told = read_poses(oracle / f"rln_proj_64_{name}.star")
    footprint = spatial.footprint(NARROW)
    c = kbwf.expand(NARROW, jnp.asarray(volume, jnp.float64))

    def correlations(sign):
        poses = Poses(told.rotations, sign * told.shifts)
        ours = fold(np.asarray(spatial.project(footprint, c, poses, 96)), 64)
        pairs = zip(ours, images, strict=True)
        return np.array([np.corrcoef(a.ravel(), b.ravel())[0, 1] for a, b in pairs])

    assert np.all(correlations(1) > 0.999), correlations(1)
    if name == "shifted":
        assert np.all(correlations(-1) < 0.9), correlations(-1)


def test_footprint_of_an_oscillating_psf():
    """A chirped PSF needs a fine quadrature; one cut short is refused."""
    basis = kbwf.KBWF(radius=2.0, taper=10.8)

    def chirp(omega):
        return np.cos(2.0 * omega**2) * np.exp(-(omega**2) / 8)

    psf = ctf.IsotropicPSF(chirp, 40.0)
    table = spatial.footprint(basis, psf)
    # An independent quadrature, 40 000 nodes by the midpoint rule.
    omega = (np.arange(40000) + 0.5) * (30.0 / 40000)
    spectrum = np.asarray(kbwf.fourier_transform(basis, jnp.asarray(omega)))
    spectrum = spectrum * chirp(omega)
    radii = np.linspace(0, 80, 41)
    kernel = j0(np.multiply.outer(radii, omega))
    for values, series in (
        (spectrum, table.profile),
        (spectrum**2, table.autocorrelation),
    ):
        expected = kernel @ (values * omega) * (30.0 / 40000) / (2 * np.pi)
        expected = np.where(radii < series.radius, expected, 0.0)
        error = np.abs(np.asarray(series(jnp.asarray(radii**2))) - expected).max()
        assert error < 1e-6 * np.abs(expected).max()
    with pytest.raises(InputError, match="radius must be so large"):
        spatial.footprint(basis, ctf.IsotropicPSF(chirp, 3.0))
