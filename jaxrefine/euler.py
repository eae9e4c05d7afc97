"""Euler angles, as RELION's files and the paper use them.

The angles ``(rot, tilt, psi)`` are in radians. Their rotation is RELION's
``Euler_angles2matrix``::

    R(rot, tilt, psi) = Z(psi) Y(tilt) Z(rot),

        [ cos a  sin a  0]          [cos a  0  -sin a]
    Z = [-sin a  cos a  0]      Y = [  0    1    0   ]
        [   0      0    1]          [sin a  0   cos a]

Its first two rows are ``M_theta`` of eq. (5) with ``theta_1 = psi``,
``theta_2 = tilt`` and ``theta_3 = rot`` (the caption of Fig. 2 has the names the other
way round).

Every function accepts leading batch axes.
"""

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxrefine._types import Angles, Rotations
from jaxrefine.geometry import stack_rows


@eqx.filter_jit
def euler_to_matrix(angles: Angles) -> Rotations:
    """Return ``R = Z(psi) Y(tilt) Z(rot)``, RELION's Euler matrix."""
    (ca, cb, cg), (sa, sb, sg) = _cosines_and_sines(angles)
    return stack_rows(
        (cg * cb * ca - sg * sa, cg * cb * sa + sg * ca, -cg * sb),
        (-sg * cb * ca - cg * sa, -sg * cb * sa + cg * ca, sg * sb),
        (sb * ca, sb * sa, cb),
    )


@eqx.filter_jit
def euler_jacobian(angles: Angles) -> Float[Array, "*batch 3 3 3"]:
    """Return the derivatives of ``R`` by ``rot``, ``tilt`` and ``psi``.

    ``result[..., i, :, :]`` is ``dR / dangles[..., i]``. With rows ``r_i`` and columns
    ``c_i`` of ``R``::

        dR/drot  = [-c_1, c_0, 0]  (columns),
        dR/dtilt = [-cos(psi) r_2, sin(psi) r_2, dr_2/dtilt]  (rows),
        dR/dpsi  = [r_1, -r_0, 0]  (rows).
    """
    (ca, cb, cg), (sa, sb, sg) = _cosines_and_sines(angles)
    r = euler_to_matrix(angles)
    zero = jnp.zeros_like(ca)
    by_rot = jnp.stack(
        [-r[..., :, 1], r[..., :, 0], jnp.zeros_like(r[..., :, 2])], axis=-1
    )
    by_tilt = stack_rows(
        (-cg * sb * ca, -cg * sb * sa, -cg * cb),
        (sg * sb * ca, sg * sb * sa, sg * cb),
        (cb * ca, cb * sa, -sb),
    )
    by_psi = stack_rows(
        tuple(r[..., 1, i] for i in range(3)),
        tuple(-r[..., 0, i] for i in range(3)),
        (zero, zero, zero),
    )
    return jnp.stack([by_rot, by_tilt, by_psi], axis=-3)


def projection_matrix(angles: Angles) -> Float[Array, "*batch 2 3"]:
    """Return ``M_theta`` of eq. (5): the point ``k`` is seen at ``M_theta k``."""
    return euler_to_matrix(angles)[..., :2, :]


def projection_jacobian(angles: Angles) -> Float[Array, "*batch 3 2 3"]:
    """Return ``dM_theta / d(rot, tilt, psi)``, the matrices of Theorem 1."""
    return euler_jacobian(angles)[..., :2, :]


@eqx.filter_jit
def matrix_to_euler(rotations: Rotations) -> Angles:
    """Return ``(rot, tilt, psi)`` with ``tilt`` in ``[0, pi]``.

    ``rot`` is read from the viewing direction, the third row of ``R``; ``psi`` is then
    read from ``R Z(rot)^T = Z(psi) Y(tilt)``. Hence ``R`` is reproduced to rounding
    even where the view is so close to a pole that ``rot`` itself is noise. At the poles
    (``sin(tilt)`` under four units of rounding) ``rot`` is zero, ``psi`` carries the
    whole in-plane turn, and derivatives are finite but carry no meaning.
    """
    x, y, z = (rotations[..., 2, i] for i in range(3))
    rounding = 4 * float(jnp.finfo(rotations.dtype).eps)
    pole = jnp.maximum(jnp.abs(x), jnp.abs(y)) < rounding
    x, y = jnp.where(pole, 1, x), jnp.where(pole, 0, y)
    sine = jnp.sqrt(x**2 + y**2)
    c, s = x / sine, y / sine
    tilt = jnp.arctan2(jnp.where(pole, 0, sine), z)
    psi = jnp.arctan2(
        c * rotations[..., 0, 1] - s * rotations[..., 0, 0],
        c * rotations[..., 1, 1] - s * rotations[..., 1, 0],
    )
    return jnp.stack([jnp.arctan2(y, x), tilt, psi], axis=-1)


def _cosines_and_sines(angles):
    """Return the cosines and the sines of rot, tilt and psi, each a tuple of three."""
    each = tuple(angles[..., i] for i in range(3))
    return tuple(map(jnp.cos, each)), tuple(map(jnp.sin, each))
