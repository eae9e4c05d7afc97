r"""Pose updates in the tangent space of SO(3) x R^2.

A pose moves by a 5-vector ``(w, dt)``: :math:`R \leftarrow e^{\hat w} R` and
``t <- t + dt``. Each step has coordinates of its own, so that none is near a
singularity, as Euler angles may be.

A pose update is a `PoseUpdate`: any object with its method ``minimise``. An objective
returns the cost at a pose, its gradient by the 5-vector, and an approximation of its
Hessian: :math:`J^T W J` of the residual plus the prior's. Everything is written for one
particle; use ``jax.vmap`` for many.
"""

from collections.abc import Callable
from typing import Protocol, final, runtime_checkable

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float

from jaxrefine._types import Scalar
from jaxrefine.geometry import rotvec_to_matrix

_HIGHEST = jax.lax.Precision.HIGHEST

Objective = Callable[
    [Float[Array, "3 3"], Float[Array, "2"]],
    tuple[Scalar, Float[Array, "5"], Float[Array, "5 5"]],
]
"""Cost, gradient and information matrix at a pose."""

Constraint = Callable[
    [Float[Array, "3 3"], Float[Array, "2"]],
    tuple[Float[Array, "3 3"], Float[Array, "2"]],
]
"""Takes a pose to the nearest allowed one."""

_LARGEST_TURN = 0.5  # radians in one step; the linearisation is good for no more
# The damping is divided by the first after an accepted step, and multiplied by the
# second after a rejected one. They are a convention, like Marquardt's 10 for both, that
# no benchmark has set.
_RELAX, _TIGHTEN = 5, 8


@final
class Estimate(eqx.Module):
    """A pose, and how well it is determined.

    Attributes
    ----------
    rotation, shift
        The pose.
    cost
        The objective there.
    information
        :math:`J^T W J` plus the prior's; its inverse is the covariance of the rotation
        vector (radians) and the shift (pixels), the Cramer-Rao bound where the
        residual is noise.
    damping
        What was added to the information's diagonal in each iteration, relative to it.
    accepted
        Whether each iteration lowered the cost.
    """

    rotation: Float[Array, "*batch 3 3"]
    shift: Float[Array, "*batch 2"]
    cost: Float[Array, "*batch"]
    information: Float[Array, "*batch 5 5"]
    damping: Float[Array, "*batch iterations"]
    accepted: Bool[Array, "*batch iterations"]

    @property
    def covariance(self) -> Float[Array, "*batch 5 5"]:
        """Inverse of the information."""
        return jnp.linalg.inv(self.information)


def retract(
    rotation: Float[Array, "3 3"], shift: Float[Array, "2"], step: Float[Array, "5"]
) -> tuple[Float[Array, "3 3"], Float[Array, "2"]]:
    r"""Move a pose: :math:`(e^{\hat w} R,\; t + dt)` with ``step = (w, dt)``."""
    turn = rotvec_to_matrix(step[:3])
    return jnp.matmul(turn, rotation, precision=_HIGHEST), shift + step[3:]


@runtime_checkable
class PoseUpdate(Protocol):
    """The methods that a pose update must have."""

    @property
    def iterations(self) -> int:
        """Number of steps that are tried."""
        ...

    def minimise(
        self,
        objective: Objective,
        rotation: Float[Array, "3 3"],
        shift: Float[Array, "2"],
        constraint: Constraint,
    ) -> Estimate:
        """Improve one pose; the result's cost is never above that of the start."""
        ...


@final
class LevenbergMarquardt(eqx.Module):
    r"""Levenberg-Marquardt with Marquardt's scaling, and damping per particle.

    .. math:: (A + \mu\,\mathrm{diag} A)\, \delta = -g, \qquad A = J^T W J + \Sigma^{-1}

    Scaling the damping by the diagonal (Marquardt, SIAM J. Appl. Math. 11, 1963) makes
    the steps independent of the units of angles and shifts. A step is accepted only if
    the cost falls; the damping then falls to a fifth, or else grows to eight times. One
    evaluation of the objective per iteration, and one to begin with.

    Parameters
    ----------
    iterations
        Number of steps that are tried.
    damping
        First value of the damping ``mu``.
    """

    iterations: int = eqx.field(static=True, default=3)
    damping: float = eqx.field(static=True, default=1e-2)

    def minimise(
        self,
        objective: Objective,
        rotation: Float[Array, "3 3"],
        shift: Float[Array, "2"],
        constraint: Constraint,
    ) -> Estimate:
        """Improve one pose."""
        dtype = rotation.dtype
        rotation, shift = constraint(rotation, shift)

        def iterate(carry, _):
            (rotation, shift), (cost, gradient, information), damping = carry
            diagonal = jnp.diag(information)
            # An image without signal has no information; it must not divide by zero.
            floor = 1e-6 * jnp.max(diagonal) + jnp.finfo(dtype).tiny
            damped = information + jnp.diag(damping * diagonal + floor)
            step = -jnp.linalg.solve(damped, gradient)
            turn = jnp.sqrt(jnp.sum(step[:3] ** 2) + jnp.finfo(dtype).tiny)
            step = step * jnp.minimum(1.0, _LARGEST_TURN / turn)
            trial = constraint(*retract(rotation, shift, step))
            trial_values = objective(*trial)
            better = trial_values[0] < cost
            current = (rotation, shift), (cost, gradient, information)
            kept = jax.tree.map(
                lambda a, b: jnp.where(better, a, b), (trial, trial_values), current
            )
            next_damping = jnp.where(better, damping / _RELAX, damping * _TIGHTEN)
            return (*kept, next_damping), (damping, better)

        # The first step is 0, and accepted since any cost is below infinity: this
        # iteration evaluates the start, and relaxes the damping to its first value.
        unknown = (
            jnp.asarray(jnp.inf, dtype),
            jnp.zeros(5, dtype),
            jnp.eye(5, dtype=dtype),
        )
        first = jnp.asarray(_RELAX * self.damping, dtype)
        (pose, (cost, _, information), _), (damping, accepted) = jax.lax.scan(
            iterate, ((rotation, shift), unknown, first), None, self.iterations + 1
        )
        rotation, shift = pose
        return Estimate(rotation, shift, cost, information, damping[1:], accepted[1:])


@final
class Descent(eqx.Module):
    """A first-order method of ``optax`` on the 5-vector of the tangent space.

    The gradient is scaled by the square roots of the information's diagonal at the
    start, so that steps do not depend on the units of angles and shifts. The pose of
    the lowest cost is returned, which need not be the last one.

    Parameters
    ----------
    transformation
        For instance ``optax.adam(0.5)``.
    iterations
        Number of steps.
    """

    transformation: optax.GradientTransformation = eqx.field(static=True)
    iterations: int = eqx.field(static=True, default=20)

    def minimise(
        self,
        objective: Objective,
        rotation: Float[Array, "3 3"],
        shift: Float[Array, "2"],
        constraint: Constraint,
    ) -> Estimate:
        """Improve one pose."""
        start = constraint(rotation, shift)
        cost, gradient, information = objective(*start)
        scale = jnp.sqrt(jnp.diag(information)) + jnp.finfo(rotation.dtype).tiny
        # The tangent space is that at the pose of each step, whose coordinates are 0.
        origin = jnp.zeros_like(gradient)
        memory = self.transformation.init(origin)

        def iterate(carry, _):
            pose, gradient, memory, best = carry
            step, memory = self.transformation.update(gradient / scale, memory, origin)
            moved = retract(pose[0], pose[1], jnp.asarray(step) / scale)
            pose = constraint(*moved)
            cost, gradient, information = objective(*pose)
            better = cost < best[1]
            latest = (pose, cost, information)
            best = jax.tree.map(lambda a, b: jnp.where(better, a, b), latest, best)
            return (pose, gradient, memory, best), better

        best = (start, cost, information)
        (*_, best), accepted = jax.lax.scan(
            iterate, (start, gradient, memory, best), None, self.iterations
        )
        pose, cost, information = best
        none = jnp.zeros(self.iterations, rotation.dtype)
        rotation, shift = pose
        return Estimate(rotation, shift, cost, information, none, accepted)
