"""The scale of a map and the noise's power, shell by shell, on known ones.

Both are recovered to their sampling errors, sums over shells are those of a loop, and
groups of few images lean on what all have in common.
"""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import blobs, draw, draw_complex, draw_poses

from jaxrefine.data.particles import Particles
from jaxrefine.errors import InputError
from jaxrefine.maps import noise
from jaxrefine.maps.noise import ShellSums, noise_power, shell_sums
from jaxrefine.operators import slices
from jaxrefine.operators.gridding import Gridding

N, R_MAX = 16, 7
DISC = slices.disc(N, R_MAX)
K = len(DISC.shells)


@pytest.fixture(scope="module")
def compared():
    """Images with a known scale and noise in every shell, compared with their map."""
    count = 400
    poses, transfer = draw_poses(count, seed=8), 1 + 0.3 * draw(count, K, seed=9)
    spectrum = Gridding(4, 2.0).spectrum(blobs(N), R_MAX)
    model = slices.project(spectrum, DISC, poses, transfer)
    shells = np.asarray(DISC.shells)
    scale = np.linspace(1.6, 0.3, N // 2 + 1)
    power = np.geomspace(0.5, 20, N // 2 + 1)
    noise = np.asarray(draw_complex(count, K, seed=10)) * np.sqrt(power / 2)[shells]
    data = jnp.asarray(scale[shells] * np.asarray(model) + noise)
    included = np.arange(count) % 4 > 0

    @eqx.filter_jit
    def compare_each(data):
        def one(data, rotation, shift, transfer):
            return shell_sums(spectrum, DISC, data, rotation, shift, transfer)

        return jax.vmap(one)(data, poses.rotations, poses.shifts, transfer)

    def compare(data, included=included):
        sums = compare_each(data).of_groups(np.atleast_2d(included))
        return sums if included.ndim == 2 else jax.tree.map(lambda leaf: leaf[0], sums)

    return compare, data, np.asarray(model), scale, power, included


@pytest.mark.slow
def test_the_gain_recovers_a_known_scale(compared):
    compare, data, model, scale, power, included = compared
    sums = compare(data)
    # The error of a least-squares scale is the noise over the model's norm.
    known = slice(1, R_MAX + 1)
    error = np.sqrt(power / 2 / np.maximum(np.asarray(sums.model), 1e-30) * 2)
    assert (np.abs(sums.gain - scale) < 4 * error + 1e-12)[known].all()
    # Without noise it is exact.
    shells = np.asarray(DISC.shells)
    clean = compare(jnp.asarray(scale[shells] * model))
    np.testing.assert_allclose(clean.gain[known], scale[known], rtol=1e-12)
    rest = np.asarray(clean.residual(clean.gain) / (clean.data + 1e-30))
    np.testing.assert_allclose(rest[known], 0, atol=1e-12)
    assert float(sums.gain[-1]) == 0.0  # a shell that the disc does not have


def test_the_residual_power_recovers_a_known_noise(compared):
    compare, data, *_, power, included = compared
    sums = compare(data)
    known = slice(1, R_MAX + 1)
    # A frequency stands for two in the count, but is one complex number.
    count = np.maximum(np.asarray(sums.count), 1)
    error = power * np.sqrt(2 / count)
    found = np.asarray(sums.residual(sums.gain)) / count
    assert (np.abs(found - power) < 4 * error)[known].all()


def test_shell_sums_are_sums_over_shells(compared):
    """In NumPy; images that are not included do not count."""
    compare, data, model, *_, included = compared
    sums = compare(data)
    few, y, s = included, np.asarray(data), model
    times, shells = np.asarray(DISC.multiplicity), np.asarray(DISC.shells)
    for shell in range(N // 2 + 1):
        here = (shells == shell) * times
        assert float(sums.count[shell]) == few.sum() * here.sum()
        for value, terms in (
            (sums.data, np.abs(y) ** 2),
            (sums.model, np.abs(s) ** 2),
            (sums.cross, (s.conj() * y).real),
        ):
            np.testing.assert_allclose(value[shell], np.sum(terms[few] @ here))


def test_the_gain_is_bounded():
    """A map of the other sign counts as none; a faint one is not blown up."""
    one = jnp.ones(4)
    cross = jnp.array([-3.0, 0.5, 7.0, 1.0])
    sums = ShellSums(10 * one, one.at[3].set(0.0), cross, one)
    np.testing.assert_allclose(sums.gain, [0.0, 0.5, 2.0, 0.0])
    left = sums.residual(sums.gain)
    np.testing.assert_allclose(left, [10, 9.75, 0, 10], atol=1e-12)


def test_groups_are_summed_apart_and_pooled_by_their_weights(compared):
    """As if each were compared by itself; the scale is that of least squares."""
    compare, data, *_ = compared
    group = np.arange(len(data)) % 5 == 0
    belongs = np.stack([~group, group])
    sums = compare(data, belongs)
    parts = [compare(data, one) for one in belongs]
    for value, *exact in zip(*map(jax.tree.leaves, (sums, *parts)), strict=True):
        np.testing.assert_allclose(value, exact, rtol=1e-12)
    weights = jnp.asarray(np.random.default_rng(3).uniform(size=(2, N // 2 + 1)))
    pooled = sums.pooled(weights)
    known = slice(1, R_MAX + 1)
    cross, model = (
        sum(np.asarray(weights[g] * getattr(parts[g], name))[known] for g in (0, 1))
        for name in ("cross", "model")
    )
    np.testing.assert_allclose(pooled.gain[known], cross / model, rtol=1e-12)


# --- noise of groups of images

SHAPE = np.array([5.0, 3.0, 2.0, 1.5, 1.0, 0.8, 0.9, 1.1])
FREQUENCIES = np.array([1.0, 8, 12, 16, 32, 28, 40, 40])  # of a particle


def draw_residuals(particles, spectra, seed):
    """Sums of squares over the frequencies of so many particles."""
    count = np.asarray(particles)[:, None] * FREQUENCIES
    sums = np.random.default_rng(seed).chisquare(np.maximum(count, 1e-9))
    return jnp.asarray(np.where(count > 0, sums * spectra, 0.0)), jnp.asarray(count)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
def test_a_single_group_has_its_own_noise(dtype):
    """To the last bit, also where there is none or nothing was counted."""
    residual, count = draw_residuals([7], SHAPE, 0)
    residual, count = (leaf.astype(dtype) for leaf in (residual, count))
    residual, count = residual.at[0, 3].set(0.0), count.at[0, 5].set(0.0)
    residual = residual.at[0, 5].set(0.0)
    own = residual / jnp.maximum(count, 1)
    np.testing.assert_array_equal(noise_power(residual, count), own)


def test_large_groups_have_noise_of_their_own():
    """Of any shape and level, to the sampling error."""
    spectra = np.stack([SHAPE, 9 * SHAPE[::-1]])
    residual, count = draw_residuals([3000, 1000], spectra, 1)
    error = np.log(noise_power(residual, count) / spectra)
    assert (np.abs(error) < 4 * np.sqrt(2 / count))[:, 1:].all()


def test_small_groups_have_the_common_shape_at_their_level():
    """Off by much less than by themselves, whatever their level."""
    levels, particles = np.array([1.0, 25.0, 0.1, 1.0]), [1000, 1, 2, 0]
    own, found = [], []
    for seed in range(20):
        residual, count = draw_residuals(particles, levels[:, None] * SHAPE, seed)
        power = np.asarray(noise_power(residual, count))
        found.append(power / (levels[:, None] * SHAPE))
        own.append(residual / np.maximum(count, 1) / (levels[:, None] * SHAPE))
        # Without images it is what all have together.
        common = residual.sum(axis=0) / count.sum(axis=0)
        np.testing.assert_allclose(power[3], common, rtol=1e-12)
    few, inner = slice(1, 3), slice(1, 4)
    worse, better = (
        np.std(np.array(values)[:, few, inner], axis=0) for values in (own, found)
    )
    assert (better < 0.7 * worse).all()
    assert np.abs(np.mean(found, axis=0)[few, inner] - 1).max() < 0.15


# --- white noise


M = 46
AXIS = np.arange(M) - M // 2
RADIUS = np.hypot(AXIS[:, None], AXIS)


def noisy_images(count=60, sigma=1.0, seed=3):
    """White noise about a smooth blob that has faded at half of the radius."""
    blob = 2 * np.exp(-(RADIUS**2) / 2 / (M / 12) ** 2)
    white = np.random.default_rng(seed).normal(size=(count, M, M))
    return blob + sigma * white


def soft_circle(diameter, edge):
    """A mask that falls from 1 to 0 within ``edge`` pixels of the circle."""
    ramp = np.clip((RADIUS - diameter * M / 2) / edge, 0, 1)
    return 0.5 + 0.5 * np.cos(np.pi * ramp)


def in_fourier_space(images):
    """Through an FFT in single precision, which leaves rounding in the corners."""
    return np.fft.irfft2(np.fft.rfft2(images).astype(np.complex64), s=(M, M))


MASKS = {
    "none": lambda images: images,
    "hard, inscribed": lambda images: np.where(RADIUS > M / 2, 0.0, images),
    "hard, filled": lambda images: np.where(RADIUS > M / 2, 3.0, images),
    "hard, a little larger": lambda images: np.where(
        RADIUS > 1.05 * M / 2, 0.0, images
    ),
    "hard, larger": lambda images: np.where(RADIUS > 1.15 * M / 2, 0.0, images),
    "soft, 0.75": lambda images: soft_circle(0.75, 5) * images,
    "soft, 0.95": lambda images: soft_circle(0.95, 5) * images,
    "soft, 1": lambda images: soft_circle(1.0, 5) * images,
    "half of the images": lambda images: np.where(
        (np.arange(len(images)) % 2 > 0)[:, None, None] & (RADIUS > M / 2), 0.0, images
    ),
    "ramps": lambda images: images + AXIS / 10,
    "soft, 0.6": lambda images: soft_circle(0.6, 5) * images,
    "hard, then resampled": lambda images: in_fourier_space(
        np.where(RADIUS > 0.9 * M / 2, 0.0, images)
    ),
    "quantised": lambda images: np.where(RADIUS > M / 2, 0.0, np.round(3 * images) / 3),
}


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("scale", [1e-3, 1e4])
def test_white_noise_is_that_beside_the_particle(mask, scale):
    """With every habit of masking that real stacks have."""
    images = scale * MASKS[mask](noisy_images())
    found = noise.white_noise(jnp.asarray(images, jnp.float32))
    assert found == pytest.approx(scale, rel=0.04), "some 1e4 pixels are seen"


def test_white_noise_of_one_image():
    (image,) = noisy_images(count=1)
    assert noise.white_noise(jnp.asarray(image[None])) == pytest.approx(1.0, rel=0.15)


def test_white_noise_of_a_part_of_the_images_is_that_of_all():
    images = jnp.asarray(noisy_images(count=1200))
    assert noise.white_noise(images) == pytest.approx(1.0, rel=0.01)


def test_no_noise():
    assert noise.white_noise(jnp.zeros((3, 16, 16))) == 0.0


def test_white_noise_needs_corners():
    with pytest.raises(InputError, match="at least 16 pixels a side, got 15"):
        noise.white_noise(jnp.zeros((3, 15, 15)))


def test_smoothed_noise_is_that_of_the_pixels():
    """As after a resampling: what is asked for is the spread of a pixel."""
    white = np.random.default_rng(2).normal(size=(60, M, M))
    smooth = (white + np.roll(white, 1, axis=1) + np.roll(white, 1, axis=2)) / 3**0.5
    found = noise.white_noise(jnp.asarray(smooth))
    assert found == pytest.approx(1.0, rel=0.04)


@pytest.mark.parametrize("batch_size", [3, 100])
def test_the_power_of_images_is_that_of_their_transforms(batch_size):
    """In each shell; a group of few gets the common spectrum at its own level."""
    m, count = 16, 40
    rng = np.random.default_rng(0)
    images = rng.normal(size=(count, m, m)).cumsum(axis=1)  # coloured
    axis = np.fft.fftfreq(m, 1 / m)
    shells = np.rint(np.hypot(axis, axis[:, None])).astype(int)
    power = np.abs(np.fft.fft2(images)) ** 2
    inside = np.hypot(axis, axis[:, None]) <= (m - 1) // 2
    expected = [power[:, inside & (shells == s)].mean() for s in range(m // 2)]
    found = noise.image_power(Particles(images), batch_size)
    np.testing.assert_allclose(found[0, : m // 2], expected, rtol=1e-5)
    scale = np.where(np.arange(count) == 7, 5.0, 1.0)[:, None, None]
    group = (scale[:, 0, 0] > 1).astype(int)
    two = noise.image_power(Particles(scale * images, group=group), batch_size)
    level = two[1, 1 : m // 2] / two[0, 1 : m // 2]
    assert 15 < np.exp(np.mean(np.log(level))) < 40


def test_the_power_of_a_small_group_is_that_of_its_images():
    """Also where one in two images is looked at, and it has none of these."""
    m, count = 8, 4400
    images = np.random.default_rng(0).normal(size=(count, m, m)).astype(np.float32)
    group = np.zeros(count, int)
    group[[403, 406, 1651, 2001, 3999, 4393]] = 2
    group[4397] = 4
    levels = np.array([1.0, np.nan, 100.0, np.nan, 1e4])
    scaled = np.sqrt(levels)[group][:, None, None].astype(np.float32) * images
    found = noise.image_power(Particles(scaled, group=group), 500)
    mean = found[:, 1 : m // 2].mean(axis=1) / m**2
    np.testing.assert_allclose(mean[[0, 2, 4]], levels[[0, 2, 4]], rtol=0.5)
    assert np.isfinite(mean).all()
