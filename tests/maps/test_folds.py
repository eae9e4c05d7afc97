"""Folds of the particles: each map is the other's, and tau is that of a scan.

The error of prediction is the sum over the images left out, and cross-validation ends
near the minimum of a scan over a fine grid, from either side of it.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import slice_matrix

from jaxrefine.maps import admm, folds, tv
from jaxrefine.maps.sums import Sums, data_term, solve

N = 16


class Case:
    """The folds of noisy images, and how to solve for their maps."""

    def __init__(self, sums):
        self.data = folds.folds(sums)
        self.starts = [admm.init(jnp.zeros((N, N, N)))] * 2

    def solutions(self, tau, iterations=10, starts=None):
        return folds.solve_all(
            self.data,
            self.starts if starts is None else starts,
            jnp.asarray(tau),
            tv.IsotropicTV(),
            iterations,
        )

    def error(self, states):
        return sum(
            float(folds.prediction_error(own, state.coefficients))
            for own, state in zip(self.data.own, states, strict=True)
        )


@pytest.fixture(scope="module")
def case(noisy):
    return Case(noisy.sums)


@pytest.mark.slow
def test_folds_are_made_of_each_other(noisy, case):
    """A fold's map is the solution for the other fold's images, to the last bit."""
    tau, penalty = jnp.asarray(1.3), tv.IsotropicTV()
    for state, other in zip(case.solutions(tau), noisy.sums[::-1], strict=True):
        data = data_term(other)
        alone = solve(data, other.peak, case.starts[0], tau, penalty, 10)
        np.testing.assert_array_equal(state.coefficients, alone.coefficients)


def test_no_images_make_an_empty_map(noisy, case):
    """Nor do they leave anything in the multipliers, whatever the start was."""
    nothing = Sums.zero(N, jnp.float64)
    start = jax.tree.map(lambda leaf: leaf + 1.0, case.starts[0])
    of_images, of_nothing = folds.solve_all(
        folds.folds([nothing, noisy.sums[1]]),
        [start] * 2,
        jnp.asarray(1.3),
        tv.IsotropicTV(),
        10,
    )
    assert float(jnp.max(of_images.coefficients)) > 0.1
    for leaf in jax.tree.leaves(of_images):
        assert np.isfinite(leaf).all()
    for leaf in jax.tree.leaves(of_nothing):
        np.testing.assert_array_equal(leaf, 0)


def test_prediction_error_of_held_out_images(noisy, case):
    """Directly, image by image, of the images that the map was not made of."""
    state = case.solutions(1.0)[0]
    matrix = slice_matrix(noisy.disc, noisy.poses[0])
    seen = matrix @ np.asarray(state.coefficients).ravel()
    data = np.asarray(noisy.spectra[0])
    gap = np.abs(seen - data) ** 2 - np.abs(data) ** 2
    exact = 0.5 * np.sum(np.asarray(noisy.disc.quadrature) * gap) / noisy.sigma**2
    value = float(folds.prediction_error(case.data.own[0], state.coefficients))
    # The accuracy of the insertion.
    assert value == pytest.approx(exact, rel=2e-3)


@pytest.fixture(scope="module")
def scan(case):
    """Prediction errors on a fine grid of tau, from converged solutions."""
    grid = np.geomspace(0.03, 30, 28)
    errors, states = [], None
    for tau in grid:
        for _ in range(3):
            states = case.solutions(tau, starts=states)
        errors.append(case.error(states))
    return grid, np.array(errors)


@pytest.mark.slow
@pytest.mark.parametrize("start", [0.15, 0.5, 2.0, 6.0])
def test_cross_validation_finds_the_minimum_of_a_scan(case, scan, start):
    grid, errors = scan
    best = grid[np.argmin(errors)]
    assert grid[3] < best < grid[-4]
    tau, states, table = folds.cross_validate(
        case.data, case.starts, jnp.asarray(start), tv.IsotropicTV(), 30, trials=14
    )
    assert 1 / 1.5 < float(tau) / best < 1.5
    # The solutions are those of the best tried, and their error is in the table.
    tried = min(table, key=table.__getitem__)
    assert case.error(states) == pytest.approx(table[tried], rel=1e-12)
    assert 1 / 1.4 <= float(tau) / tried <= 1.4
    # And they are near the ones of the scan.
    assert min(table.values()) == pytest.approx(errors.min(), rel=2e-3)
    ratios = np.diff(np.log(sorted(table)))
    np.testing.assert_allclose(ratios, np.log(1.4), rtol=1e-6)


def test_cross_validation_stops_when_its_trials_are_spent(case):
    tau, _, table = folds.cross_validate(
        case.data, case.starts, jnp.asarray(0.15), tv.IsotropicTV(), 30, trials=3
    )
    assert len(table) <= 4
    assert 0.15 < float(tau) <= 0.15 * 1.4**3


def test_cross_validation_walks_the_right_way_from_a_cold_start(case, scan):
    """Far below the best tau it has to go up, though no map has converged yet."""
    assert scan[0][np.argmin(scan[1])] > 0.1
    tau, *_ = folds.cross_validate(
        case.data, case.starts, jnp.asarray(0.05), tv.IsotropicTV(), 30
    )
    assert float(tau) > 0.05
