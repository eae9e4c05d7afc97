r"""Poses: rotations and shifts of particles.

A rotation ``R`` takes a point ``k = (x, y, z)`` of the volume to ``R k``: the first two
coordinates are its place in the image, the third is its depth along the beam. A shift
``t = (x, y)`` puts the particle at ``+t`` pixels from the origin of its image. Euler
angles, which files and the paper use, are in :mod:`jaxrefine.euler`.

Every function accepts leading batch axes unless its signature says otherwise.
"""

from typing import final

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from jaxrefine._arrays import on_device
from jaxrefine._types import Rotations, Scalar, Shifts

_HIGHEST = jax.lax.Precision.HIGHEST

# Below this squared angle a series replaces 0/0. Its first neglected term is then
# under 1e-16, and above it the closed form's derivative still has all its digits.
_SMALL = 1e-5


@final
class Poses(eqx.Module):
    """Where the particles are and how they are rotated.

    Attributes
    ----------
    rotations
        Rotation matrices, acting on points ``(x, y, z)`` of the volume.
    shifts
        The particle sits at ``+t = (x, y)`` pixels from the origin of its image, as in
        eq. (1). (RELION's ``rlnOrigin`` is ``-t``; ``io`` converts.)
    """

    rotations: Rotations = eqx.field(converter=on_device)
    shifts: Shifts = eqx.field(converter=on_device)

    def __len__(self) -> int:
        return self.shifts.shape[0]

    def take(self, indices: Int[np.ndarray | Array, " chosen"]) -> "Poses":
        """Return the poses of some of the particles, in this order."""
        return Poses(self.rotations[indices], self.shifts[indices])


@eqx.filter_jit
def rotvec_to_matrix(vectors: Float[Array, "*batch 3"]) -> Rotations:
    """Return ``exp(w^)``, the turn by ``|w|`` radians about ``w`` (Rodrigues).

    ``exp(w^) = cos|w| I + a w^ + b w w^T`` with ``w^ v = w x v``, ``a = sin|w| / |w|``
    and ``b = (1 - cos|w|) / |w|^2``. Exact, with its derivatives, at ``w = 0`` too.
    """
    squared = jnp.sum(vectors**2, axis=-1)
    small = squared < _SMALL
    angle = jnp.sqrt(jnp.where(small, 1, squared))
    a = jnp.where(small, 1 - squared / 6 + squared**2 / 120, jnp.sin(angle) / angle)
    b = jnp.where(
        small,
        1 / 2 - squared / 24 + squared**2 / 720,
        2 * (jnp.sin(angle / 2) / angle) ** 2,
    )
    c = 1 - b * squared
    x, y, z = (vectors[..., i] for i in range(3))
    return stack_rows(
        (c + b * x * x, b * x * y - a * z, b * x * z + a * y),
        (b * y * x + a * z, c + b * y * y, b * y * z - a * x),
        (b * z * x - a * y, b * z * y + a * x, c + b * z * z),
    )


@eqx.filter_jit
def matrix_to_rotvec(rotations: Rotations) -> Float[Array, "*batch 3"]:
    """Return the ``w`` with ``exp(w^) = R`` and ``|w| <= pi``.

    Passes through the unit quaternion, so that it is accurate to rounding near 0 and
    near pi. At exactly pi, ``w`` and ``-w`` are the same rotation; one is returned.
    """
    quaternion = _matrix_to_quaternion(rotations)
    cosine, axis = quaternion[..., 0], quaternion[..., 1:]
    squared = jnp.sum(axis**2, axis=-1)
    small = squared < _SMALL
    sine = jnp.sqrt(jnp.where(small, 1, squared))
    # asin(s) / s about s = 0, where the cosine is positive.
    scale = jnp.where(
        small,
        1 + squared / 6 + 3 * squared**2 / 40,
        jnp.arctan2(sine, cosine) / sine,
    )
    return 2 * scale[..., None] * axis


@eqx.filter_jit
def uniform_rotations(
    key: PRNGKeyArray, count: int, dtype: jax.typing.DTypeLike = float
) -> Float[Array, "count 3 3"]:
    """Draw rotations from the Haar measure, by normalised Gaussian quaternions."""
    quaternion = jax.random.normal(key, (count, 4), dtype)
    norm = jnp.linalg.norm(quaternion, axis=-1, keepdims=True)
    return _quaternion_to_matrix(quaternion / norm)


@eqx.filter_jit
def geodesic_distance(
    rotations: Rotations, reference: Rotations
) -> Float[Array, "*batch"]:
    """Return the angle between rotations, in radians in ``[0, pi]``.

    With columns ``a_i`` and ``b_i``, the turn from one to the other has::

        sin(angle) axis = sum_i a_i x b_i / 2,   cos(angle) = (sum_i a_i . b_i - 1) / 2,

    and ``atan2`` of the two is accurate to rounding from 0 to pi. (The sines are taken
    from ``a_i x (b_i - a_i)``, the same but exactly zero for equal rotations.) The
    distance has kinks at 0 and at pi; there the gradient returned is zero.
    """
    turn = jnp.cross(rotations, reference - rotations, axis=-2).sum(axis=-1) / 2
    squared = jnp.sum(turn**2, axis=-1)
    kink = squared == 0
    sine = jnp.where(kink, 0, jnp.sqrt(jnp.where(kink, 1, squared)))
    cosine = (jnp.sum(rotations * reference, axis=(-2, -1)) - 1) / 2
    return jnp.arctan2(sine, cosine)


@eqx.filter_jit
def align_rotations(
    rotations: Float[Array, "particles 3 3"],
    reference: Float[Array, "particles 3 3"],
    iterations: int = 20,
) -> Float[Array, "3 3"]:
    """Return the global rotation ``G`` that best takes ``rotations`` to ``reference``.

    Poses are known only up to a rotation of the volume: ``R_p G`` sees ``V(G x)`` as
    ``R_p`` sees ``V(x)``. This minimises the sum of chordal distances::

        sum_p ||R_p G - Ref_p||_F,    ||A - B||_F = 2 sqrt(2) sin(angle(A, B) / 2),

    by iteratively reweighted least squares: ``G`` is the rotation nearest to
    ``sum_p R_p^T Ref_p / d_p``, with the ``d_p`` of the last ``G`` (and one at first).
    Distances, not their squares, so that gross outliers leave ``G`` in place.
    """
    floor = float(jnp.finfo(rotations.dtype).eps) ** 0.5

    def nearest(weights):
        correlation = jnp.einsum(
            "p,pji,pjk->ik", weights, rotations, reference, precision=_HIGHEST
        )
        return _nearest_rotation(correlation)

    def step(_, rotation):
        difference = _turn_all(rotations, rotation) - reference
        distances = jnp.linalg.norm(difference, axis=(-2, -1))
        return nearest(1 / jnp.maximum(distances, floor))

    start = nearest(jnp.ones_like(rotations[:, 0, 0]))
    return jax.lax.fori_loop(0, iterations, step, start)


def mirror(rotations: Rotations) -> Rotations:
    """Return the poses ``J R J``, ``J = diag(1, 1, -1)``, of the other hand.

    A point ``k`` of the volume is the point ``J k`` of its mirror image ``V(J x)``. The
    pose ``J R J`` puts it at ``J R J J k = J R k``: the same place in the image, at the
    opposite depth. Projections forget the depth, so images alone cannot tell
    ``(V, R)`` from ``(V(J x), J R J)``.
    """
    j = jnp.array([1, 1, -1], rotations.dtype)
    return rotations * jnp.broadcast_to(j[:, None] * j[None, :], rotations.shape)


@eqx.filter_jit
def align_rotations_and_hand(
    rotations: Float[Array, "particles 3 3"],
    reference: Float[Array, "particles 3 3"],
) -> tuple[Float[Array, "3 3"], Bool[Array, ""]]:
    """Align as `align_rotations` does, up to the hand too.

    Returns
    -------
    rotation
        The ``G`` that takes ``rotations``, mirrored if need be, to ``reference``.
    mirrored
        Whether `mirror` ``(rotations) G`` is nearer, by the sum of geodesic distances,
        than ``rotations G`` with the best ``G`` of each.
    """

    def fit(candidates) -> tuple[Float[Array, "3 3"], Scalar]:
        rotation = align_rotations(candidates, reference)
        aligned = _turn_all(candidates, rotation)
        return rotation, geodesic_distance(aligned, reference).sum()

    same, same_cost = fit(rotations)
    other, other_cost = fit(mirror(rotations))
    mirrored = other_cost < same_cost
    return jnp.where(mirrored, other, same), mirrored


def stack_rows(*rows: tuple[Float[Array, "*batch"], ...]) -> Float[Array, "*batch r c"]:
    """Return the matrices whose entries are given row by row."""
    return jnp.stack([jnp.stack(row, axis=-1) for row in rows], axis=-2)


def _turn_all(rotations, rotation):
    """Return ``R_p G`` for every p."""
    return jnp.einsum("pij,jk->pik", rotations, rotation, precision=_HIGHEST)


def _nearest_rotation(matrix):
    """Return the rotation nearest to a matrix in the Frobenius norm."""
    u, _, vt = jnp.linalg.svd(matrix)
    hand = jnp.sign(jnp.linalg.det(u) * jnp.linalg.det(vt))
    return jnp.matmul(u, vt.at[2].multiply(hand), precision=_HIGHEST)


def _quaternion_to_matrix(quaternion):
    """Return the rotations of unit quaternions ``(w, x, y, z)``."""
    w, x, y, z = (quaternion[..., i] for i in range(4))
    return stack_rows(
        (1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)),
        (2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)),
        (2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)),
    )


def _matrix_to_quaternion(rotations):
    """Return unit quaternions ``(w, x, y, z)`` with ``w >= 0``.

    ``4 q q^T`` is linear in ``R``; its row with the largest diagonal entry is ``q`` up
    to a factor, without cancellation.
    """
    (a, b, c), (d, e, f), (g, h, i) = (
        tuple(rotations[..., row, column] for column in range(3)) for row in range(3)
    )
    outer = stack_rows(
        (1 + a + e + i, h - f, c - g, d - b),
        (h - f, 1 + a - e - i, b + d, c + g),
        (c - g, b + d, 1 - a + e - i, f + h),
        (d - b, c + g, f + h, 1 - a - e + i),
    )
    largest = jnp.argmax(jnp.diagonal(outer, axis1=-2, axis2=-1), axis=-1)
    row = jnp.take_along_axis(outer, largest[..., None, None], axis=-2)[..., 0, :]
    quaternion = row / jnp.linalg.norm(row, axis=-1, keepdims=True)
    return jnp.where(quaternion[..., :1] < 0, -quaternion, quaternion)
