"""Normalisation by the background and masks, by definition and on real particles."""

import numpy as np
import pytest

from jaxrefine.data.particles import Particles
from jaxrefine.data.preprocess import Masked, Normalised, outside
from jaxrefine.errors import InputError
from jaxrefine.io import read_stack


@pytest.fixture
def images():
    rng = np.random.default_rng(0)
    gain, offset = rng.uniform(0.2, 5, (6, 1, 1)), rng.uniform(-9, 9, (6, 1, 1))
    return (gain * rng.normal(size=(6, 20, 20)) + offset).astype(np.float32)


def test_the_background_is_of_mean_0_and_deviation_1(images):
    around = Normalised(images, 12.0)[np.arange(6)][:, outside(20, 12.0)]
    np.testing.assert_allclose(around.mean(axis=1), 0, atol=1e-6)
    np.testing.assert_allclose(around.std(axis=1), 1, atol=1e-6)


def test_scale_and_offset_of_an_image_do_not_matter(images):
    other = 3 * images - 7
    some = np.array([4, 1])
    np.testing.assert_allclose(
        Normalised(other, 12.0)[some], Normalised(images, 12.0)[some], atol=1e-5
    )
    np.testing.assert_allclose(
        Normalised(-images, 12.0, invert=True)[some],
        Normalised(images, 12.0)[some],
        atol=1e-6,
    )


def test_only_what_is_asked_for_is_read(images):
    class Watched:
        shape, asked = images.shape, []

        def __getitem__(self, indices):
            self.asked.append(np.asarray(indices))
            return images[indices]

    source = Watched()
    particles = Particles(Normalised(source, 12.0)).take(np.array([5, 2, 3]))
    batch, _ = particles.batch(np.array([2, 0]))
    np.testing.assert_array_equal(source.asked, [[3, 5]])
    np.testing.assert_array_equal(batch, Normalised(images, 12.0)[np.array([3, 5])])


def test_what_is_refused(images):
    for diameter in (0.0, -1.0, 40.0, float("nan")):
        with pytest.raises(InputError, match="diameter must be positive and leave"):
            Normalised(images, diameter)
    images[3] = 2
    with pytest.raises(InputError, match=r"image 3 \(from 0\) must vary"):
        Normalised(images, 12.0)[np.array([1, 3])]


def radii(m, centres):
    """The distance of every pixel from a centre (x, y), pixel by pixel."""
    return np.array(
        [
            [
                [np.hypot(j - m // 2 - x, i - m // 2 - y) for j in range(m)]
                for i in range(m)
            ]
            for x, y in centres
        ]
    )


CENTRES = np.random.default_rng(1).uniform(-4, 4, (6, 2))


def test_a_circle_is_cut_out_about_the_particle(images):
    """Its bits are kept, then comes a cosine of 5 pixels, then nothing."""
    masked = Masked(images, 7.0, CENTRES)[np.arange(6)]
    away = radii(20, CENTRES) - 3.5
    np.testing.assert_array_equal(masked[away <= 0], images[away <= 0])
    assert not masked[away >= 5].any() and (away >= 5).any(axis=(1, 2)).all()
    edge = (away > 0) & (away < 5)
    expected = (images * np.cos(np.pi * away / 10) ** 2)[edge]
    np.testing.assert_allclose(masked[edge], expected, rtol=1e-5, atol=1e-6)
    wide = Masked(images, 50.0, CENTRES)[np.arange(6)]
    np.testing.assert_array_equal(wide, images)


def test_the_circle_is_that_of_the_image_that_is_asked_for(images):
    masked = Masked(Normalised(images, 12.0), 7.0, CENTRES)
    batch, _ = Particles(masked).take(np.array([5, 2, 3])).batch(np.array([2, 0]))
    away = radii(20, CENTRES[[3, 5]]) - 3.5
    np.testing.assert_array_equal(np.asarray(batch) != 0, away < 5)


def test_masked_noise_is_white_and_weaker():
    """By the share of the area that the (soft) circle has."""
    rng, some = np.random.default_rng(2), np.arange(400)
    white = rng.normal(size=(400, 20, 20)).astype(np.float32)
    masked = Masked(white, 7.0, np.zeros((400, 2)))[some]
    power = np.mean(np.abs(np.fft.fft2(masked)) ** 2, axis=0) / 20**2
    one = Masked(np.ones((1, 20, 20)), 7.0, np.zeros((1, 2)))
    expected = np.mean(one[np.array([0])] ** 2)
    assert one.noise_share == pytest.approx(expected, rel=1e-6)
    assert 0.15 < expected < 0.5
    frequency = np.hypot(*np.meshgrid(*[np.fft.fftfreq(20, 1 / 20)] * 2))
    for shell in range(1, 10):
        found = power[np.round(frequency) == shell].mean()
        assert found == pytest.approx(expected, rel=0.1)


@pytest.mark.parametrize(
    ("diameter", "centres", "words"),
    [
        *((d, CENTRES, "diameter must be positive") for d in (0.0, -1.0, float("nan"))),
        (7.0, CENTRES[:5], "each of 6 images, got 5"),
    ],
)
def test_circles_that_are_none(images, diameter, centres, words):
    with pytest.raises(InputError, match=words):
        Masked(images, diameter, centres)


def test_real_particles_are_bright_once_inverted(data_dir):
    """Beta-galactosidase on a real background: dark protein, uneven exposure."""
    folder = data_dir / "real_betagal"
    images, _ = read_stack(folder / "betagal_emd2984_particles_101_96px.mrcs")
    found = Normalised(images, 60.0, invert=True)[np.arange(101)]
    centre = ~outside(96, 30.0)
    assert np.mean(found[:, centre].mean(axis=1) > 0) > 0.95
    empty, _ = read_stack(folder / "betagal_emd2984_background_101_96px.mrcs")
    empty = Normalised(empty, 60.0, invert=True)[np.arange(101)]
    assert abs(empty[:, centre].mean()) < 0.2 * found[:, centre].mean()
    np.testing.assert_allclose(found[:, outside(96, 60.0)].std(axis=1), 1, atol=1e-5)
