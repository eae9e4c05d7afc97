"""The schedule of band limits."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import COARSE

from jaxrefine import refine, simulate
from jaxrefine.data.particles import Particles
from jaxrefine.geometry import Poses
from jaxrefine.maps import folds
from jaxrefine.maps.fsc import fsc
from jaxrefine.operators import slices
from jaxrefine.refinement import half_sets, insertion, map_step, schedule
from jaxrefine.refinement.config import RefineConfig
from jaxrefine.refinement.sets import make_particle_set


def dataset_of(truth, count, snr_db=10.0):
    """Images of a map, and poses to start from."""
    return simulate.make_dataset(
        jax.random.key(1),
        truth,
        count,
        max_shift=1.0,
        max_angle_error=0.2,
        snr_db=snr_db,
        project=simulate.slice_projector(truth),
    )


def test_the_largest_band_limit_is_kept():
    count, side = 8, 24
    images = np.zeros((count, side, side), np.float32)
    poses = Poses(jnp.tile(jnp.eye(3), (count, 1, 1)), jnp.zeros((count, 2)))
    for most, expected in ((None, 8), (7, 6), (11, 8)):
        config = RefineConfig(first_r_max=4, max_r_max=most)
        particle_set = make_particle_set(
            Particles(images), poses, jax.random.key(0), config
        )
        reached = schedule.next_band_limit(4, 11.0, particle_set)
        assert reached == slices.bucket(expected, side), (most, reached)


@pytest.mark.parametrize("size", [16, 64, 95, 96, 127, 128, 200, 256, 360])
def test_a_smaller_map_holds_the_next_band(size):
    """Whatever the next band limit turns out to be; and it is worth while."""
    config = RefineConfig()
    for r_max in range(1, (size - 1) // 2 + 1):
        side = schedule.map_side(0, r_max, size, config)
        assert side == size or (size >= 96 and 2 * side <= size)
        assert (side - 1) // 2 > min(2 * r_max, (size - 1) // 2) or side == size
    assert (schedule.map_side(0, 7, size, config) < size) == (size >= 96)


def test_only_maps_that_others_follow_for_certain_are_smaller():
    config = RefineConfig(multi_start=(0, 2), iterations=8)
    for iterations, small in ((8, [0, 1, 2]), (3, [0, 1]), (1, [])):
        config = dataclasses.replace(config, iterations=iterations)
        sides = [schedule.map_side(i, 7, 128, config) for i in range(-1, 9)]
        assert [i - 1 for i, side in enumerate(sides) if side < 128] == small
    config = dataclasses.replace(config, multi_start=(), iterations=8)
    assert schedule.map_side(0, 7, 128, config) == 128


@pytest.mark.parametrize("n", [48, 49])
def test_maps_of_fewer_voxels_are_as_good(n):
    """In the shells that they have; in the others they are empty, and known to be."""
    side = 24
    truth = simulate.phantom(jax.random.key(0), n)
    dataset = simulate.make_dataset(
        jax.random.key(1),
        truth,
        60,
        max_shift=1.0,
        max_angle_error=0.0,
        snr_db=0.0,
        project=simulate.slice_projector(truth),
    )
    everyone = np.ones(60, bool)
    config = RefineConfig()
    particle_set = make_particle_set(
        Particles(np.asarray(dataset.images)), dataset.truth, jax.random.key(2), config
    )
    start = map_step.start(particle_set, simulate.blur(truth, 3.0))
    scores = {}
    for each in (side, n):
        sums = insertion.sum_up(
            particle_set, start.hypotheses, start.noise, everyone, each
        )
        state = map_step.update_maps(particle_set, start, folds.folds(sums))
        state = map_step.assess(particle_set, state, everyone, each)
        scores[each] = np.asarray(fsc(state.mean_map, truth))
        if each == side:
            assert not np.any(state.fold_fsc[side // 2 :])
            assert not np.any(state.gain[side // 2 :])
            level = (float(dataset.sigma) * n) ** 2
            np.testing.assert_allclose(state.noise[0, side // 2 :], level, rtol=0.2)
    low = slice(1, side // 2 - 1)
    assert np.mean(scores[side][low]) > np.mean(scores[n][low]) - 0.01
    assert np.mean(scores[n][low]) > 0.9


@pytest.mark.slow
def test_a_run_does_not_end_with_larger_voxels(monkeypatch):
    """Nor does its score: both are as if all maps had had all voxels.

    The band limit is held so low that every map could have been small. A run that is
    interrupted after such a map ends in the same bits.
    """
    n, count = 48, 80
    half = simulate.phantom(jax.random.key(0), n)
    truth = (half + jnp.roll(half[:, ::-1, ::-1], 1, axis=(1, 2))) / 2
    dataset = dataset_of(truth, count)
    particles = Particles(np.asarray(dataset.images))
    config = dataclasses.replace(
        COARSE,
        half_sets=True,
        max_r_max=5,
        first_r_max=5,
        iterations=4,
        tau=1.0,
        symmetry="C2",
    )
    given = particles, dataset.initial, simulate.blur(truth, 3.0), config
    sides, outcomes = [], {}
    original = schedule.map_side

    def seen(*words):
        sides.append(original(*words))
        return sides[-1]

    monkeypatch.setattr(schedule, "map_side", seen)
    for least in (16, 96):
        sides.clear()
        monkeypatch.setattr(schedule, "_LEAST_TO_CROP", least)
        rows = []
        result = refine(
            *given,
            key=jax.random.key(2),
            callback=lambda state, info, rows=rows: rows.append((state, info)),
        )
        assert (min(sides) < n) == (least == 16)
        assert len(rows) > config.last_multi_start + 1
        outcomes[least] = result, rows
        if least == 16:
            resumed = refine(*given, key=jax.random.key(2), state=rows[1][0])
            np.testing.assert_array_equal(resumed.volume, result.volume)
    (small, few), (whole, many) = outcomes[16], outcomes[96]
    noise = [np.asarray(each[-1][0].set_states[0].noise) for each in (few, many)]
    np.testing.assert_allclose(noise[0][0, 1:23], noise[1][0, 1:23], rtol=0.1)
    scores = [each[-1][1].gold_score for each in (few, many)]
    assert abs(scores[0] - scores[1]) < 0.02
    # The last small maps lack shells; the first whole ones are kept in any case.
    correlation = few[config.last_multi_start][0].correlation
    assert np.any(correlation) and not np.any(correlation[12:])
    assert few[config.last_multi_start + 1][1].is_kept
    gap = fsc(jnp.asarray(small.volume), truth) - fsc(jnp.asarray(whole.volume), truth)
    assert abs(float(jnp.mean(gap[1:]))) < 0.01


@pytest.mark.slow
def test_small_maps_set_no_score_that_whole_ones_must_exceed(monkeypatch):
    """Here half sets disagree in the shells that small maps lack."""
    n, count, key = 32, 40, jax.random.key(0)
    truth = simulate.phantom(key, n)
    dataset = dataset_of(truth, count)
    config = dataclasses.replace(
        COARSE,
        half_sets=True,
        max_r_max=3,
        first_r_max=3,
        search_r_max=3,
        iterations=4,
        multi_start=(0,),
        candidates=16,
        tau=1.0,
    )
    curve = np.where(np.arange(n // 2 + 1) < 8, 0.5, -0.2)
    monkeypatch.setattr(half_sets, "correlation", lambda *_: curve)
    monkeypatch.setattr(schedule, "_LEAST_TO_CROP", 16)
    rows, particles = [], Particles(np.asarray(dataset.images))
    result = refine(
        particles,
        dataset.initial,
        simulate.blur(truth, 3.0),
        config,
        key=key,
        callback=lambda state, info: rows.append(info),
    )
    # The third maps agree as well as the second ones, which ends the run.
    small, whole, same = (info.gold_score for info in rows)
    assert small > whole == same
    assert all(info.is_kept for info in rows)
    np.testing.assert_allclose(result.state.correlation[8:], curve[8:], rtol=1e-6)


@pytest.mark.slow
def test_half_sets_decide_the_band_limit():
    """Where noise is strong, the folds would have it grow farther."""
    n, count, first = 24, 60, 4
    truth = simulate.phantom(jax.random.key(0), n)
    dataset = dataset_of(truth, count, snr_db=-6.0)
    config = dataclasses.replace(
        COARSE,
        half_sets=True,
        first_r_max=first,
        search_r_max=first,
        iterations=3,
        multi_start=(0,),
        candidates=16,
        tau=1.0,
    )
    key, seen = jax.random.key(2), []
    particles = Particles(np.asarray(dataset.images))
    result = refine(
        particles,
        dataset.initial,
        simulate.blur(truth, 2.0),
        config,
        key=key,
        callback=lambda *each: seen.append(each),
    )
    either = make_particle_set(particles, dataset.initial, key, config)

    def limit(r_max, curve):
        supported = schedule.supported(np.asarray(curve), config, either.last_shell)
        return schedule.next_band_limit(r_max, supported, either)

    of_folds = []
    for (before, _), (_, info) in itertools.pairwise(seen):
        assert info.r_max == limit(int(before.r_max), before.correlation)
        curve = np.mean([each.fold_fsc for each in before.set_states], axis=0)
        of_folds.append(limit(int(before.r_max), curve))
    assert of_folds != [info.r_max for _, info in seen[1:]]
    # What is reported of it is no finer than where poses were compared.
    supported = schedule.supported(
        np.asarray(result.state.correlation), config, either.last_shell
    )
    assert result.informed_up_to == min(int(supported), int(result.state.r_max))
