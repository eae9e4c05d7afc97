"""The search: its likelihoods are costs, its candidates what brute force finds."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import blobs, draw
from scipy.spatial.transform import Rotation

from jaxrefine.data.observation import Observation
from jaxrefine.geometry import Poses, geodesic_distance
from jaxrefine.operators import slices
from jaxrefine.operators.gridding import Gridding
from jaxrefine.poses import likelihood, search
from jaxrefine.poses.prior import Prior

N, R_MAX = 16, 6
DISC = slices.disc(N, R_MAX)
K = len(DISC.shells)
log_likelihoods = eqx.filter_jit(search.log_likelihoods)
propose = jax.jit(search.propose, static_argnums=4)


def spectrum(dtype=jnp.float64):
    return Gridding(4, 2.0).spectrum(blobs(N, dtype=dtype), R_MAX)


def draw_rotations(count, seed=0, dtype=jnp.float64):
    matrices = Rotation.random(count, np.random.default_rng(seed)).as_matrix()
    return jnp.asarray(matrices, dtype)


def image_at(rotation, shift, transfer=None):
    poses = Poses(rotation[None], shift[None])
    transfer = None if transfer is None else transfer[None]
    return slices.project(spectrum(rotation.dtype), DISC, poses, transfer)[0]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [jnp.float64, jnp.float32])
@pytest.mark.parametrize("with_transfer", [False, True])
def test_likelihoods_are_costs(with_transfer, dtype):
    """Of every rotation with every shift: one by one, and without the energy."""
    rotations, shifts = draw_rotations(5, dtype=dtype), draw(4, 2, seed=1, dtype=dtype)
    data = jax.lax.complex(draw(K, seed=2, dtype=dtype), draw(K, seed=3, dtype=dtype))
    data = data * jnp.asarray(20, data.dtype)
    weights = jnp.abs(draw(K, seed=4, dtype=dtype))
    transfer = draw(K, seed=5, dtype=dtype) if with_transfer else None
    seen = Observation(DISC, weights, data, transfer)
    values = log_likelihoods(spectrum(dtype), seen, rotations, shifts)
    assert values.shape == (5, 4) and values.dtype == dtype

    def cost(rotation, shift):
        return likelihood.cost(spectrum(dtype), seen, rotation, shift)

    by_shift = jax.vmap(cost, in_axes=(None, 0))
    costs = jax.jit(jax.vmap(by_shift, in_axes=(0, None)))(rotations, shifts)
    energy = np.sum(np.asarray(weights) * np.abs(np.asarray(data)) ** 2) / 2
    rounding = 20 * np.finfo(dtype).eps * energy
    np.testing.assert_allclose(values, energy - costs, rtol=0, atol=rounding)


@pytest.mark.parametrize("steps", [1, 2, 3, 6])
def test_the_grid_of_shifts(steps):
    """All integer points of the circle, once, the centre first, then outwards."""
    grid = search.shift_grid(steps)
    expected = {
        (x, y)
        for x in range(-steps, steps + 1)
        for y in range(-steps, steps + 1)
        if np.hypot(x, y) <= steps + 0.5
    }
    assert {tuple(point) for point in grid.astype(int)} == expected
    assert len(grid) == len(expected)
    np.testing.assert_array_equal(grid[0], 0)
    assert (np.diff(np.hypot(*grid.T)) >= -1e-12).all()


def test_proposals_have_their_centre_and_spread():
    centres, count, spread = draw_rotations(3), 4000, 0.2
    rotations = propose(
        jax.random.key(0), centres, jnp.asarray(spread), jnp.asarray(count), 3 * count
    )
    groups = np.asarray(rotations).reshape(3, count, 3, 3)
    for centre, group in zip(np.asarray(centres), groups, strict=True):
        np.testing.assert_allclose(group[0], centre, atol=1e-14)
        vectors = Rotation.from_matrix(group[1:] @ centre.T).as_rotvec()
        covariance = vectors.T @ vectors / len(vectors)
        bound = 4 * spread**2 * np.sqrt(2 / count)
        np.testing.assert_allclose(covariance, spread**2 * np.eye(3), atol=bound)
        np.testing.assert_allclose(
            vectors.mean(axis=0), 0, atol=4 * spread / np.sqrt(count)
        )
    # The draws about different centres are different ones.
    turns = groups @ np.swapaxes(np.asarray(centres), 1, 2)[:, None]
    assert np.abs(turns[0, 1:] - turns[1, 1:]).max(axis=(1, 2)).min() > 0
    alone = propose(jax.random.key(0), centres, jnp.asarray(spread), jnp.asarray(1), 3)
    np.testing.assert_allclose(alone, centres, atol=1e-14)


def test_covering_counts_grow_within_bounds():
    spreads, radii = np.geomspace(1e-3, 3, 20), range(1, 60)
    table = np.array(
        [[search.covering_count(s, 1 / r) for r in radii] for s in spreads]
    )
    assert (np.diff(table, axis=0) >= 0).all() and (np.diff(table, axis=1) >= 0).all()
    assert table.min() == 24 and table.max() == 4096
    # Where the bounds do not bind, eight times as many at twice the resolution.
    few, many = (search.covering_count(0.2, 1 / r) for r in (10, 20))
    assert many / few == pytest.approx(8, rel=0.02)


# --- explore


def make_prior(rotation, **changes):
    settings = {
        "angle_spread": 0.4,
        "shift_spread": 2.0,
        "max_angle": 3.2,
        "max_shift": 6.0,
    }
    settings = settings | changes
    numbers = [jnp.asarray(x, rotation.dtype) for x in settings.values()]
    return Prior(rotation, jnp.zeros(2, rotation.dtype), *numbers)


SHIFT = jnp.array([1.0, -2.0])
OFFSETS = jnp.asarray(search.shift_grid(3))


@eqx.filter_jit
def run(key, data, known, centres, spread=0.3, keep=3, separation=0.2, count=150):
    """Explore an image, of noise 1 in a pixel; also return what was tried."""
    weights = DISC.multiplicity.at[jnp.argmin(DISC.shells)].set(0.0) / N**2 / 0.05**2
    shift = jnp.zeros(2)
    spread, separation = jnp.asarray(spread), jnp.asarray(separation)
    seen = Observation(DISC, weights, data, None)
    # There is room for more, and only some of the offsets are tried.
    offsets = jnp.concatenate([OFFSETS, jnp.full((4, 2), 0.5)])
    tried = jnp.arange(len(offsets)) < len(OFFSETS)
    total, room = len(centres) * count, len(centres) * count + 40
    numbers = (jnp.asarray(count), jnp.asarray(len(centres)))
    find = search.Search(spread, offsets, tried, separation, *numbers, room, keep)
    found = find(spectrum(), seen, key, known, centres, shift)
    room += -room % search._AT_ONCE
    rotations = search.propose(key, centres, spread, numbers[0], room)[:total]
    values = search.log_likelihoods(spectrum(), seen, rotations, OFFSETS)
    return found, rotations, values


def brute_force(known, rotations, likelihoods, keep, separation):
    """The rule in NumPy: add the prior, sum over shifts, take the best that differ."""
    turns = np.asarray(rotations) @ np.asarray(known.rotations).T
    angles = np.linalg.norm(Rotation.from_matrix(turns).as_rotvec(), axis=1)
    chord = 2 * np.sin(angles / 2)
    by_rotation = -(chord**2) / 2 / float(known.angle_spread) ** 2
    by_rotation[angles > float(known.max_angle)] = -np.inf
    lengths = np.hypot(*np.asarray(OFFSETS).T)
    by_shift = -(lengths**2) / 2 / float(known.shift_spread) ** 2
    by_shift[lengths > float(known.max_shift)] = -np.inf
    posterior = np.asarray(likelihoods) + by_shift
    score = np.logaddexp.reduce(posterior, axis=1) + by_rotation
    chosen = []
    while len(chosen) < keep:
        best = int(np.argmax(score))
        chosen.append(best)
        gaps = np.asarray(rotations) @ np.asarray(rotations)[best].T
        gaps = np.linalg.norm(Rotation.from_matrix(gaps).as_rotvec(), axis=1)
        score[2 * np.sin(gaps / 2) < separation] = -np.inf
    shifts = np.asarray(OFFSETS)[np.argmax(posterior[chosen], axis=1)]
    return np.asarray(rotations)[chosen], shifts


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_explore_is_brute_force(seed):
    """A noiseless image: the true pose is among the candidates, and comes first."""
    truth = draw_rotations(1, seed)[0]
    wrong = jnp.asarray(Rotation.from_rotvec([0.5, -0.3, 0.2]).as_matrix()) @ truth
    centres = jnp.stack([wrong, truth])
    known = make_prior(truth)
    (rotations, shifts), tried, values = run(
        jax.random.key(seed), image_at(truth, SHIFT), known, centres
    )
    expected = brute_force(known, tried, values, 3, 0.2)
    np.testing.assert_allclose(rotations, expected[0], atol=1e-12)
    np.testing.assert_allclose(shifts, expected[1], atol=1e-12)
    np.testing.assert_allclose(rotations[0], truth, atol=1e-12)
    np.testing.assert_array_equal(shifts[0], SHIFT)
    for i, j in ((0, 1), (0, 2), (1, 2)):
        assert float(geodesic_distance(rotations[i], rotations[j])) >= 0.2


def test_explore_comes_near_what_no_centre_is():
    """The truth 0.3 rad away: as near as the best of the candidates tried."""
    truth = draw_rotations(1, 7)[0]
    turn = Rotation.from_rotvec([0.2, 0.1, -0.2]).as_matrix()
    (rotations, shifts), tried, _ = run(
        jax.random.key(3),
        image_at(truth, SHIFT),
        make_prior(truth),
        jnp.stack([jnp.asarray(turn) @ truth] * 2),
        keep=1,
    )
    gaps = geodesic_distance(tried, jnp.broadcast_to(truth, tried.shape))
    found = float(geodesic_distance(rotations[0], truth))
    assert float(gaps.min()) <= found < 3 * float(gaps.min())
    assert found < 0.15
    np.testing.assert_array_equal(shifts[0], SHIFT)


def test_explore_stays_within_the_largest_deviations():
    """Though the image says otherwise: the true shift and turn are out of bounds."""
    truth = draw_rotations(1, 9)[0]
    given = jnp.asarray(Rotation.from_rotvec([0.6, 0, 0]).as_matrix()) @ truth
    known = make_prior(given, max_angle=0.4, max_shift=1.5)
    (rotations, shifts), tried, values = run(
        jax.random.key(4), image_at(truth, SHIFT), known, jnp.stack([given, truth])
    )
    expected = brute_force(known, tried, values, 3, 0.2)
    np.testing.assert_allclose(rotations, expected[0], atol=1e-12)
    np.testing.assert_allclose(shifts, expected[1], atol=1e-12)
    there = jnp.broadcast_to(given, rotations.shape)
    assert float(geodesic_distance(rotations, there).max()) <= 0.4
    assert np.hypot(*np.asarray(shifts).T).max() <= 1.5


@pytest.mark.parametrize("max_angle", [np.pi, 4.0, 2 * np.pi])
def test_half_a_turn_or_more_is_no_limit(max_angle):
    """All rotations are within pi: a larger limit must not forbid any."""
    given = draw_rotations(1, 9)[0]
    truth = jnp.asarray(Rotation.from_rotvec([0, 3.0, 0]).as_matrix()) @ given
    known = make_prior(given, angle_spread=10.0, max_angle=max_angle)
    (rotations, _), *_ = run(
        jax.random.key(4), image_at(truth, SHIFT), known, jnp.stack([given, truth])
    )
    np.testing.assert_allclose(rotations[0], truth, atol=1e-12)
