"""Normalisation by the background, against its definition and on real particles."""

from pathlib import Path

import numpy as np
import pytest

from jaxrefine.background import Normalised, outside
from jaxrefine.errors import InputError
from jaxrefine.io import read_stack
from jaxrefine.particles import Particles

REAL = Path(__file__).resolve().parents[2] / "shared/data/real_betagal"


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
        with pytest.raises(InputError, match="A circle of"):
            Normalised(images, diameter)
    images[3] = 2
    with pytest.raises(InputError, match=r"Image 3 \(from 0\) is constant"):
        Normalised(images, 12.0)[np.array([1, 3])]


@pytest.mark.skipif(not REAL.exists(), reason="real particles are not in a clone")
def test_real_particles_are_bright_once_inverted():
    """Beta-galactosidase on a real background: dark protein, uneven exposure."""
    images, _ = read_stack(REAL / "betagal_emd2984_particles_101_96px.mrcs")
    found = Normalised(images, 60.0, invert=True)[np.arange(101)]
    centre = ~outside(96, 30.0)
    assert np.mean(found[:, centre].mean(axis=1) > 0) > 0.95
    empty, _ = read_stack(REAL / "betagal_emd2984_background_101_96px.mrcs")
    empty = Normalised(empty, 60.0, invert=True)[np.arange(101)]
    assert abs(empty[:, centre].mean()) < 0.2 * found[:, centre].mean()
    np.testing.assert_allclose(found[:, outside(96, 60.0)].std(axis=1), 1, atol=1e-5)
