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
from jaxtyping import Array, Bool, Float, Int

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
# A step that promises to lower a negative log-likelihood by less than this is taken
# without another evaluation: it is a third of the error bars, all five together.
_TRUSTED = 0.05


@final
class Estimate(eqx.Module):
    """A pose, and how well it is determined.

    Attributes
    ----------
    rotation, shift
        The pose.
    cost
        The objective there; a prediction of it, if the last step was not evaluated.
    information
        :math:`J^T W J` plus the prior's; its inverse is the covariance of the rotation
        vector (radians) and the shift (pixels), the Cramer-Rao bound where the
        residual is noise.
    evaluations
        How many times the objective was evaluated.
    """

    rotation: Float[Array, "*batch 3 3"]
    shift: Float[Array, "*batch 2"]
    cost: Float[Array, "*batch"]
    information: Float[Array, "*batch 5 5"]
    evaluations: Int[Array, "*batch"]

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


def next_damping(damping: Scalar, accepted: Bool[Array, ""]) -> Scalar:
    """Return the damping of Levenberg-Marquardt after a step.

    It falls to a fifth if the step was accepted, and grows to eight times if not.
    """
    return jnp.where(accepted, damping / _RELAX, damping * _TIGHTEN)


@runtime_checkable
class PoseUpdate(Protocol):
    """The method that a pose update must have."""

    def minimise(
        self,
        objective: Objective,
        rotation: Float[Array, "3 3"],
        shift: Float[Array, "2"],
        constraint: Constraint,
    ) -> Estimate:
        """Improve one pose; no cost that was evaluated on the way is lower."""
        ...


class _Standing(eqx.Module):
    """Where Levenberg-Marquardt stands: a pose, its values, and the step to try."""

    rotation: Float[Array, "3 3"]
    shift: Float[Array, "2"]
    cost: Scalar
    gradient: Float[Array, "5"]
    information: Float[Array, "5 5"]
    damping: Scalar
    evaluations: Int[Array, ""]

    def step(self) -> Float[Array, "5"]:
        """Return the step to try, which turns by no more than half a radian."""
        diagonal = jnp.diag(self.information)
        tiny = jnp.finfo(diagonal.dtype).tiny
        # An image without signal has no information; it must not divide by zero.
        floor = 1e-6 * jnp.max(diagonal) + tiny
        damped = self.information + jnp.diag(self.damping * diagonal + floor)
        step = -jnp.linalg.solve(damped, self.gradient)
        turn = jnp.sqrt(jnp.sum(step[:3] ** 2) + tiny)
        return step * jnp.minimum(1.0, _LARGEST_TURN / turn)

    def promise(self, step: Float[Array, "5"]) -> Scalar:
        """Return by how much the undamped step would lower a quadratic cost.

        It is exact where the information is diagonal, and slightly more than what the
        damped step gains.
        """
        descent = -jnp.dot(self.gradient, step, precision=_HIGHEST)
        return (1 + self.damping) * descent / 2


@final
class LevenbergMarquardt(eqx.Module):
    r"""Levenberg-Marquardt with Marquardt's scaling, and damping per particle.

    .. math:: (A + \mu\,\mathrm{diag} A)\, \delta = -g, \qquad A = J^T W J + \Sigma^{-1}

    Scaling the damping by the diagonal (Marquardt, SIAM J. Appl. Math. 11, 1963) makes
    the steps independent of the units of angles and shifts. A step is accepted only if
    the cost falls; the damping then falls to a fifth, or else grows to eight times. One
    evaluation of the objective per iteration, and one to begin with.

    The cost is a negative log-likelihood. A step that promises to lower it by less than
    0.05 is taken without an evaluation, and is the last.

    Parameters
    ----------
    iterations
        Largest number of steps that are tried.
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

        def iterate(carry):
            here, step, _ = carry
            pose = constraint(*retract(here.rotation, here.shift, step))
            values = objective(*pose)
            better = values[0] < here.cost
            damping = next_damping(here.damping, better)
            tried = _Standing(*pose, *values, damping, here.evaluations)
            stayed = eqx.tree_at(lambda s: s.damping, here, damping)
            here = jax.tree.map(lambda a, b: jnp.where(better, a, b), tried, stayed)
            here = eqx.tree_at(lambda s: s.evaluations, here, here.evaluations + 1)
            step = here.step()
            return here, step, here.promise(step)

        def goes_on(carry):
            here, _, promise = carry
            return (here.evaluations <= self.iterations) & (promise >= _TRUSTED)

        # The first step is 0, and accepted since any cost is below infinity: this
        # iteration evaluates the start, and relaxes the damping to its first value.
        unknown = jnp.asarray(jnp.inf, dtype)
        start = _Standing(
            *constraint(rotation, shift),
            unknown,
            jnp.zeros(5, dtype),
            jnp.eye(5, dtype=dtype),
            jnp.asarray(_RELAX * self.damping, dtype),
            jnp.zeros((), jnp.int32),
        )
        here, step, promise = jax.lax.while_loop(
            goes_on, iterate, (start, jnp.zeros(5, dtype), unknown)
        )
        trusted = (promise < _TRUSTED) & (here.evaluations <= self.iterations)
        last = jnp.where(trusted, step, 0.0)
        rotation, shift = constraint(*retract(here.rotation, here.shift, last))
        cost = here.cost - jnp.where(trusted, promise, 0.0)
        return Estimate(rotation, shift, cost, here.information, here.evaluations)


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
            return (pose, gradient, memory, best), None

        best = (start, cost, information)
        (*_, best), _ = jax.lax.scan(
            iterate, (start, gradient, memory, best), None, self.iterations
        )
        pose, cost, information = best
        rotation, shift = pose
        evaluations = jnp.asarray(self.iterations + 1, jnp.int32)
        return Estimate(rotation, shift, cost, information, evaluations)
