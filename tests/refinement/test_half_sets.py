"""What brings two sets together, where the map is symmetric."""

import dataclasses

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrefine import simulate, symmetry
from jaxrefine.data.particles import Particles
from jaxrefine.geometry import (
    Poses,
    matrix_to_rotvec,
    rotvec_to_matrix,
)
from jaxrefine.maps import admm, align
from jaxrefine.maps.fsc import fsc
from jaxrefine.operators import slices
from jaxrefine.operators.gridding import Gridding
from jaxrefine.refinement import half_sets, map_step
from jaxrefine.refinement.config import RefineConfig
from jaxrefine.refinement.sets import make_particle_set

N, COUNT = 24, 8
TURN, OFFSET = jnp.array([0.05, -0.04, 0.06]), jnp.array([0.4, 0.3, -0.5])


def state_of(whole, start, volume):
    """The first state of a set, whose folds' maps are both a given one."""
    maps = admm.init(volume), admm.init(volume)
    return eqx.tree_at(lambda s: s.maps, map_step.start(whole, start), maps)


@pytest.mark.parametrize(
    ("group", "free"),
    [("C1", (1, 1, 1)), ("C3", (0, 0, 1)), ("D2", (0, 0, 0)), ("I", (0, 0, 0))],
)
def test_a_symmetric_map_stays_on_its_axes(group, free):
    """What is kept of a motion commutes with the group; without one all is kept."""
    operators = symmetry.operators(group)
    rotation, translation = half_sets.on_axes(rotvec_to_matrix(TURN), OFFSET, operators)
    kept = jnp.asarray(free, float)
    np.testing.assert_allclose(matrix_to_rotvec(rotation), kept * TURN, atol=1e-12)
    np.testing.assert_allclose(translation, kept * OFFSET, atol=1e-12)
    for operator in operators:
        np.testing.assert_allclose(rotation @ operator, operator @ rotation, atol=1e-12)
        np.testing.assert_allclose(operator @ translation, translation, atol=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("fixed", [None, "angle", "shift"])
def test_a_set_that_drifted_is_brought_back(fixed):
    """Map and poses together, so that projections stay; but not what is fixed."""
    volume = simulate.blur(simulate.phantom(jax.random.key(0), N), 1.0)
    turn = jnp.asarray(np.asarray(TURN) * (fixed != "angle"), jnp.float32)
    offset = jnp.asarray(np.asarray(OFFSET) * (fixed != "shift"), jnp.float32)
    drifted = align.move_map(volume, rotvec_to_matrix(turn), offset)
    rotations = simulate.equidistributed_rotations(
        jax.random.key(1), COUNT, jnp.float32
    )
    poses = Poses(
        rotations, simulate.random_shifts(jax.random.key(2), COUNT, 1.0, jnp.float32)
    )
    limits = {} if fixed is None else {f"max_{fixed}": 0.0}
    images = np.zeros((COUNT, N, N), np.float32)
    whole = make_particle_set(
        Particles(images),
        poses,
        jax.random.key(3),
        dataclasses.replace(RefineConfig(), **limits),
    )
    here, there = (state_of(whole, volume, one) for one in (volume, drifted))
    back = half_sets.turned(there, here, whole)
    band = slice(1, N // 2 - 1)
    before, after = (fsc(volume, one.mean_map)[band] for one in (there, back))
    assert float(jnp.min(before)) < 0.95
    assert float(jnp.min(after)) > 0.999
    np.testing.assert_allclose(
        half_sets.correlation(here, there, whole)[band], after, atol=1e-6
    )
    disc = slices.disc(N, 8)
    old, new = (
        slices.project(
            Gridding().spectrum(one.mean_map, 8), disc, one.hypotheses.best()
        )
        for one in (there, back)
    )
    assert float(jnp.linalg.norm(new - old) / jnp.linalg.norm(old)) < 0.01
    kept = {"angle": "rotations", "shift": "shifts"}
    for what, name in kept.items():
        one, other = (getattr(each.hypotheses, name) for each in (there, back))
        assert bool((one == other).all()) == (what == fixed)


@pytest.mark.slow
def test_sets_that_ended_in_other_copies_are_brought_together():
    """Poses that are known up to a group give either set a copy of its own."""
    single = jnp.float32
    volume = simulate.blur(simulate.phantom(jax.random.key(0), N), 1.0)
    operator = jnp.asarray(symmetry.operators("C4")[3], single)
    turn = operator @ rotvec_to_matrix(TURN.astype(single))
    drifted = align.move_map(volume, turn, OFFSET.astype(single))
    poses = Poses(
        simulate.equidistributed_rotations(jax.random.key(1), COUNT, single),
        jnp.zeros((COUNT, 2), single),
    )
    images = np.zeros((COUNT, N, N), np.float32)
    config = RefineConfig(symmetry_relax="C4")
    whole = make_particle_set(Particles(images), poses, jax.random.key(3), config)
    here, there = (state_of(whole, volume, one) for one in (volume, drifted))
    back = half_sets.turned(there, here, whole)
    band = slice(1, N // 2 - 1)
    assert float(jnp.min(fsc(volume, back.mean_map)[band])) > 0.999
    assert float(jnp.min(half_sets.correlation(here, there, whole)[band])) > 0.999
    turned = there.hypotheses.best().rotations @ turn.T
    # The motion that brings the set back is the inverse of the one that it made.
    np.testing.assert_allclose(back.hypotheses.best().rotations, turned, atol=1e-3)


@pytest.mark.slow
def test_no_pose_leaves_its_limits():
    """A particle at its limit stays there when its set is turned."""
    volume = simulate.blur(simulate.phantom(jax.random.key(0), N), 1.0)
    single = jnp.float32
    drifted = align.move_map(
        volume, rotvec_to_matrix(TURN.astype(single)), OFFSET.astype(single)
    )
    poses = Poses(
        jnp.tile(jnp.eye(3, dtype=single), (COUNT, 1, 1)), jnp.zeros((COUNT, 2), single)
    )
    config = RefineConfig(max_angle=0.02, max_shift=0.1)
    images = np.zeros((COUNT, N, N), np.float32)
    whole = make_particle_set(Particles(images), poses, jax.random.key(3), config)
    here, there = (map_step.start(whole, volume) for _ in range(2))
    maps = (admm.init(drifted), admm.init(drifted))
    here = eqx.tree_at(lambda s: s.maps, here, (admm.init(volume), admm.init(volume)))
    there = eqx.tree_at(lambda s: s.maps, there, maps)
    best = half_sets.turned(there, here, whole).hypotheses.best()
    angle = jnp.linalg.norm(matrix_to_rotvec(best.rotations), axis=-1)
    np.testing.assert_allclose(angle, 0.02, rtol=1e-3)
    np.testing.assert_allclose(jnp.linalg.norm(best.shifts, axis=-1), 0.1, rtol=1e-3)
