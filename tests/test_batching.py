"""Batches change the memory that a sum or a map takes, never its value."""

import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import draw

from jaxrefine._batching import (
    for_active,
    map_over_particles,
    side_by_side,
    sum_over_particles,
)
from jaxrefine.errors import InputError

COUNT = 7

# Seven terms of order one, added in another order: a few units of rounding.
TOLERANCE = {jnp.float64: 1e-14, jnp.float32: 1e-5}


@pytest.mark.parametrize("dtype", [jnp.float64, jnp.float32])
@pytest.mark.parametrize("batch_size", [1, 2, 3, 6, 7, 8, 100])
def test_a_sum_is_that_of_all_particles(batch_size, dtype):
    """Dividing the count, not dividing it, larger than it; trees in and out."""
    particles = {"x": draw(COUNT, 4, dtype=dtype), "y": (draw(COUNT, dtype=dtype),)}

    def function(particle):
        scalar = particle["y"][0]
        square = particle["x"] ** 2
        return {"scaled": scalar * particle["x"], "nested": [scalar, (square,)]}

    value = sum_over_particles(function, particles, batch_size)
    x, y = (np.asarray(a, float) for a in (particles["x"], particles["y"][0]))
    exact = {"scaled": y @ x, "nested": [y.sum(), ((x**2).sum(0),)]}
    assert jax.tree.structure(value) == jax.tree.structure(exact)
    for a, b in zip(jax.tree.leaves(value), jax.tree.leaves(exact), strict=True):
        assert a.dtype == dtype and a.shape == np.shape(b)
        np.testing.assert_allclose(a, b, rtol=0, atol=10 * TOLERANCE[dtype])


@pytest.mark.parametrize("batch_size", [1, 2, 3, 6, 7, 8, 100])
def test_a_map_has_the_result_of_each_particle_in_its_place(batch_size):
    particles = draw(COUNT, 4), draw(COUNT, seed=1)

    def function(particle):
        vector, scalar = particle
        return {"scaled": scalar * vector, "square": scalar**2}

    results = map_over_particles(function, particles, batch_size)
    vectors, scalars = map(np.asarray, particles)
    np.testing.assert_allclose(results["scaled"], scalars[:, None] * vectors)
    np.testing.assert_allclose(results["square"], scalars**2)


@pytest.mark.parametrize("function", [map_over_particles, sum_over_particles])
@pytest.mark.parametrize(("count", "batch_size"), [(0, 4), (3, 0), (3, -1)])
def test_no_particles_and_no_batch_are_refused(function, count, batch_size):
    words = f"at least 1, got {count} particles and a batch size of {batch_size}$"
    with pytest.raises(InputError, match=words):
        function(lambda v: v, jnp.zeros((count, 2)), batch_size)


@pytest.mark.parametrize("batch_size", [1, 3, 50])
def test_the_sum_over_one_particle_is_its_result(batch_size):
    x = draw(1, 3)
    value = sum_over_particles(lambda v: v**3, x, batch_size)
    np.testing.assert_allclose(value, x[0] ** 3, rtol=1e-15)


@pytest.mark.parametrize("batch_size", [1, 3, 7])
def test_a_sum_is_compiled_and_differentiated(batch_size):
    x, weights = draw(COUNT, 3), draw(3, seed=1)

    def total(weights):
        return sum_over_particles(
            lambda v: jnp.sin(jnp.vdot(v, weights)), x, batch_size
        )

    value, gradient = jax.jit(jax.value_and_grad(total))(weights)
    phase = np.asarray(x) @ np.asarray(weights)
    np.testing.assert_allclose(value, np.sin(phase).sum(), rtol=1e-13)
    np.testing.assert_allclose(gradient, np.cos(phase) @ np.asarray(x), rtol=1e-12)


def test_memory_is_that_of_a_batch():
    """Results of 64 kB for 200 particles would be 13 MB if they were all kept."""
    size, count, batch_size = 8192, 200, 4
    ramp = jnp.linspace(0.0, 1.0, size)

    def total(x):
        return sum_over_particles(lambda v: jnp.sin(v + ramp), x, batch_size)

    compiled = jax.jit(total).lower(jnp.zeros(count)).compile()
    memory = compiled.memory_analysis()
    assert memory is not None
    assert memory.temp_size_in_bytes < 4 * batch_size * size * 8
    everything = jax.jit(lambda x: jax.lax.map(lambda v: jnp.sin(v + ramp), x).sum(0))
    memory = everything.lower(jnp.zeros(count)).compile().memory_analysis()
    assert memory is not None
    assert memory.temp_size_in_bytes > count * size * 8 / 2, "the test must bite"


@pytest.mark.parametrize("size", [1, 2, 3, 5, 100])
@pytest.mark.parametrize("active", ["none", "one", "some", "all"])
def test_what_is_active_is_evaluated(active, size):
    """The others keep what they had, and nothing is evaluated in vain."""
    chosen = {"none": [], "one": [4], "some": [6, 0, 3], "all": range(COUNT)}[active]
    is_active = np.isin(np.arange(COUNT), list(chosen))
    x, y = draw(COUNT, 4), draw(COUNT, seed=1)
    before = {"z": draw(COUNT, 4, seed=2), "calls": jnp.zeros(COUNT, jnp.int32)}
    seen = []

    def function(x, y):
        jax.debug.callback(lambda value: seen.append(float(value)), y)
        return {"z": x * y, "calls": jnp.ones((), jnp.int32)}

    found = jax.jit(lambda *a: for_active(function, a[0], size, a[1:3], a[3]))(
        jnp.asarray(is_active), x, y, before
    )
    jax.effects_barrier()
    expected = np.where(is_active[:, None], x * y[:, None], before["z"])
    np.testing.assert_allclose(found["z"], expected, rtol=1e-15)
    np.testing.assert_array_equal(found["calls"], is_active)
    count, size = is_active.sum(), min(size, COUNT)
    assert len(seen) == size * -(-count // size)
    assert set(np.asarray(y)[is_active]) <= set(seen)


def test_side_by_side():
    """At the same time, in order; an error is that of the function."""
    meet = threading.Barrier(2, timeout=30)
    values = side_by_side([lambda: meet.wait() < 2, lambda: meet.wait() < 2])
    assert values == [True, True]
    assert side_by_side([lambda: "first", lambda: "second"]) == ["first", "second"]

    def fail():
        raise InputError("no such image")

    with pytest.raises(InputError, match="no such image"):
        side_by_side([lambda: 1, fail])
