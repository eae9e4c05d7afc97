"""Laws of the simulated data.

The phantom is compact, without symmetry and the same in every box; the views are evenly
spaced, the noise has its power, images of a Gaussian are Gaussians at its place, and
the errors to start from are uniform.
"""

import math

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import centred, gaussian, lattice_points

from jaxrefine import simulate
from jaxrefine.ctf import gaussian_psf
from jaxrefine.errors import InputError
from jaxrefine.euler import euler_to_matrix, matrix_to_euler
from jaxrefine.geometry import Poses, geodesic_distance
from jaxrefine.operators import kbwf

KEY = jax.random.key(0)
SIZES = [31, 32, 48]


def radii(n):
    x, y, z = lattice_points(centred(n))
    return np.sqrt(x**2 + y**2 + z**2).reshape(n, n, n)


@pytest.mark.parametrize(("n", "seed"), list(zip(SIZES, range(3), strict=True)))
def test_phantom_is_positive_compact_and_centred(n, seed):
    volume = np.asarray(simulate.phantom(jax.random.key(seed), n))
    assert volume.shape == (n, n, n) and volume.dtype == np.float32
    assert volume.min() >= 0 and volume.max() == pytest.approx(1)
    # Atoms end at 0.34 n; 3 widths further a blob is at 1 % of its own peak.
    width = max(0.015 * n, 0.7)
    assert volume[radii(n) > 0.34 * n + 3 * width].max() < 0.01
    for axis in range(3):
        profile = volume.sum(axis=tuple({0, 1, 2} - {axis}))
        assert abs(profile @ centred(n)) / profile.sum() < 0.01


@pytest.mark.parametrize("n", [31, 47])
@pytest.mark.parametrize("seed", range(3))
def test_phantom_has_no_symmetry_and_a_hand(n, seed):
    """Flips of one axis mirror, of two turn by 180 degrees, of three invert."""
    volume = np.asarray(simulate.phantom(jax.random.key(seed), n))
    for axes in [(0,), (1,), (2,), (0, 1), (0, 2), (1, 2), (0, 1, 2)]:
        flipped = np.flip(volume, axes)
        assert np.corrcoef(volume.ravel(), flipped.ravel())[0, 1] < 0.8, axes


def test_phantom_looks_the_same_in_every_box():
    """Blob widths of 0.72 and 1.44 voxels: the small map is the large, subsampled."""
    small, large = simulate.phantom(KEY, 48), simulate.phantom(KEY, 96)
    correlation = np.corrcoef(np.ravel(small), np.ravel(large[::2, ::2, ::2]))[0, 1]
    assert correlation == pytest.approx(1, abs=1e-5)


@pytest.mark.slow
def test_phantom_is_decided_by_its_key():
    first = simulate.phantom(KEY, 24)
    np.testing.assert_array_equal(first, simulate.phantom(KEY, 24))
    assert jnp.abs(first - simulate.phantom(jax.random.key(1), 24)).max() > 0.1
    double = simulate.phantom(KEY, 24, jnp.float64)
    assert double.dtype == jnp.float64
    np.testing.assert_array_equal(double, first.astype(jnp.float64))


@pytest.mark.parametrize("snr_db", [-14.2, -5.0, 3.0])
def test_noise_has_the_wanted_power_per_pixel(snr_db):
    images = 0.3 + jax.random.uniform(KEY, (40, 24, 24))
    sigma = simulate.noise_std(images, snr_db)
    noise = simulate.add_noise(jax.random.key(1), images, sigma) - images
    measured = 10 * math.log10(float(jnp.mean(images**2) / jnp.mean(noise**2)))
    # The mean square of N Gaussians has the relative standard deviation sqrt(2 / N).
    bound = 3 * 10 / math.log(10) * math.sqrt(2 / images.size)
    assert measured == pytest.approx(snr_db, abs=bound)


@pytest.mark.parametrize("dtype", [jnp.float64, jnp.float32])
@pytest.mark.parametrize("count", [100, 2000])
def test_equidistributed_views_are_evenly_spaced(dtype, count):
    rotations = simulate.equidistributed_rotations(jax.random.key(15), count, dtype)
    assert rotations.dtype == dtype
    views = np.asarray(rotations[:, 2], float)
    assert np.linalg.norm(views.mean(axis=0)) < 1 / count
    cosines = views @ views.T
    np.fill_diagonal(cosines, -1)
    nearest = np.arccos(cosines.max(axis=1))
    ideal = np.sqrt(8 * np.pi / np.sqrt(3) / count)  # the hexagonal lattice
    assert 0.75 * ideal < nearest.min() and nearest.max() < 1.05 * ideal
    psi = np.asarray(matrix_to_euler(rotations)[:, 2], float) % (2 * np.pi)
    assert abs(psi.mean() - np.pi) < 4 * 2 * np.pi / np.sqrt(12 * count)


def test_equidistributed_views_of_many_particles_survive_single_precision():
    single, double = (
        simulate.equidistributed_rotations(jax.random.key(16), 200_000, dtype)[:, 2]
        for dtype in (jnp.float32, jnp.float64)
    )
    np.testing.assert_allclose(single, double, rtol=0, atol=2e-6)


def test_init1_errors_are_uniform_and_shifts_zero():
    """Of views that no error can take past a pole, where all three angles jump."""
    limit = 0.7
    rotations = simulate.equidistributed_rotations(KEY, 4000)
    angles = matrix_to_euler(rotations)
    far = (angles[:, 1] > limit) & (angles[:, 1] < math.pi - limit)
    count = int(far.sum())
    poses = Poses(rotations[far], simulate.random_shifts(KEY, count, 3.0))
    initial = simulate.init1_poses(jax.random.key(1), poses, limit)
    errors = np.asarray(matrix_to_euler(initial.rotations) - angles[far])
    errors = (errors + np.pi) % (2 * np.pi) - np.pi
    assert np.all(np.abs(errors) <= limit + 1e-12)
    assert not np.any(initial.shifts)
    for column in errors.T:
        # Kolmogorov-Smirnov: exceeded with probability 2 exp(-2 * 2^2) < 1e-3.
        ranks = (np.arange(count) + 0.5) / count
        distance = np.abs(np.sort(column) / (2 * limit) + 0.5 - ranks).max()
        assert distance < 2 / math.sqrt(count)
    assert np.abs(np.corrcoef(errors.T) - np.eye(3)).max() < 4 / math.sqrt(count)


def test_shifts_fill_their_square():
    shifts = simulate.random_shifts(KEY, 4000, 2.5)
    assert jnp.abs(shifts).max() <= 2.5
    np.testing.assert_allclose(shifts.min(axis=0), -2.5, atol=0.02)
    np.testing.assert_allclose(shifts.max(axis=0), 2.5, atol=0.02)
    assert not jnp.any(simulate.random_shifts(KEY, 5, 0.0))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
def test_blur_of_a_delta_is_a_gaussian(dtype):
    n, width = 33, 2.0
    delta = jnp.zeros((n, n, n), dtype).at[n // 2, n // 2, n // 2].set(1)
    blurred = simulate.blur(delta, width)
    assert blurred.dtype == dtype
    expected = gaussian(n, (0.0, 0.0, 0.0), width) / (2 * math.pi * width**2) ** 1.5
    tolerance = 1e-9 if dtype == jnp.float64 else 1e-7
    np.testing.assert_allclose(blurred, expected, atol=tolerance)
    assert float(blurred.sum()) == pytest.approx(1, abs=1e-5)
    moment = float(jnp.sum(blurred * jnp.asarray(radii(n) ** 2, dtype)))
    assert moment == pytest.approx(3 * width**2, rel=1e-4)


def test_blur_does_not_wrap_around():
    """At four widths the neglected tail is exp(-8) of the peak."""
    n = 16
    corner = jnp.zeros((n, n, n)).at[0, 0, 0].set(1)
    blurred = simulate.blur(corner, 2.0)
    assert jnp.abs(blurred[8:, 8:, 8:]).max() < 4e-4 * blurred.max()


def test_blur_of_width_zero_changes_nothing():
    volume = jax.random.normal(KEY, (9, 9, 9))
    np.testing.assert_allclose(simulate.blur(volume, 0.0), volume, atol=1e-14)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
@pytest.mark.parametrize(
    ("basis", "tolerance"), [(kbwf.SIMULATION_BASIS, 8e-3), (kbwf.KBWF(), 2e-4)]
)
@pytest.mark.parametrize("psf_width", [None, 1.5])
def test_images_of_a_blob_are_gaussians_at_its_place(
    dtype, basis, tolerance, psf_width
):
    r"""The X-ray transform of a Gaussian is one: sqrt(2 pi) s exp(-|y|^2 / 2 s^2).

    It lies about ``M k0 + t``: a shift ``+t`` moves the content to +x and +y. A PSF
    adds its squared width. Both bases agree with the map at the voxels, where it is
    Gaussian up to the regularisation of `kbwf.expand` (1e-4). Between them the window
    of radius 2 ripples: at s = 3 by 6e-3 of the peak, the window of radius 4 not.
    """
    n, width, centre = 32, 3.0, (3.0, -2.0, 1.0)
    poses = Poses(
        euler_to_matrix(jnp.asarray([[0.0, 0.0, 0.0], [0.4, 1.1, 2.0]], dtype)),
        jnp.asarray([[2.5, 1.25], [-1.5, 2.0]], dtype),
    )
    psf = None if psf_width is None else gaussian_psf(psf_width)
    volume = gaussian(n, centre, width, dtype=dtype)
    images = simulate.clean_images(volume, poses, basis=basis, psf=psf)
    assert images.shape == (2, n, n) and images.dtype == dtype

    variance = width**2 + (psf_width or 0.0) ** 2
    peak = math.sqrt(2 * math.pi) * width * width**2 / variance
    places = np.asarray(poses.rotations)[:, :2] @ np.array(centre)
    np.testing.assert_allclose(places[0], centre[:2], atol=1e-6)
    y, x = np.meshgrid(centred(n), centred(n), indexing="ij")
    for image, (px, py) in zip(images, places + np.asarray(poses.shifts), strict=True):
        expected = peak * np.exp(-0.5 * ((x - px) ** 2 + (y - py) ** 2) / variance)
        np.testing.assert_allclose(image, expected, atol=tolerance * peak)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
@pytest.mark.parametrize(
    ("basis", "tolerance"), [(kbwf.SIMULATION_BASIS, 8e-3), (kbwf.KBWF(), 2e-4)]
)
def test_images_by_slices_are_those_of_the_spatial_projector(dtype, basis, tolerance):
    """Of a smooth map, but for the ripples of a small window, which are beyond Nyquist.

    They are known from `test_images_of_a_blob_are_gaussians_at_its_place`.
    """
    n = 32
    angles = jnp.asarray([[0.0, 0.0, 0.0], [0.4, 1.1, 2.0], [2.0, 0.3, -1.0]], dtype)
    shifts = jnp.asarray([[2.5, 1.25], [-1.5, 2.0], [0.0, 0.3]], dtype)
    poses = Poses(euler_to_matrix(angles), shifts)
    volume = gaussian(n, (3.0, -2.0, 1.0), 2.0, dtype=dtype)
    volume = volume - 0.5 * gaussian(n, (-2.0, 4.0, 0.0), 2.5, dtype=dtype)
    exact = simulate.clean_images(volume, poses, basis=basis)
    images = simulate.slice_projector(volume, basis)(poses)
    assert images.shape == (3, n, n) and images.dtype == dtype
    np.testing.assert_allclose(images, exact, atol=tolerance * float(exact.max()))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
def test_dataset_is_what_its_parts_make(dtype):
    volume = simulate.phantom(KEY, 20, dtype)

    def make(key, **noise):
        return simulate.make_dataset(
            key, volume, 12, max_shift=2.0, max_angle_error=0.5, **noise
        )

    data = make(KEY, snr_db=-3.0)
    assert all(leaf.dtype == dtype for leaf in jax.tree.leaves(data))
    assert data.images.shape == (12, 20, 20)
    assert jnp.abs(data.truth.shifts).max() <= 2
    # Turns by up to half a radian about three axes.
    off = geodesic_distance(data.initial.rotations, data.truth.rotations)
    assert 0 < jnp.min(off) and jnp.max(off) <= 1.5
    assert not jnp.any(data.initial.shifts)

    clean = simulate.clean_images(volume, data.truth)
    np.testing.assert_allclose(data.sigma, simulate.noise_std(clean, -3.0), rtol=1e-6)
    assert float(jnp.std(data.images - clean)) == pytest.approx(
        float(data.sigma), rel=3 / math.sqrt(2 * clean.size)
    )
    assert eqx.tree_equal(data, make(KEY, snr_db=-3.0))
    assert eqx.tree_equal(data, make(KEY, sigma=float(data.sigma)))
    other = make(jax.random.key(1), snr_db=-3.0)
    assert not jnp.any(data.truth.shifts == other.truth.shifts)
    # Compiled as one function rather than by parts, it rounds differently.
    noiseless = make(KEY, sigma=0.0)
    rounding = 100 * float(jnp.finfo(dtype).eps) * float(jnp.abs(clean).max())
    np.testing.assert_allclose(noiseless.images, clean, rtol=0, atol=rounding)
    project = simulate.slice_projector(volume)
    sliced = make(KEY, sigma=0.0, project=project)
    np.testing.assert_allclose(
        sliced.images, project(data.truth), rtol=0, atol=rounding
    )


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"volume": jnp.zeros((8, 8, 9))}, "must be a cube, got 8 x 8 x 9"),
        ({"count": 0}, "count must be at least 1, got 0"),
        ({"max_shift": -1.0}, "max_shift must be at least 0 pixels, got -1.0"),
        ({"max_angle_error": -0.1}, "max_angle_error must be at least 0, got -0.1"),
        ({"snr_db": 0.0}, "one of sigma and snr_db must be given, got both"),
        ({"sigma": None}, "one of sigma and snr_db must be given, got neither"),
    ],
)
def test_unusable_parameters_are_named(change, sentence):
    parameters = {
        "volume": jnp.zeros((8, 8, 8)),
        "count": 2,
        "max_shift": 1.0,
        "max_angle_error": 0.1,
        "sigma": 1.0,
    }
    with pytest.raises(InputError, match=sentence):
        simulate.make_dataset(KEY, **(parameters | change))


def test_small_boxes_and_negative_blurs_are_refused():
    with pytest.raises(InputError, match="n must be at least 16 .* got 15"):
        simulate.phantom(KEY, 15)
    with pytest.raises(InputError, match="width must be at least 0 voxels, got -1.0"):
        simulate.blur(jnp.zeros((4, 4, 4)), -1.0)
