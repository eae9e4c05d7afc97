"""RELION's padded grids as sums: dense references, and images inserted one by one."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxrefine.maps import padded, tv
from jaxrefine.maps.sums import data_term
from jaxrefine.operators import normal

BOX = 6
SIZES = [
    6,
    9,
    11,
    12,
    18,
]  # paddings of 1, 1.5, the least for a linear convolution, 2, 3


def frequencies(size):
    return np.moveaxis(np.indices((size,) * 3), 0, -1)


def half(grid):
    """The samples of a Hermitian grid that ``rfftn`` has."""
    return grid[..., : grid.shape[-1] // 2 + 1]


def positions(box):
    return np.arange(box) - box // 2


def envelope(size, box=BOX):
    line = padded.envelope(box, size)
    return line[:, None, None] * line[:, None] * line


def random_grids(size, rng):
    """Random data with the symmetry of a real map's, and weights, some of them zero."""
    data = np.fft.fftn(rng.normal(size=(size,) * 3)) / BOX**2
    weight = np.abs(np.fft.fftn(rng.normal(size=(size,) * 3)))
    outside = weight < np.median(weight) / 2
    return np.where(outside, 0, data), np.where(outside, 0, weight)


def spectrum(volume, size):
    """The definition: a sum over voxels around the origin, at every frequency."""
    k = np.fft.fftfreq(size, 1 / size)
    wave = np.exp(-2j * np.pi / size * np.outer(k, positions(len(volume))))
    return np.einsum("az,by,cx,zyx->abc", wave, wave, wave, volume)


@pytest.mark.parametrize("size", SIZES)
def test_the_sums_have_the_misfit_of_the_grid(size):
    """Of any map: the sum over all frequencies, one by one, up to a constant."""
    rng = np.random.default_rng(size)
    data, weight = random_grids(size, rng)
    sums = padded.sums_of_grid(jnp.asarray(half(data)), jnp.asarray(half(weight)), BOX)
    found = data_term(sums)

    def misfit(volume):
        quotient = BOX**2 * data / np.where(weight > 0, weight, 1)
        residual = np.abs(quotient - spectrum(volume, size)) ** 2
        return np.sum(weight * residual) / (4 * BOX**4)

    zero = misfit(np.zeros((BOX,) * 3))
    for volume in rng.normal(size=(3, BOX, BOX, BOX)):
        u = jnp.asarray(volume)
        value = found.value(u, normal.apply_normal(found.transfer, u))
        np.testing.assert_allclose(value, misfit(volume) - zero, rtol=1e-10)


def inserted(points, values, size):
    """Insert values at frequencies, and their mirror images, by trilinear weights."""
    grid = np.zeros((size,) * 3, np.result_type(values))
    for sign, value in ((1, values), (-1, np.conj(values))):
        low = np.floor(sign * points).astype(int)
        for corner in np.indices((2,) * 3).reshape(3, -1).T:
            t = np.prod(1 - np.abs(sign * points - low - corner), axis=-1)
            np.add.at(grid, tuple((low + corner).T % size), t * value)
    return grid


def random_frequencies(rng, count, radius):
    points = rng.uniform(-radius, radius, (count, 3))
    return points[np.linalg.norm(points, axis=-1) < radius - 2]


def test_noiseless_samples_give_the_map():
    """Its spectrum is known at random frequencies; the regulariser hardly counts."""
    rng = np.random.default_rng(0)
    box, size = 12, 24
    x = positions(box)
    z, y = x[:, None, None], x[:, None]
    truth = np.exp(-((x - 1) ** 2 + (y + 1) ** 2 + z**2) / 4.0)
    truth += 0.7 * np.exp(-((x + 1) ** 2 + (y - 1) ** 2 + (z - 1) ** 2) / 4.0)
    points = random_frequencies(rng, 80000, size / 2)
    wave = [np.exp(-2j * np.pi / size * np.outer(p, x)) for p in points.T]
    values = np.einsum("zyx,jx->jzy", truth, wave[2])
    values = np.einsum("jzy,jz,jy->j", values, *wave[:2]) / box**2
    precision = 1e4
    data, weight = (
        inserted(points, precision * each, size)
        for each in (values, np.ones(len(points)))
    )
    volume, _ = padded.reconstruct(
        jnp.asarray(half(data)),
        jnp.asarray(half(weight)),
        box,
        jnp.asarray(1e-3),
        tv.IsotropicTV(),
        30,
    )
    error = np.linalg.norm(volume - truth) / np.linalg.norm(truth)
    uncorrected = np.linalg.norm(envelope(size, box) * volume - truth)
    corners = np.sqrt(z**2 + y**2 + x**2) > box / 2 + 3
    assert corners.any() and not np.asarray(volume)[corners].any()
    assert error < 0.02  # of linear interpolation between random frequencies
    assert uncorrected > 3 * error * np.linalg.norm(truth)


@pytest.mark.parametrize("size", [12, 15])
def test_the_envelope_is_what_interpolation_does_on_average(size):
    """A wave of any frequency, inserted and summed up again, over a fine comb of them.

    The mean over equidistant frequencies is a trapezoidal rule for a piecewise linear
    integrand times a wave: exact to the square of the step.
    """
    steps = 200
    xi = (np.arange(steps) + 0.5) / steps
    x = positions(BOX)
    low, high = (
        weight[:, None] * np.exp(2j * np.pi / size * np.outer(k - xi, x))
        for weight, k in ((1 - xi, np.zeros(steps)), (xi, np.ones(steps)))
    )
    line = np.mean(low + high, axis=0)
    expected = line[:, None, None] * line[:, None] * line
    np.testing.assert_allclose(envelope(size), expected, atol=1e-5)


def test_the_noise_of_the_back_projection_is_what_lambda_is_measured_in():
    """Pure noise of RELION's power: its variance is w[0] times the envelope squared."""
    rng = np.random.default_rng(1)
    box, size, sigma2, draws = 8, 16, 3e-4, 40
    points = random_frequencies(rng, 4000, size / 2)
    weight = jnp.asarray(inserted(points, np.ones(len(points)) / sigma2, size))
    sums = padded.sums_of_grid(jnp.zeros_like(half(weight), complex), half(weight), box)
    variances = []
    for _ in range(draws):
        parts = rng.normal(scale=np.sqrt(sigma2), size=(2, len(points)))
        data = inserted(points, (parts[0] + 1j * parts[1]) / sigma2, size)
        drawn = padded.sums_of_grid(jnp.asarray(half(data)), half(weight), box)
        variances.append((drawn.backprojection / envelope(size, box)) ** 2)
    ratio = float(np.mean(variances) / sums.peak)
    # 40 draws of 512 voxels, of which about a hundred are independent; aliases of the
    # interpolation add some per cent near the faces.
    assert 0.9 < ratio < 1.1


def test_more_images_weaken_the_regulariser_as_their_noise_averages():
    """Four times the sums: the same map by twice tau, which is four times lambda."""
    rng = np.random.default_rng(2)
    data, weight = (jnp.asarray(half(each)) for each in random_grids(12, rng))

    def made(data, weight, tau):
        return padded.reconstruct(
            data, weight, BOX, jnp.asarray(tau), tv.IsotropicTV(), 400
        )

    volume, lam = made(data, weight, 0.5)
    of_more, lam_of_more = made(4 * data, 4 * weight, 1.0)
    assert float(lam_of_more) == pytest.approx(4 * float(lam))
    np.testing.assert_allclose(of_more, volume, atol=1e-9 * np.abs(volume).max())
    of_brighter, _ = made(3 * data, weight, 1.5)
    np.testing.assert_allclose(
        of_brighter, 3 * volume, atol=1e-9 * np.abs(volume).max()
    )


def test_no_images_make_an_empty_map():
    zero = jnp.zeros((12, 12, 7))
    volume, lam = padded.reconstruct(
        zero.astype(complex), zero, BOX, jnp.asarray(1.0), tv.IsotropicTV(), 3
    )
    assert not volume.any() and lam == 0
