"""Contrast and defocus at a known pose: derivatives, optima and bounds by other routes.

The Cramer-Rao bound here is that of van Trees, to which the priors belong.
"""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import blobs

from jaxrefine.ctf import CTF, transparent
from jaxrefine.data import observation
from jaxrefine.data.particles import Particles
from jaxrefine.geometry import Poses
from jaxrefine.operators import slices
from jaxrefine.operators.gridding import Gridding
from jaxrefine.poses import likelihood, optics
from jaxrefine.poses.optics import Optics, OpticsPrior

N, P, LAST, PIXEL = 24, 400, 11, 2.0
BOTH = OpticsPrior(0.2, 300.0)
ONLY = {"contrast": OpticsPrior(0.2, 0.0), "defocus": OpticsPrior(0.0, 300.0)}


class Scene:
    """Images whose contrast and defocus differ from what their table says."""

    def __init__(self, sigma=0.5, prior=BOTH):
        rng = np.random.default_rng(0)
        volume = blobs(N, 1.0)
        self.spectrum = Gridding(4, 2.0).spectrum(volume, LAST)
        rotations = np.linalg.qr(rng.normal(size=(P, 3, 3)))[0]
        rotations *= np.sign(np.linalg.det(rotations))[:, None, None]
        self.poses = Poses(
            jnp.asarray(rotations), jnp.asarray(rng.uniform(-2, 2, (P, 2)))
        )
        u = jnp.asarray(rng.uniform(8e3, 2e4, P))
        self.ctf = CTF(u, u - 400.0, jnp.asarray(rng.uniform(0, 3, P)))
        self.truth = Optics(
            jnp.asarray(1 + prior.contrast_spread * rng.normal(size=P)),
            jnp.asarray(prior.defocus_spread * rng.normal(size=P)),
        )
        empty = Particles(np.zeros((P, N, N), np.float32), self.ctf, PIXEL)
        self.view = observation.view(empty, LAST, jnp.full(N // 2 + 1, sigma**2 * N**2))
        transfer = self.view.transfer(self.truth.applied(self.ctf), None)
        clean = slices.project(self.spectrum, self.view.disc, self.poses, transfer)
        images = slices.to_images(clean, self.view.disc)
        noise = sigma * rng.normal(size=images.shape)
        self.spectra = self.view.spectra(jnp.asarray(images + noise), None)

    def seen(self, index=slice(None)):
        view, spectrum = self.view, self.spectrum

        def compare(image, rotation, shift):
            return optics.compare(
                spectrum,
                view.observation(image, None),
                rotation,
                shift,
                view.frequencies_in_inverse_angstroms,
            )

        data = (self.spectra, self.poses.rotations, self.poses.shifts)
        return jax.jit(jax.vmap(compare))(*(each[index] for each in data))

    def ctf_of(self, index):
        return jax.tree.map(lambda leaf: leaf[index], self.ctf)


@pytest.fixture(scope="module")
def scene():
    return Scene()


@eqx.filter_jit
def estimates(prior, ctf, seen):
    return jax.vmap(lambda c, s: optics.estimate(prior, c, s))(ctf, seen)


def test_the_slope_of_a_transfer_function_is_its_derivative(scene):
    frequencies = scene.view.frequencies_in_inverse_angstroms
    gamma = jnp.asarray(np.random.default_rng(1).normal(size=len(frequencies)))
    ctf = scene.ctf_of(3)

    def moved(defocus):
        return Optics(jnp.ones(()), defocus).applied(ctf)(frequencies, gamma)

    value, slope = ctf.value_and_slope(frequencies, gamma)
    exact, twin = jax.jvp(moved, (jnp.zeros(()),), (jnp.ones(()),))
    np.testing.assert_allclose(value, exact, atol=1e-12)
    np.testing.assert_allclose(slope, twin, atol=1e-12)


def test_a_transparent_transfer_function_is_one(scene):
    ctf = jax.tree.map(lambda leaf: leaf[0], transparent(3))
    values = ctf(scene.view.frequencies_in_inverse_angstroms)
    np.testing.assert_allclose(values, 1, atol=1e-12)


def whole_cost(scene, index, prior, contrast, defocus):
    """The cost of the image with this contrast and defocus, and that of the priors."""
    view = scene.view
    ctf = Optics(contrast, defocus).applied(scene.ctf_of(index))
    transfer = ctf(view.frequencies_in_inverse_angstroms)
    observed = view.observation(scene.spectra[index], transfer)
    rotation, shift = scene.poses.rotations[index], scene.poses.shifts[index]
    cost = likelihood.cost(scene.spectrum, observed, rotation, shift) - observed.energy
    if prior.contrast_spread:
        cost += (contrast - 1) ** 2 / (2 * prior.contrast_spread**2)
    if prior.defocus_spread:
        cost += defocus**2 / (2 * prior.defocus_spread**2)
    return cost


@pytest.mark.parametrize("prior", [BOTH, *ONLY.values()], ids=["both", *ONLY])
def test_cost_and_slope_are_those_of_the_likelihood(scene, prior):
    """The twin by autodiff: the best contrast of each offset, and the slope there."""
    seen = scene.seen(slice(5, 6))
    seen = jax.tree.map(lambda leaf: leaf[0], seen)
    ctf = scene.ctf_of(5)
    for defocus in (-400.0, 0.0, 150.0):
        at = jnp.asarray(defocus)
        cost, contrast, slope, information = optics.objective(prior, ctf, seen, at)
        assert float(cost) == pytest.approx(
            float(whole_cost(scene, 5, prior, contrast, at)), rel=1e-9
        )
        by_contrast, by_defocus = jax.grad(
            lambda a, d: whole_cost(scene, 5, prior, a, d), argnums=(0, 1)
        )(contrast, at)
        assert float(slope) == pytest.approx(float(by_defocus), rel=1e-7, abs=1e-9)
        if prior.contrast_spread:
            assert float(by_contrast) == pytest.approx(0, abs=1e-6)
        else:
            assert contrast == 1
        # The information is the mean Hessian, where the model explains the image.
        free = jnp.sqrt(information[0, 0] * information[1, 1])
        assert abs(float(information[0, 1])) < float(free)


@pytest.mark.parametrize("what", ["both", *ONLY])
def test_the_optimum_is_that_of_a_dense_search(scene, what):
    prior = ONLY.get(what, BOTH)
    found = estimates(prior, scene.ctf, scene.seen())
    a = np.linspace(0.4, 1.6, 61) if prior.contrast_spread else np.ones(1)
    d = np.linspace(-900, 900, 181) if prior.defocus_spread else np.zeros(1)
    grid = [jnp.asarray(x.ravel()) for x in np.meshgrid(a, d)]
    costs = jax.jit(
        lambda index: jax.vmap(lambda x, y: whole_cost(scene, index, prior, x, y))(
            *grid
        )
    )
    for index in range(0, P, 40):
        optics_found = jax.tree.map(lambda leaf, at=index: leaf[at], found.optics)
        cost = whole_cost(
            scene, index, prior, optics_found.contrast, optics_found.defocus
        )
        assert float(cost) <= float(jnp.min(costs(index))) + 1e-6


@pytest.mark.parametrize("what", ["both", *ONLY])
def test_errors_are_those_of_the_bound(what):
    """300 angstroms and 20 % are recovered to within 1.2 times the bound."""
    prior = ONLY.get(what, BOTH)
    scene = Scene(prior=prior)
    found = estimates(prior, scene.ctf, scene.seen())
    for name in ("contrast", "defocus"):
        spread = getattr(prior, f"{name}_spread")
        error = getattr(found.optics, name) - getattr(scene.truth, name)
        bar = getattr(found.errors, name)
        if not spread:
            np.testing.assert_array_equal(error, 0)
            np.testing.assert_array_equal(bar, 0)
            continue
        rms, bound = (float(jnp.sqrt(jnp.mean(x**2))) for x in (error, bar))
        assert bound < 0.7 * spread
        assert rms < 1.2 * bound
        assert rms > 0.8 * bound


def test_what_is_beyond_a_limit_is_at_it_and_not_measured(scene):
    """Contrasts of 3, and defocus of 1300 angstroms more than the table says."""
    view, index = scene.view, slice(0, 40)
    rotations, shifts = scene.poses.rotations[index], scene.poses.shifts[index]
    ctf = jax.tree.map(lambda leaf: leaf[index], scene.ctf)
    for beyond, name in (
        (Optics(jnp.full(40, 3.0), jnp.zeros(40)), "contrast"),
        (Optics(jnp.ones(40), jnp.full(40, 1300.0)), "defocus"),
    ):
        transfer = view.transfer(beyond.applied(ctf), None)
        clean = slices.project(
            scene.spectrum, view.disc, Poses(rotations, shifts), transfer
        )
        spectra = view.spectra(slices.to_images(clean, view.disc), None)

        def compare(image, rotation, shift):
            return optics.compare(
                scene.spectrum,
                view.observation(image, None),
                rotation,
                shift,
                view.frequencies_in_inverse_angstroms,
            )

        seen = jax.vmap(compare)(spectra, rotations, shifts)
        found = estimates(ONLY[name], ctf, seen)
        limited = np.asarray(getattr(found.at_limit, name))
        assert limited.mean() > 0.5
        spread = getattr(ONLY[name], f"{name}_spread")
        errors = np.asarray(getattr(found.errors, name))
        np.testing.assert_allclose(errors[limited], spread)
        assert (errors[~limited] < spread).all()
    within = estimates(BOTH, scene.ctf, scene.seen()).at_limit
    assert np.mean(within.contrast) < 0.02 and np.mean(within.defocus) < 0.02


def test_noise_alone_leaves_what_was_known(scene):
    """An empty map: nothing is learned, and the priors remain."""
    seen = jax.tree.map(jnp.zeros_like, scene.seen(slice(0, 3)))
    ctf = jax.tree.map(lambda leaf: leaf[:3], scene.ctf)
    found = estimates(BOTH, ctf, seen)
    np.testing.assert_allclose(found.optics.contrast, 1)
    np.testing.assert_allclose(found.optics.defocus, 0, atol=1e-6)
    np.testing.assert_allclose(found.errors.contrast, BOTH.contrast_spread)
    np.testing.assert_allclose(found.errors.defocus, BOTH.defocus_spread)
