"""What is known of each particle's pose beforehand: Gaussian priors with limits."""

import math
from typing import final

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxrefine._arrays import on_device
from jaxrefine._types import Rotations, Scalar, Shifts
from jaxrefine.geometry import (
    Poses,
    matrix_to_rotvec,
    rotvec_to_matrix,
)

_HIGHEST = jax.lax.Precision.HIGHEST


@final
class Prior(eqx.Module):
    r"""Gaussian priors about a given pose, cut off at largest deviations.

    .. math:: -\log p(R, t) = \frac{|v|^2}{2 s_R^2} + \frac{|t - t_0|^2}{2 s_t^2}
       + \log\big((2\pi)^{5/2} s_R^3 s_t^2\big), \qquad e^{\hat v} = R R_0^T

    If the rotation is known only up to the operators of a group, it has K copies
    :math:`R_k = R_0 S_k`, and the prior is the mixture of the priors about them,

    .. math:: p(R, t) = \frac1K \sum_k p_k(R, t), \qquad
       e^{\hat v_k} = R R_k^T.

    Deviations, and their largest values, are those from the nearest copy. (RELION's
    ``--relax_sym`` also gives all copies of an orientation equal shares of its prior:
    ``HealpixSampling::findSymmetryMate`` in ``healpix_sampling.cpp``, RELION 5.)

    Attributes
    ----------
    rotations, shifts
        The pose ``R_0``, ``t_0`` (pixels).
    angle_spread, shift_spread
        Standard deviations ``s_R`` (radians, of each component of the rotation vector
        ``v``) and ``s_t`` (pixels, of each component).
    max_angle, max_shift
        Largest ``|v|`` (radians) and largest ``|t - t_0|`` (pixels). With 0 the
        rotation, or the shift, is fixed, whatever the data say.
    copies
        The copies ``R_k`` of the rotation, of which it is the first; None if it is the
        only one.
    """

    rotations: Rotations
    shifts: Shifts
    angle_spread: Float[Array, "*batch"]
    shift_spread: Float[Array, "*batch"]
    max_angle: Float[Array, "*batch"]
    max_shift: Float[Array, "*batch"]
    copies: Float[Array, "*batch copies 3 3"] | None = None

    @property
    def centres(self) -> Float[Array, "*batch copies 3 3"]:
        """The copies of the given rotation; itself alone if there are no others."""
        return self.rotations[..., None, :, :] if self.copies is None else self.copies

    @property
    def free(self) -> Float[Array, "5"]:
        """1 for each component of ``(w, t)`` that may move, 0 for a fixed one."""
        limits = jnp.stack([self.max_angle, self.max_shift])
        moves = (limits > 0).astype(limits.dtype)
        return jnp.repeat(moves, np.array([3, 2]), total_repeat_length=5)

    def take(self, indices: Int[np.ndarray, " chosen"]) -> "Prior":
        """Return the priors of the particles at the given indices."""
        return jax.tree.map(lambda leaf: leaf[indices], self)

    def deviation(
        self, rotation: Float[Array, "3 3"], shift: Float[Array, "2"]
    ) -> tuple[Float[Array, "3"], Float[Array, "2"]]:
        """Return the rotation vector from the nearest copy, and the shift."""
        turned = jnp.matmul(rotation, self.nearest(rotation).T, precision=_HIGHEST)
        return matrix_to_rotvec(turned), shift - self.shifts

    def nearest(self, rotation: Float[Array, "3 3"]) -> Float[Array, "3 3"]:
        """Return the copy of the given rotation that is nearest to a rotation."""
        if self.copies is None:
            return self.rotations
        trace = jnp.einsum("kij,ij->k", self.copies, rotation, precision=_HIGHEST)
        return self.copies[jnp.argmax(trace)]

    def _turns(
        self, rotation: Float[Array, "3 3"]
    ) -> tuple[Float[Array, "copies 3"], Float[Array, "copies"]]:
        """Return the ``v_k`` from all copies, and the ``-|v_k|^2 / 2 s_R^2``."""
        turned = jnp.einsum("ij,klj->kil", rotation, self.centres, precision=_HIGHEST)
        v = matrix_to_rotvec(turned)
        return v, -jnp.sum(v**2, axis=-1) / (2 * self.angle_spread**2)

    def cost(self, rotation: Float[Array, "3 3"], shift: Float[Array, "2"]) -> Scalar:
        """Return ``-log p``, normalised as if nothing were cut off."""
        _, exponents = self._turns(rotation)
        size = jnp.log(2 * jnp.pi) * 2.5 + jnp.log(self.angle_spread) * 3
        size = size + jnp.log(self.shift_spread) * 2 + math.log(len(exponents))
        square = jnp.sum((shift - self.shifts) ** 2) / self.shift_spread**2
        return square / 2 - jax.nn.logsumexp(exponents) + size

    def gradient(
        self, rotation: Float[Array, "3 3"], shift: Float[Array, "2"]
    ) -> Float[Array, "5"]:
        """Return the gradient of the cost by ``(w, t)``, ``R <- exp(w^) R``."""
        v, exponents = self._turns(rotation)
        share = jax.nn.softmax(exponents)
        v = jnp.matmul(share, v, precision=_HIGHEST)
        u = shift - self.shifts
        return jnp.concatenate([v / self.angle_spread**2, u / self.shift_spread**2])

    def information(self) -> Float[Array, "5 5"]:
        """Return the inverse of the covariance about a copy."""
        rotation = jnp.broadcast_to(1 / self.angle_spread**2, (3,))
        shift = jnp.broadcast_to(1 / self.shift_spread**2, (2,))
        return jnp.diag(jnp.concatenate([rotation, shift]))

    def clip(
        self, rotation: Float[Array, "3 3"], shift: Float[Array, "2"]
    ) -> tuple[Float[Array, "3 3"], Float[Array, "2"]]:
        """Return the nearest pose within the largest deviations."""
        v, u = self.deviation(rotation, shift)
        length, distance = (jnp.sqrt(jnp.sum(x**2) + 1e-30) for x in (v, u))
        back = rotvec_to_matrix(v * jnp.minimum(1.0, self.max_angle / length))
        nearest = jnp.matmul(back, self.nearest(rotation), precision=_HIGHEST)
        rotation = jnp.where(length > self.max_angle, nearest, rotation)
        return rotation, self.shifts + u * jnp.minimum(1.0, self.max_shift / distance)


def priors_about(
    poses: Poses,
    angle_spread: float,
    shift_spread: float,
    max_angle: float,
    max_shift: float,
    operators: Float[np.ndarray, "order 3 3"] | None = None,
) -> Prior:
    """Return priors about given poses, with a leading axis on every leaf.

    Parameters
    ----------
    poses
        The given poses, radians and pixels.
    angle_spread, shift_spread, max_angle, max_shift
        See `Prior`; the same for all of them.
    operators
        The ``S_k`` up to which the rotations are known, the identity first; None, or
        the identity alone, if they are known.
    """
    count, dtype = len(poses), poses.rotations.dtype
    numbers = (angle_spread, shift_spread, max_angle, max_shift)
    each = [on_device(np.full(count, number, dtype)) for number in numbers]
    copies = None
    if operators is not None and len(operators) > 1:
        turned = np.asarray(poses.rotations, np.float64)[:, None] @ operators
        copies = on_device(turned.astype(dtype))
    return Prior(poses.rotations, poses.shifts, *each, copies=copies)
