r"""Aberrations of optics groups: their polynomials, and images that are made by hand.

The image of point scatterers is known in closed form, with a CTF, an offset of its
phase, a tilted beam and a magnification; the view of the particles and the slices of
their map must give the same, and their derivatives those of autodiff. RELION's programs
are asked in `test_relion_aberrations`.
"""

from math import factorial

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import centred, draw, draw_complex, draw_poses, relative_error

from jaxrefine import geometry, simulate
from jaxrefine.aberrations import Aberrations, magnified, with_beam_tilt, zernike
from jaxrefine.ctf import CTF, apply_ctf, electron_wavelength
from jaxrefine.data import observation
from jaxrefine.data.observation import Observation
from jaxrefine.data.particles import Particles
from jaxrefine.errors import InputError
from jaxrefine.maps.sums import insert
from jaxrefine.operators import kbwf, normal, slices
from jaxrefine.operators.gridding import Gridding
from jaxrefine.poses import likelihood

N, PIXEL, LAST = 24, 1.3, 11
ODD = jnp.array([[0.3, -0.2, 9.0, -4.0, 7.0, 12.0], [0.0, 0, -20, 5, 30, 0]])
EVEN = jnp.array([[0.1, 2.0, -3.0, 1.0, 30.0, -20.0, 15, 9, -25], [0.0] * 9])
MATRIX = jnp.array([[[1.03, 0.02], [-0.01, 0.97]], [[0.98, 0.0], [0.03, 1.0]]])
GROUP = np.array([0, 1, 1, 0])
COUNT = len(GROUP)
CTFS = CTF(
    jnp.array([9e3, 1.2e4, 1.5e4, 8e3]), jnp.array([8e3, 1.2e4, 1.4e4, 8e3]), 0.4
)
KINDS = {
    "odd": Aberrations(odd=ODD),
    "even": Aberrations(even=EVEN),
    "magnification": Aberrations(magnification=MATRIX),
    "all": Aberrations(ODD, EVEN, MATRIX),
}


# The errors of these slices are far below the tolerances.
FINE = Gridding(5, 2.0)
equations = eqx.filter_jit(likelihood.normal_equations)
with_gradient = eqx.filter_jit(likelihood.cost_and_gradient)


# --- polynomials


def textbook(n, m, x, y):
    """The polynomial in polar coordinates (Noll, J. Opt. Soc. Am. 66, 1976)."""
    rho, phi, order = np.hypot(x, y), np.arctan2(y, x), abs(m)
    radial = sum(
        (-1) ** k
        * factorial(n - k)
        / (factorial(k) * factorial((n + order) // 2 - k))
        / factorial((n - order) // 2 - k)
        * rho ** (n - 2 * k)
        for k in range((n - order) // 2 + 1)
    )
    return radial * (np.cos(m * phi) if m >= 0 else np.sin(-m * phi))


ORDERS = {
    "odd": [(1, m) for m in (-1, 1)]
    + [(3, m) for m in (-3, -1, 1, 3)]
    + [(5, m) for m in (-5, -3, -1, 1, 3, 5)],
    "even": [(0, 0)]
    + [(2, m) for m in (-2, 0, 2)]
    + [(4, m) for m in (-4, -2, 0, 2, 4)]
    + [(6, m) for m in (-6, -4, -2, 0, 2, 4, 6)],
}


@pytest.mark.parametrize("kind", ORDERS)
def test_each_coefficient_multiplies_its_polynomial(kind):
    """In the order of RELION's columns; at the origin too, where no angle is."""
    points = np.random.default_rng(0).uniform(-0.8, 0.8, (30, 2))
    points[0] = 0
    for place, (n, m) in enumerate(ORDERS[kind]):
        exact = textbook(n, m, *points.T)
        found = zernike(n, m, jnp.asarray(points))
        np.testing.assert_allclose(found, exact, rtol=0, atol=1e-13)
        one = jnp.zeros((1, len(ORDERS[kind]))).at[0, place].set(0.7)
        aberrations = Aberrations(**{kind: one})
        if kind == "odd":
            phase = np.array(aberrations.phase(jnp.asarray(points)))
            np.testing.assert_allclose(phase, np.exp(0.7j * exact)[None], atol=1e-13)
        else:
            gamma = np.array(aberrations.gamma(jnp.asarray(points)))
            np.testing.assert_allclose(gamma, 0.7 * exact[None], atol=1e-13)


def test_a_tilted_beam_has_coma():
    r"""Of the phase :math:`-2\pi C_s \lambda^2 |u|^2 u\cdot\tau`, and no other."""
    tilt, length = np.array([[0.8, -0.3]]), np.array([2.0])
    wave = np.asarray(electron_wavelength(jnp.array(200.0)))[None]
    points = np.random.default_rng(1).uniform(-0.4, 0.4, (20, 2))
    coma = -2 * np.pi * 2.0e7 * wave**2 * np.sum(points**2, axis=1)
    coma = coma * (points @ tilt[0]) * 1e-3
    for odd in (np.zeros((1, 0)), np.array([[0, 0, 0, 50.0, -70.0]])):
        found = with_beam_tilt(odd, tilt, length, wave)
        aberrations = Aberrations(odd=jnp.asarray(found))
        phase = np.array(aberrations.phase(jnp.asarray(points)))
        np.testing.assert_allclose(phase, np.exp(1j * coma)[None], atol=1e-12)
    kept = with_beam_tilt(np.array([[0.1, 0.2, 3.0, 0, 0, 4.0]]), tilt, length, wave)
    rest = kept - with_beam_tilt(np.zeros((1, 6)), tilt, length, wave)
    np.testing.assert_allclose(rest, [[0.1, 0.2, 3.0, 0, 0, 4.0]], atol=1e-12)


def test_derivatives_are_finite_at_the_origin():
    def value(points):
        gamma = KINDS["all"].gamma(points)
        assert gamma is not None
        return jnp.sum(gamma**2)

    assert np.isfinite(jax.grad(value)(jnp.zeros((1, 2)))).all()


# --- images made by hand


def scatterers():
    """Positions ``(x, y, z)`` in voxels, and weights."""
    rng = np.random.default_rng(2)
    return rng.integers(-5, 6, (12, 3)), rng.uniform(0.5, 1.5, 12)


def volume():
    """A map of single voxels, whose spectrum is a sum of waves."""
    made = np.zeros((N, N, N))
    places, weights = scatterers()
    for (x, y, z), weight in zip(places + N // 2, weights, strict=True):
        made[z, y, x] += weight
    return jnp.asarray(made)


def spectra_by_hand(poses, aberrations, omega):
    """The formula of `jaxrefine.aberrations`, written out, ``(particles, k)``."""
    places, weights = scatterers()
    found = []
    for p, group in enumerate(GROUP):
        matrix = np.eye(2)
        if aberrations.magnification is not None:
            matrix = np.asarray(aberrations.magnification[group])
        mapped = omega @ matrix.T
        seen = places @ np.asarray(poses.rotations[p])[:2].T
        values = np.exp(-2j * np.pi / N * mapped @ seen.T) @ weights
        values *= np.exp(-2j * np.pi / N * omega @ np.asarray(poses.shifts[p]))
        u = mapped / (N * PIXEL)
        gamma = chi = np.zeros(len(u))
        if aberrations.even is not None:
            for c, (n, m) in zip(aberrations.even[group], ORDERS["even"], strict=False):
                gamma = gamma + float(c) * textbook(n, m, *u.T)
        if aberrations.odd is not None:
            for c, (n, m) in zip(aberrations.odd[group], ORDERS["odd"], strict=False):
                chi = chi + float(c) * textbook(n, m, *u.T)
        optics = jax.tree.map(lambda leaf, at=p: leaf[at], CTFS)
        values *= np.asarray(optics(jnp.asarray(u), jnp.asarray(gamma)))
        found.append(values * np.exp(1j * chi))
    return np.stack(found)


def images_by_hand(poses, aberrations):
    disc = slices.disc(N, LAST)
    made = spectra_by_hand(poses, aberrations, np.asarray(disc.frequencies))
    return slices.to_images(jnp.asarray(made), disc)


def particles_of(images, aberrations):
    return Particles(
        np.asarray(images), CTFS, PIXEL, group=GROUP, aberrations=aberrations
    )


def test_the_offset_of_the_phase_is_relions():
    """RELION's CTF is ``-sin(gamma)``, and its offset is added to ``gamma``."""
    optics, points = CTF(1e4, 9e3, 0.3), jnp.array([[0.1, 0.05], [-0.2, 0.1]])
    later = CTF(1e4, 9e3, 0.3, phase_shift=-0.4)
    offset = jnp.full(2, 0.4)
    np.testing.assert_allclose(optics(points, offset), later(points), rtol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_seen_of_an_image_is_its_slice(kind):
    """Up to a band limit, where a view compares them; and the noise is unchanged."""
    aberrations, poses = KINDS[kind], draw_poses(COUNT)
    particles = particles_of(images_by_hand(poses, aberrations), aberrations)
    noise = jnp.ones((2, N // 2 + 1)).at[1].set(4.0)
    view = observation.view(particles, LAST, noise, observation.PART)
    group = jnp.asarray(GROUP)
    images = jnp.asarray(particles.images)
    data, transfer, matrices = view.seen(images, CTFS, group)
    spectrum = FINE.spectrum(volume(), LAST)
    model = slices.project(spectrum, view.disc, poses, transfer, magnification=matrices)
    seen = np.asarray(view.weights) > 0
    assert seen.sum() > 0.8 * np.sum(np.asarray(slices.disc(N, LAST).shells) > 0)
    assert relative_error(model[:, seen], data[:, seen]) < 1e-4
    limited = view.up_to(jnp.asarray(6))
    row = jax.tree.map(lambda leaf: leaf[1], (data, transfer, matrices))
    one = limited.observation(*row)
    cost, *_ = equations(spectrum, one, poses.rotations[1], poses.shifts[1])
    assert float(cost) < 1e-7 * float(one.energy)
    # White noise stays white, at the level of its group.
    white = jnp.asarray(np.random.default_rng(3).normal(size=(400, N, N)))
    many = jnp.asarray(np.arange(400) % 2)
    power = np.abs(view.spectra(white, many)[:, seen]) ** 2 / N**2
    for g, level in ((0, 1.0), (1, 0.25)):
        assert np.mean(power[g::2]) == pytest.approx(level, rel=0.02)


@pytest.mark.parametrize("kind", KINDS)
def test_simulated_images_have_them(kind):
    """`slice_projector` and `apply_ctf` make what is made by hand, below Nyquist."""
    aberrations, poses = KINDS[kind], draw_poses(COUNT)
    chosen = np.flatnonzero(GROUP == 0)
    few, optics = jax.tree.map(lambda leaf: leaf[chosen], (poses, CTFS))
    matrix = aberrations.magnification
    project = simulate.slice_projector(volume(), magnification=matrix)
    images = apply_ctf(optics, project(few), PIXEL, aberrations)
    disc = slices.disc(N, 10)
    omega = np.asarray(disc.frequencies)
    exact = spectra_by_hand(poses, aberrations, omega)[chosen]
    mapped = (
        omega
        if matrix is None
        else np.asarray(magnified(matrix[0], jnp.asarray(omega)))
    )
    radius = jnp.asarray(2 * np.pi / N * np.linalg.norm(mapped, axis=1))
    basis = kbwf.SIMULATION_BASIS
    # Voxels are expanded in a window, and then sampled at all frequencies.
    window = np.asarray(kbwf.fourier_transform(basis, radius))
    coefficients = kbwf.expand(basis, volume())
    assert images.shape == (len(chosen), N, N)
    spectra = slices.image_spectra(images, disc)
    for i, p in enumerate(chosen):
        points = mapped @ np.asarray(poses.rotations[p])[:2]
        points = jnp.asarray(points)
        values = [FINE.spectrum(v, LAST) for v in (coefficients, volume())]
        ratio = np.asarray(evaluate(values[0], points) / evaluate(values[1], points))
        expected = exact[i] * (window * ratio)
        assert relative_error(spectra[i], expected) < 1e-4


@eqx.filter_jit
def evaluate(spectrum, points):
    return spectrum(points[:, 0], points[:, 1], points[:, 2])


# --- derivatives and adjoints

DISC = slices.disc(16, 6)
K = len(DISC.multiplicity)


def test_gradient_and_normal_equations_with_a_magnification():
    """``jax.grad`` of the cost, and ``jacfwd`` of the slice written in the open."""
    reference = Gridding(2, 1.5).spectrum(draw(16, 16, 16), 7)
    poses = draw_poses(1)
    rotation, shift = poses.rotations[0], poses.shifts[0]
    transfer = jnp.cos(draw(K, seed=5))
    matrix = jnp.array([[1.08, 0.05], [-0.03, 0.95]])
    seen = Observation(
        DISC,
        DISC.quadrature * (1 + draw(K, seed=6) ** 2),
        8 * draw_complex(K, seed=7),
        transfer,
        magnification=matrix,
    )

    def moved(step):
        return geometry.rotvec_to_matrix(step[:3]) @ rotation, shift + step[3:]

    def residual(step):
        turned, at = moved(step)
        omega = DISC.frequencies
        points = (omega @ matrix.T) @ turned[:2]
        values = reference(points[:, 0], points[:, 1], points[:, 2])
        angle = -2 * np.pi / 16 * (omega @ at)
        phase = jax.lax.complex(jnp.cos(angle), jnp.sin(angle))
        return values * phase * transfer.astype(phase.dtype) - seen.spectrum

    zero, w = jnp.zeros(5), np.asarray(seen.weights)
    functions = jax.jit(residual), jax.jit(jax.jacfwd(residual))
    r, jacobian = (np.asarray(function(zero)) for function in functions)
    slope = np.real((jacobian.conj() * w[:, None]).T @ r)
    square = np.real((jacobian.conj() * w[:, None]).T @ jacobian)

    @jax.jit
    def cost(step):
        return likelihood.cost(reference, seen, *moved(step))

    np.testing.assert_allclose(cost(zero), np.sum(w * np.abs(r) ** 2) / 2, rtol=1e-12)
    assert relative_error(jax.grad(cost)(zero), slope) < 1e-10
    _, gradient = with_gradient(reference, seen, rotation, shift)
    assert relative_error(gradient, slope) < 1e-10
    _, gradient, information = equations(reference, seen, rotation, shift)
    assert relative_error(gradient, slope) < 1e-10
    assert relative_error(information, square) < 1e-10


def test_sums_with_a_magnification_are_those_of_the_dense_matrix():
    """``H^T W g`` and ``H^T W H`` of every voxel, each image with its own matrix."""
    n, count = 16, 3
    poses, matrices = draw_poses(count), jnp.asarray([*MATRIX, jnp.eye(2)])
    spectra, transfer = draw_complex(count, K), jnp.cos(draw(count, K, seed=4))
    weights = 1 + draw(count, K, seed=5) ** 2
    sums = eqx.filter_jit(insert)(
        Gridding(6, 2.0), DISC, spectra, poses, transfer, weights, None, matrices
    )
    z, y, x = np.meshgrid(*[centred(n)] * 3, indexing="ij")
    voxels = np.stack([x.ravel(), y.ravel(), z.ravel()])
    omega = np.asarray(DISC.frequencies)
    mapped = np.einsum("pij,kj->pki", matrices, omega)
    points = np.einsum("pki,pij->pkj", mapped, np.asarray(poses.rotations)[:, :2])
    h = np.exp(-2j * np.pi / n * points @ voxels) * np.asarray(transfer)[..., None]
    h *= np.exp(-2j * np.pi / n * np.asarray(poses.shifts) @ omega.T)[..., None]
    w = np.asarray(weights) * np.asarray(DISC.quadrature)
    exact = np.einsum("pkv,pk->v", h.conj(), w * np.asarray(spectra)).real
    assert relative_error(sums.backprojection.ravel(), exact) < 1e-4
    probe = np.asarray(draw(n**3, seed=8))
    through = np.einsum("pkv,pk->v", h.conj(), w * (h @ probe)).real
    product = normal.apply_normal(
        normal.transfer(sums.kernel), jnp.asarray(probe.reshape(n, n, n))
    )
    assert relative_error(product.ravel(), through) < 1e-4


# --- what cannot be


def test_particles_refuse_aberrations_that_do_not_fit():
    images = np.zeros((COUNT, N, N), np.float32)
    words = "^aberrations must be those of 3 groups, got those of 2$"
    with pytest.raises(InputError, match=words):
        Particles(images, CTFS, PIXEL, GROUP * 2, aberrations=KINDS["odd"])
    words = "^pixel_size_in_angstroms must be given with aberrations, got none$"
    with pytest.raises(InputError, match=words):
        Particles(images, None, group=GROUP, aberrations=KINDS["odd"])


def test_a_choice_of_particles_keeps_their_groups():
    aberrations, poses = KINDS["all"], draw_poses(COUNT)
    particles = particles_of(images_by_hand(poses, aberrations), aberrations)
    few = particles.take(np.array([3, 1]))
    noise = jnp.ones((2, N // 2 + 1), jnp.float32)
    images, ctf = few.batch(np.arange(2))
    found = observation.view(few, LAST, noise).seen(
        images, ctf, jnp.asarray(few.group_of(np.arange(2)))
    )
    images, ctf = particles.batch(np.array([3, 1]))
    exact = observation.view(particles, LAST, noise).seen(
        images, ctf, jnp.asarray(GROUP[[3, 1]])
    )
    assert eqx.tree_equal(found, exact)
