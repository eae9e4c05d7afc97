"""Total variation: adjoints, proximal maps by brute force, and safe derivatives."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import draw
from scipy.optimize import minimize

from jaxrefine.maps import tv

REGULARISERS = [tv.IsotropicTV(), tv.AnisotropicTV()]
every_regulariser = pytest.mark.parametrize("regulariser", REGULARISERS, ids=str)
TOLERANCE = {jnp.float64: 1e-13, jnp.float32: 1e-5}
every_dtype = pytest.mark.parametrize("dtype", TOLERANCE)


@pytest.mark.parametrize("n", [1, 2, 5, 6])
def test_gradient_is_forward_differences_in_the_order_x_y_z(n):
    volume = np.asarray(draw(n, n, n))
    field = np.asarray(tv.gradient(jnp.asarray(volume)))
    for z, y, x in np.ndindex(n, n, n):
        for component, (dz, dy, dx) in enumerate([(0, 0, 1), (0, 1, 0), (1, 0, 0)]):
            ahead = (z + dz, y + dy, x + dx)
            inside = max(ahead) < n
            expected = volume[ahead] - volume[z, y, x] if inside else 0.0
            assert field[component, z, y, x] == expected


@every_dtype
@pytest.mark.parametrize("n", [1, 2, 5, 6])
def test_gradient_adjoint_is_the_adjoint(n, dtype):
    x, y = draw(n, n, n, dtype=dtype), draw(3, n, n, n, seed=1, dtype=dtype)
    left, right = jnp.vdot(tv.gradient(x), y), jnp.vdot(x, tv.gradient_adjoint(y))
    scale = float(jnp.linalg.norm(y) * jnp.linalg.norm(x))
    assert abs(left - right) <= TOLERANCE[dtype] * scale
    (transposed,) = jax.linear_transpose(tv.gradient, x)(y)
    atol = TOLERANCE[dtype] * 10
    np.testing.assert_allclose(tv.gradient_adjoint(y), transposed, atol=atol)
    assert tv.gradient(x).dtype == tv.gradient_adjoint(y).dtype == dtype


def test_gradient_of_a_constant_is_zero():
    assert np.all(tv.gradient(jnp.full((4, 4, 4), 2.7)) == 0)


def test_values_are_the_norms():
    field = np.asarray(draw(3, 4, 4, 4))
    isotropic, anisotropic = (r.value(jnp.asarray(field)) for r in REGULARISERS)
    expected = np.linalg.norm(field, axis=0).sum()
    np.testing.assert_allclose(isotropic, expected, rtol=1e-13)
    np.testing.assert_allclose(anisotropic, np.abs(field).sum(), rtol=1e-13)


def objective(regulariser, s, field, threshold):
    return 0.5 * jnp.sum((s - field) ** 2) + threshold * regulariser.value(s)


@every_regulariser
@pytest.mark.parametrize("threshold", [0.1, 0.8, 2.0])
def test_prox_is_the_minimiser_that_a_search_finds(regulariser, threshold):
    """Both norms are separable over voxels, so each voxel is a search in 3-D."""
    fields = np.asarray(draw(3, 2, 2, 2, seed=3))
    prox = np.asarray(regulariser.prox(jnp.asarray(fields), jnp.asarray(threshold)))
    norms = {tv.IsotropicTV: np.linalg.norm, tv.AnisotropicTV: lambda s: abs(s).sum()}
    norm = norms[type(regulariser)]
    for index in np.ndindex(2, 2, 2):
        field, found = (f[(slice(None), *index)] for f in (fields, prox))

        def cost(s, field=field):
            return 0.5 * np.sum((s - field) ** 2) + threshold * norm(s)

        options = {"xatol": 1e-9, "fatol": 1e-15, "maxiter": 4000, "maxfev": 4000}
        searched = [
            minimize(cost, start, method="Nelder-Mead", options=options)
            for start in (field, 0.3 * field + 0.1)
        ]
        best = min(searched, key=lambda result: result.fun)
        assert cost(found) <= best.fun + 1e-14
        # Strong convexity: |found - best|^2 / 2 is at most the difference in cost. The
        # search itself stalls at the kinks, 5e-6 away.
        np.testing.assert_allclose(found, best.x, rtol=0, atol=1e-4)


@every_dtype
@every_regulariser
def test_prox_beats_every_neighbour(regulariser, dtype):
    """The cost is 1-strongly convex: it rises by half the squared distance at least."""
    field, threshold = draw(3, 3, 3, 3, seed=4, dtype=dtype), jnp.asarray(0.9, dtype)
    prox = regulariser.prox(field, threshold)
    assert prox.dtype == dtype
    lowest = objective(regulariser, prox, field, threshold)
    for seed in range(20):
        step = 10.0 ** -(seed % 4) * draw(3, 3, 3, 3, seed=seed, dtype=dtype)
        other = objective(regulariser, prox + step, field, threshold)
        gap = other - lowest - 0.5 * jnp.sum(step**2)
        assert gap > -10 * TOLERANCE[dtype] * (1 + float(other))


@every_dtype
@every_regulariser
def test_moreau(regulariser, dtype):
    """``prox_{t R}(u) + P(u) = u``, ``P`` the projection on the dual ball of size t."""
    field, threshold = draw(3, 4, 4, 4, seed=5, dtype=dtype), 0.8
    u = np.asarray(field, float)
    if isinstance(regulariser, tv.IsotropicTV):
        projected = u / np.maximum(np.linalg.norm(u, axis=0) / threshold, 1.0)
    else:
        projected = np.clip(u, -threshold, threshold)
    prox = regulariser.prox(field, jnp.asarray(threshold, dtype))
    atol = TOLERANCE[dtype]
    np.testing.assert_allclose(prox, u - projected, rtol=0, atol=atol)


@every_regulariser
def test_prox_at_zero_threshold_is_the_identity(regulariser):
    field = draw(3, 3, 3, 3).at[:, 0].set(0.0)
    np.testing.assert_array_equal(regulariser.prox(field, jnp.zeros(())), field)


@every_regulariser
def test_prox_above_every_magnitude_is_zero(regulariser):
    field = draw(3, 3, 3, 3)
    assert np.all(regulariser.prox(field, jnp.asarray(100.0)) == 0)


@every_dtype
@every_regulariser
def test_prox_has_finite_derivatives_at_zero(regulariser, dtype):
    field = draw(3, 2, 2, 2, dtype=dtype).at[:, 0].set(0.0)
    for threshold in [0.0, 0.5]:
        by_field, by_threshold = jax.grad(
            lambda f, t: jnp.sum(regulariser.prox(f, t) ** 2 + regulariser.prox(f, t)),
            argnums=(0, 1),
        )(field, jnp.asarray(threshold, dtype))
        assert np.all(np.isfinite(by_field)) and np.isfinite(by_threshold)


@every_regulariser
def test_value_has_a_finite_derivative_at_zero(regulariser):
    """It is a subgradient where the field is zero, as it is in flat solvent."""
    field = draw(3, 2, 2, 2).at[:, 0].set(0.0)
    slope = jax.grad(regulariser.value)(field)
    assert np.all(np.abs(slope[:, 0]) <= 1)
    if isinstance(regulariser, tv.IsotropicTV):
        u = np.asarray(field[:, 1])
        expected = u / np.linalg.norm(u, axis=0)
        assert np.all(slope[:, 0] == 0)
        np.testing.assert_allclose(slope[:, 1], expected, rtol=1e-13)
