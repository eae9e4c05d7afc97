"""Sums over images against the dense ones, and the maps that are made of them.

What is inserted is the definition's kernel and back-projection, the data term is the
sum of squares, one ``tau`` serves any noise and number of images, and least squares
solve the normal equations.
"""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import (
    centred,
    draw,
    draw_complex,
    draw_poses,
    lattice_points,
    relative_error,
    slice_frequencies,
    slice_matrix,
)

from jaxrefine.maps import admm, tv
from jaxrefine.maps.sums import Sums, data_term, insert, least_squares, solve
from jaxrefine.operators import normal, slices
from jaxrefine.operators.gridding import Gridding

N, R_MAX, P = 16, 7, 6
# Relative error of this on white noise: see test_gridding.
INSERTION, ERROR = Gridding(6, 2.0), 1e-4
DISC = slices.disc(N, R_MAX)
K = len(DISC.shells)
ALL = np.arange(P)
insert = eqx.filter_jit(insert)


class Images:
    """Random spectra at random poses, with optics and weights of their own."""

    def __init__(self, with_transfer=True):
        self.poses = draw_poses(P)
        self.spectra = draw_complex(P, K, seed=2)
        self.transfer = draw(P, K, seed=4) if with_transfer else None
        self.weights = jnp.abs(draw(P, K, seed=5))
        self.matrix = slice_matrix(DISC, self.poses, self.transfer)
        self.both = np.asarray(DISC.quadrature) * np.asarray(self.weights)

    def sums(self, chosen=ALL):
        return insert(
            INSERTION,
            DISC,
            self.spectra[chosen],
            self.poses.take(chosen),
            None if self.transfer is None else self.transfer[chosen],
            self.weights[chosen],
        )

    def cost(self, c, data):
        """The weighted sum of squares, with and without the images."""
        residual = self.matrix @ np.asarray(c).ravel() - data
        return 0.5 * np.sum(self.both * np.abs(residual) ** 2)


@pytest.fixture(scope="module")
def images():
    return Images()


@pytest.fixture(scope="module")
def sums(images):
    return images.sums()


@pytest.mark.slow
@pytest.mark.parametrize("with_transfer", [True, False])
def test_insert_is_the_dense_sum(with_transfer):
    """Weights once, transfer once in the images and twice in the kernel."""
    images = Images(with_transfer)
    sums = images.sums()
    weighted = images.both * np.asarray(images.spectra)
    backprojection = np.einsum("pkv,pk->v", images.matrix.conj(), weighted).real
    assert relative_error(np.ravel(sums.backprojection), backprojection) < ERROR
    density = images.both * np.abs(images.matrix[..., 0]) ** 2
    lags = 2 * np.pi / N * lattice_points(np.arange(1 - N, N))
    omega = slice_frequencies(DISC, images.poses).reshape(-1, 3)
    kernel = density.ravel() @ np.cos(omega @ lags)
    assert sums.kernel.shape == (2 * N - 1,) * 3
    assert relative_error(np.ravel(sums.kernel), kernel) < ERROR
    assert float(sums.peak) == pytest.approx(density.sum(), rel=ERROR)


def test_sums_add_up(images, sums):
    first, last = (images.sums(chosen) for chosen in np.split(ALL, 2))
    total = Sums.zero(N, jnp.float64) + first + last
    for value, exact in zip(jax.tree.leaves(total), jax.tree.leaves(sums), strict=True):
        assert relative_error(value, exact) < 1e-12


@pytest.mark.slow
def test_the_data_term_is_the_sum_of_squares(images, sums):
    """Of the images' residuals, less the energy of the images."""
    data = data_term(sums)
    spectra = np.asarray(images.spectra)
    energy = images.cost(np.zeros((N, N, N)), spectra)
    for seed in range(3):
        c = draw(N, N, N, seed=seed)
        exact = images.cost(c, spectra) - energy
        value = float(data.value(c, normal.apply_normal(data.transfer, c)))
        assert value == pytest.approx(exact, abs=ERROR * energy, rel=10 * ERROR)
        # And what project() makes of the map has that residual.
        spectrum = INSERTION.spectrum(c, R_MAX)
        seen = slices.project(spectrum, DISC, images.poses, images.transfer)
        residual = np.abs(np.asarray(seen) - spectra) ** 2
        again = 0.5 * np.sum(images.both * residual) - energy
        assert value == pytest.approx(again, abs=ERROR * energy, rel=10 * ERROR)


def test_the_peak_is_the_variance_of_the_noise(noisy):
    """In a voxel of the back-projection, for whitened images."""
    values, poses = [], noisy.poses[0]
    for seed in range(40):
        noise = noisy.sigma * draw(len(poses), N, N, seed=100 + seed)
        sums = noisy.insert(slices.image_spectra(noise, noisy.disc), poses)
        values.append(np.asarray(sums.backprojection)[4:12, 4:12, 4:12])
    variance = np.mean(np.square(values))
    assert variance == pytest.approx(float(noisy.sums[0].peak), rel=0.05)


@pytest.mark.parametrize(("noise", "copies"), [(7.0, 1), (1.0, 9), (0.2, 4)])
def test_tau_serves_any_noise_and_number(noisy, noise, copies):
    """Images ``s`` times as strong, noise included: the same tau, ``s`` times the map.

    With ``q**2`` times as many images the penalty has to count ``q`` times as much.
    """
    sums = noisy.sums[1]
    scaled = Sums(copies / noise**2 * sums.kernel, copies / noise * sums.backprojection)
    start = admm.init(jnp.zeros((N, N, N)))

    def solution(sums, tau):
        tau, penalty = jnp.asarray(tau), tv.IsotropicTV()
        return solve(data_term(sums), sums.peak, start, tau, penalty, 10).coefficients

    plain, other = solution(sums, 1.3), solution(scaled, 1.3 * np.sqrt(copies))
    assert relative_error(other / noise, plain) < 1e-8


def test_least_squares_solve_the_normal_equations(images):
    """Those of the definition for maps in the ball; of no images the map is empty."""
    sums = images.sums()
    small = 1e-3 * float(sums.peak)
    ball = (lattice_points(centred(N)) ** 2).sum(axis=0) <= (N / 2) ** 2

    def residual(c):
        c = np.asarray(c).ravel()
        assert not c[~ball].any()
        misfit = images.both * (images.matrix @ c - np.asarray(images.spectra))
        pull = np.einsum("pkn,pk->n", images.matrix.conj(), misfit).real + small * c
        right = np.asarray(sums.backprojection).ravel()[ball]
        return np.linalg.norm(pull[ball]) / np.linalg.norm(right)

    soon, late = (least_squares(sums, k) for k in (20, 500))
    assert residual(late) < 3e-3 < residual(soon) < 0.3
    assert not jnp.any(least_squares(Sums.zero(N, jnp.float64)))
