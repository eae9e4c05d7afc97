"""Particles, poses, maps and subsets that do not fit each other are refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrefine.data.particles import Particles
from jaxrefine.errors import InputError
from jaxrefine.geometry import Poses
from jaxrefine.refinement import loop, reconstruction
from jaxrefine.refinement.config import RefineConfig
from jaxrefine.refinement.sets import (
    FEWEST,
    deal,
    divide,
    divided,
    halves,
    is_dominated,
    make_particle_set,
)

KEY = jax.random.key(3)


def blank(count=6, side=16):
    """Images, poses and a map that fit each other."""
    poses = Poses(jnp.tile(jnp.eye(3), (count, 1, 1)), jnp.zeros((count, 2)))
    return np.zeros((count, side, side), np.float32), poses, jnp.zeros((side,) * 3)


def spoilt(which, value):
    images, poses, volume = blank()
    if which == "rotations":
        poses = Poses(poses.rotations.at[2, 1, 1].set(value), poses.shifts)
    elif which == "shifts":
        poses = Poses(
            poses.rotations, poses.shifts.at[2, 1].set(value).at[3].set(value)
        )
    else:
        volume = volume.at[3, 4, 5].set(value)
    return images, poses, volume


REFUSED = {
    "few particles": (blank(3), "^there must be at least 4 particles, got 3$"),
    "small images": (
        blank(6, 15),
        "^images must have a side of at least 16 pixels, got 15$",
    ),
    "other poses": (
        (blank(6)[0], blank(5)[1], blank(6)[2]),
        r"^poses of 6 images must have rotations of shape \(6, 3, 3\) and shifts of "
        r"shape \(6, 2\), got \(5, 3, 3\) and \(5, 2\)$",
    ),
    "another map": (
        (*blank()[:2], jnp.zeros((20, 20, 20))),
        r"^the map of images of side 16 must have the shape \(16, 16, 16\), got "
        r"\(20, 20, 20\)$",
    ),
    "rotations": (
        spoilt("rotations", jnp.nan),
        "^rotations must be finite, got 1 that are not$",
    ),
    "improper rotations": (
        spoilt("rotations", -1.0),
        r"^rotations must be orthogonal matrices of determinant 1, got 1 that are not, "
        r"the first for particle 2 \(from 0\)$",
    ),
    "shifts": (
        spoilt("shifts", jnp.inf),
        "^shifts must be finite, got 3 that are not$",
    ),
    "shifts out of the image": (
        spoilt("shifts", 8.5),
        r"^shifts must be at most 8 pixels along x and y, within the image, got 2 that "
        r"are not, the first 8.5 for particle 2 \(from 0\)$",
    ),
    "map": (
        spoilt("map", -jnp.inf),
        "^the map's values must be finite, got 1 that are not$",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_input_that_does_not_fit(case):
    (images, poses, volume), words = REFUSED[case]
    with pytest.raises(InputError, match=words):
        loop.refine(Particles(images), poses, volume, key=KEY)
    if case not in ("another map", "map"):
        with pytest.raises(InputError, match=words):
            reconstruction.reconstruct(Particles(images), poses, key=KEY)


@pytest.mark.parametrize(
    ("mask", "words"),
    [
        (
            jnp.ones((20,) * 3),
            r"must have the shape \(16, 16, 16\), got \(20, 20, 20\)$",
        ),
        (
            jnp.full((16,) * 3, 1.5),
            "^the mask must have values from 0 .* got 1.5 to 1.5",
        ),
        (
            jnp.full((16,) * 3, jnp.nan),
            "^the mask must have values from 0 .* got nan to nan",
        ),
        (jnp.zeros((16,) * 3), "^the mask must have values from 0 .* got 0 to 0"),
    ],
)
def test_masks_that_are_none(mask, words):
    images, poses, volume = blank()
    with pytest.raises(InputError, match=words):
        loop.refine(Particles(images), poses, volume, key=KEY, mask=mask)


def test_an_image_that_is_not_finite_is_named():
    images, poses, volume = blank()
    images[:, 0, 0] = np.nan
    with pytest.raises(InputError, match=r"^image [0-5] \(from 0\) must be finite"):
        loop.refine(Particles(images), poses, volume, key=KEY)


@pytest.mark.parametrize(
    ("subsets", "words"),
    [
        (
            [0, 1, 0, 1, 0, 1],
            r"^subsets must be 1 or 2 for each of 6 particles.* got \[0, 1\]",
        ),
        (
            [1, 1, 1, 1, 1, 1],
            r"must be 1 or 2 for each of 6 particles.*, got \[1\] for 6$",
        ),
        ([1, 2, 3, 1, 2, 3], r"got \[1, 2, 3\] for 6$"),
        ([1, 2, 1, 2], r"for each of 6 particles.*, got \[1, 2\] for 4$"),
    ],
)
def test_subsets_that_are_none(subsets, words):
    images, poses, volume = blank()
    config = RefineConfig(half_sets=True)
    with pytest.raises(InputError, match=words):
        loop.refine(
            Particles(images), poses, volume, config, key=KEY, subsets=np.array(subsets)
        )


def test_a_half_set_must_have_enough_particles():
    """Each set is dealt into two folds, neither of which may be empty."""
    images, poses, volume = blank()
    config = RefineConfig(half_sets=True, iterations=1)
    subsets = np.array([1, 2, 2, 2, 2, 2])
    with pytest.raises(InputError):
        loop.refine(Particles(images), poses, volume, config, key=KEY, subsets=subsets)


# --- dealing


def of_clusters(cluster):
    count = len(cluster)
    images, poses, _ = blank(count)
    return Particles(images, cluster=np.asarray(cluster)), poses


@pytest.mark.parametrize("count", [4, 5, 33, 400])
def test_independent_particles_take_turns_in_a_random_order(count):
    """Nothing but the key and their number decides, whatever their clusters' names."""
    expected = np.empty(count, int)
    order = np.asarray(jax.random.permutation(KEY, count))
    expected[order] = 1 + np.arange(count) % 2
    images, poses, _ = blank(count)
    names = 7 * np.random.default_rng(0).permutation(count) - 3
    for particles in (Particles(images), Particles(images, cluster=names)):
        np.testing.assert_array_equal(deal(particles, KEY), expected)
        fold = make_particle_set(particles, poses, KEY, RefineConfig()).fold
        np.testing.assert_array_equal(fold, expected - 1)


def test_repeating_all_rows_changes_no_deal():
    images, _, _ = blank(9)
    once = deal(Particles(images), KEY)
    for copies in (2, 5):
        particles, _ = of_clusters(np.tile(np.arange(9), copies))
        np.testing.assert_array_equal(deal(particles, KEY), np.tile(once, copies))


@pytest.mark.parametrize("half_sets", [True, False])
@pytest.mark.parametrize("seed", range(5))
def test_a_cluster_is_in_one_half_set_and_one_fold(seed, half_sets):
    """And sets and folds are as large as each other, as far as clusters allow."""
    rng = np.random.default_rng(seed)
    sizes = rng.integers(1, 12, 40)
    cluster = rng.permutation(np.repeat(np.arange(40), sizes))
    particles, poses = of_clusters(cluster)
    config = RefineConfig(half_sets=half_sets)
    _, particle_sets = divide(particles, poses, config, jax.random.key(seed), None)
    parts = np.full(len(cluster), -1)
    counts = []
    for i, one in enumerate(particle_sets):
        parts[one.indices] = 2 * i + one.fold
        counts.append([len(one.of_fold(fold)) for fold in (0, 1)])
        assert abs(counts[i][0] - counts[i][1]) <= 3
    assert abs(sum(counts[0]) - sum(counts[-1])) <= 3
    assert (parts >= 0).all() and len(set(parts)) == 2 * len(particle_sets)
    for each in range(40):
        assert len(set(parts[cluster == each])) == 1


def test_half_sets_that_are_given_are_kept_and_what_they_divide_is_counted():
    cluster = np.array([0, 0, 1, 1, 2, 2, 3, 3, 4, 5, 6, 7])
    subsets = np.array([1, 2, 1, 1, 2, 2, 2, 1, 1, 2, 1, 2])
    assert divided(subsets, cluster) == 2
    particles, poses = of_clusters(cluster)
    config = RefineConfig(half_sets=True)
    _, particle_sets = divide(particles, poses, config, KEY, subsets)
    for half, one in enumerate(particle_sets, start=1):
        np.testing.assert_array_equal(one.indices, np.flatnonzero(subsets == half))
        for each in set(cluster[one.indices]):
            assert len(set(one.fold[cluster[one.indices] == each])) == 1


def test_another_key_deals_clusters_in_another_way():
    """Also where no two have the same size, which would decide alone otherwise."""
    sizes = np.arange(20, 40)
    particles, _ = of_clusters(np.repeat(np.arange(20), sizes))
    first = np.concatenate([[0], np.cumsum(sizes)[:-1]])
    dealt = {tuple(deal(particles, jax.random.key(i))[first]) for i in range(20)}
    assert len(dealt) == 20


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        ([8], True),
        ([9, 1], True),
        ([88] + 12 * [1], True),
        ([8, 4], False),
        ([5, 5], False),
        ([3, 3, 3], False),
        ([2, 2], False),
        (8 * [1], False),
    ],
)
def test_a_cluster_of_most_particles_is_dealt_singly_into_folds(sizes, expected):
    """Otherwise it is kept together, and both folds have two particles or more."""
    cluster = np.repeat(np.arange(len(sizes)), sizes)
    particles, poses = of_clusters(cluster)
    assert is_dominated(cluster) == expected
    for seed in range(5):
        key = jax.random.key(seed)
        one = make_particle_set(particles, poses, key, RefineConfig())
        counts = [len(one.of_fold(fold)) for fold in (0, 1)]
        assert min(counts) >= max(2, sum(counts) // 6)
        if expected:
            assert abs(counts[0] - counts[1]) <= 1
        else:
            assert all(len(set(one.fold[cluster == i])) == 1 for i in set(cluster))


def test_each_half_set_may_be_one_cluster():
    """If the halves are given, or each is dealt one, only the folds divide it."""
    cluster = np.repeat([0, 1], 10)
    particles, poses = of_clusters(cluster)
    config = RefineConfig(half_sets=True)
    for subsets in (1 + cluster, None):
        _, both = divide(particles, poses, config, KEY, subsets)
        assert [len(set(cluster[one.indices])) for one in both] == [1, 1]
        for one in both:
            assert len(one.of_fold(0)) == len(one.of_fold(1)) == 5


@pytest.mark.parametrize("sizes", [[12], [20, FEWEST - 1]])
def test_half_sets_that_cannot_be_dealt_are_refused(sizes):
    particles, poses = of_clusters(np.repeat(np.arange(len(sizes)), sizes))
    got = sorted([*sizes, 0][:2], reverse=True)
    words = (
        f"^each half set must have at least 4 particles, got {got[0]} and {got[1]}, "
        "as the particles of a cluster are kept together$"
    )
    with pytest.raises(InputError, match=words):
        halves(particles, KEY, None)
    with pytest.raises(InputError, match=words):
        loop.refine(
            particles,
            poses,
            jnp.zeros((16,) * 3),
            RefineConfig(half_sets=True),
            key=KEY,
        )
