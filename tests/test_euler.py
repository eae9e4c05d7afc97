"""Euler angles: eq. (5), RELION's matrix, derivatives by autodiff, round trips.

The angles of a rotation come back unchanged inside their domain, and near the poles,
where they are not unique, the rotation does.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrefine import euler, geometry

PI = np.pi
DTYPES = [(jnp.float64, 1e-14), (jnp.float32, 2e-6)]


def random_angles(seed, count=100, dtype=jnp.float64):
    return jax.random.uniform(jax.random.key(seed), (count, 3), dtype, -4.0, 4.0)


def close(a, b, atol):
    np.testing.assert_allclose(a, b, rtol=0, atol=atol)


def relion_matrix(rot, tilt, psi):
    ca, cb, cg = np.cos(rot), np.cos(tilt), np.cos(psi)
    sa, sb, sg = np.sin(rot), np.sin(tilt), np.sin(psi)
    cc, cs, sc, ss = cb * ca, cb * sa, sb * ca, sb * sa
    return np.array(
        [
            [cg * cc - sg * sa, cg * cs + sg * ca, -cg * sb],
            [-sg * cc - cg * sa, -sg * cs + cg * ca, sg * sb],
            [sc, ss, cb],
        ]
    )


def equation_5(theta_1, theta_2, theta_3):
    c1, c2, c3 = np.cos(theta_1), np.cos(theta_2), np.cos(theta_3)
    s1, s2, s3 = np.sin(theta_1), np.sin(theta_2), np.sin(theta_3)
    return np.array(
        [
            [c1 * c2 * c3 - s1 * s3, c3 * s1 + c1 * c2 * s3, -c1 * s2],
            [-c1 * s3 - c2 * c3 * s1, c1 * c3 - c2 * s1 * s3, s1 * s2],
        ]
    )


@pytest.mark.parametrize(("dtype", "atol"), DTYPES)
def test_euler_matrices_are_rotations(dtype, atol):
    r = euler.euler_to_matrix(random_angles(0, dtype=dtype))
    assert r.dtype == dtype
    r = np.asarray(r, float)
    close(r @ r.swapaxes(-1, -2), np.broadcast_to(np.eye(3), r.shape), atol)
    close(np.linalg.det(r), 1.0, atol)


def test_projection_matrix_is_equation_5():
    angles = random_angles(1)
    rot, tilt, psi = np.asarray(angles).T
    expected = np.moveaxis(equation_5(psi, tilt, rot), -1, 0)
    close(euler.projection_matrix(angles), expected, 1e-15)


def test_matrix_is_relions_and_factors_into_elementary_turns():
    angles = random_angles(2)
    rot, tilt, psi = np.asarray(angles).T
    expected = np.moveaxis(relion_matrix(rot, tilt, psi), -1, 0)
    close(euler.euler_to_matrix(angles), expected, 1e-15)
    # The passive turns about z and y are exp of minus the generators.
    exp, e = geometry.rotvec_to_matrix, np.eye(3)
    z_psi, y_tilt, z_rot = (
        np.asarray(exp(jnp.asarray(-angle[:, None] * axis)))
        for angle, axis in ((psi, e[2]), (tilt, e[1]), (rot, e[2]))
    )
    close(z_psi @ y_tilt @ z_rot, expected, 1e-14)


@pytest.mark.parametrize(("dtype", "atol"), DTYPES)
def test_jacobians_match_autodiff(dtype, atol):
    poles = [[0.3, 0.0, -1.2], [0.3, PI, -1.2], [0.0, 0.0, 0.0]]
    angles = jnp.concatenate(
        [random_angles(4, 97, dtype), jnp.array(poles, dtype)], axis=0
    )
    for function, jacobian in (
        (euler.euler_to_matrix, euler.euler_jacobian),
        (euler.projection_matrix, euler.projection_jacobian),
    ):
        twin = jnp.moveaxis(jax.jit(jax.vmap(jax.jacfwd(function)))(angles), -1, -3)
        assert jacobian(angles).dtype == dtype
        close(jacobian(angles), twin, atol)


@pytest.mark.parametrize(("dtype", "atol"), DTYPES)
@pytest.mark.parametrize("offset", [0.0, 1e-16, 1e-12, 1e-8, 1e-7, 1e-4, 0.5])
def test_euler_round_trip_near_the_poles(dtype, atol, offset):
    rot, _, psi = random_angles(5, dtype=dtype).T
    for tilt in (offset, -offset, PI - offset, PI + offset):
        angles = jnp.stack([rot, jnp.full_like(rot, tilt), psi], axis=-1)
        r = euler.euler_to_matrix(angles)
        back = euler.matrix_to_euler(r)
        assert back.dtype == dtype
        assert jnp.all((back[:, 1] >= 0) & (back[:, 1] <= jnp.asarray(PI, dtype)))
        close(euler.euler_to_matrix(back), r, atol)
        if offset == 0.0:
            close(back[:, 0], 0.0, 0)


@pytest.mark.parametrize(("dtype", "atol"), DTYPES)
def test_euler_round_trip_of_any_rotation(dtype, atol):
    r = geometry.uniform_rotations(jax.random.key(6), 100, dtype)
    close(euler.euler_to_matrix(euler.matrix_to_euler(r)), r, atol)


def test_euler_angles_return_unchanged_inside_their_domain():
    angles = random_angles(7)
    angles = jnp.stack(
        [angles[:, 0] * 0.75, 1.5 + angles[:, 1] * 0.3, angles[:, 2] * 0.75], axis=-1
    )
    back = euler.matrix_to_euler(euler.euler_to_matrix(angles))
    close(back, angles, 1e-13)


def test_euler_gradient_is_finite_at_the_poles_and_right_elsewhere():
    flip = jnp.diag(jnp.array([1.0, -1.0, -1.0]))
    for differentiate in (jax.jacfwd, jax.jacrev):
        derivative = jax.jit(differentiate(euler.matrix_to_euler))
        for pole in (jnp.eye(3), flip):
            assert jnp.all(jnp.isfinite(derivative(pole)))

    def there_and_back(angles):
        return euler.matrix_to_euler(euler.euler_to_matrix(angles))

    derivative = jax.jit(jax.jacfwd(there_and_back))
    close(derivative(jnp.array([0.4, 1.0, -2.0])), np.eye(3), 1e-14)


def test_mirror_reverses_the_tilt_and_is_an_involution():
    angles = random_angles(23)
    mirrored = geometry.mirror(euler.euler_to_matrix(angles))
    reversed_tilt = angles * jnp.array([[1.0, -1.0, 1.0]])
    close(mirrored, euler.euler_to_matrix(reversed_tilt), 0)
    close(geometry.mirror(mirrored), euler.euler_to_matrix(angles), 0)
