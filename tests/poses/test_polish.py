"""Polished poses, of many particles: their errors, curvatures and evidence are honest.

The laws share the polished poses, those of `poses.uncertainty` with them.
"""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import blobs
from scipy.spatial.transform import Rotation

from jaxrefine.ctf import CTF
from jaxrefine.data import observation
from jaxrefine.data.particles import Particles
from jaxrefine.euler import euler_to_matrix
from jaxrefine.geometry import Poses
from jaxrefine.operators import slices
from jaxrefine.operators.gridding import Gridding
from jaxrefine.poses import hypotheses, likelihood, polish, solvers, uncertainty
from jaxrefine.poses.prior import priors_about
from jaxrefine.poses.solvers import LevenbergMarquardt

N, R_MAX, P = 16, 7, 200
SIGMA, PIXEL = 1.0, 4.0
ZEROS, CONSTANT = 0, 1  # particles without a signal
GRIDDING = Gridding(4, 2.0)
SINGLE = jnp.float32


class Scene:
    """Noisy images with optics, of a map and at poses that are known."""

    def __init__(self):
        rng = np.random.default_rng(0)
        angles = rng.uniform(-np.pi, np.pi, (P, 3)).astype(np.float32)
        shifts = rng.uniform(-1, 1, (P, 2)).astype(np.float32)
        self.truth = Poses(euler_to_matrix(jnp.asarray(angles)), shifts)
        defocus = jnp.asarray(rng.uniform(1e4, 2e4, P), SINGLE)
        self.ctf = CTF(defocus, defocus + 300)
        self.noise = jnp.full(N // 2 + 1, (SIGMA * N) ** 2, SINGLE)
        empty = Particles(np.zeros((P, N, N), np.float32), self.ctf, PIXEL)
        self.view = observation.view(empty, R_MAX, self.noise)
        self.spectrum = GRIDDING.spectrum(blobs(N, dtype=SINGLE), R_MAX)
        transfer = self.view.transfer(self.ctf, None)
        clean = slices.project(self.spectrum, self.view.disc, self.truth, transfer)
        clean = np.asarray(slices.to_images(clean, self.view.disc))
        images = clean + SIGMA * rng.normal(size=clean.shape)
        images[ZEROS], images[CONSTANT] = 0.0, 7.0
        self.particles = Particles(images.astype(np.float32), self.ctf, PIXEL)
        self.prior = priors_about(self.truth, 0.5, 2.0, np.pi, 6.0)

    def polish(self, owners, batch_size=50, spectrum=None, prior=None, turn=0.05):
        rng = np.random.default_rng(5)
        vectors = turn * rng.normal(size=(P, 3))
        turns = Rotation.from_rotvec(vectors).as_matrix()
        rotations = turns @ np.asarray(self.truth.rotations, float)
        shifts = np.asarray(self.truth.shifts) + turn * rng.normal(size=(P, 2))
        return polish.polish_poses(
            self.particles,
            owners,
            self.spectrum if spectrum is None else spectrum,
            self.view,
            self.prior if prior is None else prior,
            rotations[owners].astype(np.float32),
            shifts[owners].astype(np.float32),
            LevenbergMarquardt(iterations=8),
            batch_size,
        )


@pytest.fixture(scope="module")
def scene():
    return Scene()


@pytest.fixture(scope="module")
def polished(scene):
    return scene.polish(np.arange(P))


def errors_of(scene, polished):
    turns = polished.rotations @ np.swapaxes(np.asarray(scene.truth.rotations), 1, 2)
    vectors = Rotation.from_matrix(turns).as_rotvec()
    return np.concatenate(
        [vectors, polished.shifts - np.asarray(scene.truth.shifts)], 1
    )


@pytest.mark.slow
def test_covariances_are_honest(scene, polished):
    """Ellipsoids of 95 % hold 95 %, and errors are the Cramer-Rao bound's."""
    real = slice(2, None)
    errors = errors_of(scene, polished)[real]
    squares = np.einsum("pi,pij,pj->p", errors, polished.information[real], errors)
    # chi-squared of five degrees of freedom; 3.5 standard errors of 198 particles.
    assert 0.88 <= np.mean(squares < 11.07) <= 0.99
    assert 0.8 <= np.sqrt(np.mean(squares) / 5) <= 1.25
    covariances = np.linalg.inv(polished.information[real].astype(float))
    bound = np.sqrt(np.mean(np.diagonal(covariances, axis1=1, axis2=2), axis=0))
    rms = np.sqrt(np.mean(errors**2, axis=0))
    assert (rms / bound < 1.25).all() and (rms / bound > 0.75).all()
    # The images decide, not the prior: the bound is much below its width.
    assert bound[:3].max() < 0.25 and bound[3:].max() < 1


@pytest.mark.slow
def test_the_curvature_is_the_mean_hessian(scene, polished):
    """Against the Hessian, by autodiff, averaged over draws from the Gaussian."""
    owners = np.array([5, 9])
    pose = polished.rotations[owners], polished.shifts[owners]
    information = polished.information[owners]
    found = uncertainty.mean_curvatures(
        scene.particles,
        owners,
        scene.spectrum,
        scene.view,
        scene.prior,
        *pose,
        information,
        2,
    )
    images, ctf = scene.particles.batch(owners)
    data, transfer = scene.view.spectra(images, None), scene.view.transfer(ctf, None)

    def cost(step, prior, rotation, shift, data, transfer):
        place = solvers.retract(rotation, shift, step)
        seen = scene.view.observation(data, transfer)
        misfit = likelihood.cost(scene.spectrum, seen, *place)
        return misfit + prior.cost(*place)

    hessian = jax.jit(jax.vmap(jax.hessian(cost), in_axes=(0, *[None] * 5)))
    rng = np.random.default_rng(0)
    for i, owner in enumerate(owners):
        prior = jax.tree.map(lambda leaf, owner=owner: leaf[owner], scene.prior)
        half = np.linalg.cholesky(np.linalg.inv(information[i].astype(float)))
        draws = rng.normal(size=(200, 5))
        draws = np.concatenate([draws, -draws]) @ half.T
        place = (jnp.asarray(part[i]) for part in pose)
        hessians = hessian(
            jnp.asarray(draws, SINGLE), prior, *place, data[i], transfer[i]
        )
        mean = np.mean(np.asarray(hessians, float), axis=0)
        assert np.abs(half.T @ (found[i] - mean) @ half).max() < 0.1
        # It is not the information that it was made from.
        assert np.abs(half.T @ (found[i] - information[i]) @ half).max() > 0.02


def test_silent_images_go_where_the_prior_is(scene, polished):
    """Zeros and a constant: nothing but a map that is not seen; finite throughout."""
    for leaf in jax.tree.leaves(polished):
        assert np.isfinite(leaf).all() and leaf.dtype in (np.float32, np.int32)
    assert (polished.evidence[[ZEROS, CONSTANT]] < 0).all()
    assert np.median(polished.evidence[2:]) > 10


def test_without_a_map_nothing_is_known(scene):
    """The evidence is zero, the pose and its covariance the prior's."""
    nothing = GRIDDING.spectrum(jnp.zeros((N, N, N), SINGLE), R_MAX)
    result = scene.polish(np.arange(50), spectrum=nothing)
    np.testing.assert_allclose(result.evidence, 0, atol=1e-3)
    expected = np.diag([1 / 0.5**2] * 3 + [1 / 2.0**2] * 2)
    np.testing.assert_allclose(result.information, np.tile(expected, (50, 1, 1)))
    # A cost of 100 is rounded to 1e-5, which a pose 0.005 standard deviations off has.
    assert np.abs(errors_of(scene, Padded(result))[:50]).max() < 0.01


class Padded:
    """Results of the first particles, as many times as there are particles."""

    def __init__(self, result):
        self.rotations = np.resize(result.rotations, (P, 3, 3))
        self.shifts = np.resize(result.shifts, (P, 2))


@pytest.mark.slow
def test_the_evidence_is_the_integral(scene, polished):
    """Of the likelihood ratio times the prior, by importance sampling."""
    some, count = [5, 6, 7], 4000
    images, ctf = scene.particles.batch(np.array(some))
    data, transfer = scene.view.spectra(images, None), scene.view.transfer(ctf, None)
    normal = np.random.default_rng(2).normal(size=(count, 5))

    @eqx.filter_jit
    def log_ratio(rotations, shifts, data, transfer, prior):
        seen = scene.view.observation(data, transfer)

        def one(rotation, shift):
            cost = likelihood.cost(scene.spectrum, seen, rotation, shift)
            return -cost - prior.cost(rotation, shift)

        return jax.vmap(one)(rotations, shifts) + seen.energy

    for i, particle in enumerate(some):
        information = polished.information[particle].astype(float)
        # 1.3 times as wide as the Laplace approximation, for the tails.
        root = 1.3 * np.linalg.cholesky(np.linalg.inv(information))
        steps = normal @ root.T
        turns = Rotation.from_rotvec(steps[:, :3]).as_matrix()
        rotations = turns @ polished.rotations[particle]
        shifts = polished.shifts[particle] + steps[:, 3:]
        values = log_ratio(
            jnp.asarray(rotations, SINGLE),
            jnp.asarray(shifts, SINGLE),
            data[i],
            transfer[i],
            jax.tree.map(lambda leaf, p=particle: leaf[p], scene.prior),
        )
        size = np.log(np.abs(np.linalg.det(root))) + 2.5 * np.log(2 * np.pi)
        proposal = -np.sum(normal**2, axis=1) / 2 - size
        exact = np.logaddexp.reduce(np.asarray(values, float) - proposal) - np.log(
            count
        )
        assert float(polished.evidence[particle]) == pytest.approx(exact, abs=0.8)


@pytest.mark.slow
def test_a_particle_does_not_know_its_batch(scene, polished):
    """Others beside it, in another order, in batches of another size: the same."""
    owners = np.array([9, 120, 3, 3, 77, 41, 8, 150, 2])
    result = scene.polish(owners, batch_size=4)
    for name in ("rotations", "shifts", "information", "evidence"):
        part, whole = getattr(result, name), getattr(polished, name)[owners]
        scale = np.abs(whole).max()
        np.testing.assert_allclose(part, whole, rtol=1e-3, atol=1e-4 * scale)
    np.testing.assert_allclose(result.rotations[2], result.rotations[3], atol=1e-6)


@pytest.mark.slow
def test_weigh_is_merge_for_each():
    rng = np.random.default_rng(0)
    rotations = jnp.asarray(Rotation.random(12, rng).as_matrix()).reshape(4, 3, 3, 3)
    shifts, evidence = jnp.zeros((4, 3, 2)), jnp.asarray(rng.normal(size=(4, 3)))
    evidence = evidence.at[2, 1:].set(-jnp.inf)
    separation = jnp.asarray(0.05)
    known, order = polish.weigh(rotations, shifts, evidence, separation, 3)
    for i in range(4):
        one, places = hypotheses.merge(rotations[i], shifts[i], evidence[i], separation)
        np.testing.assert_array_equal(order[i], places)
        np.testing.assert_allclose(known.weights[i], one.weights, atol=1e-12)
        np.testing.assert_array_equal(known.rotations[i], one.rotations)
    fewer, _ = polish.weigh(rotations, shifts, evidence, separation, 2)
    np.testing.assert_array_equal(fewer.rotations, known.rotations[:, :2])
    np.testing.assert_allclose(np.sum(fewer.weights, axis=1), 1.0)
