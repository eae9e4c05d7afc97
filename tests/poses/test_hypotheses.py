"""What is believed of poses: densities, derivatives and rankings by other routes."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.spatial.transform import Rotation
from scipy.stats import multivariate_normal

from jaxrefine import symmetry
from jaxrefine.geometry import Poses, geodesic_distance
from jaxrefine.poses import hypotheses, solvers
from jaxrefine.poses.hypotheses import certain
from jaxrefine.poses.prior import Prior, priors_about

ANGLE_STD, SHIFT_STD, MAX_ANGLE, MAX_SHIFT = 0.3, 1.5, 0.8, 2.5


def draw_rotations(count, seed=0, dtype=jnp.float64):
    matrices = Rotation.random(count, np.random.default_rng(seed)).as_matrix()
    return jnp.asarray(matrices, dtype)


def make_prior(seed=0, dtype=jnp.float64, **changes):
    settings = {
        "angle_spread": ANGLE_STD,
        "shift_spread": SHIFT_STD,
        "max_angle": MAX_ANGLE,
        "max_shift": MAX_SHIFT,
    }
    numbers = [jnp.asarray(x, dtype) for x in (settings | changes).values()]
    shift = jnp.asarray(np.random.default_rng(seed).normal(size=2), dtype)
    return Prior(draw_rotations(1, seed, dtype)[0], shift, *numbers)


retract = jax.jit(solvers.retract)
merge = jax.jit(hypotheses.merge)
cost = jax.jit(Prior.cost)
gradient = jax.jit(Prior.gradient)
clip = jax.jit(Prior.clip)
distance = jax.jit(geodesic_distance)


@jax.jit
def cost_along(step, known, pose):
    rotation, shift = pose
    return known.cost(*solvers.retract(rotation, shift, step))


def moved(known, step):
    """The prior's pose, turned and shifted by a 5-vector."""
    step = jnp.asarray(step, known.shifts.dtype)
    return retract(known.rotations, known.shifts, step)


def steps(count, angle, shift, seed=5):
    """5-vectors whose turn and whose shift have these lengths."""
    v = np.random.default_rng(seed).normal(size=(count, 5))
    v[:, :3] *= angle / np.linalg.norm(v[:, :3], axis=1, keepdims=True)
    v[:, 3:] *= shift / np.linalg.norm(v[:, 3:], axis=1, keepdims=True)
    return v


# --- Prior


@pytest.mark.parametrize("angle", [0.0, 1e-4, 0.4, 2.9])
def test_the_cost_is_the_negative_log_density(angle):
    """Of a normal distribution of the rotation vector (by scipy) and the shift."""
    known = make_prior()
    covariance = np.diag([ANGLE_STD**2] * 3 + [SHIFT_STD**2] * 2)
    for step in steps(4, angle, 1.7):
        rotation, shift = moved(known, step)
        turn = np.asarray(rotation) @ np.asarray(known.rotations).T
        v = Rotation.from_matrix(turn).as_rotvec()
        point = np.concatenate([v, np.asarray(shift - known.shifts)])
        exact = -multivariate_normal.logpdf(point, cov=covariance)  # pyright: ignore
        assert float(cost(known, rotation, shift)) == pytest.approx(exact, rel=1e-9)


@pytest.mark.parametrize("angle", [0.0, 1e-3, 0.4, 2.0])
def test_the_gradient_of_the_prior(angle):
    """Along exp(w^) R: |log|^2 has its logarithm as gradient, at any distance."""
    known = make_prior()
    slope = jax.jit(jax.jacfwd(cost_along))
    for step in steps(3, angle, 1.7):
        pose = moved(known, step)
        twin = slope(jnp.zeros(5), known, pose)
        np.testing.assert_allclose(gradient(known, *pose), twin, rtol=1e-9, atol=1e-9)


def test_the_information_of_the_prior():
    """It is the Hessian where the prior is most dense, and positive definite."""
    known = make_prior()
    pose = known.rotations, known.shifts
    hessian = jax.jit(jax.hessian(cost_along))(jnp.zeros(5), known, pose)
    np.testing.assert_allclose(known.information(), hessian, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("dtype", [jnp.float64, jnp.float32])
@pytest.mark.parametrize(("angle", "shift"), [(0.0, 0.0), (0.79, 2.49), (0.1, 0.01)])
def test_allowed_poses_are_left_alone(angle, shift, dtype):
    known = make_prior(dtype=dtype)
    for step in steps(3, angle, max(shift, 1e-12)):
        pose = moved(known, step)
        new = clip(known, *pose)
        np.testing.assert_array_equal(new[0], pose[0])
        np.testing.assert_allclose(new[1], pose[1], atol=1e-6)
        assert new[0].dtype == new[1].dtype == dtype


@pytest.mark.parametrize("angle", [0.81, 1.7, 3.1])
@pytest.mark.parametrize("shift", [1.0, 2.51, 40.0])
def test_other_poses_end_at_the_largest_deviation(angle, shift):
    """Nearest: on the geodesic, and no random allowed pose is nearer."""
    known = make_prior()
    allowed = np.concatenate(
        [steps(300, MAX_ANGLE, MAX_SHIFT, seed) for seed in (1, 2)]
    ) * np.random.default_rng(3).uniform(size=(600, 1)) ** (1 / 3)
    others, moves = jax.jit(jax.vmap(lambda s: moved(known, s)))(jnp.asarray(allowed))
    for step in steps(3, angle, shift):
        pose = moved(known, step)
        rotation, t = clip(known, *pose)
        assert float(distance(rotation, known.rotations)) == pytest.approx(
            MAX_ANGLE, rel=1e-9
        )
        deviation = np.linalg.norm(t - known.shifts)
        assert deviation == pytest.approx(min(shift, MAX_SHIFT), rel=1e-9)
        turned = float(distance(rotation, pose[0]))
        assert turned == pytest.approx(angle - MAX_ANGLE, rel=1e-6)
        there = jnp.broadcast_to(pose[0], others.shape)
        assert turned <= distance(others, there).min() + 1e-9
        gaps = np.linalg.norm(np.asarray(moves) - np.asarray(pose[1]), axis=1)
        assert np.linalg.norm(t - pose[1]) <= gaps.min() + 1e-9
        # A projection: what was clipped is allowed.
        again = clip(known, rotation, t)
        np.testing.assert_allclose(again[0], rotation, atol=1e-12)
        np.testing.assert_allclose(again[1], t, atol=1e-12)


def test_priors_of_many_particles():
    """Vectorised over particles it is the prior of each."""
    rng = np.random.default_rng(8)
    poses = Poses(draw_rotations(6), rng.normal(size=(6, 2)))
    many = priors_about(poses, ANGLE_STD, SHIFT_STD, MAX_ANGLE, MAX_SHIFT)
    some = many.take(np.array([4, 1, 1]))
    rotations, shifts = draw_rotations(3), jnp.asarray(rng.normal(size=(3, 2)))
    costs = jax.jit(jax.vmap(Prior.cost))(some, rotations, shifts)
    for i, index in enumerate((4, 1, 1)):
        numbers = [jnp.asarray(x) for x in (ANGLE_STD, SHIFT_STD, MAX_ANGLE, MAX_SHIFT)]
        one = Prior(poses.rotations[index], poses.shifts[index], *numbers)
        assert float(costs[i]) == pytest.approx(
            float(cost(one, rotations[i], shifts[i]))
        )


@pytest.fixture
def relaxed():
    """A pose that is known up to the operators of C3; copies overlap a little."""
    poses = Poses(draw_rotations(1, 4), jnp.array([[0.3, -0.8]]))
    numbers = (0.7, SHIFT_STD, MAX_ANGLE, MAX_SHIFT)
    many = priors_about(poses, *numbers, symmetry.operators("C3"))
    return jax.tree.map(lambda leaf: leaf[0], many)


def poses_anywhere(count):
    shifts = np.random.default_rng(6).normal(size=(count, 2))
    return zip(draw_rotations(count, 9), jnp.asarray(shifts), strict=True)


def test_the_prior_of_copies_is_their_mixture(relaxed):
    """The mean of the densities about each copy, of which the given pose is one."""
    copies = np.asarray(relaxed.rotations) @ symmetry.operators("C3")
    np.testing.assert_allclose(relaxed.centres, copies, atol=1e-12)
    ones = [
        dataclasses.replace(relaxed, rotations=jnp.asarray(copy), copies=None)
        for copy in copies
    ]
    slope = jax.jit(jax.jacfwd(cost_along))
    for pose in poses_anywhere(8):
        densities = [np.exp(-float(cost(one, *pose))) for one in ones]
        assert float(cost(relaxed, *pose)) == pytest.approx(-np.log(np.mean(densities)))
        twin = slope(jnp.zeros(5), relaxed, pose)
        np.testing.assert_allclose(gradient(relaxed, *pose), twin, rtol=1e-8, atol=1e-9)


def test_limits_of_copies_are_those_from_the_nearest(relaxed):
    for rotation, shift in poses_anywhere(12):
        there = jnp.broadcast_to(rotation, (3, 3, 3))
        angle = distance(relaxed.centres, there)
        nearest = relaxed.centres[np.argmin(angle)]
        np.testing.assert_array_equal(relaxed.nearest(rotation), nearest)
        new, _ = clip(relaxed, rotation, shift)
        least = min(float(angle.min()), MAX_ANGLE)
        assert float(distance(new, nearest)) == pytest.approx(least, rel=1e-8)
        turned = float(distance(new, rotation))
        assert turned == pytest.approx(float(angle.min()) - least, abs=1e-8)


# --- Hypotheses


def draw_candidates(count, seed=0, dtype=jnp.float64):
    rng = np.random.default_rng(seed)
    rotations = draw_rotations(count, seed, dtype)
    shifts = jnp.asarray(rng.normal(size=(count, 2)), dtype)
    return rotations, shifts, jnp.asarray(rng.normal(size=count), dtype)


def brute_merge(rotations, evidence, separation):
    """Take the most probable; drop what is near something more probable; normalise."""
    order = sorted(range(len(evidence)), key=lambda i: (-evidence[i], i))
    kept = []
    for rank, i in enumerate(order):
        above = order[:rank]
        gaps = [
            np.linalg.norm(
                Rotation.from_matrix(rotations[i] @ rotations[j].T).as_rotvec()
            )
            for j in above
        ]
        if evidence[i] > -np.inf and all(gap >= separation for gap in gaps):
            kept.append(i)
    mass = np.exp(np.asarray(evidence)[kept] - np.max(evidence))
    return kept, mass / mass.sum()


@pytest.mark.parametrize("seed", range(4))
def test_merge_is_the_ranking_by_hand(seed):
    """With clusters of near candidates, some ties, and some empty places."""
    rng = np.random.default_rng(seed)
    centres = draw_rotations(3, seed)
    rotations, shifts, evidence = draw_candidates(9, seed)
    near = Rotation.from_rotvec(0.01 * rng.normal(size=(9, 3))).as_matrix()
    rotations = jnp.asarray(near @ np.asarray(centres)[rng.integers(0, 3, 9)])
    evidence = evidence.at[np.array([2, 5])].set(evidence[7]).at[3].set(-jnp.inf)
    ranked, order = merge(rotations, shifts, evidence, jnp.asarray(0.3))
    kept, weights = brute_merge(np.asarray(rotations), np.asarray(evidence), 0.3)
    assert list(order[: len(kept)]) == kept
    np.testing.assert_allclose(ranked.weights[: len(kept)], weights, rtol=1e-12)
    np.testing.assert_array_equal(ranked.weights[len(kept) :], 0.0)
    np.testing.assert_array_equal(ranked.rotations, rotations[order])
    np.testing.assert_array_equal(ranked.shifts, shifts[order])
    assert sorted(np.asarray(order)) == list(range(9))


def test_candidates_that_coincide_count_once():
    """The same pose thrice, with the greatest evidence of the three."""
    rotations, shifts, _ = draw_candidates(2)
    index = np.array([0, 1, 0, 0])
    evidence = jnp.array([1.0, 0.5, 3.0, 3.0])
    ranked, order = merge(rotations[index], shifts[index], evidence, jnp.asarray(0.1))
    assert list(order[:2]) == [2, 1]
    odds = np.exp(0.5 - 3.0)
    expected = np.array([1, odds, 0, 0]) / (1 + odds)
    np.testing.assert_allclose(ranked.weights, expected, rtol=1e-12)


@pytest.mark.parametrize("dtype", [jnp.float64, jnp.float32])
@pytest.mark.parametrize("offset", [0.0, 1e4, -1e4])
def test_weights_are_probabilities_whatever_the_evidence(offset, dtype):
    rotations, shifts, evidence = draw_candidates(5, dtype=dtype)
    evidence = evidence + jnp.asarray(offset, dtype)
    ranked, _ = merge(rotations, shifts, evidence, jnp.asarray(1e-3, dtype))
    assert ranked.log_weights.dtype == dtype
    assert float(ranked.weights.sum()) == pytest.approx(1, rel=1e-5)
    assert (np.diff(ranked.weights) <= 0).all()
    # Two that are sure, the rest out of the question.
    ranked, _ = merge(
        rotations, shifts, evidence.at[2:].add(-2e4), jnp.asarray(1e-3, dtype)
    )
    np.testing.assert_array_equal(ranked.weights[2:], 0.0)


def test_the_separation_is_an_angle():
    """A little more apart: two; a little less: one."""
    first = draw_rotations(1)[0]
    for angle, count in ((0.29, 1), (0.31, 2)):
        step = jnp.array([angle, 0, 0, 0, 0])
        second, _ = retract(first, jnp.zeros(2), step)
        ranked, _ = merge(
            jnp.stack([first, second]),
            jnp.zeros((2, 2)),
            jnp.array([0.0, 1.0]),
            jnp.asarray(0.3),
        )
        assert int((ranked.weights > 0).sum()) == count


@pytest.mark.parametrize("dtype", [jnp.float64, jnp.float32])
def test_certain_believes_in_one_pose(dtype):
    rng = np.random.default_rng(3)
    poses = Poses(
        draw_rotations(5).astype(dtype),
        jnp.asarray(rng.normal(size=(5, 2)), dtype),
    )
    known = certain(poses, 4)
    assert known.rotations.shape == (5, 4, 3, 3) and known.rotations.dtype == dtype
    np.testing.assert_array_equal(known.weights, [[1, 0, 0, 0]] * 5)
    best = known.best()
    np.testing.assert_array_equal(best.rotations, poses.rotations)
    np.testing.assert_array_equal(best.shifts, poses.shifts)


def test_best_is_the_first():
    rotations, shifts, evidence = draw_candidates(6)
    ranked, order = merge(rotations, shifts, evidence, jnp.asarray(1e-3))
    best = ranked.best()
    top = int(np.argmax(evidence))
    assert int(order[0]) == top
    np.testing.assert_array_equal(best.rotations, rotations[top])
    np.testing.assert_array_equal(best.shifts, shifts[top])
