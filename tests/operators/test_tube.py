"""Tubes against brute force: no lattice point near the line is ever missed."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrefine import geometry
from jaxrefine.operators import _tube

HALF = 14
DIAGONALS = [(1, 1, 1), (1, 1, 0), (1, 0, 1), (0, -1, 1), (-1, 1, 1), (1, -1, -1)]
AXES = [(1, 0, 0), (0, 1, 0), (0, 0, 1), (-1, 0, 0), (0, -1, 0), (0, 0, -1)]


def looking_along(direction, turn=0.3):
    """A rotation whose third row is a given direction, exactly if it is an axis."""
    d = np.array(direction, float) / np.linalg.norm(direction)
    helper = np.eye(3)[np.argmin(np.abs(d))]
    first = np.cross(helper, d) / np.linalg.norm(np.cross(helper, d))
    second = np.cross(d, first)
    c, s = np.cos(turn), np.sin(turn)
    return np.stack([c * first + s * second, c * second - s * first, d])


def rotations(dtype=jnp.float64):
    known = [looking_along(d) for d in AXES + DIAGONALS]
    known += [looking_along(d, 0.0) for d in AXES + DIAGONALS]
    drawn = geometry.uniform_rotations(jax.random.key(0), 24)
    return jnp.concatenate([jnp.asarray(known), drawn]).astype(dtype)


@pytest.mark.parametrize("dtype", [jnp.float64, jnp.float32])
@pytest.mark.parametrize("radius", [0.4, 2.0, 4.0, 5.3])
def test_no_point_of_the_tube_is_missed(radius, dtype):
    k = np.arange(-HALF, HALF + 1)
    size = _tube.window_size(radius)
    offsets = np.random.default_rng(0).uniform(-3, 3, (len(rotations()), 2))
    offsets[::3] = 0
    # A point this near the rim may fall out by rounding; its weight vanishes there.
    rim = {jnp.float64: 1e-9, jnp.float32: 1e-4}[dtype]

    @jax.jit
    def locate(rotation, y):
        line = _tube.viewing_line(rotation)
        plane = jnp.asarray(k, dtype)
        return line, _tube.window_corner(line, y[0], y[1], plane, radius)

    seen = 0
    for rotation, y in zip(rotations(dtype), offsets, strict=True):
        line, (u, v) = locate(rotation, jnp.asarray(y, dtype))
        order = [(int(line.axis) + i) % 3 for i in (1, 2, 3)]
        w_all, v_all, u_all = np.meshgrid(k, k, k, indexing="ij")
        points = np.empty((*w_all.shape, 3))
        for axis, coordinate in zip(order, (u_all, v_all, w_all), strict=True):
            points[..., axis] = coordinate
        # Brute force in x, y, z, knowing nothing of dominant axes.
        place = points @ np.asarray(rotation[:2], float).T - y.astype(dtype)
        near = np.linalg.norm(place, axis=-1) < radius - rim
        first_u, first_v = (np.asarray(c)[:, None, None] for c in (u, v))
        covered = (u_all >= first_u) & (u_all < first_u + size)
        covered &= (v_all >= first_v) & (v_all < first_v + size)
        assert not np.any(near & ~covered)
        seen += near.sum()
    # The tubes were not empty: their volume is about pi r^2 times their length.
    assert seen > 0.5 * np.pi * radius**2 * len(k) * len(offsets)


def test_windows_are_no_larger_than_a_diagonal_tube_needs():
    """Along (1, 0, 1) / sqrt(2) the ellipse reaches ``sqrt(2) r``: no slack of two."""
    radius = 4.0
    k = np.arange(-HALF, HALF + 1)
    u, v = np.meshgrid(k, k)
    rotation = looking_along((1, 0, 1))
    widest = 0
    for shift in np.linspace(0, 1, 11):
        place = np.stack([u + shift, v, 0 * u], axis=-1) @ rotation[:2].T
        inside = np.any(np.linalg.norm(place, axis=-1) < radius, axis=0)
        widest = max(widest, inside.sum())
    assert _tube.window_size(radius) in (widest, widest + 1)


def test_viewing_line_puts_the_dominant_axis_last():
    for rotation in rotations():
        line = _tube.viewing_line(rotation)
        direction = np.asarray(line.direction)
        assert np.abs(direction[2]) == np.abs(direction).max()
        axis = int(line.axis)
        assert direction[2] == rotation[2, axis]
        assert direction[0] == rotation[2, (axis + 1) % 3]
        np.testing.assert_array_equal(
            _tube.uncycle(line, line.projection), rotation[:2]
        )


def test_cyclic_copies_are_indexed_as_documented():
    n = 4
    array = jnp.asarray(np.random.default_rng(1).normal(size=(n, n, n)))
    copies = np.asarray(_tube.cyclic_copies(array))
    for point in np.ndindex(n, n, n):
        x, y, z = point
        for a in range(3):
            at = point[a], point[(a + 2) % 3], point[(a + 1) % 3]
            assert copies[(a, *at)] == array[z, y, x]


@pytest.mark.parametrize("n", [3, 4])
def test_merging_is_the_adjoint_of_copying(n):
    rng = np.random.default_rng(2)
    x = jnp.asarray(rng.normal(size=(n, n, n)))
    y = jnp.asarray(rng.normal(size=(3, n, n, n)))
    left = jnp.vdot(_tube.cyclic_copies(x), y)
    right = jnp.vdot(x, _tube.merge_copies(y))
    np.testing.assert_allclose(left, right, rtol=1e-13)
    np.testing.assert_allclose(
        _tube.merge_copies(_tube.cyclic_copies(x)), 3 * x, rtol=1e-15
    )


@pytest.mark.parametrize("dtype", [jnp.float64, jnp.float32])
def test_project_lattice_is_the_matrix_product(dtype):
    rotation = rotations(dtype)[-1]
    k = np.random.default_rng(3).integers(-50, 50, (3, 20))
    x, y = _tube.project_lattice(rotation[:2], *jnp.asarray(k, dtype))
    exact = np.asarray(rotation, float)[:2] @ k
    atol = {jnp.float64: 1e-13, jnp.float32: 2e-5}[dtype]
    np.testing.assert_allclose(jnp.stack([x, y]), exact, rtol=0, atol=atol)
