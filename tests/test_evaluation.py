"""Metrics against brute force, and their invariances."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrefine import evaluation, geometry
from jaxrefine.maps.fsc import crossing, fsc, mean_fsc, resolution_in_angstroms

KEY = jax.random.key(0)
SIZES = [5, 6, 9, 12]


def noise(n, seed=0, dtype=jnp.float64):
    return jax.random.normal(jax.random.fold_in(KEY, seed), (n, n, n), dtype)


def brute_force_fsc(a, b):
    """Visit every frequency of the full transform, one by one."""
    n = a.shape[0]
    a_hat, b_hat = np.fft.fftn(a), np.fft.fftn(b)
    k = np.fft.fftfreq(n, 1 / n)
    sums = np.zeros((3, n // 2 + 1))
    for index in np.ndindex(n, n, n):
        r = round(np.sqrt(sum(k[i] ** 2 for i in index)))
        if r <= n // 2:
            x, y = a_hat[index], b_hat[index]
            sums[:, r] += (x * y.conjugate()).real, abs(x) ** 2, abs(y) ** 2
    return sums[0] / np.sqrt(sums[1] * sums[2])


def shell_counts(n):
    k = np.fft.fftfreq(n, 1 / n)
    radius = np.sqrt(sum(axis**2 for axis in np.meshgrid(k, k, k)))
    return np.bincount(np.rint(radius).astype(int).ravel())[: n // 2 + 1]


@pytest.mark.parametrize("n", SIZES)
def test_fsc_is_the_double_loop(n):
    a, b = noise(n), noise(n) + 0.7 * noise(n, 1)
    np.testing.assert_allclose(fsc(a, b), brute_force_fsc(a, b), atol=1e-12)


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("scale", [1.0, 1e-3, 250.0])
def test_fsc_with_a_scaled_copy_is_one(n, scale):
    a = noise(n)
    np.testing.assert_allclose(fsc(a, scale * a), 1, rtol=1e-12)
    np.testing.assert_allclose(fsc(a, -scale * a), -1, rtol=1e-12)


def test_fsc_in_float32():
    a, b = noise(16, 0, jnp.float32), noise(16, 1, jnp.float32)
    curve = jax.jit(fsc)(a, a + b)
    assert curve.dtype == jnp.float32
    exact = fsc(a.astype(jnp.float64), (a + b).astype(jnp.float64))
    np.testing.assert_allclose(curve, exact, atol=1e-5)
    np.testing.assert_allclose(fsc(a, 1e-14 * a), 1, rtol=1e-5)
    np.testing.assert_allclose(fsc(1e-14 * a, 1e-14 * a), 1, rtol=1e-5)


@pytest.mark.parametrize("n", [31, 32])
def test_fsc_of_independent_noise_is_small(n):
    """Over N frequencies, half of them independent, its deviation is 1 / sqrt(N)."""
    curve = np.asarray(fsc(noise(n, 0), noise(n, 1)))
    assert np.all(np.abs(curve) < 4 / np.sqrt(shell_counts(n)))
    normalised = curve[1:] * np.sqrt(shell_counts(n)[1:])
    assert 0.5 < np.std(normalised) < 1.6


def test_fsc_expects_the_signal_share():
    """A signal and the same signal plus as much noise: 1 / sqrt(2) on average."""
    n = 32
    curve = fsc(noise(n, 0), noise(n, 0) + noise(n, 1))
    within = 4 / np.sqrt(shell_counts(n))
    assert np.all(np.abs(curve - np.sqrt(0.5)) < within)


def test_fsc_of_an_empty_volume_is_zero():
    a = noise(8)
    np.testing.assert_array_equal(fsc(a, jnp.zeros_like(a)), np.zeros(5))
    gradient = jax.grad(lambda b: jnp.sum(fsc(a, b)))(jnp.zeros_like(a))
    assert jnp.all(jnp.isfinite(gradient))


def test_the_mask_multiplies_both_volumes():
    n = 8
    a, b = noise(n, 0), noise(n, 1)
    mask = (noise(n, 2) > 0).astype(a.dtype)
    expected = fsc(a * mask, b * mask)
    np.testing.assert_allclose(fsc(a, b, mask), expected)
    hidden = a + (1 - mask) * b
    np.testing.assert_allclose(fsc(a, hidden, mask), 1, rtol=1e-12)


def test_mean_fsc_leaves_out_shell_zero():
    assert mean_fsc(jnp.array([100.0, 1.0, 0.5, 0.0])) == 0.5


@pytest.mark.parametrize(
    ("curve", "threshold", "radius"),
    [
        ([1.0, 1.0, 1.0, 0.0, 0.0], 0.5, 2.5),
        ([1.0, 0.9, 0.6, 0.2, 0.9], 0.5, 2.25),
        ([1.0, 1.0, 0.5, 0.0, 0.0], 0.5, 2.0),
        ([1.0, 1.0, 0.9, 0.8, 0.7], 0.5, 4.0),
        ([1.0, 1.0, 0.9, 0.8, 0.5], 0.5, 4.0),
        ([0.0, 1.0, 1.0, 1.0, 0.0], 0.5, 3.5),
        ([1.0, 0.4, 0.9, 0.9, 0.9], 0.5, 1.0),
        ([1.0, 1.0, 1.0, 0.243, 0.043], 0.143, 3.5),
        ([1.0, 1.0, 1.0, -1.0, 1.0], 0.5, 2.25),
    ],
)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
def test_crossing_of_curves_by_hand(curve, threshold, radius, dtype):
    result = jax.jit(crossing)(jnp.array(curve, dtype), threshold)
    np.testing.assert_allclose(result, radius, rtol=1e-6)
    assert result.dtype == dtype


def test_crossing_of_a_broken_curve_is_no_success():
    assert jnp.isnan(crossing(jnp.array([1.0, 0.9, jnp.nan, 0.9]), 0.5))
    assert crossing(jnp.full(4, jnp.nan), 0.5) == 1


def test_resolution_at_nyquist_is_two_voxels():
    assert resolution_in_angstroms(32.0, 64, 1.5) == 3.0
    assert resolution_in_angstroms(jnp.asarray(16.0), 64, 1.5) == 6.0


def test_volume_snr_db():
    truth = noise(8)
    for factor, decibels in [(0.9, 20.0), (0.0, 0.0), (1.01, 40.0)]:
        result = evaluation.volume_snr_db(truth, factor * truth)
        np.testing.assert_allclose(result, decibels, atol=1e-9)
    assert evaluation.volume_snr_db(truth, truth) == jnp.inf


def poses(count, dtype=jnp.float64):
    keys = jax.random.split(jax.random.fold_in(KEY, 9), 2)
    rotations = geometry.uniform_rotations(keys[0], count, dtype)
    shifts = 4 * jax.random.normal(keys[1], (count, 2), dtype)
    return geometry.matrix_to_euler(rotations), shifts


def moved(angles, shifts):
    """The same images, as poses of a map that was turned and moved."""
    rotations = geometry.euler_to_matrix(angles)
    turn = geometry.euler_to_matrix(jnp.array([0.7, 1.9, -2.0], angles.dtype))
    step = jnp.array([3.0, -1.5, 2.5], angles.dtype)
    moved_shifts = shifts - rotations[:, :2] @ step
    return geometry.matrix_to_euler(rotations @ turn), moved_shifts


@pytest.mark.parametrize(("dtype", "atol"), [(jnp.float32, 2e-3), (jnp.float64, 1e-5)])
def test_moving_the_map_is_no_error(dtype, atol):
    truth = poses(50, dtype)
    errors = jax.jit(evaluation.pose_errors)(*moved(*truth), *truth)
    np.testing.assert_allclose(errors.angle_in_degrees, 0, atol=atol)
    np.testing.assert_allclose(errors.shift_in_pixels, 0, atol=atol)
    assert errors.angle_in_degrees.dtype == dtype


def test_errors_are_those_of_the_particles_that_are_off():
    """Two particles of many: the rest pins the frame, up to their small pull on it."""
    angles, shifts = poses(400)
    tilted = angles.at[3, 2].add(jnp.deg2rad(30))
    shifted = shifts.at[7].add(jnp.array([3.0, 4.0]))
    errors = evaluation.pose_errors(*moved(tilted, shifted), angles, shifts)
    expected = jnp.zeros(400).at[3].set(30)
    np.testing.assert_allclose(errors.angle_in_degrees, expected, atol=0.3)
    expected = jnp.zeros(400).at[7].set(5)
    np.testing.assert_allclose(errors.shift_in_pixels, expected, atol=0.1)


def test_lost_particles_do_not_drag_the_frame():
    """A quarter is off by half a turn about a point beside the origin."""
    angles, shifts = poses(400)
    rotations = geometry.euler_to_matrix(angles)
    turn = jnp.diag(jnp.array([-1.0, -1.0, 1.0]))
    centre = jnp.array([4.0, -2.0, 3.0])
    lost = jnp.arange(400) < 100
    other = geometry.matrix_to_euler(rotations @ turn)
    beside = shifts + (rotations @ (centre - turn @ centre))[:, :2]
    noisy = shifts + 0.2 * jax.random.normal(KEY, shifts.shape)
    found = evaluation.pose_errors(
        jnp.where(lost[:, None], other, angles),
        jnp.where(lost[:, None], beside, noisy),
        angles,
        shifts,
    )
    kept = found.shift_in_pixels[100:]
    here = jnp.linalg.norm(noisy - shifts, axis=-1)[100:]
    assert float(jnp.median(kept)) < 1.2 * float(jnp.median(here))
    np.testing.assert_allclose(found.angle_in_degrees[100:], 0, atol=1e-3)


def test_moving_the_map_changes_no_error():
    angles, shifts = poses(60)
    keys = jax.random.split(jax.random.fold_in(KEY, 5), 2)
    noisy = (
        angles + 0.05 * jax.random.normal(keys[0], angles.shape),
        shifts + 0.5 * jax.random.normal(keys[1], shifts.shape),
    )
    still = evaluation.pose_errors(*noisy, angles, shifts)
    other = evaluation.pose_errors(*moved(*noisy), angles, shifts)
    np.testing.assert_allclose(
        other.angle_in_degrees, still.angle_in_degrees, atol=1e-4
    )
    np.testing.assert_allclose(other.shift_in_pixels, still.shift_in_pixels, atol=1e-4)
    assert 0.3 < jnp.median(still.shift_in_pixels) < 0.9


def test_views_along_one_direction_are_no_trouble():
    """Depth is then unseen, and the least-squares system singular."""
    angles, shifts = poses(20)
    angles = angles.at[:, :2].set(0.3)
    errors = evaluation.pose_errors(*moved(angles, shifts), angles, shifts)
    np.testing.assert_allclose(errors.shift_in_pixels, 0, atol=1e-5)


def test_summary():
    errors = evaluation.PoseErrors(
        jnp.array([0.0, 1, 2, 3, 4, 5, 6, 7, 20, 90, 170]), jnp.arange(11.0) / 10
    )
    assert evaluation.summarise(errors) == pytest.approx(
        {
            "angle_error_deg_median": 5.0,
            "angle_error_deg_p90": 90.0,
            "angle_error_deg_p95": 130.0,
            "fraction_within_5_deg": 6 / 11,
            "fraction_within_10_deg": 8 / 11,
            "shift_error_px_median": 0.5,
            "shift_error_px_p90": 0.9,
            "shift_error_px_p95": 0.95,
        }
    )


def test_signed_differences_are_those_put_in():
    """Angles off by known amounts, in a frame that is turned and moved as a whole."""
    key = jax.random.key(7)
    angles = geometry.equidistributed_angles(key, 80, jnp.float64)
    angles = angles[(angles[:, 1] > 0.3) & (angles[:, 1] < 2.8)]
    error = 0.02 * jax.random.normal(key, angles.shape)
    error = error - jnp.median(error, axis=0)[None]
    off = 0.3 * jax.random.normal(jax.random.key(8), (len(angles), 2))
    rotation = geometry.rotvec_to_matrix(jnp.array([0.3, -0.5, 0.2]))
    turned = geometry.euler_to_matrix(angles - error) @ rotation
    found = evaluation.pose_differences(
        geometry.matrix_to_euler(turned), -off, angles, jnp.zeros_like(off)
    )
    # The frame is found from noisy poses, to a fraction of their errors.
    np.testing.assert_allclose(found[0], np.rad2deg(error), atol=0.8)
    np.testing.assert_allclose(found[1], off, atol=0.2)
    assert np.corrcoef(found[0].ravel(), error.ravel())[0, 1] > 0.95
