"""Particles: batches are what they say, views read nothing, bad data is a sentence."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxrefine.ctf import CTF
from jaxrefine.data.particles import Particles
from jaxrefine.data.preprocess import Masked, Normalised
from jaxrefine.errors import InputError

IMAGES = np.random.default_rng(0).normal(size=(7, 4, 4))
DEFOCI = jnp.arange(7.0) * 1e3 + 1e4


class Recorder:
    """Images that remember which of them were read."""

    shape = IMAGES.shape

    def __init__(self):
        self.read = []

    def __getitem__(self, indices):
        self.read += list(indices)
        return IMAGES[indices]


def memory_map(tmp_path):
    path = tmp_path / "images.raw"
    IMAGES.astype(np.float32).tofile(path)
    return np.memmap(path, np.float32, "r", shape=IMAGES.shape)


SOURCES = {
    "numpy": lambda _: IMAGES,
    "integers": lambda _: (100 * IMAGES).astype(np.int16),
    "jax": lambda _: jnp.asarray(IMAGES),
    "memory map": memory_map,
    "anything": lambda _: Recorder(),
}


@pytest.mark.parametrize("source", SOURCES)
def test_batches_are_the_images_asked_for_in_single_precision(source, tmp_path):
    images = SOURCES[source](tmp_path)
    particles = Particles(images, CTF(DEFOCI, DEFOCI), 1.5)
    assert len(particles) == 7 and particles.image_size == 4
    for indices in (np.array([5, 0, 5]), jnp.array([1]), np.arange(7)):
        batch, ctf = particles.batch(indices)
        expected = np.asarray(images[np.asarray(indices)], np.float32)
        np.testing.assert_array_equal(batch, expected)
        assert batch.dtype == jnp.float32 and ctf is not None
        np.testing.assert_array_equal(ctf.defocus_u, DEFOCI[indices])
        assert ctf.voltage.dtype == jnp.float32


def test_a_view_reads_only_what_it_is_asked_for():
    source = Recorder()
    particles = Particles(source, CTF(DEFOCI, DEFOCI), 1.5)
    some = particles.take(np.array([6, 4, 2, 0])).take(np.array([2, 1]))
    assert source.read == []
    assert len(some) == 2 and some.pixel_size_in_angstroms == 1.5
    batch, ctf = some.batch(np.array([0]))
    assert source.read == [2] and ctf is not None
    np.testing.assert_array_equal(batch, IMAGES[[2]].astype(np.float32))
    np.testing.assert_array_equal(ctf.defocus_u, DEFOCI[jnp.array([2])])


def test_groups_go_with_their_particles():
    group = np.array([0, 0, 1, 3, 1, 0, 1])
    particles = Particles(IMAGES, group=group)
    assert particles.groups == 4
    some = particles.take(np.array([6, 4, 3, 0])).take(np.array([2, 1, 1]))
    np.testing.assert_array_equal(some.group, [3, 1, 1])
    np.testing.assert_array_equal(some.group_of(jnp.array([1, 0])), [1, 3])
    alone = Particles(IMAGES).take(np.array([3, 4]))
    assert alone.group is None and alone.groups == 1
    np.testing.assert_array_equal(alone.group_of(np.array([1, 1, 0])), [0, 0, 0])


@pytest.mark.parametrize("group", [np.zeros(6, int), np.arange(7) - 1])
def test_groups_of_other_particles_are_refused(group):
    with pytest.raises(InputError, match="each of 7 images"):
        Particles(IMAGES, group=group)


def test_the_share_of_the_noise_follows_from_the_images():
    """Through views and normalisation; images that were not masked have all of it."""
    masked = Masked(np.ones((7, 12, 12)), 2.0, np.zeros((7, 2)))
    assert 0 < masked.noise_share < 1
    for images in (masked, Normalised(masked, 9.0)):
        particles = Particles(images)
        for view in (particles, particles.take(np.array([6, 4]))):
            assert view.noise_share == masked.noise_share
    assert Particles(IMAGES).take(np.array([6, 4])).noise_share == 1


def test_particles_without_optics_stay_without():
    assert Particles(IMAGES).batch(np.array([3]))[1] is None
    assert Particles(IMAGES).take(np.array([3])).ctf is None


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_an_image_that_is_not_finite_is_named(bad):
    images = IMAGES.copy()
    images[5, 1, 2] = bad
    particles = Particles(images)
    particles.batch(np.array([0, 4, 6]))
    with pytest.raises(InputError, match=r"^image 5 \(from 0\) must be finite"):
        particles.batch(np.array([0, 5]))
    # Also through a view, which counts otherwise.
    with pytest.raises(InputError, match="^image 5 "):
        particles.take(np.array([6, 5])).batch(np.array([1]))


@pytest.mark.parametrize(
    ("images", "words"),
    [
        (np.zeros((3, 4, 5)), "particles x m x m, got 3 x 4 x 5"),
        (np.zeros((4, 4)), "got 4 x 4"),
        (np.zeros((3, 0, 0)), "got 3 x 0 x 0"),
        (np.zeros((0, 4, 4)), "at least one particle"),
    ],
)
def test_images_that_are_none_or_not_square_are_refused(images, words):
    with pytest.raises(InputError, match=words):
        Particles(images)


@pytest.mark.parametrize("defoci", [1e4, jnp.ones(6)])
def test_optics_of_other_particles_are_refused(defoci):
    with pytest.raises(InputError, match="each of 7 images"):
        Particles(IMAGES, CTF(defoci, defoci), 1.5)


@pytest.mark.parametrize("pixel", [0.0, -1.0, np.nan, np.inf])
def test_pixel_sizes_that_are_not_positive_are_refused(pixel):
    with pytest.raises(InputError, match="pixel_size_in_angstroms must be positive"):
        Particles(IMAGES, None, float(pixel))


def test_optics_need_a_pixel_size():
    """A CTF is a function of frequencies in angstroms; nothing else needs them."""
    words = "^pixel_size_in_angstroms must be given with a ctf, got none$"
    with pytest.raises(InputError, match=words):
        Particles(IMAGES, CTF(DEFOCI, DEFOCI))
    assert Particles(IMAGES).box_in_angstroms == 4


@pytest.mark.parametrize("indices", [[7], [-1, 2]])
def test_indices_of_no_particle_are_refused(indices):
    for ask in (Particles(IMAGES).take, Particles(IMAGES).batch):
        with pytest.raises(InputError, match="must be from 0 to 6"):
            ask(np.array(indices))


def test_no_particles_cannot_be_taken():
    with pytest.raises(InputError, match="at least one particle"):
        Particles(IMAGES).take(np.array([], int))


def test_clusters_go_with_their_particles():
    cluster = np.array([3, 3, 1, 0, 1, 9, 9])
    particles = Particles(IMAGES, cluster=cluster)
    view = particles.take(np.array([6, 4, 0])).take(np.array([2, 0]))
    np.testing.assert_array_equal(view.cluster, [3, 9])
    with pytest.raises(InputError, match="cluster must hold .* 7 images, .*(6,)"):
        Particles(IMAGES, cluster=cluster[:6])


def test_images_that_cannot_be_read_are_not_taken_for_bad_ones():
    class Source:
        shape = (3, 4, 4)

        def __getitem__(self, indices, /):
            raise InputError("cannot read it")

    with pytest.raises(InputError, match="cannot read it"):
        Particles(Source()).unusable()


def test_images_that_cannot_be_used_are_found():
    """Those that `batch` refuses, in its words; the others can be taken."""
    images = np.random.default_rng(3).normal(size=(150, 4, 4)).astype(np.float32)
    images[[0, 70, 149], 1, 2] = np.nan, np.inf, -np.inf
    particles = Particles(images)
    told = []
    found = particles.unusable(lambda *words: told.append(words))
    assert told == [("images", done, 150) for done in (0, 50, 100, 150)]
    assert list(found) == [0, 70, 149]
    assert found[70] == "image 70 (from 0) must be finite, got a value that is not"
    good = particles.take(np.setdiff1d(np.arange(150), list(found)))
    assert good.unusable() == {} and np.isfinite(good.batch(np.arange(147))[0]).all()
