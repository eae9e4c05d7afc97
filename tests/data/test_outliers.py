"""Images that are unlike the others are found, and no other; so are hot pixels."""

import numpy as np
import pytest

from jaxrefine.data import outliers
from jaxrefine.data.preprocess import (
    Cleaned,
    Masked,
    Normalised,
    cleaned,
    outside,
    unprepared,
)

COUNT, M = 100, 32
BACKGROUND = outside(M, 0.75 * M)
ALL = np.zeros(COUNT, int)
BAD = np.array([3, 40, 77, 98])
Y, X = np.mgrid[:M, :M]


def particles(noise, seed=0):
    """Images of a few blobs that move, and white noise."""
    rng = np.random.default_rng(seed)
    places = rng.uniform(-5, 5, (COUNT, 4, 2)) + M // 2
    squares = (X - places[..., :1, None]) ** 2 + (Y - places[..., 1:, None]) ** 2
    signal = np.exp(-squares / 8).sum(axis=1)
    return (signal + noise * rng.normal(size=signal.shape)).astype(np.float32)


def look(images):
    return outliers.look(images, BACKGROUND)


def hot(images):
    """Return the images with hot pixels, and what they look like without."""
    seen = look(images)
    limit = outliers.hot_limit(seen)
    found = np.flatnonzero(seen.peak > limit)
    if len(found):
        seen.put(found, look(outliers.without_hot_pixels(images[found], limit)))
    return found, seen


def smooth(images):
    """Real noise is correlated."""
    return sum(np.roll(images, shift, (1, 2)) for shift in ((0, 0), (1, 0), (0, 1)))


SOUND = {
    "noise": particles(1.0),
    "little noise": particles(0.1),
    "no noise": particles(0.0),
    "noise alone": particles(1e3),
    "coloured": smooth(particles(1.0)),
    "masked": Masked(particles(1.0), 20.0, np.zeros((COUNT, 2)))[np.arange(COUNT)],
    "eight bits": np.round(particles(1.0) * 20).clip(-128, 127).astype(np.float32),
    "dark": -particles(1.0),
    "shaded": particles(1.0) + 0.2 * (X / M - 0.5).astype(np.float32),
    "tiny": particles(1.0) * np.float32(1e-20),
    "huge": particles(1.0) * np.float32(1e20),
}


@pytest.mark.parametrize("name", SOUND)
def test_nothing_is_found_in_sound_images(name):
    found, seen = hot(SOUND[name])
    assert not len(found) and outliers.unlike_others(seen, ALL) == {}
    assert outliers.not_normalised(seen, ALL) is None


def carbon(images):
    """A brighter half plane with a texture of its own, through the particle."""
    rng = np.random.default_rng(1)
    beyond = (X + Y > M).astype(np.float32)
    return images + beyond * (3 + rng.normal(size=images.shape)).astype(np.float32)


def with_empty_edge(images):
    return np.where(M // 3 > X, np.float32(0.1), images)


def saturated(images):
    return np.minimum(images, np.quantile(images, 0.8)).astype(np.float32)


SPOILT = {
    "contrast": (lambda images: 4 * images, "too strong"),
    "faint": (lambda images: images / 4, "too weak"),
    "bright": (lambda images: images + 3, "too bright"),
    "dark": (lambda images: images - 3, "too dark"),
    "edge": (with_empty_edge, "empty in a part"),
    "saturated": (saturated, "one value in many pixels"),
    "carbon": (carbon, ""),
    "constant": (lambda images: 0 * images + 5, ""),
}


@pytest.mark.parametrize("kind", SPOILT)
@pytest.mark.parametrize("noise", [0.5, 2.0])
def test_images_that_are_unlike_the_others_are_found(noise, kind):
    spoil, words = SPOILT[kind]
    images = particles(noise) / noise
    images[BAD] = spoil(images[BAD])
    found = outliers.unlike_others(hot(images)[1], ALL)
    assert list(found) == BAD.tolist()
    assert all(words in reason for reason in found.values()), found


@pytest.mark.parametrize("kind", ["contrast", "faint", "bright", "dark"])
def test_grey_scales_may_be_any_of_images_that_are_normalised(kind):
    images = particles(1.0)
    images[BAD] = SPOILT[kind][0](images[BAD])
    assert outliers.unlike_others(look(images), ALL, grey_scale=False) == {}


def test_each_group_has_its_own_grey_scale():
    """Two microscopes: what is usual with one is unusual with the other."""
    images, group = particles(1.0), np.arange(COUNT) % 2
    images[group == 1] *= 5
    assert outliers.not_normalised(look(images), ALL) is not None
    assert outliers.not_normalised(look(images), group) is None
    assert outliers.unlike_others(look(images), group) == {}
    images[4] *= 5
    assert list(outliers.unlike_others(look(images), group)) == [4]
    few = np.where(np.arange(COUNT) < 15, 1, 0)
    images = particles(1.0)
    images[7] *= 100
    assert outliers.unlike_others(look(images), few) == {}


@pytest.mark.parametrize(("shift", "normalised"), [(0.4, True), (0.6, False)])
def test_the_mean_of_a_background_has_the_limit_of_relion(shift, normalised):
    """0.5 standard deviations, see ``relion_refine``, whatever the scale is."""
    images = particles(10.0)
    centred = images - images[:, BACKGROUND].mean(axis=1)[:, None, None]
    for sign, scale in ((1, 1), (-1, 1e4)):
        shifted = scale * (centred + sign * shift * 10)
        reason = outliers.not_normalised(look(shifted), ALL)
        assert (reason is None) == normalised
        if reason is not None:
            assert f"mean of {sign * shift:g} standard deviations" in reason


@pytest.mark.parametrize(("factor", "normalised"), [(1.8, True), (2.2, False)])
def test_the_deviation_of_a_background_has_the_limit_of_relion(factor, normalised):
    """From half to twice what is usual, in a tenth of the images."""
    for share, other in ((1 / 5, normalised), (1 / 20, True)):
        images = particles(10.0)
        images[: int(share * COUNT)] *= factor
        images[-int(share * COUNT) :] /= factor
        reason = outliers.not_normalised(look(images), ALL)
        assert (reason is None) == (normalised or other)


@pytest.mark.parametrize("value", [30.0, 1e3, -1e6, 3e38])
def test_hot_pixels_are_replaced_and_nothing_else(value):
    images = particles(1.0)
    places = ([3, 40, 40, 98], [0, 16, 5, 31], [9, 16, 31, 31])
    spoilt = images.copy()
    spoilt[places] = value
    seen = look(spoilt)
    limit = outliers.hot_limit(seen)
    found = np.flatnonzero(seen.peak > limit)
    assert found.tolist() == [3, 40, 98]
    result = outliers.without_hot_pixels(spoilt, limit)
    changed = np.zeros(images.shape, bool)
    changed[places] = True
    np.testing.assert_array_equal(result[~changed], images[~changed])
    square = np.delete(images[40, 15:18, 15:18].ravel(), 4)
    assert result[40, 16, 16] == np.float32(np.median(square))
    assert np.abs(result[places]).max() < 3
    read = Cleaned(spoilt, np.isin(np.arange(COUNT), found), limit)
    np.testing.assert_array_equal(read[np.array([40, 1])], result[np.array([40, 1])])


def test_a_bright_particle_is_not_hot():
    """It has bright neighbours, however bright it is."""
    images = particles(0.01)
    images[5] += 300 * np.exp(-((X - 16) ** 2 + (Y - 16) ** 2) / 4).astype(np.float32)
    limit = outliers.hot_limit(look(images))
    assert look(images).peak[5] > 1
    np.testing.assert_array_equal(outliers.without_hot_pixels(images, limit), images)


def test_hot_pixels_are_replaced_before_images_are_prepared():
    images = particles(1.0)
    spoilt = images.copy()
    spoilt[BAD, 2, 2] = 1e6
    chain = Masked(Normalised(spoilt, 20.0), 24.0, np.zeros((COUNT, 2)))
    assert unprepared(chain) is spoilt
    mended = cleaned(chain, np.isin(np.arange(COUNT), BAD), 10.0)
    expected = Masked(Normalised(images, 20.0), 24.0, np.zeros((COUNT, 2)))[BAD]
    np.testing.assert_allclose(mended[BAD], expected, atol=0.02)
    assert np.abs(chain[BAD] - expected).max() > 1
    sound = np.array([0, 1])
    np.testing.assert_array_equal(mended[sound], chain[sound])
