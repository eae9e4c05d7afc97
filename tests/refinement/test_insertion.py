"""The sums over images: those of one call, whatever takes them up, and on what."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import digest_on, draw_poses, relative_error

from jaxrefine.ctf import CTF
from jaxrefine.data import observation
from jaxrefine.data.particles import Particles
from jaxrefine.geometry import Poses
from jaxrefine.maps import sums
from jaxrefine.maps.folds import FOLDS
from jaxrefine.operators.gridding import Finufft
from jaxrefine.poses.hypotheses import Hypotheses
from jaxrefine.refinement import insertion
from jaxrefine.refinement.config import RefineConfig
from jaxrefine.refinement.sets import make_particle_set

N, P, H, GROUPS = 16, 700, 2, 2


def scene():
    """Return particles of two groups with optics, and two poses of each, weighted.

    One fold has twice as many particles as the other. A tenth of the poses have no
    weight, a tenth of the particles are left out.
    """
    random = np.random.default_rng(0)
    images = random.normal(size=(P, N, N)).astype(np.float32)
    defocus = jnp.asarray(random.uniform(8e3, 2e4, P), jnp.float32)
    particles = Particles(images, CTF(defocus, defocus + 200), 4.0, np.arange(P) % 2)
    poses = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), draw_poses(P * H))
    weights = random.uniform(size=(P, H)) * (random.uniform(size=(P, H)) > 0.1)
    weights = np.maximum(weights / (weights.sum(axis=1, keepdims=True) + 1e-9), 1e-9)
    hypotheses = Hypotheses(
        poses.rotations.reshape(P, H, 3, 3),
        poses.shifts.reshape(P, H, 2),
        jnp.asarray(np.log(weights), jnp.float32),
    )
    config = RefineConfig(hypotheses=H)
    given = Poses(hypotheses.rotations[:, 0], hypotheses.shifts[:, 0])
    particle_set = make_particle_set(particles, given, jax.random.key(0), config)
    fold = (np.arange(P) % 3 == 0).astype(int)
    particle_set = replace(particle_set, fold=fold)
    noise = jnp.asarray(random.uniform(1, 3, (GROUPS, N // 2 + 1)), jnp.float32)
    return particle_set, hypotheses, noise, random.uniform(size=P) > 0.1


@pytest.mark.parametrize("side", [None, 12])
def test_lanes_of_batches_are_the_sum_of_all(side, monkeypatch):
    """As one call with all images of a fold at all their poses makes it."""
    particle_set, hypotheses, noise, included = scene()
    monkeypatch.setattr(insertion, "_ROUND", 8)
    found = insertion.sum_up(particle_set, hypotheses, noise, included, side)
    n = N if side is None else side
    particles = particle_set.particles
    view = observation.view(particles, (n - 1) // 2, noise)
    weights = np.asarray(hypotheses.weights)
    for fold in range(FOLDS):
        here = included & (particle_set.fold == fold)
        owners, columns = np.nonzero(here[:, None] & (weights > 0.01))
        images, ctf = particles.batch(owners)
        group = jnp.asarray(particles.group_of(owners))
        weight = jnp.asarray(weights[owners, columns])
        exact = sums.insert(
            Finufft(),
            view.disc,
            view.spectra(jnp.asarray(images), group),
            Poses(
                hypotheses.rotations[owners, columns],
                hypotheses.shifts[owners, columns],
            ),
            view.transfer(ctf, group),
            weight[:, None] * view.inverse_noise[None],
            n,
        )
        for value, expected in zip(
            jax.tree.leaves(found[fold]), jax.tree.leaves(exact), strict=True
        ):
            assert value.shape == expected.shape
            assert relative_error(value, expected) < 2e-4  # finufft's own is 1e-4


def test_without_images_the_sums_are_empty():
    particle_set, hypotheses, noise, _ = scene()
    found = insertion.sum_up(particle_set, hypotheses, noise, np.zeros(P, bool))
    for leaf in jax.tree.leaves(found):
        assert not np.any(leaf)


def test_one_fold_may_be_empty():
    particle_set, hypotheses, noise, _ = scene()
    some = particle_set.fold == 1
    first, second = insertion.sum_up(particle_set, hypotheses, noise, some)
    _, both = insertion.sum_up(particle_set, hypotheses, noise, np.ones(P, bool))
    assert float(first.peak) == 0.0
    assert relative_error(second.backprojection, both.backprojection) < 1e-6


def test_a_pairwise_sum_has_the_bits_of_its_halves_and_quarters():
    """Numbers of very different size, so that the order of additions matters."""
    random = np.random.default_rng(1)
    sizes = 10.0 ** random.integers(-6, 6, (8, 1, 1, 1))
    values = jnp.asarray(sizes * random.normal(size=(8, 3, 3, 3)), jnp.float32)
    each = [sums.Sums(value, value[:2, :2, :2]) for value in values]
    whole = insertion.pairwise_sum(each)
    for size in (1, 2, 4):
        parts = [insertion.pairwise_sum(each[i : i + size]) for i in range(0, 8, size)]
        again = insertion.pairwise_sum(parts)
        for leaf, expected in zip(
            jax.tree.leaves(again), jax.tree.leaves(whole), strict=True
        ):
            np.testing.assert_array_equal(leaf, expected)
    exact = np.sum(np.asarray(values, float), axis=0)
    np.testing.assert_allclose(whole.kernel, exact, rtol=1e-4, atol=1e-5)
    in_turn = sum(values[1:], values[0])
    assert np.any(np.asarray(in_turn) != np.asarray(whole.kernel))


ON_DEVICES = """
import test_insertion
from jaxrefine.refinement import insertion
insertion._ROUND = int(sys.argv[1])
found = insertion.sum_up(*test_insertion.scene())
"""


@pytest.mark.slow
@pytest.mark.parametrize("size", [8, 4096])
def test_devices_change_no_bit(size):
    """Also three of them, of which two are used, and batches that are not full."""
    counts = (1, 2, 3, 4, 8)
    digests = {digest_on(count, __file__, ON_DEVICES, size) for count in counts}
    assert len(digests) == 1
