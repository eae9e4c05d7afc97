"""A noise spectrum for each group of particles: measured, and weighed by."""

import dataclasses

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import COARSE

from jaxrefine import evaluation, simulate
from jaxrefine.ctf import CTF
from jaxrefine.data import observation
from jaxrefine.data.particles import Particles
from jaxrefine.geometry import Poses
from jaxrefine.io import load_checkpoint, save_checkpoint
from jaxrefine.maps import admm
from jaxrefine.maps.fsc import fsc
from jaxrefine.operators import slices
from jaxrefine.operators.gridding import Gridding
from jaxrefine.poses import hypotheses, likelihood
from jaxrefine.poses.polish import polish_poses
from jaxrefine.poses.prior import priors_about
from jaxrefine.poses.solvers import LevenbergMarquardt
from jaxrefine.refinement import insertion, loop, map_step, reconstruction
from jaxrefine.refinement.sets import divide, make_particle_set

pytestmark = pytest.mark.slow

N, LAST, P = 16, 7, 240
SHELLS = N // 2 + 1
SINGLE, KEY = jnp.float32, jax.random.key(3)
CONFIG = dataclasses.replace(
    COARSE,
    angle_spread=0.2,
    shift_spread=0.5,
    iterations=2,
    first_r_max=LAST,
    search_r_max=LAST,
    multi_start=(0,),
    candidates=8,
    tau=1.0,
    batch_size=40,
)
GROUP = np.arange(P) % 3 // 2  # two thirds are 0, one third 1
DISC = slices.disc(N, LAST)
SHELL = np.rint(np.hypot(*np.meshgrid(np.fft.rfftfreq(N), np.fft.fftfreq(N))) * N)
SHELL = np.minimum(SHELL.astype(int), SHELLS - 1)
WHITE = np.full(SHELLS, 1.0)
RISING = np.linspace(4.0, 14.0, SHELLS)  # nine times as strong, on the average


def noise(spectra, seed):
    """Noise images of every particle; ``spectra`` are powers in a pixel."""
    white = np.random.default_rng(seed).normal(size=(P, N, N))
    colour = np.sqrt(np.asarray(spectra)[GROUP])[:, SHELL]
    return np.fft.irfft2(np.fft.rfft2(white) * colour, s=(N, N))


def blobs():
    """A map without symmetry, well inside its box."""
    rng = np.random.default_rng(3)
    z, y, x = np.mgrid[:N, :N, :N] - N // 2
    squares = [
        (x - a) ** 2 + (y - b) ** 2 + (z - c) ** 2
        for a, b, c in rng.normal(scale=2.0, size=(8, 3))
    ]
    return jnp.asarray(sum(np.exp(-square / 2) for square in squares), SINGLE)


class Scene:
    """Clean images of a map at known poses, with optics."""

    def __init__(self):
        self.truth = blobs()
        rng = np.random.default_rng(1)
        self.poses = Poses(
            simulate.equidistributed_rotations(jax.random.key(1), P, SINGLE),
            jnp.asarray(rng.uniform(-1, 1, (P, 2)), SINGLE),
        )
        defocus = jnp.asarray(rng.uniform(1e4, 2e4, P), SINGLE)
        self.ctf = CTF(defocus, defocus + 300)
        clean = slices.project(
            Gridding(4, 2.0).spectrum(self.truth, LAST), DISC, self.poses
        )
        self.clean = np.asarray(slices.to_images(clean, DISC))
        self.sigma = float(np.std(self.clean))

    def images(self, spectra, seed=2):
        """Images whose noise has the mean power of the signal times the spectra."""
        made = self.clean + self.sigma * noise(spectra, seed)
        return made.astype(np.float32)

    def power(self, spectra):
        """The same powers, as an image's spectrum has them."""
        return jnp.asarray((self.sigma * N) ** 2 * np.asarray(spectra), SINGLE)


@pytest.fixture(scope="module")
def scene():
    return Scene()


@pytest.fixture(scope="module")
def images(scene):
    return scene.images((WHITE, RISING))


# --- what noise does to a particle


@eqx.filter_jit
def costs(spectrum, view, plain, images, ctf, group, poses, weights):
    """Costs in the view, with weights of each particle, and by their definition."""

    def one(data, rotation, shift, transfer, weights):
        seen = observation.Observation(DISC, weights, data, transfer)
        return likelihood.cost_and_gradient(spectrum, seen, rotation, shift)

    def compare(data, transfer, weights):
        return jax.vmap(one)(data, poses.rotations, poses.shifts, transfer, weights)

    data, bare = plain.spectra(images, None), plain.transfer(ctf, None)
    gap = data - slices.project(spectrum, DISC, poses, bare)
    exact = jnp.sum(weights * (gap.real**2 + gap.imag**2), axis=1) / 2
    ones = jnp.ones_like(weights)
    whitened = view.spectra(images, group), view.transfer(ctf, group)
    return (
        compare(*whitened, view.weights[None] * ones),
        compare(data, ones if bare is None else bare, weights),
        exact,
    )


@pytest.mark.parametrize("with_optics", [True, False])
def test_the_cost_is_that_of_the_groups_own_noise(scene, images, with_optics):
    """``1/2 sum |g - C h|^2 / N_g`` and its gradient, some shells being empty."""
    powers = np.stack([WHITE, RISING]) * (scene.sigma * N) ** 2
    powers[0, 5], powers[1, 3], powers[:, 6] = np.inf, np.inf, np.inf
    shells, times = np.asarray(DISC.shells), np.asarray(DISC.multiplicity)
    few = slice(0, 6)
    weights = np.where(shells > 0, times / powers[GROUP[few]][:, shells], 0.0)
    view, plain = (
        observation.view(Particles(images, None, 4.0), LAST, jnp.asarray(power))
        for power in (powers, np.ones(SHELLS))
    )
    double = jax.tree.map(
        lambda leaf: jnp.asarray(leaf[few], float),
        (images, scene.ctf if with_optics else None, scene.poses),
    )
    (cost, gradient), (same, expected), exact = costs(
        COARSE.interpolation.spectrum(scene.truth.astype(float), LAST),
        view,
        plain,
        double[0],
        double[1],
        GROUP[few],
        double[2],
        jnp.asarray(weights),
    )
    np.testing.assert_allclose(cost, exact, rtol=1e-10)
    np.testing.assert_allclose(same, exact, rtol=1e-10)
    np.testing.assert_allclose(gradient, expected, atol=1e-10 * np.abs(expected).max())
    # What has no power in any group, and the origin, do not count.
    silent = np.asarray(view.weights) == 0
    np.testing.assert_array_equal(silent, (shells == 0) | (shells == 6))
    assert view.factor is not None and np.isfinite(view.factor).all()


def test_a_group_knows_nothing_of_the_others_noise(scene, images):
    """Poses, information and evidence stay as they are whatever that is."""
    particles = Particles(images, None, 4.0, GROUP)
    powers = scene.power((WHITE, RISING)).at[1, 5].set(jnp.inf)
    prior = priors_about(scene.poses, 0.2, 0.5, np.pi, 6.0)
    rotations, shifts = (
        np.asarray(scene.poses.rotations),
        np.asarray(scene.poses.shifts),
    )

    def polished(owners, noise):
        view = observation.view(particles, LAST, noise)
        return polish_poses(
            particles,
            owners,
            COARSE.interpolation.spectrum(scene.truth, LAST),
            view,
            prior,
            rotations[owners],
            shifts[owners],
            LevenbergMarquardt(iterations=3),
            40,
        )

    together = polished(np.arange(40), powers)
    for group in (0, 1):
        members = np.flatnonzero(GROUP[:40] == group)
        alone = polished(members, powers[jnp.array([group, group])])
        for name in ("rotations", "shifts", "information", "evidence"):
            value, exact = getattr(together, name)[members], getattr(alone, name)
            scale = np.abs(exact).max()
            np.testing.assert_allclose(value, exact, atol=2e-4 * scale, err_msg=name)


def whole_of(scene, images, group, config=CONFIG):
    particles = Particles(images, None, 4.0, group)
    return make_particle_set(particles, scene.poses, KEY, config)


def test_the_sums_are_those_of_the_groups(scene, images):
    """Each inserted by itself, with its own noise, the empty shells left out."""
    whole = whole_of(scene, images, GROUP)
    powers = scene.power((WHITE, RISING)).at[1, 5].set(jnp.inf)
    known = hypotheses.certain(scene.poses, CONFIG.hypotheses)
    together = insertion.sum_up(whole, known, powers, np.ones(P, bool))
    parts = [
        insertion.sum_up(
            whole, known, powers[jnp.array([group, group])], GROUP == group
        )
        for group in (0, 1)
    ]
    for value, *both in zip(together, *parts, strict=True):
        exact = both[0] + both[1]
        for a, b in zip(jax.tree.leaves(value), jax.tree.leaves(exact), strict=True):
            np.testing.assert_allclose(a, b, atol=1e-5 * np.abs(b).max())


# --- what is measured


def assessed(scene, images, group):
    """The noise that the true poses and map leave, and that at the start."""
    whole = whole_of(scene, images, group)
    state = map_step.start(whole, scene.truth)
    first = np.asarray(state.noise)
    maps = tuple(admm.init(scene.truth) for _ in state.maps)
    state = eqx.tree_at(lambda s: s.maps, state, maps)
    found = map_step.assess(whole, state, np.ones(len(whole), bool))
    return np.asarray(found.noise), first, np.asarray(found.gain)


INSIDE = slice(1, LAST + 1)


def relative_errors(group):
    """Standard errors of a group's power: a mean of n squares varies by 2 / n."""
    each = np.bincount(DISC.shells, np.asarray(DISC.multiplicity))[INSIDE]
    return np.sqrt(2 / (np.bincount(group)[:, None] * each))


def test_the_spectra_of_two_groups_are_recovered(scene, images):
    """Levels nine times apart, white and rising, to four standard errors."""
    powers = np.asarray(scene.power((WHITE, RISING)))
    found, first, gain = assessed(scene, images, GROUP)
    assert found.shape == first.shape == (2, SHELLS)
    errors, expected = np.log(found / powers)[:, INSIDE], relative_errors(GROUP)
    assert (np.abs(errors) < 4 * expected).all()
    assert np.sqrt(np.mean((errors / expected) ** 2)) < 1.5
    np.testing.assert_array_equal(first, np.repeat(first[:, :1], SHELLS, axis=1))
    np.testing.assert_allclose(first[:, 0] / powers[:, -3:].mean(axis=1), 1, atol=0.2)
    # The quiet group decides on the scale: shells in which there is signal.
    np.testing.assert_allclose(gain[1:5], 1, atol=0.1)


def test_groups_of_equal_noise_are_as_one(scene):
    images = scene.images((WHITE, WHITE))
    apart, _, gain = assessed(scene, images, GROUP)
    together, _, pooled = assessed(scene, images, None)
    assert together.shape == (1, SHELLS)
    errors = np.log(apart / together)[:, INSIDE]
    assert (np.abs(errors) < 4 * relative_errors(GROUP)).all()
    np.testing.assert_allclose(gain[INSIDE], pooled[INSIDE], rtol=0.05)


def test_few_particles_lean_on_the_rest(scene):
    """One particle among many: its level, but hardly a shape of its own.

    Groups without particles, or with images of nothing, harm nobody.
    """
    images, group = scene.images((WHITE, WHITE)), np.zeros(P, int)
    images[7] = scene.clean[7] + 3 * (images[7] - scene.clean[7])
    images[8] = 0.0
    group[7], group[8], group[9:19] = 1, 3, 4
    found, first, _ = assessed(scene, images, group)
    truth = np.asarray(scene.power(WHITE)) * np.array([1, 9, 1, 1, 1])[:, None]
    errors = np.log(found / truth)[:, INSIDE]
    assert np.abs(errors[[1, 4]]).max() < 0.5 and np.abs(errors[0]).max() < 0.15
    # By itself a particle's first shell, of 8 real numbers, would be off by a half.
    assert np.ptp(errors[1]) < 0.5
    np.testing.assert_array_equal(found[2:4], first[2:4])
    assert (first[2:4] >= first[[0, 1, 4]].max()).all()


def test_a_shell_may_be_empty_in_one_group(scene, images):
    """It has infinite noise there; the other group's is measured all the same."""
    cut = images.copy()
    spectra = np.fft.rfft2(cut[GROUP == 1]) * (SHELL < 6)
    cut[GROUP == 1] = np.fft.irfft2(spectra, s=(N, N))
    found, _, _ = assessed(scene, cut, GROUP)
    exact, _, _ = assessed(scene, images, GROUP)
    assert np.isinf(found[1, 6 : LAST + 1]).all()
    np.testing.assert_allclose(found[0, INSIDE], exact[0, INSIDE], rtol=0.1)
    np.testing.assert_allclose(found[1, 1:6], exact[1, 1:6], rtol=0.1)


# --- what comes of it


def reconstruct(scene, images, group):
    particles = Particles(images, None, 4.0, group)
    made = reconstruction.reconstruct(particles, scene.poses, CONFIG, key=KEY)
    curve = fsc(jnp.asarray(made.volume), scene.truth)
    return made, float(jnp.mean(curve[1 : LAST + 1]))


@pytest.fixture(scope="module")
def mixed(scene):
    """Images, a third of them quiet, and what becomes of them if nobody is told."""
    images = scene.images((16 * RISING, 16 * WHITE))
    return images, *reconstruct(scene, images, None)


def test_one_group_is_as_none(scene, mixed):
    """To the last bit."""
    images, none, _ = mixed
    one, _ = reconstruct(scene, images, np.zeros(P, int))
    np.testing.assert_array_equal(one.volume, none.volume)
    assert (one.tau, one.lam) == (none.tau, none.lam)


def test_knowing_the_noise_makes_a_better_map(scene, mixed):
    """Than one noise for all: what is noisy counts for less."""
    images, _, worse = mixed
    _, better = reconstruct(scene, images, GROUP)
    assert better > worse + 0.05


# --- that they stay together


def test_half_sets_keep_their_groups(scene, images):
    config = dataclasses.replace(CONFIG, half_sets=True)
    particles = Particles(images, None, 4.0, GROUP)
    subsets = 1 + np.arange(P) % 2
    _, particle_sets = divide(particles, scene.poses, config, KEY, subsets)
    for particle_set in particle_sets:
        np.testing.assert_array_equal(
            particle_set.particles.group, GROUP[particle_set.indices]
        )
    # A half that lacks the last group has one spectrum less.
    _, particle_sets = divide(particles, scene.poses, config, KEY, 1 + GROUP)
    assert [particle_set.particles.groups for particle_set in particle_sets] == [1, 2]


@pytest.fixture(scope="module")
def run(scene, images):
    """A whole run, and the states that its callback got."""
    few = np.arange(96)
    particles = Particles(images[few], None, 4.0, GROUP[few])
    poses = jax.tree.map(lambda leaf: leaf[few], scene.poses)

    def go(**options):
        return loop.refine(particles, poses, scene.truth, CONFIG, key=KEY, **options)

    seen = []
    return go, go(callback=lambda state, info: seen.append(state)), seen


def test_poses_are_known_as_well_as_the_noise_allows(scene, run):
    _, result, _ = run
    (state,) = result.state.set_states
    errors = np.log(np.asarray(state.noise) / np.asarray(scene.power((WHITE, RISING))))
    assert np.abs(errors[:, 2 : LAST + 1].mean(axis=1)).max() < 0.2
    group, some = GROUP[:96], np.arange(96)
    errors = evaluation.pose_errors(result.poses, scene.poses.take(some))
    variances = np.trace(result.covariances[:, :3, :3], axis1=1, axis2=2)
    for figure in (errors.angle_in_degrees, np.sqrt(variances)):
        quiet, noisy = (np.median(figure[group == g]) for g in (0, 1))
        assert quiet < 0.8 * noisy


def test_an_interrupted_run_ends_in_the_same_bits(run, tmp_path):
    go, result, seen = run
    save_checkpoint(tmp_path / "state", seen[0], {})
    state, _ = load_checkpoint(
        tmp_path / "state", jax.tree.map(jnp.zeros_like, seen[0])
    )
    again = go(state=state)
    np.testing.assert_array_equal(again.volume, result.volume)
    for a, b in zip(
        jax.tree.leaves(again.state), jax.tree.leaves(result.state), strict=True
    ):
        np.testing.assert_array_equal(a, b)
