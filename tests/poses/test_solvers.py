"""Pose updates on a problem that scipy solves too: points seen in projection."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.optimize
from scipy.spatial.transform import Rotation

from jaxrefine.geometry import geodesic_distance
from jaxrefine.poses import solvers
from jaxrefine.poses.solvers import Descent, LevenbergMarquardt

POINTS = np.random.default_rng(0).normal(size=(9, 3))
SIGMA = 0.05
TRUTH = Rotation.from_rotvec([0.3, -0.5, 0.9]).as_matrix(), np.array([0.7, -1.1])


class Seen(eqx.Module):
    """Points ``M R x + t``, seen with noise of a known strength."""

    seen: jax.Array
    sigma: float = eqx.field(static=True, default=SIGMA)

    def residual(self, step, rotation, shift):
        rotation, shift = solvers.retract(rotation, shift, step)
        points = jnp.asarray(POINTS, self.seen.dtype)
        at = jnp.matmul(points, rotation[:2].T, precision="highest") + shift[None]
        return (at - self.seen).ravel() / self.sigma

    def __call__(self, rotation, shift):
        zero = jnp.zeros(5, self.seen.dtype)
        r = self.residual(zero, rotation, shift)
        j = jax.jacfwd(self.residual)(zero, rotation, shift)
        return jnp.sum(r**2) / 2, r @ j, j.T @ j


def observe(seed=1, sigma=SIGMA, dtype=jnp.float64):
    noise = np.random.default_rng(seed).normal(size=(len(POINTS), 2))
    clean = POINTS @ TRUTH[0][:2].T + TRUTH[1]
    return Seen(jnp.asarray(clean + sigma * noise, dtype), sigma)


def free(rotation, shift):
    return rotation, shift


def near_truth(angle, seed=2, dtype=jnp.float64):
    axis = np.random.default_rng(seed).normal(size=3)
    turn = Rotation.from_rotvec(angle * axis / np.linalg.norm(axis)).as_matrix()
    shift = TRUTH[1] + angle
    return jnp.asarray(turn @ TRUTH[0], dtype), jnp.asarray(shift, dtype)


@eqx.filter_jit
def minimise(update, objective, rotation, shift, constraint=free):
    # optax's Adam raises a float to an integer power, which "strict" forbids.
    with jax.numpy_dtype_promotion("standard"):
        return update.minimise(objective, rotation, shift, constraint)


def by_scipy(objective, rotation, shift):
    """The optimum in one chart, by another algorithm with numerical derivatives."""
    seen = np.asarray(objective.seen)

    def residual(v):
        turned = Rotation.from_rotvec(v[:3]).as_matrix() @ np.asarray(rotation)
        return ((POINTS @ turned[:2].T + v[3:] - seen) / objective.sigma).ravel()

    start = np.concatenate([np.zeros(3), shift])
    found = scipy.optimize.least_squares(residual, start, xtol=1e-14, gtol=1e-12)
    turned = Rotation.from_rotvec(found.x[:3]).as_matrix() @ np.asarray(rotation)
    return turned, found.x[3:], found.cost


UPDATES = {
    "LM": LevenbergMarquardt(iterations=12),
    "Adam": Descent(optax.adam(optax.cosine_decay_schedule(2.0, 300)), iterations=300),
    "SGD": Descent(optax.sgd(0.6, momentum=0.5), iterations=300),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", UPDATES)
@pytest.mark.parametrize("angle", [0.02, 0.6])
def test_every_update_finds_the_optimum(name, angle):
    objective, start = observe(), near_truth(angle)
    estimate = minimise(UPDATES[name], objective, *start)
    rotation, shift, cost = by_scipy(objective, *start)
    # Descent is an inexact method, and the last step of Levenberg-Marquardt is not
    # followed by another: a hundredth of the standard deviations suffices.
    accuracy = 0.01 * SIGMA
    assert float(estimate.cost) == pytest.approx(cost, rel=1e-4)
    turned = geodesic_distance(estimate.rotation, jnp.asarray(rotation))
    assert float(turned) < accuracy
    np.testing.assert_allclose(estimate.shift, shift, rtol=0, atol=accuracy)
    # What is told of the pose is what the objective tells there.
    there = objective(estimate.rotation, estimate.shift)
    exact = 1e-2 if name == "LM" else 1e-10
    np.testing.assert_allclose(estimate.cost, there[0], rtol=exact)
    scale = np.abs(there[2]).max()
    np.testing.assert_allclose(estimate.information, there[2], atol=exact * scale)
    np.testing.assert_allclose(
        estimate.covariance @ estimate.information, np.eye(5), atol=1e-9
    )


@pytest.mark.parametrize("name", UPDATES)
def test_updates_satisfy_the_protocol(name):
    update = UPDATES[name]
    assert isinstance(update, solvers.PoseUpdate)
    assert not isinstance(object(), solvers.PoseUpdate)
    estimate = minimise(update, observe(), *near_truth(0.1))
    assert 1 < int(estimate.evaluations) <= 301


def test_the_first_order_law_of_retract():
    """exp(w^) R moves a point of R by w x, and t by dt."""
    rotation, shift = near_truth(0.4)
    slope_r, slope_t = jax.jacfwd(lambda d: solvers.retract(rotation, shift, d))(
        jnp.zeros(5)
    )
    point = np.array([0.2, -1.0, 3.0])
    for i in range(3):
        expected = np.cross(np.eye(3)[i], np.asarray(rotation) @ point)
        np.testing.assert_allclose(slope_r[..., i] @ point, expected, atol=1e-14)
    np.testing.assert_array_equal(slope_r[..., 3:], 0)
    np.testing.assert_array_equal(slope_t, np.eye(5)[3:])


@pytest.mark.parametrize("seed", range(2))
def test_the_cost_never_rises(seed):
    """Prefixes of one run: each ends at least as low as the one before."""
    objective, start = observe(seed), near_truth(2.5, seed)
    costs = [float(objective(*start)[0])]
    for count in (0, 1, 3, 20):
        update = LevenbergMarquardt(iterations=count, damping=1e-6)
        part = minimise(update, objective, *start)
        assert int(part.evaluations) <= count + 1
        costs.append(float(part.cost))
    assert costs[0] == costs[1] and costs == sorted(costs, reverse=True)
    assert costs[-1] < costs[0]


def test_a_step_is_scaled_and_damped_as_marquardt_says():
    """Accepted or rejected, it is that of the damping that those before it left."""
    results = set()

    def overshooting(objective):
        """With less information than there is, steps are too long at first."""

        def values(rotation, shift):
            cost, gradient, information = objective(rotation, shift)
            return cost, gradient, information / 5

        return values

    for seed in range(3):
        objective, start = overshooting(observe(seed)), near_truth(1.0, seed)
        damping, cost, pose = 1e-6, float(objective(*start)[0]), start
        for count in range(1, 12):
            _, gradient, information = (np.asarray(x) for x in objective(*pose))
            diagonal = np.diag(information)
            floor = 1e-6 * diagonal.max()  # for images without information
            damped = information + np.diag(damping * diagonal + floor)
            step = -np.linalg.solve(damped, gradient)
            step *= min(1.0, 0.5 / np.linalg.norm(step[:3]))
            trial = solvers.retract(*pose, jnp.asarray(step))
            value = float(objective(*trial)[0])
            better = value < cost
            if better:
                pose, cost = trial, value
            damping *= 1 / 5 if better else 8
            update = LevenbergMarquardt(iterations=count, damping=1e-6)
            found = minimise(update, objective, *start)
            if int(found.evaluations) <= count:
                break  # the last step was taken on trust
            assert float(found.cost) == pytest.approx(cost, rel=1e-5)
            np.testing.assert_allclose(found.rotation, pose[0], atol=1e-4)
            results.add(better)
    assert results == {True, False}


def test_the_last_step_is_taken_without_an_evaluation():
    """Near the optimum: one evaluation, and the cost is that which scipy finds."""
    objective, start = observe(), near_truth(0.4)
    rotation, shift, cost = by_scipy(objective, *start)
    near = solvers.retract(
        jnp.asarray(rotation), jnp.asarray(shift), jnp.full(5, 0.1 * SIGMA / 5)
    )
    estimate = minimise(LevenbergMarquardt(), objective, *near)
    assert int(estimate.evaluations) == 1
    before = float(objective(*near)[0]) - cost
    assert 1e-4 < before < 0.05
    assert abs(float(estimate.cost) - cost) < 0.1 * before
    there = float(objective(estimate.rotation, estimate.shift)[0]) - cost
    assert there < 0.02 * before
    # With no step to make, the pose stays.
    still = minimise(LevenbergMarquardt(iterations=0), objective, *near)
    np.testing.assert_array_equal(still.rotation, near[0])
    assert float(still.cost) == float(objective(*near)[0])


def test_no_step_turns_by_more_than_half_a_radian():
    objective, start = observe(), near_truth(2.9)
    update = LevenbergMarquardt(iterations=1, damping=1e-9)
    estimate = minimise(update, objective, *start)
    assert 0 < float(geodesic_distance(estimate.rotation, start[0])) <= 0.5 + 1e-9


@pytest.mark.parametrize("name", ["LM", "SGD"])
def test_the_constraint_is_respected(name):
    """Also by the start; at the bound a cost as low as any nearby one's."""
    objective, limit = observe(), 0.2

    def constraint(rotation, shift):
        return rotation, jnp.clip(shift, -limit, limit)

    estimate = minimise(UPDATES[name], objective, *near_truth(0.1), constraint)
    np.testing.assert_array_equal(np.abs(estimate.shift), limit)
    np.testing.assert_allclose(np.sign(estimate.shift), np.sign(TRUTH[1]))
    assert np.isfinite(estimate.cost)
    allowed = constraint(*near_truth(0.1))
    assert float(estimate.cost) <= float(objective(*allowed)[0])


@pytest.mark.parametrize("dtype", [jnp.float64, jnp.float32])
@pytest.mark.parametrize("name", ["LM", "SGD"])
def test_without_information_nothing_moves(name, dtype):
    """An image that says nothing: cost, gradient and information are zero."""

    def nothing(rotation, shift):
        zero = jnp.zeros((), dtype)
        return zero, jnp.zeros(5, dtype), jnp.zeros((5, 5), dtype)

    start = near_truth(0.3, dtype=dtype)
    estimate = minimise(UPDATES[name], nothing, *start)
    np.testing.assert_array_equal(estimate.rotation, start[0])
    np.testing.assert_array_equal(estimate.shift, start[1])
    leaves = [estimate.rotation, estimate.shift, estimate.cost, estimate.information]
    assert all(np.isfinite(leaf).all() for leaf in leaves)
    assert all(leaf.dtype == dtype for leaf in leaves)


def test_in_single_precision():
    objective, start = observe(dtype=jnp.float32), near_truth(0.4, dtype=jnp.float32)
    estimate = minimise(LevenbergMarquardt(iterations=6), objective, *start)
    rotation, shift, _ = by_scipy(objective, *start)
    found = jnp.asarray(rotation, jnp.float32)
    assert float(geodesic_distance(estimate.rotation, found)) < 1e-4
    np.testing.assert_allclose(estimate.shift, shift, atol=1e-4)
    assert estimate.cost.dtype == estimate.information.dtype == jnp.float32


def test_the_covariance_is_that_of_the_estimates():
    """Over many noises, small enough for the problem to be linear."""
    sigma, count = 1e-3, 3000
    noise = np.random.default_rng(4).normal(size=(count, len(POINTS), 2))
    clean = POINTS @ TRUTH[0][:2].T + TRUTH[1]
    many = Seen(jnp.asarray(clean + sigma * noise), sigma)
    start = jnp.asarray(TRUTH[0]), jnp.asarray(TRUTH[1])
    update = LevenbergMarquardt(iterations=4)

    def one(seen):
        return update.minimise(Seen(seen, sigma), *start, free)

    estimates = jax.jit(jax.vmap(one))(many.seen)
    turns = np.asarray(estimates.rotation) @ TRUTH[0].T
    vectors = Rotation.from_matrix(turns).as_rotvec()
    errors = np.concatenate([vectors, np.asarray(estimates.shift) - TRUTH[1]], axis=1)
    predicted = np.asarray(jnp.mean(estimates.covariance, axis=0))
    # Whitened by the prediction the errors' covariance is the identity.
    root = np.linalg.inv(np.linalg.cholesky(predicted))
    whitened = errors @ root.T
    spread = 4 * np.sqrt(2 / count)
    np.testing.assert_allclose(whitened.T @ whitened / count, np.eye(5), atol=spread)
    np.testing.assert_allclose(whitened.mean(axis=0), 0, atol=4 / np.sqrt(count))
