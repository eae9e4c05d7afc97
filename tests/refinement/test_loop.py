"""The production refinement, end to end on a tiny particle: one shape, many laws.

They share a whole run, a reconstruction and a run of half sets; what needs none of
these is in the files of the single modules.
"""

import dataclasses
import itertools
import json

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import COARSE, digest_on

from jaxrefine import evaluation, simulate
from jaxrefine.data.particles import Particles
from jaxrefine.geometry import (
    Poses,
    rotvec_to_matrix,
)
from jaxrefine.io import load_checkpoint, save_checkpoint
from jaxrefine.maps import tv
from jaxrefine.maps.fsc import fsc, mean_fsc
from jaxrefine.operators import slices
from jaxrefine.operators.gridding import Gridding
from jaxrefine.poses.hypotheses import certain
from jaxrefine.poses.presence import LEAST_EVIDENCE
from jaxrefine.poses.solvers import Descent, Estimate
from jaxrefine.refinement import (
    half_sets,
    insertion,
    loop,
    map_step,
    pose_step,
    reconstruction,
    schedule,
)
from jaxrefine.refinement.sets import divide, make_particle_set

pytestmark = pytest.mark.slow

N, P, LAST = 24, 80, 11
ZEROS, CONSTANT, NOISE = 3, 10, 41  # particles without a particle
SILENT = [ZEROS, CONSTANT, NOISE]
SINGLE = jnp.float32
KEY = jax.random.key(3)
# One band limit and coarse interpolation, so that little is compiled, and once.
CONFIG = dataclasses.replace(
    COARSE,
    angle_spread=0.3,
    shift_spread=1.2,
    iterations=3,
    first_r_max=LAST,
    search_r_max=LAST,
    candidates=16,
    batch_size=64,
)


class Scene:
    """A phantom, its images with a few bad ones among them, and a start."""

    def __init__(self, snr_db=3.0):
        self.truth = simulate.phantom(jax.random.key(0), N)
        angles, shifts, noise, error = jax.random.split(jax.random.key(1), 4)
        self.poses = Poses(
            simulate.equidistributed_rotations(angles, P, SINGLE),
            simulate.random_shifts(shifts, P, 1.5, SINGLE),
        )
        disc = slices.disc(N, LAST)
        spectrum = Gridding(4, 2.0).spectrum(self.truth, LAST)
        clean = slices.to_images(slices.project(spectrum, disc, self.poses), disc)
        sigma = simulate.noise_std(clean, snr_db)
        self.images = np.array(simulate.add_noise(noise, clean, sigma), np.float32)
        self.images[ZEROS], self.images[CONSTANT] = 0.0, 5.0
        self.images[NOISE] = float(sigma) * np.random.default_rng(0).normal(size=(N, N))
        self.initial = simulate.init1_poses(error, self.poses, 0.4)
        self.map = simulate.blur(self.truth, 2.0)
        self.real = np.setdiff1d(np.arange(P), SILENT)

    def refine(self, config=CONFIG, images=None, **options):
        images = self.images if images is None else images
        particles = Particles(images)
        return loop.refine(
            particles, self.initial, self.map, config, key=KEY, **options
        )

    def fsc(self, volume):
        return float(mean_fsc(fsc(jnp.asarray(volume), self.truth)))

    def errors(self, poses):
        """The errors of the real particles, up to a motion of the map."""
        truth, some = self.poses, self.real
        errors = evaluation.pose_errors(poses.take(some), truth.take(some))
        return evaluation.summarise(errors)


@pytest.fixture(scope="module")
def scene():
    return Scene()


@pytest.fixture(scope="module")
def run(scene):
    """A whole run, and what its callback saw."""
    seen = []
    result = scene.refine(callback=lambda state, info: seen.append((state, info)))
    return result, seen


@pytest.fixture(scope="module")
def unrefined(scene):
    particles = Particles(scene.images)
    return reconstruction.reconstruct(particles, scene.initial, CONFIG, key=KEY)


@pytest.fixture(scope="module")
def oracle(scene):
    some = scene.real
    particles = Particles(scene.images).take(some)
    poses = scene.poses.take(some)
    return reconstruction.reconstruct(particles, poses, CONFIG, key=KEY)


def assert_identical(a, b):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(x, y)


def outcome(result):
    """All arrays of a result."""
    return {
        field.name: getattr(result, field.name) for field in dataclasses.fields(result)
    }


# --- that it refines


def test_poses_and_map_improve(scene, run, unrefined):
    result, _ = run
    before, after = scene.errors(scene.initial), scene.errors(result.poses)
    assert before["angle_error_in_degrees_median"] > 15
    assert after["angle_error_in_degrees_median"] < 5
    assert after["fraction_within_10_degrees"] > 0.9
    assert after["shift_error_in_pixels_median"] < 0.3
    assert scene.fsc(result.volume) > scene.fsc(unrefined.volume) + 0.2
    assert scene.fsc(result.volume) > scene.fsc(scene.map) + 0.05


def test_the_true_poses_make_a_better_map(scene, run, unrefined, oracle):
    """Than the initial map, than wrong poses, and than refined ones (nearly)."""
    best = scene.fsc(oracle.volume)
    assert best > scene.fsc(scene.map) + 0.05
    assert best > scene.fsc(unrefined.volume) + 0.2
    assert best > scene.fsc(run[0].volume) - 0.02
    first, second = oracle.half_maps
    assert first.shape == second.shape == (N, N, N)
    # Halves are worse than the whole, and differ.
    assert 0.3 < max(scene.fsc(first), scene.fsc(second)) < best
    assert not np.array_equal(first, second)
    assert oracle.errors and oracle.lam > 0
    tried = min(oracle.errors, key=oracle.errors.__getitem__)
    assert 1 / 1.4 <= oracle.tau / tried <= 1.4


def test_the_background_does_not_matter(scene, oracle):
    """An offset of every image says nothing, be it zero mean or many sigmas."""
    some = scene.real
    poses = scene.poses.take(some)
    images = scene.images[some]
    mean = images.mean(axis=(1, 2), keepdims=True)
    for offset in (-mean, 10 * images.std()):
        particles = Particles(images + offset)
        again = reconstruction.reconstruct(particles, poses, CONFIG, key=KEY)
        assert scene.fsc(again.volume) == pytest.approx(
            scene.fsc(oracle.volume), abs=0.01
        )
        assert again.tau == pytest.approx(oracle.tau, rel=0.05)


@pytest.mark.parametrize("end", [LAST - 3, 4])
def test_shells_that_are_empty_are_ignored(scene, oracle, end):
    """Images cut off below Nyquist make a map cut off there, and no other.

    Most shells may be empty; the noise is measured in the others.
    """
    some = scene.real
    poses = scene.poses.take(some)
    disc = slices.disc(N, end)
    spectra = slices.image_spectra(jnp.asarray(scene.images[some]), disc)
    images = np.asarray(slices.to_images(spectra, disc))
    again = reconstruction.reconstruct(Particles(images), poses, CONFIG, key=KEY)
    kept = slice(1, end)
    before, after = (
        np.asarray(fsc(jnp.asarray(x.volume), scene.truth))[kept]
        for x in (oracle, again)
    )
    np.testing.assert_allclose(after, before, atol=0.05)


def test_reconstruct_respects_subsets(scene):
    """The first half map is made of the first half, and of nothing else."""
    some = scene.real
    poses = scene.poses.take(some)
    subsets = 1 + (np.arange(len(some)) < len(some) // 3)
    images = scene.images[some]
    maps = []
    for factor in (1.0, 0.0):
        scale = np.where(subsets == 2, factor, 1.0).astype(np.float32)
        made = reconstruction.reconstruct(
            Particles(images * scale[:, None, None]),
            poses,
            dataclasses.replace(CONFIG, tau=1.0),
            key=KEY,
            subsets=subsets,
        )
        maps.append(made.half_maps)
    assert np.abs(maps[1][1]).max() < 1e-3 * np.abs(maps[0][1]).max()
    assert scene.fsc(maps[1][0]) > 0.5


def test_images_that_show_nothing(scene, run):
    """Zeros, a constant and noise end where they began, and are told apart."""
    result, _ = run
    assert list(np.flatnonzero(result.undetermined)) == SILENT
    np.testing.assert_array_equal(
        result.poses.rotations[np.array(SILENT)],
        scene.initial.rotations[np.array(SILENT)],
    )
    np.testing.assert_array_equal(
        result.poses.shifts[np.array(SILENT)], scene.initial.shifts[np.array(SILENT)]
    )
    assert (result.log_likelihood[SILENT] <= 0).all()
    assert (result.log_likelihood[scene.real] > LEAST_EVIDENCE).all()
    for leaf in jax.tree.leaves(outcome(result)):
        assert not np.isnan(leaf).any()
    assert np.isfinite(result.volume).all()
    np.linalg.cholesky(result.covariances.astype(float))  # positive definite
    changed = np.asarray(result.poses.rotations != scene.initial.rotations)
    assert changed[scene.real].all(axis=(1, 2)).mean() > 0.9


def test_poses_stay_in_their_bounds(scene, run):
    result, _ = run
    moves = np.asarray(result.poses.shifts) - np.asarray(scene.initial.shifts)
    assert np.linalg.norm(moves, axis=1).max() <= CONFIG.max_shift * (1 + 1e-5)
    config = dataclasses.replace(
        CONFIG, iterations=1, max_angle=0.1, max_shift=0.3, tau=1.0
    )
    result = scene.refine(config)
    rotations, start = (
        np.asarray(poses.rotations, float) for poses in (result.poses, scene.initial)
    )
    trace = np.einsum("pij,pij->p", rotations, start)
    assert np.arccos(np.clip((trace - 1) / 2, -1, 1)).max() < 0.1 + 1e-3
    moves = np.asarray(result.poses.shifts) - np.asarray(scene.initial.shifts)
    assert np.linalg.norm(moves, axis=1).max() <= 0.3 * (1 + 1e-5)


@pytest.mark.parametrize("factor", [1e-3, 1.0, 1e3])
def test_the_scale_of_the_initial_map_does_not_matter(scene, factor):
    """It is given that of the images, whatever it was; an empty map stays empty."""
    whole = make_particle_set(Particles(scene.images), scene.initial, KEY, CONFIG)
    known = [
        map_step.start(whole, scene.map * jnp.asarray(f, SINGLE))
        for f in (1.0, factor, 0.0)
    ]
    maps = [np.asarray(one.maps[0].coefficients * one.gain[0]) for one in known]
    peak = float(scene.truth.max())
    np.testing.assert_allclose(maps[1], maps[0], atol=1e-4 * peak)
    np.testing.assert_array_equal(maps[2], 0)
    # The images are projections of the truth: so is the blurred map's low end.
    low = np.abs(np.fft.rfftn(maps[0]))[0, 0, 1:3] / np.abs(
        np.fft.rfftn(scene.map)[0, 0, 1:3]
    )
    assert (np.abs(np.log(low)) < np.log(1.6)).all()


# --- what a callback gets


def test_the_callback_is_told_everything(run):
    result, seen = run
    assert [info.iteration for _, info in seen] == [1, 2, 3]
    assert [int(state.iteration) for state, _ in seen] == [1, 2, 3]
    radii = [info.r_max for _, info in seen]
    assert radii == sorted(radii) and radii[-1] <= LAST
    for _, info in seen:
        row = json.loads(json.dumps(info.row(), allow_nan=False))
        assert row == info.row()
        assert set(row) == {field.name for field in dataclasses.fields(info)}
        assert row["evaluations"] >= 1 and 0 <= row["decided"] <= 1
        assert row["gold_score"] is None and len(row["tau"]) == 1
        assert 0 < row["fold_score"] < 1
    assert seen[0][1].searched == seen[2][1].searched == P
    changes = [info.angle_change_in_degrees for _, info in seen]
    assert changes[0] > 3 * changes[-1]
    scores = [info.fold_score for _, info in seen]
    assert scores[-1] > scores[0]


def test_the_state_is_consistent(run):
    """Weights are probabilities; the best hypothesis is the first one."""
    for state, _ in run[1]:
        (one,) = state.set_states
        weights = np.asarray(one.hypotheses.weights)
        np.testing.assert_allclose(weights.sum(axis=1), 1, rtol=1e-5)
        assert (np.diff(weights, axis=1) <= 0).all()
        assert (one.noise > 0).all() and (one.gain >= 0).all()
        assert np.isfinite(one.evidence).all()


# --- that it repeats itself


def test_the_same_input_from_a_file_gives_the_same_bits(scene, run, tmp_path):
    """A memory map instead of an array, and a run from the start."""
    path = tmp_path / "images.raw"
    scene.images.tofile(path)
    images = np.memmap(path, np.float32, "r", shape=scene.images.shape)
    assert_identical(outcome(scene.refine(images=images)), outcome(run[0]))


@pytest.mark.parametrize("after", [1, 2])
def test_an_interrupted_run_ends_in_the_same_bits(scene, run, after, tmp_path):
    result, seen = run
    save_checkpoint(tmp_path / "state", seen[after - 1][0], {})
    like = jax.tree.map(jnp.zeros_like, seen[0][0])
    state, _ = load_checkpoint(tmp_path / "state", like)
    resumed = []
    again = scene.refine(
        state=state, callback=lambda state, info: resumed.append(info.iteration)
    )
    assert resumed == list(range(after + 1, 4))
    assert_identical(outcome(again), outcome(result))


def test_a_finished_run_is_only_concluded(scene, run):
    def never(state, info):
        raise AssertionError("nothing is left to do")

    result, seen = run
    again = scene.refine(state=seen[-1][0], callback=never)
    assert_identical(outcome(again), outcome(result))


def many(scene, batch_size):
    """Refine four times as many particles, of which a fold has three blocks."""
    four = Poses(
        jnp.tile(scene.initial.rotations, (4, 1, 1)),
        jnp.tile(scene.initial.shifts, (4, 1)),
    )
    noise = np.random.default_rng(9).normal(size=(4 * P, N, N)) * scene.images.std()
    images = (np.tile(scene.images, (4, 1, 1)) + noise).astype(np.float32)
    config = dataclasses.replace(CONFIG, iterations=2, batch_size=batch_size)
    return loop.refine(Particles(images), four, scene.map, config, key=KEY)


def test_the_batch_size_does_not_matter(scene):
    """Not a bit, whether blocks are visited in twos or all at once."""
    in_twos, at_once = (outcome(many(scene, size)) for size in (1, 1000))
    assert_identical(in_twos, at_once)


ON_DEVICES = """
import test_loop
scene = test_loop.Scene()
scene.images, scene.map = (np.load(path) for path in sys.argv[2:])
scene.map = test_loop.jnp.asarray(scene.map)
found = test_loop.outcome(test_loop.many(scene, int(sys.argv[1])))
"""


@pytest.mark.skipif(
    jax.__version_info__ >= (0, 12),
    reason="sums on one device depend on the number of threads, seen with JAX 0.12",
)
def test_the_devices_do_not_matter(scene, tmp_path):
    """Not a bit of a whole refinement, on one and two of them.

    Of the three blocks of a fold one of the two has two, and the other one.
    All have the same images and map, whose simulation may depend on the devices.
    """
    data = [tmp_path / "images.npy", tmp_path / "map.npy"]
    for path, array in zip(data, (scene.images, scene.map), strict=True):
        np.save(path, np.asarray(array))
    digests = {
        digest_on(devices, __file__, ON_DEVICES, batch_size, *data)
        for devices, batch_size in ((1, 64), (2, 1000))
    }
    assert len(digests) == 1


# --- half sets

SUBSETS = 1 + np.arange(P) % 2
HALVES = dataclasses.replace(CONFIG, iterations=2, half_sets=True, tau=0.9)


@pytest.fixture(scope="module")
def halves(scene):
    seen = []
    result = scene.refine(
        HALVES, subsets=SUBSETS, callback=lambda state, info: seen.append(info)
    )
    return result, seen


def test_half_sets_have_maps_and_a_correlation(scene, halves):
    result, seen = halves
    first, second = result.half_maps
    curve = fsc(jnp.asarray(first), jnp.asarray(second))
    np.testing.assert_array_equal(result.fsc, curve)
    assert 0.3 < np.mean(result.fsc[1:8]) < 1
    assert scene.fsc(result.volume) > max(scene.fsc(first), scene.fsc(second))
    # They have no regulariser, unlike the maps that the poses were compared with.
    smooth, rough = (
        float(jnp.sum(jnp.linalg.norm(tv.gradient(jnp.asarray(volume)), axis=0)))
        for volume in (result.state.set_states[0].mean_map, first)
    )
    assert rough > 1.5 * smooth
    assert result.tau == pytest.approx(0.9, rel=1e-6)
    for info in seen:
        assert len(info.tau) == 2 and 0 < info.gold_score < 1
        json.dumps(info.row(), allow_nan=False)


def test_half_sets_know_nothing_of_each_other(scene, halves):
    """Nothing but noise in set 2: set 1's poses, map and error bars keep their bits.

    (They share a band limit, which is at its largest here, and whether an iteration is
    kept, as the first ones always are.)
    """
    images = scene.images.copy()
    of_noise = images[SUBSETS == 2]
    noise = np.random.default_rng(4).normal(size=of_noise.shape) * of_noise.std()
    images[SUBSETS == 2] = noise.astype(np.float32)
    result, first = scene.refine(HALVES, images=images, subsets=SUBSETS), SUBSETS == 1
    for name in ("covariances", "log_likelihood", "undetermined"):
        np.testing.assert_array_equal(
            getattr(result, name)[first], getattr(halves[0], name)[first]
        )
    assert_identical(
        jax.tree.map(lambda leaf: leaf[first], result.poses),
        jax.tree.map(lambda leaf: leaf[first], halves[0].poses),
    )
    np.testing.assert_array_equal(result.half_maps[0], halves[0].half_maps[0])
    assert_identical(result.state.set_states[0], halves[0].state.set_states[0])
    assert np.abs(result.half_maps[1] - halves[0].half_maps[1]).max() > 0.01


def test_a_refinement_that_is_carried_on_does_not_get_worse():
    """What half sets agree less after is not kept, and all is as before it.

    Without the score of half sets, the map of so few and noisy images loses 0.05.
    """
    noisy = Scene(snr_db=-6.0)
    config = dataclasses.replace(HALVES, iterations=20)
    seen, state, results = [], None, []
    while len(seen) < config.iterations:
        results.append(
            noisy.refine(
                config,
                subsets=SUBSETS,
                state=state,
                callback=lambda *each: seen.append(each),
            )
        )
        state = eqx.tree_at(lambda s: s.finished, seen[-1][0], jnp.asarray(False))
    kept = [info.is_kept for _, info in seen]
    assert all(kept[: config.last_multi_start + 1]) and not all(kept)
    scores = [info.gold_score for _, info in seen if info.is_kept]
    late = scores[config.last_multi_start :]
    assert late == sorted(late)
    for (before, _), (after, info) in itertools.pairwise(seen):
        if not info.is_kept:
            assert bool(after.finished) and after.r_max == before.r_max
            assert_identical(after.set_states, before.set_states)
    truths = [noisy.fsc(state.volume) for state, _ in seen]
    assert truths[-1] > max(truths) - 0.005
    ended = next(i for i, (state, _) in enumerate(seen) if state.finished)
    again = noisy.refine(config, subsets=SUBSETS, state=seen[ended - 1][0])
    assert_identical(outcome(again), outcome(results[0]))


def test_subsets_are_respected(scene, halves):
    """Sets are who they are said to be; without labels they are two halves."""
    sizes = [len(one.evidence) for one in halves[0].state.set_states]
    assert sizes == [P // 2, P // 2]
    uneven = np.where(np.arange(P) < 20, 2, 1)

    def deal(config, subsets):
        particles = Particles(scene.images)
        return divide(particles, scene.initial, config, KEY, subsets)[1]

    for subsets, expected in ((uneven, [60, 20]), (None, [40, 40])):
        particle_sets = deal(HALVES, subsets)
        assert [len(particle_set) for particle_set in particle_sets] == expected
        places = np.concatenate(
            [particle_set.indices for particle_set in particle_sets]
        )
        assert sorted(places) == list(range(P))
        for particle_set in particle_sets:
            images, _ = particle_set.particles.batch(np.arange(len(particle_set)))
            np.testing.assert_array_equal(images, scene.images[particle_set.indices])
            given = scene.initial.shifts[particle_set.indices]
            np.testing.assert_array_equal(particle_set.prior.shifts, given)
            # Two folds of each set, as large as each other.
            assert abs(len(particle_set.of_fold(0)) - len(particle_set.of_fold(1))) <= 1
    np.testing.assert_array_equal(deal(HALVES, uneven)[1].indices, np.arange(20))
    (everyone,) = deal(CONFIG, None)
    np.testing.assert_array_equal(everyone.indices, np.arange(P))


# --- other settings

STILL = dataclasses.replace(CONFIG, iterations=1, multi_start=())


def test_a_tau_that_is_given_is_used(scene, run):
    smooth = scene.refine(dataclasses.replace(STILL, tau=20.0))
    rough = scene.refine(dataclasses.replace(STILL, tau=0.05))
    for result, tau in ((smooth, 20.0), (rough, 0.05)):
        assert result.tau == pytest.approx(tau, rel=1e-6)
    variation = [np.abs(np.diff(one.volume)).sum() for one in (smooth, rough)]
    assert variation[0] < 0.5 * variation[1]
    found = reconstruction.reconstruct(
        Particles(scene.images),
        scene.initial,
        dataclasses.replace(CONFIG, tau=20.0),
        key=KEY,
    )
    assert found.tau == pytest.approx(20.0, rel=1e-6) and found.errors == {}
    assert 0.1 < run[0].tau < 10


def test_poses_may_be_updated_by_any_method_of_optax(scene):
    """From poses near the truth; dtype promotion as users have it."""
    update = Descent(optax.sgd(0.3), iterations=10)
    rng = np.random.default_rng(2)
    turns = rotvec_to_matrix(jnp.asarray(0.1 * rng.normal(size=(P, 3)), SINGLE))
    near = Poses(turns @ scene.poses.rotations, scene.poses.shifts)
    config = dataclasses.replace(STILL, update=update, tau=1.0)
    seen = []
    result = loop.refine(
        Particles(scene.images),
        near,
        scene.truth,
        config,
        key=KEY,
        callback=lambda state, info: seen.append(info),
    )
    before, after = scene.errors(near), scene.errors(result.poses)
    assert (
        after["angle_error_in_degrees_median"]
        < 0.6 * before["angle_error_in_degrees_median"]
    )
    # One to begin with, and ten steps.
    assert seen[0].evaluations == 11 and seen[0].searched == 0


class Still:
    """A pose update of one's own: no pytree, and of no class of ours."""

    def minimise(self, objective, rotation, shift, constraint):
        """Stay."""
        rotation, shift = constraint(rotation, shift)
        cost, _, information = objective(rotation, shift)
        return Estimate(rotation, shift, cost, information, jnp.ones((), jnp.int32))


def test_any_object_may_update_the_poses(scene):
    config = dataclasses.replace(STILL, update=Still(), iterations=1)
    result = scene.refine(config)
    determined = ~result.undetermined
    np.testing.assert_allclose(
        np.asarray(result.poses.rotations)[determined],
        np.asarray(scene.initial.rotations)[determined],
        atol=1e-5,
    )


def test_images_of_nothing_at_all(scene):
    """All zeros: no map, no poses, but no failure either."""
    result = scene.refine(STILL, images=np.zeros_like(scene.images))
    assert result.undetermined.all()
    np.testing.assert_array_equal(result.poses.rotations, scene.initial.rotations)
    np.testing.assert_array_equal(result.poses.shifts, scene.initial.shifts)
    assert np.isfinite(result.volume).all()
    assert np.isfinite(result.covariances).all()


@pytest.mark.parametrize("which", ["all", "a fold"])
def test_no_map_is_made_of_what_is_undetermined(scene, which):
    """If it is everything, the map is empty; nothing in the result is NaN."""
    noise = np.random.default_rng(6).normal(size=scene.images.shape)
    images, seen = noise.astype(np.float32), []
    scene.refine(STILL, images=images, callback=lambda state, info: seen.append(state))
    chosen = np.ones(P, bool)
    if which == "a fold":
        _, (particle_set,) = divide(Particles(images), scene.initial, STILL, KEY, None)
        chosen = particle_set.fold == 0
    # The state before the final maps, with particles that show something or not.
    evidence = jnp.where(chosen, -1.0, 100.0).astype(SINGLE)
    state = eqx.tree_at(
        lambda s: (s.set_states[0].evidence, s.finished), seen[-1], (evidence, True)
    )
    result = scene.refine(STILL, images=images, state=state)
    for leaf in jax.tree.leaves(outcome(result)):
        assert not np.isnan(leaf).any()
    # A fold's map is made from the other one, and that of fold 1 from none at all.
    first, second = (fold.coefficients for fold in result.state.set_states[0].maps)
    assert not np.any(second)
    assert np.any(first) == np.any(result.volume) == (which == "a fold")


def test_a_position_out_of_the_image_is_undetermined(scene):
    """It keeps its given pose, as images that show nothing do."""
    seen = []
    scene.refine(STILL, callback=lambda state, info: seen.append(state))
    shifts = seen[-1].set_states[0].hypotheses.shifts
    state = eqx.tree_at(
        lambda s: (s.set_states[0].hypotheses.shifts, s.finished),
        seen[-1],
        (shifts.at[0].set(N / 2 + 1), True),
    )
    before = scene.refine(
        STILL, state=eqx.tree_at(lambda s: s.finished, seen[-1], True)
    )
    result = scene.refine(STILL, state=state)
    assert not before.undetermined[0] and result.undetermined[0]
    np.testing.assert_array_equal(before.undetermined[1:], result.undetermined[1:])
    np.testing.assert_array_equal(result.poses.shifts[0], scene.initial.shifts[0])


def test_the_band_limit_marches(scene):
    """It only grows; with the default insertion, too, runs repeat their bits."""
    config = dataclasses.replace(
        CONFIG, first_r_max=7, iterations=2, multi_start=(0,), insertion=None
    )
    seen = []
    result = scene.refine(config, callback=lambda state, info: seen.append(info))
    radii = [info.r_max for info in seen]
    assert radii == sorted(radii) and radii[0] < radii[-1] <= LAST
    assert radii[0] <= 7 and (np.diff(np.log2(radii)) <= 1).all()
    assert all(info.search_r_max <= info.r_max for info in seen)
    assert scene.errors(result.poses)["angle_error_in_degrees_median"] < 8
    assert_identical(outcome(scene.refine(config)), outcome(result))


def test_error_bars_are_those_of_the_last_band(scene):
    """A run that is stopped while the band grows, and one that is taken up again."""
    config = dataclasses.replace(STILL, first_r_max=4, iterations=2, tau=1.0)
    seen = []
    result = scene.refine(config, callback=lambda *each: seen.append(each))
    (before, first), (after, second) = seen
    assert first.r_max == int(before.r_max) < second.r_max == int(after.r_max)
    _, (particle_set,) = divide(
        Particles(scene.images), scene.initial, config, KEY, None
    )
    (state,) = after.set_states
    supported = schedule.supported(np.asarray(state.fold_fsc), config, LAST)
    assert (
        schedule.next_band_limit(second.r_max, supported, particle_set) > second.r_max
    )
    bars = np.linalg.inv(
        pose_step.measure_information(
            particle_set,
            state,
            pose_step.reference_maps(particle_set, state),
            second.r_max,
        )
    )
    some = ~result.undetermined
    np.testing.assert_array_equal(result.covariances[some], bars[some])
    assert_identical(outcome(scene.refine(config, state=before)), outcome(result))


# --- masks


def ball():
    """A soft mask around the phantom, which ends at about 0.38 of the box."""
    at = np.arange(N) - N // 2
    away = np.sqrt(at[:, None, None] ** 2 + at[:, None] ** 2 + at**2) - 9.0
    return jnp.asarray(0.5 + 0.5 * np.cos(np.pi * np.clip(away / 2, 0, 1)), SINGLE)


def test_a_mask_of_ones_changes_nothing(scene, run):
    """Not a bit."""
    ones = jnp.ones((N, N, N))
    assert_identical(outcome(scene.refine(mask=ones)), outcome(run[0]))


def test_a_mask_keeps_the_solvent_from_the_poses(scene):
    """With garbage around the initial map they are as good as without, or far off."""
    noise = np.random.default_rng(8).normal(size=(N, N, N))
    garbage = simulate.blur(jnp.asarray(noise, SINGLE), 1.0)
    garbage = 2 * garbage * scene.map.max() / garbage.max() * (1 - ball())

    def error(volume, mask):
        particles = Particles(scene.images)
        whole = make_particle_set(particles, scene.initial, KEY, CONFIG, mask)
        state = map_step.start(whole, volume)
        maps = pose_step.reference_maps(whole, state)
        state, _ = pose_step.update_poses(whole, state, maps, 0, LAST, KEY)
        return scene.errors(state.hypotheses.best())["angle_error_in_degrees_median"]

    clean, spoilt = (error(scene.map + x, None) for x in (0 * garbage, garbage))
    masked = error(scene.map + garbage, ball())
    assert masked < 0.5 * spoilt
    # Medians of 80 particles after one iteration differ by a quarter between draws.
    assert masked < 1.5 * clean


def test_maps_and_their_correlations_are_whole(scene):
    """Within a mask noise agrees by the mask's shape, and would raise the limit."""
    config = dataclasses.replace(STILL, half_sets=True, tau=1.0)
    seen, mask = [], ball()
    result = scene.refine(
        config, subsets=SUBSETS, mask=mask, callback=lambda *each: seen.append(each)
    )
    ((state, info),) = seen
    for known in state.set_states:
        first, second = known.maps
        curve = fsc(first.coefficients, second.coefficients)
        np.testing.assert_allclose(known.fold_fsc, curve, atol=1e-5)
    _, particle_sets = divide(
        Particles(scene.images), scene.initial, config, KEY, SUBSETS, mask
    )
    gold = half_sets.correlation(
        state.set_states[0], state.set_states[1], particle_sets[0]
    )
    score = float(jnp.mean(gold[1 : LAST + 1]))
    assert info.gold_score == pytest.approx(score, rel=1e-5)
    first, second = map(jnp.asarray, result.half_maps)
    curve = fsc(first, second)
    np.testing.assert_array_equal(result.fsc, curve)
    first, second = (one.mean_map for one in state.set_states)
    solvent = np.asarray(mask) == 0
    for volume in (result.volume, *result.half_maps, first, second):
        assert np.asarray(volume)[solvent].std() > 1e-3 * np.asarray(volume).max()


# --- symmetry


def negative(volume, axis):
    """The volume at minus a coordinate, about n // 2."""
    return np.roll(np.flip(volume, axis), 1, axis)


def fourfold(volume):
    """The mean over C4, which takes the grid to itself."""
    total = volume = np.asarray(volume, float)
    for _ in range(3):
        volume = negative(volume.swapaxes(1, 2), 2)
        total = total + volume
    return total / 4


def test_a_symmetric_sum_is_that_of_all_copies(scene):
    """An image at ``R`` is inserted as four images at ``R S`` would be."""
    config = dataclasses.replace(CONFIG, symmetry="D2")
    some = np.arange(4, 10)
    few = scene.poses.take(some)
    noise = jnp.ones(N // 2 + 1, SINGLE)
    group = jnp.asarray(config.operators, SINGLE)
    turned = (few.rotations[:, None] @ group).reshape(-1, 3, 3)
    copies = Poses(turned, jnp.repeat(few.shifts, 4, axis=0))
    found = []
    for owners, poses, settings in (
        (some, few, config),
        (np.repeat(some, 4), copies, CONFIG),
    ):
        images = scene.images[owners]
        whole = make_particle_set(Particles(images), poses, KEY, settings)
        fold = np.arange(len(images)) >= len(images) // 2
        whole = dataclasses.replace(whole, fold=fold.astype(int))
        everyone = np.ones(len(images), bool)
        known = certain(poses, settings.hypotheses)
        found.append(insertion.sum_up(whole, known, noise, everyone))
    for one, other in zip(*found, strict=True):
        for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
            np.testing.assert_allclose(a, b, atol=1e-5 * np.abs(b).max())
    sums = found[0][0]
    # The first operator but the identity turns by 180 degrees about z.
    back = np.asarray(sums.backprojection)
    half = negative(negative(back, 1), 2)
    np.testing.assert_allclose(
        half[1:, 1:, 1:], back[1:, 1:, 1:], atol=1e-4 * np.abs(back).max()
    )


def test_symmetric_images_are_worth_as_many_as_the_order(scene):
    """C4 makes of P images what C1 makes of 4 P with noise of their own."""
    truth = jnp.asarray(fourfold(scene.truth), SINGLE)
    disc = slices.disc(N, LAST)
    poses = Poses(
        simulate.equidistributed_rotations(jax.random.key(5), 4 * P, SINGLE),
        jnp.zeros((4 * P, 2), SINGLE),
    )
    spectrum = Gridding(4, 2.0).spectrum(truth, LAST)
    clean = slices.to_images(slices.project(spectrum, disc, poses), disc)
    sigma = simulate.noise_std(clean, -8.0)
    images = np.asarray(simulate.add_noise(jax.random.key(6), clean, sigma))
    few = np.arange(0, 4 * P, 4)

    def make(some, symmetry):
        made = reconstruction.reconstruct(
            Particles(images[some]),
            poses.take(some),
            dataclasses.replace(CONFIG, symmetry=symmetry),
            key=KEY,
        )
        return made, float(mean_fsc(fsc(jnp.asarray(made.volume), truth)))

    plain, symmetric = make(few, "C1"), make(few, "C4")
    many = make(np.arange(4 * P), "C1")
    assert symmetric[1] > plain[1] + 0.05
    assert symmetric[1] == pytest.approx(many[1], abs=0.04)
    assert 1 / 1.5 < symmetric[0].tau / many[0].tau < 1.5
    volume = symmetric[0].volume[1:, 1:, 1:]
    turned = negative(symmetric[0].volume.swapaxes(1, 2), 2)[1:, 1:, 1:]
    assert np.corrcoef(volume.ravel(), turned.ravel())[0, 1] > 0.99


# --- what is fixed


@pytest.mark.parametrize("what", ["angle", "shift"])
def test_what_is_fixed_is_the_limit_of_a_tight_prior(scene, what):
    """Its bits stay; the rest, and the evidence, are as if it were known exactly."""
    angles, shifts = np.random.default_rng(2).normal(size=(2, P, 3)) * 0.04
    near = Poses(
        rotvec_to_matrix(jnp.asarray(angles, SINGLE)) @ scene.poses.rotations,
        scene.poses.shifts + jnp.asarray(shifts[:, :2], SINGLE),
    )
    particles, still = Particles(scene.images), dataclasses.replace(STILL, tau=1.0)
    fixed, tight = (
        loop.refine(
            particles,
            near,
            scene.truth,
            dataclasses.replace(still, **settings),
            key=KEY,
        )
        for settings in ({f"max_{what}": 0.0}, {f"{what}_spread": 1e-3})
    )
    held = "rotations" if what == "angle" else "shifts"
    np.testing.assert_array_equal(getattr(fixed.poses, held), getattr(near, held))
    some = scene.real
    rotations = [result.poses.rotations[some] for result in (fixed, tight)]
    shifts = [one.poses.shifts[some] for one in (fixed, tight)]
    for one, other in (rotations, shifts):
        # A few particles have not converged quite.
        gaps = np.abs(one - other).reshape(len(some), -1).max(axis=1)
        assert np.quantile(gaps, 0.9) < 3e-3 and gaps.max() < 3e-2
    evidence = [one.state.set_states[0].evidence[some] for one in (fixed, tight)]
    np.testing.assert_allclose(*evidence, rtol=1e-2, atol=0.05)
    # What is fixed is not paid for; what is only known well has been searched for.
    assert (fixed.log_likelihood[some] > tight.log_likelihood[some] + 2).all()
    stays = np.repeat([what == "angle", what == "shift"], [3, 2])
    assert (fixed.covariances[:, stays] == 0).all()
    assert (fixed.covariances[:, :, stays] == 0).all()
    spread = [
        np.linalg.det(one.covariances[some][:, ~stays][:, :, ~stays])
        for one in (fixed, tight)
    ]
    ratio = np.abs(np.log(spread[0] / spread[1]))
    assert np.median(ratio) < 0.02 and ratio.max() < 0.3
    moved = "shifts" if what == "angle" else "rotations"
    change = np.abs(getattr(fixed.poses, moved) - getattr(near, moved))
    assert np.median(change[some]) > 1e-2
    # The end is told by what moves.
    assert float(fixed.state.pose_change) > 0
