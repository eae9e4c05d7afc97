"""The pose update: Theorem 1, its dense twin, and the line search of Algorithm 3."""

import math
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import draw
from scipy.signal import correlate

from jaxrefine import euler, geometry, simulate
from jaxrefine.ctf import gaussian_psf
from jaxrefine.geometry import Poses
from jaxrefine.operators import kbwf, spatial
from jaxrefine.paper import algorithm3
from jaxrefine.paper.algorithm3 import EulerPoses

PAPER, NARROW = kbwf.KBWF(), kbwf.SIMULATION_BASIS
TIGHT = spatial.footprint(NARROW, tolerance=1e-13)


def draw_poses(count, seed=1, dtype=jnp.float64):
    """Random poses, the first two of which look along the poles."""
    rng = np.random.default_rng(seed)
    angles = rng.uniform(-np.pi, np.pi, (count, 3))
    angles[:2, 1] = 0.0, np.pi
    shifts = rng.uniform(-1.5, 1.5, (count, 2))
    return EulerPoses(jnp.asarray(angles, dtype), jnp.asarray(shifts, dtype))


def relative(value, exact):
    """Largest over particles of the error's norm over the exact vector's norm."""
    value, exact = np.asarray(value, float), np.asarray(exact, float)
    axes = tuple(range(1, exact.ndim))
    error = np.sqrt(np.sum((value - exact) ** 2, axis=axes))
    return float(np.max(error / np.sqrt(np.sum(exact**2, axis=axes))))


def whole(volume):
    """All voxels of a volume."""
    return spatial.Support.of(np.ones(volume.shape, bool))


@eqx.filter_jit
def both_gradients(footprint, image_filter, volumes, images, poses):
    """Cost and gradient of every particle: Theorem 1, and by differentiation."""

    def one(volume, image, where):
        terms = algorithm3.map_terms(footprint, volume, whole(volume))
        data = algorithm3.particle(image_filter, image)
        explicit = algorithm3.particle_cost_and_gradient(terms, data, where)

        def cost(where):
            return algorithm3.particle_cost(terms, data, where)

        return explicit, jax.value_and_grad(cost)(where)

    return jax.lax.map(lambda case: one(*case), (volumes, images, poses))


def make_filter(kind, footprint, m):
    if kind == "pixel":
        return spatial.PixelFilter(footprint)
    return spatial.spline_filter(footprint, m)


# Both are sums of the same rounded terms, in another order.
THEOREM = {jnp.float64: 1e-12, jnp.float32: 5e-5}


@pytest.mark.parametrize(
    ("kind", "basis", "psf", "dtype"),
    [
        ("pixel", NARROW, None, jnp.float64),
        ("pixel", NARROW, gaussian_psf(0.4), jnp.float64),
        ("spline", NARROW, gaussian_psf(0.4), jnp.float64),
        ("spline", PAPER, None, jnp.float64),
        ("spline", PAPER, gaussian_psf(1.0), jnp.float64),
        ("spline", NARROW, None, jnp.float32),
        ("pixel", NARROW, None, jnp.float32),
    ],
)
def test_theorem_1_is_the_gradient(kind, basis, psf, dtype):
    count, n, m = 8, 8, 12
    footprint = spatial.footprint(basis, psf)
    volumes = draw(count, n, n, n, dtype=dtype)
    images = draw(count, m, m, seed=2, dtype=dtype)
    poses = draw_poses(count, dtype=dtype)
    (cost, explicit), (value, exact) = both_gradients(
        footprint, make_filter(kind, footprint, m), volumes, images, poses
    )
    leaves = jax.tree.leaves((cost, explicit, value, exact))
    assert all(leaf.dtype == dtype for leaf in leaves)
    tolerance = THEOREM[dtype]
    np.testing.assert_allclose(cost, value, rtol=tolerance)
    errors = (
        relative(explicit.angles, exact.angles),
        relative(explicit.shifts, exact.shifts),
    )
    assert max(errors) < tolerance
    assert np.abs(exact.angles).min() > 0


def dense_cost(basis, kernel, volume, image, angles, shift):
    """Equation (34) typed out: closed forms, all lattice points, all pixels."""
    n, m = volume.shape[0], image.shape[0]
    rot, tilt, psi = angles

    def turn(a):
        c, s, zero, one = jnp.cos(a), jnp.sin(a), jnp.zeros(()), jnp.ones(())
        return jnp.array([[c, s, zero], [-s, c, zero], [zero, zero, one]])

    c, s, zero, one = jnp.cos(tilt), jnp.sin(tilt), jnp.zeros(()), jnp.ones(())
    tip = jnp.array([[c, zero, -s], [zero, one, zero], [s, zero, c]])
    matrix = (turn(psi) @ tip @ turn(rot))[:2]

    def lattice(first, last):
        k = jnp.arange(first, last, dtype=float)
        z, y, x = jnp.meshgrid(k, k, k, indexing="ij")
        return jnp.stack([x.ravel(), y.ravel(), z.ravel()])

    auto = correlate(np.asarray(volume), np.asarray(volume), method="direct")
    seen = matrix @ lattice(-(n - 1), n)
    quadratic = jnp.asarray(auto).ravel() @ kernel(jnp.sum(seen**2, axis=0))
    seen = matrix @ lattice(-(n // 2), n - n // 2) + shift[:, None]
    pixel = jnp.arange(m, dtype=float) - m // 2
    y, x = jnp.meshgrid(pixel, pixel, indexing="ij")
    offset = jnp.stack([x.ravel(), y.ravel()], axis=-1)[:, None] - seen.T[None]
    linear = image.ravel() @ kbwf.xray_transform(basis, offset) @ volume.ravel()
    return 0.5 * quadratic - linear + 0.5 * jnp.sum(image**2)


class Case:
    """One volume and image with four poses, and their costs by the dense sums."""

    def __init__(self, basis, count=6, n=5, m=10):
        self.m, self.basis = m, basis
        self.footprint = spatial.footprint(basis, tolerance=1e-13)
        self.volume, self.image = draw(n, n, n), draw(m, m, seed=3)
        self.poses = draw_poses(count, seed=4)

        def dense(angles, shift):
            kernel = self.footprint.autocorrelation
            return dense_cost(basis, kernel, self.volume, self.image, angles, shift)

        twin = jax.jit(jax.value_and_grad(dense, argnums=(0, 1)))
        results = [
            twin(a, t)
            for a, t in zip(self.poses.angles, self.poses.shifts, strict=True)
        ]
        self.cost = np.array([value for value, _ in results])
        self.gradient = np.array([np.concatenate(slope) for _, slope in results])

    def ours(self, image_filter):
        terms = algorithm3.map_terms(self.footprint, self.volume, whole(self.volume))
        data = algorithm3.particle(image_filter, self.image)

        @jax.jit
        def evaluate(where):
            return algorithm3.particle_cost_and_gradient(terms, data, where)

        results = [
            evaluate(EulerPoses(a, t))
            for a, t in zip(self.poses.angles, self.poses.shifts, strict=True)
        ]
        cost = np.array([value for value, _ in results])
        slopes = [np.concatenate([g.angles, g.shifts]) for _, g in results]
        return cost, np.array(slopes)


@pytest.fixture(scope="module")
def case():
    return Case(PAPER)


@pytest.mark.slow
@pytest.mark.parametrize("narrow", [False, True])
def test_dense_twin(case, narrow):
    """With the exact image filter, cost and gradient are those of the dense sums."""
    case = Case(NARROW) if narrow else case
    cost, gradient = case.ours(spatial.PixelFilter(case.footprint))
    errors = (
        relative(cost[:, None], case.cost[:, None]),
        relative(gradient, case.gradient),
    )
    assert max(errors) < 1e-9


def rms(values):
    return np.sqrt(np.mean(values**2))


@pytest.mark.slow
def test_spline_converges_with_its_order(case):
    """Fourth order in value, third in slope, where the footprint is smooth enough."""
    errors = []
    for nodes in (2, 4, 8):
        image_filter = spatial.spline_filter(case.footprint, case.m, nodes)
        cost, gradient = case.ours(image_filter)
        errors.append([rms(cost - case.cost), rms(gradient - case.gradient)])
    orders = np.log2(np.array(errors[:-1]) / np.array(errors[1:]))
    assert (orders[:, 0] > 3.5).all()
    assert (orders[:, 1] > 2.6).all()


def blob(n):
    """A smooth map without symmetry, zero near the border of its box of 12 or so."""
    k = np.arange(n) - n // 2
    z, y, x = np.meshgrid(k, k, k, indexing="ij")
    total = np.zeros((n, n, n))
    centres = (3, 0, 0.5), (-1, 2.6, 1), (0, -2, -2.8), (-2, -1.5, 2)
    for weight, (cx, cy, cz) in zip((1.0, 1.3, 0.8, 1.1), centres, strict=True):
        squared = (x - cx) ** 2 + (y - cy) ** 2 + (z - cz) ** 2
        total += weight * np.exp(-squared / 2)
    return jnp.asarray(total)


def test_cost_is_the_distance_of_images():
    """``J_p = 1/2 ||g - H c||^2``, but for the gap between pixel sum and integral."""
    n, m, count = 12, 32, 4
    footprint = spatial.footprint(PAPER, tolerance=1e-13)
    rough, poses = draw(n, n, n), draw_poses(count)
    images = draw(count, m, m, seed=6)
    image_filter = spatial.PixelFilter(footprint)

    @jax.jit
    def cost(volume, image, where):
        data = algorithm3.particle(image_filter, image)
        return algorithm3.particle_cost(
            algorithm3.map_terms(footprint, volume, whole(volume)), data, where
        )

    # Pixel sums alias what a projection has beyond the sampling frequency. The paper's
    # window leaves up to 1e-3 of its peak there for white noise (measured: 3e-4 of the
    # energy), and next to nothing for a smooth map (1e-6).
    for volume, tolerance in ((rough, 1e-3), (blob(n), 1e-5)):
        seen = spatial.project(footprint, volume, poses.poses, m)
        for p in range(count):
            where = EulerPoses(poses.angles[p], poses.shifts[p])
            value = float(cost(volume, images[p], where))
            exact = 0.5 * float(jnp.sum((images[p] - seen[p]) ** 2))
            energy = 0.5 * float(jnp.sum(seen[p] ** 2))
            assert abs(value - exact) < tolerance * energy


def test_curvature_is_how_fast_projections_change():
    """``||H(theta + e) c - H(theta - e) c||^2 / (2 e)^2`` along each coordinate."""
    n, m, step = 12, 32, 1e-4
    footprint = spatial.footprint(PAPER, tolerance=1e-13)
    volume, poses = blob(n), draw_poses(3, seed=8)

    def seen(poses):
        return spatial.project(footprint, volume, poses.poses, m)

    terms = algorithm3.map_terms(footprint, volume, whole(volume))
    image_filter = spatial.PixelFilter(footprint)
    curvature = algorithm3.curvature(terms, image_filter, seen(poses), poses)
    for field, size in (("angles", 3), ("shifts", 2)):
        for i in range(size):
            ahead, behind = (
                eqx.tree_at(
                    lambda p, field=field: getattr(p, field),
                    poses,
                    getattr(poses, field).at[:, i].add(sign * step),
                )
                for sign in (1, -1)
            )
            change = (seen(ahead) - seen(behind)) / (2 * step)
            exact = jnp.sum(change**2, axis=(1, 2))
            found = getattr(curvature, field)[:, i]
            np.testing.assert_allclose(found, exact, rtol=1e-3)


def test_the_cost_looks_at_the_support_alone():
    """What a map has outside of its support does not count."""
    n, m = 9, 16
    footprint = spatial.footprint(NARROW)
    image, pose = draw(m, m, seed=6), jax.tree.map(lambda x: x[2], draw_poses(3))
    data = algorithm3.particle(spatial.PixelFilter(footprint), image)
    ball, c = spatial.Support.ball(n), draw(n, n, n)
    inside = ball.extend(ball.restrict(c))
    costs = [
        algorithm3.particle_cost_and_gradient(
            algorithm3.map_terms(footprint, volume, support), data, pose
        )
        for volume, support in ((c, ball), (inside, ball), (inside, whole(c)))
    ]
    for a, b, c in zip(*map(jax.tree.leaves, costs), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-11)
        np.testing.assert_allclose(a, c, rtol=1e-11)


# --- the line search


def rosenbrock(x):
    return 100.0 * (x[1] - x[0] ** 2) ** 2 + (1.0 - x[0]) ** 2


def search(cost, start, gradient, first, eta, trials, value=None):
    value = cost(start) if value is None else value
    return jax.jit(algorithm3.backtrack, static_argnums=(0, 6))(
        cost, start, value, gradient, jnp.asarray(first), jnp.asarray(eta), trials
    )


def brute_force(cost, start, gradient, first, eta, trials):
    """The same in plain Python: point, cost and number of trials."""
    value = float(cost(start))
    for j in range(trials):
        point = start - first * eta**j * gradient
        if float(cost(point)) < value:
            return point, float(cost(point)), j + 1
    return start, value, trials


@pytest.mark.parametrize("eta", [0.25, 0.5, 0.9])
@pytest.mark.parametrize("first", [1e-4, 1e-2, 1.0, 1e3])
@pytest.mark.parametrize("trials", [1, 4, 12])
def test_the_first_lower_point_is_taken(eta, first, trials):
    start = jnp.array([-1.2, 1.0])
    gradient = jax.grad(rosenbrock)(start)
    point, value, count = search(rosenbrock, start, gradient, first, eta, trials)
    exact, lowest, tries = brute_force(rosenbrock, start, gradient, first, eta, trials)
    assert int(count) == tries
    np.testing.assert_allclose(point, exact, rtol=1e-13)
    assert float(value) == pytest.approx(lowest, rel=1e-13)
    assert float(value) <= float(rosenbrock(start))


def bowl(x):
    return jnp.sum(x**2)


def broken(x):
    return jnp.sum(x) * jnp.nan


def flat(x):
    return jnp.sum(x) * 0.0


def half_broken(x):
    """Not a number beyond 0.5: the search must walk through it."""
    return jnp.where(jnp.abs(x[0] - 1.0) > 0.5, jnp.nan, bowl(x))


@pytest.mark.parametrize(
    ("cost", "gradient", "trials"),
    [
        (bowl, [-2.0, -4.0], 7),  # uphill
        (bowl, [0.0, 0.0], 0),
        (bowl, [jnp.nan, 1.0], 0),
        (bowl, [jnp.inf, 1.0], 7),
        (broken, [2.0, 4.0], 7),
        (flat, [2.0, 4.0], 7),  # equal is not lower
    ],
)
def test_a_failed_search_stays_where_it_is(cost, gradient, trials):
    start, value = jnp.array([1.0, 2.0]), bowl(jnp.array([1.0, 2.0]))
    value = jnp.zeros(()) if cost is flat else value
    point, after, count = search(cost, start, jnp.array(gradient), 0.3, 0.5, 7, value)
    np.testing.assert_array_equal(point, start)
    assert float(after) == float(value)
    assert int(count) == trials


def test_no_step_is_tried_that_changes_the_cost_by_less_than_its_rounding():
    """Steps of 1, 1/4, ... promise decreases of 4e-12, 1e-12, ..."""
    start, value = jnp.array([1.0, 2.0]), jnp.asarray(5000.0)
    gradient = jnp.array([2e-6, 0.0])
    _, _, count = search(broken, start, gradient, 1.0, 0.25, 30, value)
    assert int(count) == 1, "5000 is known to 1.1e-12"
    _, _, count = search(broken, start, 8.0 * gradient, 1.0, 0.25, 30, value)
    assert int(count) == 4


def test_trials_that_are_not_numbers_are_passed_over():
    start = jnp.array([1.0, 2.0])
    point, value, count = search(half_broken, start, 2.0 * start, 1.0, 0.5, 9)
    assert int(count) == 3  # 1 and 0.5 leave the domain, 0.25 does not
    np.testing.assert_array_equal(point, 0.5 * start)
    assert float(value) == float(bowl(point))


def optax_search(cost, start, gradient, first, eta, trials):
    """One line search of optax, without its sufficient-decrease constant."""
    solver = optax.scale_by_backtracking_linesearch(
        max_backtracking_steps=trials - 1,
        slope_rtol=0.0,
        decrease_factor=eta,
        increase_factor=math.inf,
        max_learning_rate=first,
    )
    updates, state = solver.update(
        -gradient,
        solver.init(start),
        start,
        value=cost(start),
        grad=gradient,
        value_fn=cost,
    )
    info: Any = state.info  # pyright: ignore[reportAttributeAccessIssue]
    return start + updates, info.num_linesearch_steps


@pytest.mark.parametrize("eta", [0.25, 0.7])
@pytest.mark.parametrize("first", [1e-3, 1.0, 50.0])
def test_optax_finds_the_same_point_on_rosenbrock(first, eta):
    start = jnp.array([-1.2, 1.0])
    for _ in range(4):
        gradient = jax.grad(rosenbrock)(start)
        ours, _, count = search(rosenbrock, start, gradient, first, eta, 40)
        theirs, steps = optax_search(rosenbrock, start, gradient, first, eta, 40)
        np.testing.assert_allclose(ours, theirs, rtol=1e-12)
        assert int(count) == int(steps)
        start = ours


@pytest.mark.slow
def test_optax_finds_the_same_angles(case):
    image_filter = spatial.spline_filter(case.footprint, case.m)
    terms = algorithm3.map_terms(case.footprint, case.volume, whole(case.volume))
    data = algorithm3.particle(image_filter, case.image)
    shift, start = case.poses.shifts[2], case.poses.angles[2]

    def cost(angles):
        return algorithm3.particle_cost(terms, data, EulerPoses(angles, shift))

    @jax.jit
    def both(first):
        value, gradient = jax.value_and_grad(cost)(start)
        ours = algorithm3.backtrack(
            cost, start, value, gradient, first, jnp.asarray(0.5), 40
        )
        return ours, optax_search(cost, start, gradient, first, 0.5, 40), value

    trials = set()
    for first in (1e-5, 1e-3, 1e-1):
        (point, lower, count), (theirs, steps), value = both(jnp.asarray(first))
        assert float(lower) < float(value)
        np.testing.assert_allclose(point, theirs, rtol=1e-12)
        assert int(count) == int(steps)
        trials.add(int(count))
    assert len(trials) > 1, "the search must have something to do"


# --- all particles


class Scene:
    """Images of a smooth map and, by the same basis, everything to refine them."""

    def __init__(self, count=7, n=12, m=28, dtype=jnp.float64):
        self.footprint = spatial.footprint(PAPER)
        self.image_filter = spatial.spline_filter(self.footprint, m, 4)
        self.volume = blob(n).astype(dtype)
        rng = np.random.default_rng(7)
        angles = rng.uniform(-np.pi, np.pi, (count, 3))
        angles[:, 1] = rng.uniform(1.0, 2.1, count)  # where the angles are independent
        shifts = rng.uniform(-1.0, 1.0, (count, 2))
        self.truth = EulerPoses(jnp.asarray(angles, dtype), jnp.asarray(shifts, dtype))
        self.images = spatial.project(self.footprint, self.volume, self.truth.poses, m)

    def config(self, **changes):
        # The inverse of the largest curvatures, some thousands.
        settings = {"angle_step": 2e-4, "shift_step": 3e-4, "iterations": 3}
        return algorithm3.PoseConfig(**settings | changes)

    def run(self, poses, config, images=None):
        images = self.images if images is None else images
        return algorithm3.run(
            poses,
            images,
            self.volume,
            self.footprint,
            self.image_filter,
            whole(self.volume),
            config,
        )

    def costs(self, poses):
        terms = algorithm3.map_terms(self.footprint, self.volume, whole(self.volume))

        @jax.jit
        def cost(image, where):
            data = algorithm3.particle(self.image_filter, image)
            return algorithm3.particle_cost(terms, data, where)

        pairs = zip(self.images, poses.angles, poses.shifts, strict=True)
        return np.array([cost(g, EulerPoses(a, t)) for g, a, t in pairs])

    def perturbed(self, degrees=2.0, pixels=0.3):
        """Every pose off by the given amounts, along random directions."""
        rng = np.random.default_rng(8)
        turn = rng.normal(size=(self.images.shape[0], 3))
        turn *= np.deg2rad(degrees) / np.linalg.norm(turn, axis=1, keepdims=True)
        move = rng.normal(size=(self.images.shape[0], 2))
        move *= pixels / np.linalg.norm(move, axis=1, keepdims=True)
        dtype = self.truth.angles.dtype
        turns = geometry.rotvec_to_matrix(jnp.asarray(turn, dtype))
        angles = euler.matrix_to_euler(turns @ self.truth.rotations)
        return EulerPoses(angles, self.truth.shifts + jnp.asarray(move, dtype))

    def errors(self, poses):
        angle = geometry.geodesic_distance(poses.rotations, self.truth.rotations)
        shift = jnp.linalg.norm(poses.shifts - self.truth.shifts, axis=-1)
        return np.rad2deg(np.asarray(angle)), np.asarray(shift)


@pytest.fixture(scope="module")
def scene():
    return Scene()


@pytest.mark.slow
@pytest.mark.parametrize("step", [1e-7, 1e-3, 1e2])
def test_no_particle_gets_worse(scene, step):
    start = scene.perturbed(20.0, 1.0)
    config = scene.config(angle_step=step, shift_step=step, max_trials=6)
    poses, info = scene.run(start, config)
    before, after = scene.costs(start), scene.costs(poses)
    # Costs are differences of numbers of the size of the image's energy.
    rounding = 1e-12 * np.asarray(jnp.sum(scene.images**2, (1, 2)))
    assert (after <= before + rounding).all()
    np.testing.assert_allclose(info.cost_before, before, rtol=0, atol=rounding.max())
    np.testing.assert_allclose(info.cost, after, rtol=0, atol=rounding.max())
    assert info.angle_moves.shape == info.shift_trials.shape == (7, 3)
    assert (np.asarray(info.angle_trials) <= 6).all()
    stuck = ~np.asarray(info.angle_moves)
    assert (np.asarray(info.angle_trials)[stuck] == 6).all()
    still = stuck.all(1)
    np.testing.assert_array_equal(poses.angles[still], start.angles[still])


@pytest.mark.slow
def test_batches_and_order_do_not_matter(scene):
    start = scene.perturbed(5.0, 0.5)
    reference, _ = scene.run(start, scene.config(batch_size=7))
    for batch_size in (1, 3, 100):
        poses, _ = scene.run(start, scene.config(batch_size=batch_size))
        for a, b in zip(*map(jax.tree.leaves, (poses, reference)), strict=True):
            np.testing.assert_allclose(a, b, rtol=0, atol=1e-11)
    order = np.random.default_rng(9).permutation(7)
    shuffled = jax.tree.map(lambda leaf: leaf[order], start)
    poses, _ = scene.run(shuffled, scene.config(batch_size=3), scene.images[order])
    np.testing.assert_allclose(
        poses.angles, reference.angles[order], rtol=0, atol=1e-11
    )


@pytest.mark.slow
def test_exact_poses_stay(scene):
    """Clean images at the truth: a fixed point but for sampling and interpolation."""
    config = scene.config(iterations=30)
    poses, _ = scene.run(scene.truth, config)
    angle, shift = scene.errors(poses)
    # The minimum of (34) is off that of 1/2 ||g - Hc||^2 by the gradient of the gap of
    # pixel sums and of the spline's error (both about 3e-2, or 5e-6 of the energy)
    # divided by the smallest curvature, some hundreds: 1e-4 radians.
    assert angle.max() < 0.02
    assert shift.max() < 5e-4


@pytest.mark.slow
def test_small_errors_are_undone(scene):
    start = scene.perturbed(2.0, 0.3)
    config = scene.config(iterations=40)
    poses, _ = scene.run(start, config)
    before, after = scene.errors(start), scene.errors(poses)
    np.testing.assert_allclose(before[0], 2.0, rtol=1e-6)
    # Down to the bounds of the test above.
    assert after[0].max() < 0.02
    assert after[1].max() < 5e-4


@pytest.mark.slow
@pytest.mark.parametrize("frozen", ["angles", "shifts"])
def test_a_step_of_zero_freezes(scene, frozen):
    start = scene.perturbed(5.0, 0.5)
    zero = {"angles": "angle_step", "shifts": "shift_step"}[frozen]
    poses, _ = scene.run(start, scene.config(**{zero: 0.0}))
    moved = {"angles": "shifts", "shifts": "angles"}[frozen]
    np.testing.assert_array_equal(getattr(poses, frozen), getattr(start, frozen))
    difference = np.asarray(getattr(poses, moved)) - np.asarray(getattr(start, moved))
    assert (np.abs(difference).max(axis=1) > 0).all()


@pytest.mark.slow
def test_single_precision(scene):
    """The same path in single precision: a line search may turn at rounding level."""
    single = Scene(dtype=jnp.float32)
    start = single.perturbed(2.0, 0.3)
    poses, info = single.run(start, single.config(iterations=40))
    floats = [x for x in jax.tree.leaves((poses, info)) if x.dtype.kind == "f"]
    assert all(leaf.dtype == jnp.float32 for leaf in floats)
    # A cost is known to 1e-6 of the energy, hence an angle to sqrt(1e-6 E / curvature),
    # some tenths of a degree; plain decrease stops there.
    angle, shift = single.errors(poses)
    assert angle.max() < 0.5 and shift.max() < 0.03
    assert not jnp.isnan(info.cost).any()


@pytest.mark.slow
def test_memory_does_not_grow_with_the_particles(scene):
    """No array of particles times voxels, nor of particles times fine image grids."""

    def temporary(count):
        poses = EulerPoses(jnp.zeros((count, 3)), jnp.zeros((count, 2)))
        images = jnp.zeros((count, 28, 28))
        model = scene.footprint, scene.image_filter, whole(scene.volume)
        arguments = (poses, images, scene.volume, *model)
        run: Any = (
            algorithm3.run
        )  # what eqx.filter_jit returns has more than a function
        lowered = run.lower(*arguments, scene.config(batch_size=2))
        memory = lowered.compile().compiled.memory_analysis()
        return memory.temp_size_in_bytes

    few, many = temporary(4), temporary(44)
    voxels = 12**3 * 8
    assert many - few < 40 * voxels / 2


@pytest.mark.slow
@pytest.mark.parametrize("sigma", [3.0, 30.0])
def test_noise_does_not_blind_the_line_search_in_single_precision(sigma):
    """The energy is 1e6 at sigma 30: a cost that contained it would not move."""
    n, count = 16, 6
    basis = kbwf.KBWF(radius=2.0, taper=10.8)
    psi = spatial.footprint(basis)
    keys = jax.random.split(jax.random.key(5), 4)
    c = simulate.phantom(keys[0], n)
    truth = Poses(
        simulate.equidistributed_rotations(keys[1], count, jnp.float32),
        jnp.zeros((count, 2), jnp.float32),
    )
    clean = spatial.project(psi, c, truth, n)
    start = EulerPoses.of(truth)
    images = clean + jnp.float32(sigma) * jax.random.normal(
        keys[2], clean.shape, jnp.float32
    )
    config = algorithm3.PoseConfig(1e-5, 1e-4, iterations=3)
    image_filter = spatial.spline_filter(psi, n)

    def refined(dtype):
        poses, data, coefficients = jax.tree.map(
            lambda leaf: leaf.astype(dtype), (start, images, c)
        )
        model = psi, image_filter, whole(c)
        return algorithm3.run(poses, data, coefficients, *model, config)

    single, info = refined(jnp.float32)
    double, reference = refined(jnp.float64)
    assert jnp.all(reference.angle_moves)
    assert jnp.all(info.angle_moves)
    assert jnp.all(info.shift_moves)
    step = jnp.abs(double.angles - start.angles.astype(float)).max()
    gap = jnp.abs(single.angles.astype(float) - double.angles).max()
    assert gap < 0.05 * step
