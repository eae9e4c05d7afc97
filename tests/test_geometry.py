"""Rotations and poses: exponential map, distance, Haar measure, alignment, hand.

Each function is compared with its definition, its inverse and its derivatives, also
where the closed form is 0/0: at turns of zero and of pi.
"""

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


def random_directions(seed, count, dtype=jnp.float64):
    v = jax.random.normal(jax.random.key(seed), (count, 3), dtype)
    return v / jnp.linalg.norm(v, axis=-1, keepdims=True)


def close(a, b, atol):
    np.testing.assert_allclose(a, b, rtol=0, atol=atol)


def test_poses():
    """A frozen tree of two leaves, which NumPy's arrays may come into."""
    rotations = geometry.uniform_rotations(jax.random.key(3), 6)
    shifts = np.arange(12.0).reshape(6, 2)
    poses = geometry.Poses(np.asarray(rotations), shifts)
    assert len(poses) == 6
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(poses))
    assert len(jax.tree.leaves(poses)) == 2
    for indices in (np.array([4, 0, 4]), jnp.array([4, 0, 4])):
        taken = poses.take(indices)
        close(taken.rotations, np.asarray(rotations)[[4, 0, 4]], 0)
        close(taken.shifts, shifts[[4, 0, 4]], 0)
    with pytest.raises(dataclasses.FrozenInstanceError):
        poses.shifts = shifts  # pyright: ignore


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
