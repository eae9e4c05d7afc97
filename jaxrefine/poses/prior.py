"""What is known of each particle's pose beforehand: Gaussian priors with limits."""

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
    """

    rotations: Rotations
    shifts: Shifts
    angle_spread: Float[Array, "*batch"]
    shift_spread: Float[Array, "*batch"]
    max_angle: Float[Array, "*batch"]
    max_shift: Float[Array, "*batch"]

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
        """Return the rotation vector and the shift from the prior's pose."""
        turned = jnp.matmul(rotation, self.rotations.T, precision=_HIGHEST)
        return matrix_to_rotvec(turned), shift - self.shifts

    def cost(self, rotation: Float[Array, "3 3"], shift: Float[Array, "2"]) -> Scalar:
        """Return ``-log p``, normalised as if nothing were cut off."""
        v, u = self.deviation(rotation, shift)
        size = jnp.log(2 * jnp.pi) * 2.5 + jnp.log(self.angle_spread) * 3
        size = size + jnp.log(self.shift_spread) * 2
        square = (
            jnp.sum(v**2) / self.angle_spread**2 + jnp.sum(u**2) / self.shift_spread**2
        )
        return square / 2 + size

    def gradient(
        self, rotation: Float[Array, "3 3"], shift: Float[Array, "2"]
    ) -> Float[Array, "5"]:
        """Return the gradient of the cost by ``(w, t)``, ``R <- exp(w^) R``."""
        v, u = self.deviation(rotation, shift)
        return jnp.concatenate([v / self.angle_spread**2, u / self.shift_spread**2])

    def information(self) -> Float[Array, "5 5"]:
        """Return the inverse of the prior's covariance."""
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
        nearest = jnp.matmul(back, self.rotations, precision=_HIGHEST)
        rotation = jnp.where(length > self.max_angle, nearest, rotation)
        return rotation, self.shifts + u * jnp.minimum(1.0, self.max_shift / distance)


def priors_about(
    poses: Poses,
    angle_spread: float,
    shift_spread: float,
    max_angle: float,
    max_shift: float,
) -> Prior:
    """Return priors about given poses, with a leading axis on every leaf.

    Parameters
    ----------
    poses
        The given poses, radians and pixels.
    angle_spread, shift_spread, max_angle, max_shift
        See `Prior`; the same for all of them.
    """
    count, dtype = len(poses), poses.rotations.dtype
    numbers = (angle_spread, shift_spread, max_angle, max_shift)
    each = [on_device(np.full(count, number, dtype)) for number in numbers]
    return Prior(poses.rotations, poses.shifts, *each)
