import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrefine import geometry

PI = np.pi
DTYPES = [(jnp.float64, 1e-14), (jnp.float32, 2e-6)]
GENERATORS = np.array(
    [
        [[0, 0, 0], [0, 0, -1], [0, 1, 0]],
        [[0, 0, 1], [0, 0, 0], [-1, 0, 0]],
        [[0, -1, 0], [1, 0, 0], [0, 0, 0]],
    ],
    float,
)


def random_angles(seed, count=100, dtype=jnp.float64):
    return jax.random.uniform(jax.random.key(seed), (count, 3), dtype, -4.0, 4.0)


def random_directions(seed, count, dtype=jnp.float64):
    v = jax.random.normal(jax.random.key(seed), (count, 3), dtype)
    return v / jnp.linalg.norm(v, axis=-1, keepdims=True)


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
    r = geometry.euler_to_matrix(random_angles(0, dtype=dtype))
    assert r.dtype == dtype
    r = np.asarray(r, float)
    close(r @ r.swapaxes(-1, -2), np.broadcast_to(np.eye(3), r.shape), atol)
    close(np.linalg.det(r), 1.0, atol)


def test_projection_matrix_is_equation_5():
    angles = random_angles(1)
    rot, tilt, psi = np.asarray(angles).T
    expected = np.moveaxis(equation_5(psi, tilt, rot), -1, 0)
    close(geometry.projection_matrix(angles), expected, 1e-15)


def test_matrix_is_relions_and_factors_into_elementary_turns():
    angles = random_angles(2)
    rot, tilt, psi = np.asarray(angles).T
    expected = np.moveaxis(relion_matrix(rot, tilt, psi), -1, 0)
    close(geometry.euler_to_matrix(angles), expected, 1e-15)
    # The passive turns about z and y are exp of minus the generators.
    exp, e = geometry.rotvec_to_matrix, np.eye(3)
    z_psi, y_tilt, z_rot = (
        np.asarray(exp(jnp.asarray(-angle[:, None] * axis)))
        for angle, axis in ((psi, e[2]), (tilt, e[1]), (rot, e[2]))
    )
    close(z_psi @ y_tilt @ z_rot, expected, 1e-14)


def test_poses():
    angles = random_angles(3, 6).reshape(2, 3, 3)
    poses = geometry.Poses(angles, jnp.zeros((2, 3, 2)))
    close(poses.rotations, geometry.euler_to_matrix(angles), 0)
    assert poses.rotations.shape == (2, 3, 3, 3)
    assert len(jax.tree.leaves(poses)) == 2
    with pytest.raises(dataclasses.FrozenInstanceError):
        poses.angles = angles  # pyright: ignore


@pytest.mark.parametrize(("dtype", "atol"), DTYPES)
def test_jacobians_match_autodiff(dtype, atol):
    poles = [[0.3, 0.0, -1.2], [0.3, PI, -1.2], [0.0, 0.0, 0.0]]
    angles = jnp.concatenate(
        [random_angles(4, 97, dtype), jnp.array(poles, dtype)], axis=0
    )
    for function, jacobian in (
        (geometry.euler_to_matrix, geometry.euler_jacobian),
        (geometry.projection_matrix, geometry.projection_jacobian),
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
        r = geometry.euler_to_matrix(angles)
        back = geometry.matrix_to_euler(r)
        assert back.dtype == dtype
        assert jnp.all((back[:, 1] >= 0) & (back[:, 1] <= jnp.asarray(PI, dtype)))
        close(geometry.euler_to_matrix(back), r, atol)
        if offset == 0.0:
            close(back[:, 0], 0.0, 0)


@pytest.mark.parametrize(("dtype", "atol"), DTYPES)
def test_euler_round_trip_of_any_rotation(dtype, atol):
    r = geometry.uniform_rotations(jax.random.key(6), 100, dtype)
    close(geometry.euler_to_matrix(geometry.matrix_to_euler(r)), r, atol)


def test_euler_angles_return_unchanged_inside_their_domain():
    angles = random_angles(7)
    angles = jnp.stack(
        [angles[:, 0] * 0.75, 1.5 + angles[:, 1] * 0.3, angles[:, 2] * 0.75], axis=-1
    )
    back = geometry.matrix_to_euler(geometry.euler_to_matrix(angles))
    close(back, angles, 1e-13)


def test_euler_gradient_is_finite_at_the_poles_and_right_elsewhere():
    flip = jnp.diag(jnp.array([1.0, -1.0, -1.0]))
    for differentiate in (jax.jacfwd, jax.jacrev):
        derivative = jax.jit(differentiate(geometry.matrix_to_euler))
        for pole in (jnp.eye(3), flip):
            assert jnp.all(jnp.isfinite(derivative(pole)))

    def there_and_back(angles):
        return geometry.matrix_to_euler(geometry.euler_to_matrix(angles))

    derivative = jax.jit(jax.jacfwd(there_and_back))
    close(derivative(jnp.array([0.4, 1.0, -2.0])), np.eye(3), 1e-14)


@pytest.mark.parametrize(
    "size", [0.0, 1e-12, 1e-9, 1e-4, 3.1e-3, 3.2e-3, 6.3e-3, 6.4e-3, 0.1, 1.0, 2.0, 3.0]
)
@pytest.mark.parametrize(("dtype", "atol"), DTYPES)
def test_rotvec_round_trip(dtype, atol, size):
    w = random_directions(8, 100, dtype) * size
    r = geometry.rotvec_to_matrix(w)
    assert r.dtype == dtype
    back = geometry.matrix_to_rotvec(r)
    # Small vectors keep their relative accuracy.
    close(back, w, atol * max(size, 1e-30) if size < 1e-3 else atol)


@pytest.mark.parametrize("gap", [1e-3, 1e-6, 1e-9, 0.0])
@pytest.mark.parametrize(("dtype", "atol"), DTYPES)
def test_rotvec_round_trip_near_pi(dtype, atol, gap):
    axes = jnp.concatenate([random_directions(9, 100, dtype), jnp.eye(3, dtype=dtype)])
    w = axes * (PI - gap)
    r = geometry.rotvec_to_matrix(w)
    back = geometry.matrix_to_rotvec(r)
    close(geometry.rotvec_to_matrix(back), r, atol)
    close(jnp.linalg.norm(back, axis=-1), PI - gap, 2 * atol)
    if gap >= 10 * atol:
        close(back, w, 3 * atol)


def test_rotvec_is_the_matrix_exponential():
    w = random_directions(10, 20) * jnp.linspace(0.0, 3.0, 20)[:, None]
    expected = jax.vmap(jax.scipy.linalg.expm)(
        jnp.einsum("pi,ijk->pjk", w, jnp.asarray(GENERATORS))
    )
    close(geometry.rotvec_to_matrix(w), expected, 1e-13)


def test_rotvec_derivatives_at_zero():
    zero = jnp.zeros(3)
    for differentiate in (jax.jacfwd, jax.jacrev):
        first = jax.jit(differentiate(geometry.rotvec_to_matrix))(zero)
        close(jnp.moveaxis(first, -1, 0), GENERATORS, 0)
    # exp(w^) = I + w^ + w^2 / 2 + ...
    second = jax.jit(jax.jacfwd(jax.jacrev(geometry.rotvec_to_matrix)))(zero)
    products = np.einsum("aij,bjk->ikab", GENERATORS, GENERATORS)
    close(second, (products + products.swapaxes(-1, -2)) / 2, 1e-15)

    def there_and_back(w):
        return geometry.matrix_to_rotvec(geometry.rotvec_to_matrix(w))

    for differentiate in (jax.jacfwd, jax.jacrev):
        derivative = jax.jit(differentiate(there_and_back))
        for size in (0.0, 1e-9, 3.2e-3, 1.0, 3.0):
            w = jnp.array([2.0, -1.0, 2.0]) / 3 * size
            close(derivative(w), np.eye(3), 1e-12)


SIZES = [1e-8, 1e-5, 1e-2, 1.0, PI / 2, 3.0, PI - 1e-2, PI - 1e-4, PI - 1e-6]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(("dtype", "atol"), DTYPES)
def test_geodesic_distance_is_the_angle_of_the_turn(dtype, atol, size):
    r = geometry.uniform_rotations(jax.random.key(11), 100, dtype)
    turn = geometry.rotvec_to_matrix(random_directions(12, 100, dtype) * size)
    turned = jnp.matmul(turn, r, precision="highest")
    assert geometry.geodesic_distance(turned, r).dtype == dtype
    close(geometry.geodesic_distance(turned, r), size, atol)
    close(geometry.geodesic_distance(r, turned), size, atol)
    identity = jnp.broadcast_to(jnp.eye(3, dtype=dtype), r.shape)
    close(
        geometry.geodesic_distance(identity, turn),
        size,
        atol * (size if size < 1 else 1),
    )


def test_geodesic_distance_gradients():
    r = geometry.uniform_rotations(jax.random.key(13), 1)[0]
    w = jnp.array([0.3, -0.2, 0.6])

    def distance(w):
        turned = jnp.matmul(geometry.rotvec_to_matrix(w), r, precision="highest")
        return geometry.geodesic_distance(turned, r)

    close(jax.grad(distance)(w), w / jnp.linalg.norm(w), 1e-14)
    close(geometry.geodesic_distance(r, r), 0.0, 0)
    close(jax.grad(geometry.geodesic_distance)(r, r), np.zeros((3, 3)), 0)
    half_turn = jnp.diag(jnp.array([1.0, -1.0, -1.0]))
    gradient = jax.grad(geometry.geodesic_distance)(half_turn, jnp.eye(3))
    close(gradient, np.zeros((3, 3)), 0)


@pytest.mark.parametrize("dtype", [jnp.float64, jnp.float32])
def test_uniform_rotations_follow_the_haar_measure(dtype):
    count = 20000
    r = geometry.uniform_rotations(jax.random.key(14), count, dtype)
    assert r.dtype == dtype
    r = np.asarray(r, float)
    close(np.linalg.det(r), 1.0, 1e-5)
    # Entries have mean 0 and variance 1/3.
    close(r.mean(axis=0), np.zeros((3, 3)), 4 * np.sqrt(1 / 3 / count))
    # The angle has density (1 - cos) / pi.
    angle = geometry.geodesic_distance(
        jnp.asarray(r), jnp.broadcast_to(jnp.eye(3), r.shape)
    )
    mean = PI / 2 + 2 / PI
    variance = PI**2 / 3 + 2 - mean**2
    close(angle.mean(), mean, 4 * np.sqrt(variance / count))


@pytest.mark.parametrize("dtype", [jnp.float64, jnp.float32])
@pytest.mark.parametrize("count", [100, 2000])
def test_equidistributed_views_are_evenly_spaced(dtype, count):
    angles = geometry.equidistributed_angles(jax.random.key(15), count, dtype)
    assert angles.dtype == dtype
    views = np.asarray(geometry.euler_to_matrix(angles)[:, 2], float)
    assert np.linalg.norm(views.mean(axis=0)) < 1 / count
    cosines = views @ views.T
    np.fill_diagonal(cosines, -1)
    nearest = np.arccos(cosines.max(axis=1))
    ideal = np.sqrt(8 * PI / np.sqrt(3) / count)  # the hexagonal lattice
    assert 0.75 * ideal < nearest.min() and nearest.max() < 1.05 * ideal
    psi = np.asarray(angles[:, 2], float)
    assert psi.min() >= 0 and psi.max() < 2 * PI
    assert abs(psi.mean() - PI) < 4 * 2 * PI / np.sqrt(12 * count)


def test_equidistributed_views_of_many_particles_survive_single_precision():
    count = 200_000
    key = jax.random.key(16)
    single = geometry.equidistributed_angles(key, count, jnp.float32)
    double = geometry.equidistributed_angles(key, count, jnp.float64)
    views = [np.asarray(geometry.euler_to_matrix(a)[:, 2]) for a in (single, double)]
    close(views[0], views[1], 2e-6)


@pytest.mark.parametrize(("dtype", "atol"), [(jnp.float64, 1e-13), (jnp.float32, 1e-6)])
def test_alignment_recovers_an_exact_rotation(dtype, atol):
    r = geometry.uniform_rotations(jax.random.key(17), 50, dtype)
    g = geometry.uniform_rotations(jax.random.key(18), 1, dtype)[0]
    reference = jnp.einsum("pij,jk->pik", r, g, precision="highest")
    found = geometry.align_rotations(r, reference)
    assert found.dtype == dtype
    close(found, g, atol)


@pytest.mark.parametrize("dtype", [jnp.float64, jnp.float32])
def test_alignment_ignores_outliers(dtype):
    align = jax.jit(geometry.align_rotations)
    for seed in range(5):
        keys = jax.random.split(jax.random.key(seed), 3)
        r = geometry.uniform_rotations(keys[0], 200, dtype)
        g = geometry.uniform_rotations(keys[1], 1, dtype)[0]
        reference = jnp.einsum("pij,jk->pik", r, g, precision="highest")
        outliers = geometry.uniform_rotations(keys[2], 40, dtype)
        reference = reference.at[:40].set(outliers)
        found = align(r, reference)
        assert geometry.geodesic_distance(found, g) < 1e-3
        close(jnp.linalg.det(found), 1.0, 1e-5)


@pytest.mark.parametrize("dtype", [jnp.float64, jnp.float32])
@pytest.mark.parametrize("other_hand", [False, True])
def test_alignment_recognises_the_hand(dtype, other_hand):
    keys = jax.random.split(jax.random.key(19), 4)
    reference = geometry.uniform_rotations(keys[0], 200, dtype)
    g = geometry.uniform_rotations(keys[1], 1, dtype)[0]
    noise = 0.1 * jax.random.normal(keys[2], (200, 3), dtype)
    r = jnp.einsum(
        "pij,pjk,lk->pil", geometry.rotvec_to_matrix(noise), reference, g
    )  # R_p G = Ref_p, up to noise
    r = r.at[:20].set(geometry.uniform_rotations(keys[3], 20, dtype))
    if other_hand:
        r = geometry.mirror(r)
    found, mirrored = geometry.align_rotations_and_hand(r, reference)
    assert mirrored == other_hand
    assert geometry.geodesic_distance(found, g) < 0.03


def test_mirror_image_has_the_same_projections():
    r = geometry.uniform_rotations(jax.random.key(20), 30)
    points = jax.random.normal(jax.random.key(21), (40, 3))
    weights = jax.random.uniform(jax.random.key(22), (40,))
    grid = jnp.linspace(-3.0, 3.0, 12)

    def project(rotation, points):
        """Render one unit Gaussian per point."""
        place = jnp.einsum("ij,qj->qi", rotation, points)[:, :2]
        x, y = (
            jnp.exp(-((grid[:, None] - place[None, :, i]) ** 2) / 2) for i in range(2)
        )
        return jnp.einsum("q,xq,yq->yx", weights, x, y)

    batch = jax.jit(jax.vmap(project, in_axes=(0, None)))
    mirrored_points = points * jnp.array([[1.0, 1.0, -1.0]])
    images = batch(r, points)
    close(batch(geometry.mirror(r), mirrored_points), images, 1e-13)
    # Neither half of the change alone leaves the images as they were.
    assert jnp.abs(batch(r, mirrored_points) - images).max() > 0.1
    assert jnp.abs(batch(geometry.mirror(r), points) - images).max() > 0.1


def test_mirror_reverses_the_tilt_and_is_an_involution():
    angles = random_angles(23)
    mirrored = geometry.mirror(geometry.euler_to_matrix(angles))
    reversed_tilt = angles * jnp.array([[1.0, -1.0, 1.0]])
    close(mirrored, geometry.euler_to_matrix(reversed_tilt), 0)
    close(geometry.mirror(mirrored), geometry.euler_to_matrix(angles), 0)
