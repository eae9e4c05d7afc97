"""The volume update against dense algebra and the optimality conditions of (10)."""

from itertools import pairwise
from typing import ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import draw_poses, toeplitz

from jaxrefine.maps import admm, tv
from jaxrefine.operators import kbwf, normal, spatial

# A small window keeps the normal equations well conditioned (about 1e3), so that a
# few hundred ADMM iterations reach the optimum to many digits.
FOOTPRINT = spatial.footprint(kbwf.KBWF(radius=1.5, taper=6.0), tolerance=1e-13)
FILTER = spatial.PixelFilter(FOOTPRINT)
N, M, PARTICLES = 6, 14, 40
LAM, RHO, RHO_NONNEGATIVE = 3.0, 100.0, 100.0
REGULARISERS = [tv.IsotropicTV(), tv.AnisotropicTV()]
every_regulariser = pytest.mark.parametrize(
    "regulariser", REGULARISERS, ids=lambda r: type(r).__name__
)
every_sign = pytest.mark.parametrize("rho_nonnegative", [None, RHO_NONNEGATIVE])


def blocks(n=N):
    """Piecewise constant, with a hole: what TV and a sign constraint both act on."""
    c = np.zeros((n, n, n))
    c[1:5, 1:4, 1:5] = 1.0
    c[2:4, 2:6, 2:5] = -1.0
    return jnp.asarray(c)


def differences(n):
    """The dense matrix of ``L``, ``(3 n^3, n^3)``, typed out."""
    step = np.diff(np.eye(n), axis=0, append=np.eye(n)[-1:])
    one = np.eye(n)
    return np.concatenate(
        [
            np.kron(np.kron(one, one), step),
            np.kron(np.kron(one, step), one),
            np.kron(np.kron(step, one), one),
        ]
    )


class Problem:
    """Noisy images, their data term, and the same as dense arrays."""

    def __init__(self, dtype=jnp.float64):
        poses = draw_poses(PARTICLES, spread=0.5)
        clean = spatial.project(FOOTPRINT, blocks(), poses, M)
        noise = np.random.default_rng(2).normal(size=clean.shape)
        self.images = (clean + 0.5 * jnp.asarray(noise)).astype(dtype)
        self.poses = jax.tree.map(lambda leaf: leaf.astype(dtype), poses)
        self.data = admm.data_term(FOOTPRINT, FILTER, self.images, self.poses, N)
        self.matrix = toeplitz(normal.kernel(FOOTPRINT, poses.rotations, N))
        self.right = np.asarray(self.data.backprojection, float).ravel()
        self.energy = 0.5 * float(jnp.vdot(self.images, self.images))
        self.dtype = dtype

    def objective(self, c, regulariser, lam=LAM):
        """Equation (10), from the dense matrix and an explicit sum."""
        c = np.asarray(c, float).ravel()
        field = (differences(N) @ c).reshape(3, -1)
        if isinstance(regulariser, tv.IsotropicTV):
            penalty = np.linalg.norm(field, axis=0).sum()
        else:
            penalty = np.abs(field).sum()
        quadratic = 0.5 * c @ self.matrix @ c - c @ self.right + self.energy
        return quadratic + lam * penalty

    def config(self, **changes):
        settings = {
            "lam": LAM,
            "rho": RHO,
            "iterations": 800,
            "cg_iterations": 200,
            "cg_tolerance": 1e-13,
        } | changes
        floats = {
            name: jnp.asarray(settings.pop(name), self.dtype)
            for name in ("lam", "rho", "rho_nonnegative")
            if settings.get(name) is not None
        }
        settings.pop("rho_nonnegative", None)
        return admm.ADMMConfig(**floats, **settings)

    def start(self):
        return admm.init(jnp.zeros((N, N, N), self.dtype))

    def run(self, regulariser, state=None, **changes):
        state = self.start() if state is None else state
        return admm.run(state, self.data, self.config(**changes), regulariser)


@pytest.fixture(scope="module")
def problem():
    return Problem()


@pytest.fixture(scope="module")
def optimum(problem):
    """The end of a long run, made once for each kind of problem."""
    known = {}

    def find(regulariser, rho_nonnegative):
        key = (type(regulariser), rho_nonnegative)
        if key not in known:
            known[key] = problem.run(regulariser, rho_nonnegative=rho_nonnegative)
        return known[key]

    return find


def difference_norm(a, b):
    return np.linalg.norm(np.asarray(a, float) - np.asarray(b, float))


@pytest.mark.slow
def test_without_regulariser_it_solves_the_normal_equations(problem):
    # The error falls by 1 / (1 + mu / rho) per iteration, where mu >= 0.4 is the
    # smallest eigenvalue of the pencil (H^T H, L^T L).
    state, info = problem.run(tv.IsotropicTV(), lam=0.0, rho=0.05, iterations=40)
    exact = np.linalg.solve(problem.matrix, problem.right)
    c = np.asarray(state.coefficients).ravel()
    # CG leaves a relative residual of 1e-13, times a condition number of 1e3.
    np.testing.assert_allclose(c, exact, rtol=0, atol=1e-9 * np.abs(exact).max())
    residual = problem.matrix @ c - problem.right
    assert np.linalg.norm(residual) < 1e-11 * np.linalg.norm(problem.right)
    assert info.regularisation[-1] == 0


@every_sign
@every_regulariser
def test_every_iteration_is_stationary_in_c(problem, regulariser, rho_nonnegative):
    """(30) and the dual step make H^T H c - H^T g + L^T y + z = 0 at *any* time."""
    state, info = problem.run(
        regulariser, rho_nonnegative=rho_nonnegative, iterations=3
    )
    c = np.asarray(state.coefficients).ravel()
    residual = (
        problem.matrix @ c
        - problem.right
        + differences(N).T @ np.asarray(state.dual).ravel()
        + np.asarray(state.dual_nonnegative).ravel()
    )
    assert np.linalg.norm(residual) < 1e-11 * np.linalg.norm(problem.right)
    assert info.cg_residual[-1] < 1e-12


def check_dual(regulariser, field, dual, lam, tolerance):
    """Assert that ``dual`` is ``lam`` times a subgradient of R at ``field``."""
    if isinstance(regulariser, tv.IsotropicTV):
        length, size = np.linalg.norm(field, axis=0), np.linalg.norm(dual, axis=0)
        product = np.sum(field * dual, axis=0)
    else:
        length, size, product = np.abs(field), np.abs(dual), field * dual
    assert size.max() <= lam * (1 + tolerance)
    # |y| <= lam and y . Lc = lam |Lc| together say that y = lam Lc / |Lc|.
    np.testing.assert_allclose(product, lam * length, rtol=0, atol=lam * tolerance)
    flat, steep = length < 1e-6, length > 0.05
    assert flat.any() and steep.any(), "the problem must have plateaus and edges"


@every_sign
@every_regulariser
def test_fixed_point_is_optimal(problem, optimum, regulariser, rho_nonnegative):
    """The KKT conditions of (10), with the multipliers as certificates."""
    state, _ = optimum(regulariser, rho_nonnegative)
    c = np.asarray(state.coefficients).ravel()
    field = (differences(N) @ c).reshape(3, -1)
    dual = np.asarray(state.dual).reshape(3, -1)
    z = np.asarray(state.dual_nonnegative).ravel()
    stationarity = (
        problem.matrix @ c - problem.right + differences(N).T @ dual.ravel() + z
    )
    assert np.linalg.norm(stationarity) < 1e-11 * np.linalg.norm(problem.right)
    # What 800 iterations of linear convergence leave; the densities are of order 1.
    check_dual(regulariser, field, dual, LAM, tolerance=1e-6)
    if rho_nonnegative is None:
        assert not z.any()
        assert c.min() < -0.1, "otherwise the constraint would be idle below"
    else:
        assert c.min() > -1e-7
        assert z.max() <= 1e-7 * LAM
        assert z.min() < -1e-2 * LAM, "the constraint must be active somewhere"
        np.testing.assert_allclose(z * c, 0, atol=1e-6 * np.abs(z).max())


@every_sign
@every_regulariser
def test_no_nearby_point_is_better(problem, optimum, regulariser, rho_nonnegative):
    state, _ = optimum(regulariser, rho_nonnegative)
    c = np.asarray(state.coefficients)
    if rho_nonnegative is not None:
        c = np.maximum(c, 0)
    least = problem.objective(c, regulariser)
    rng = np.random.default_rng(3)
    for size in (1e-1, 1e-2, 1e-3):
        for _ in range(20):
            other = c + size * rng.normal(size=c.shape)
            if rho_nonnegative is not None:
                other = np.maximum(other, 0)
            assert problem.objective(other, regulariser) > least


@every_sign
@every_regulariser
def test_residuals_vanish(optimum, regulariser, rho_nonnegative):
    _, info = optimum(regulariser, rho_nonnegative)
    for residual in (info.primal_residual, info.dual_residual):
        assert residual[-1] < 1e-7 * residual.max()
    if rho_nonnegative is None:
        assert not info.nonnegativity_residual.any()
    else:
        largest = info.nonnegativity_residual.max()
        assert info.nonnegativity_residual[-1] < 1e-7 * largest


def test_residuals_are_those_of_boyd(problem):
    """``||L c - u||`` and ``rho ||L^T (u+ - u)||``, with u from the prox."""
    regulariser = tv.IsotropicTV()
    config = problem.config()
    before, _ = problem.run(regulariser, iterations=4)
    step = eqx.filter_jit(admm.step)
    after, info = step(before, problem.data, config, regulariser)

    def split(state):
        field = tv.gradient(state.coefficients) + state.dual / RHO
        return regulariser.prox(field, jnp.asarray(LAM / RHO))

    u, new = split(before), split(after)
    primal = difference_norm(tv.gradient(after.coefficients), u)
    dual = RHO * np.linalg.norm(tv.gradient_adjoint(new - u))
    assert info.primal_residual == pytest.approx(primal, rel=1e-10)
    assert info.dual_residual == pytest.approx(dual, rel=1e-10)


def dense_admm(problem, sign, iterations):
    """Algorithm 2 for isotropic TV with ``prox(L c + sign * u~ / rho)``, in NumPy."""
    slope = differences(N)
    inverse = np.linalg.inv(problem.matrix + RHO * slope.T @ slope)
    c, dual = np.zeros(N**3), np.zeros(3 * N**3)
    for _ in range(iterations):
        field = (slope @ c + sign * dual / RHO).reshape(3, -1)
        length = np.maximum(np.linalg.norm(field, axis=0), 1e-300)
        u = (field * np.maximum(1 - LAM / RHO / length, 0)).ravel()
        c = inverse @ (problem.right + RHO * slope.T @ (u - dual / RHO))
        dual = dual + RHO * (slope @ c - u)
    return c


def test_the_sign_of_equation_28(problem, optimum):
    """As printed, ``prox(L c - u~/rho)``, Algorithm 2 does not find the optimum."""
    regulariser = tv.IsotropicTV()
    state, info = optimum(regulariser, None)
    best = float(info.objective[-1])
    right = dense_admm(problem, +1.0, 800)
    ours = np.asarray(state.coefficients).ravel()
    np.testing.assert_allclose(right, ours, rtol=0, atol=1e-7)
    assert problem.objective(right, regulariser) == pytest.approx(best, rel=1e-9)
    # It starts the same, as the multipliers are zero, and then runs away.
    gaps = [
        problem.objective(dense_admm(problem, -1.0, iterations), regulariser) - best
        for iterations in (5, 10, 20, 40)
    ]
    assert gaps[0] > 1e-3 * best
    assert all(later > earlier for earlier, later in pairwise(gaps))


@every_sign
def test_multipliers_persist(problem, rho_nonnegative):
    """Two runs of 10 iterations, the state carried over, are one of 20."""
    regulariser = tv.IsotropicTV()
    settings = {"rho_nonnegative": rho_nonnegative}
    whole, info = problem.run(regulariser, iterations=20, **settings)
    first, one = problem.run(regulariser, iterations=10, **settings)
    second, two = problem.run(regulariser, state=first, iterations=10, **settings)
    for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(second), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-12 * LAM)
    joined = np.concatenate([one.objective, two.objective])
    np.testing.assert_allclose(joined, info.objective, rtol=1e-12)
    # And they matter: without them the second half takes another way.
    forgetful, _ = problem.run(
        regulariser, state=admm.init(first.coefficients), iterations=10, **settings
    )
    assert difference_norm(forgetful.coefficients, whole.coefficients) > 1e-3


@every_regulariser
def test_objective_is_equation_10(problem, regulariser):
    state, info = problem.run(regulariser, iterations=7)
    exact = problem.objective(state.coefficients, regulariser)
    assert info.objective[-1] == pytest.approx(exact, rel=1e-12)
    np.testing.assert_allclose(
        info.data_term + info.regularisation, info.objective, rtol=1e-14
    )
    assert info.objective.shape == (7,)


def test_data_term_is_the_distance_of_images(problem):
    """``1/2 ||g - H c||^2``, but for the gap between pixel sums and integrals."""
    c = blocks() + 0.1 * jnp.asarray(np.random.default_rng(4).normal(size=(N, N, N)))
    distance = problem.images - spatial.project(FOOTPRINT, c, problem.poses, M)
    exact = 0.5 * float(jnp.vdot(distance, distance))
    value = problem.data.value(c, normal.apply_normal(problem.data.transfer, c))
    # The linear term and the energy are exact; the quadratic one is off by what pixel
    # sums alias, which is more for this narrow window than for the paper's. Measured:
    # 1.6e-3 of the quadratic term. A missing factor or term would be far more.
    flat = np.asarray(c).ravel()
    quadratic = 0.5 * flat @ problem.matrix @ flat
    assert abs(float(value) - exact) < 1e-2 * quadratic
    dense = problem.objective(c, tv.IsotropicTV(), lam=0.0)
    assert float(value) == pytest.approx(dense, rel=1e-12)


class Quadratic(eqx.Module):
    """A user's regulariser: ``R(u) = 1/2 ||u||^2``, whose answer is a linear solve."""

    traces: ClassVar[list] = []

    def value(self, field):
        self.traces.append("value")
        return 0.5 * jnp.sum(field**2)

    def prox(self, field, threshold):
        self.traces.append("prox")
        return field / (1.0 + threshold)


def test_a_regulariser_of_ones_own(problem):
    state, info = problem.run(Quadratic(), rho=2.0, iterations=200)
    slope = differences(N)
    exact = np.linalg.solve(problem.matrix + LAM * slope.T @ slope, problem.right)
    c = np.asarray(state.coefficients).ravel()
    np.testing.assert_allclose(c, exact, rtol=0, atol=1e-10)
    penalty = LAM * 0.5 * np.sum((slope @ exact) ** 2)
    assert info.regularisation[-1] == pytest.approx(penalty, rel=1e-8)


def test_other_parameters_do_not_recompile(problem):
    """lam and rho are traced: a sweep over them compiles once."""
    regulariser = Quadratic()
    first, _ = problem.run(regulariser, iterations=2)
    traced = len(Quadratic.traces)
    assert traced
    second, _ = problem.run(regulariser, iterations=2, lam=3.0, rho=11.0)
    assert len(Quadratic.traces) == traced
    assert difference_norm(first.coefficients, second.coefficients) > 1e-3
    problem.run(regulariser, iterations=3)
    assert len(Quadratic.traces) > traced, "a loop length is static"


def test_python_numbers_are_accepted(problem):
    settings = {"iterations": 2, "cg_iterations": 200, "cg_tolerance": 1e-13}
    config = admm.ADMMConfig(LAM, RHO, **settings)
    plain, _ = admm.run(problem.start(), problem.data, config, tv.IsotropicTV())
    typed, _ = problem.run(tv.IsotropicTV(), iterations=2)
    np.testing.assert_allclose(plain.coefficients, typed.coefficients, atol=1e-13)


@pytest.mark.slow
@every_sign
@every_regulariser
def test_single_precision(optimum, regulariser, rho_nonnegative):
    """CG stops at a relative residual of 1e-6.

    In double precision too, this leaves 1e-5 in the coefficients (of order one) after
    its magnification by the condition number.
    """
    problem = Problem(jnp.float32)
    state, info = problem.run(
        regulariser,
        rho_nonnegative=rho_nonnegative,
        iterations=800,
        cg_iterations=30,
        cg_tolerance=1e-6,
    )
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves((state, info)))
    best, _ = optimum(regulariser, rho_nonnegative)
    gap = np.abs(np.asarray(state.coefficients, float) - best.coefficients).max()
    assert gap < 2e-4


def test_stops_are_counted_in_info(problem):
    """Too few CG iterations are not an error, but show in the residual."""
    settings = {"iterations": 2, "rho": RHO, "lam": LAM}
    _, poor = problem.run(tv.IsotropicTV(), cg_iterations=1, **settings)
    _, good = problem.run(tv.IsotropicTV(), cg_iterations=50, **settings)
    assert poor.cg_residual[0] > 1e-3
    assert good.cg_residual[0] < 1e-6
