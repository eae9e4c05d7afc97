r"""Algorithm 1: the joint refinement of map and poses.

.. math:: \min_{c,\Theta,T}\; \tfrac12 \|g - H(\Theta, T)\,c\|^2 + \lambda R(L c)
   \qquad\text{(eqs. 9, 10)}

by alternating a volume update (:mod:`jaxrefine.maps.admm`) with a pose update
(:mod:`jaxrefine.paper.algorithm3`).
"""

import dataclasses
from collections.abc import Callable
from typing import Protocol, runtime_checkable

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxrefine._types import Images, Scalar, Volume
from jaxrefine.ctf import IsotropicPSF
from jaxrefine.errors import InputError
from jaxrefine.geometry import Poses
from jaxrefine.maps import admm, tv
from jaxrefine.operators import kbwf, spatial
from jaxrefine.operators.spatial import Footprint, ImageFilter, Support
from jaxrefine.paper import algorithm3
from jaxrefine.paper.algorithm3 import EulerPoses


class Schedule(eqx.Module):
    """A number that goes geometrically from ``first`` to ``last``.

    Parameters
    ----------
    first, last
        Values in the first and in the last outer iteration, not negative. Leaving
        ``last`` out makes a constant.
    """

    first: Float[Array, ""]
    last: Float[Array, ""]

    def __init__(self, first: float | Scalar, last: float | Scalar | None = None):
        self.first = jnp.asarray(first)
        self.last = jnp.asarray(first if last is None else last)

    def __call__(self, iteration: Int[Array, ""], count: int) -> Scalar:
        """Return the value in iteration ``iteration`` (from 0) of ``count``."""
        position = iteration.astype(self.first.dtype) / max(count - 1, 1)
        between = self.first ** (1.0 - position) * self.last**position
        return jnp.where(self.first == self.last, self.first, between)


@runtime_checkable
class StepRule(Protocol):
    """What gives the first steps of the line searches, see `jaxrefine.paper.steps`."""

    def __call__(
        self, problem: "Problem", state: "Algorithm1State", iterations: int
    ) -> tuple[Scalar, Scalar]:
        """Return the steps on the angles and on the shifts.

        They are in square radians and square pixels per unit of the cost.
        ``iterations`` is the number of outer iterations; the state says which one this
        is.
        """
        ...


class Algorithm1Config(eqx.Module):
    """Parameters of the joint refinement.

    Parameters
    ----------
    lam, rho
        Weight of the regulariser and penalty of its split, per outer iteration.
    steps
        Rule for the first trial steps of the pose update.
    regulariser
        Prior on the gradient of the coefficients.
    rho_nonnegative
        Penalty of the constraint ``c >= 0``; None leaves the sign free. With it every
        volume update ends by clipping what is left of negative coefficients.
    eta
        Factor by which a rejected pose step shrinks.
    iterations
        Outer iterations.
    admm_iterations, cg_iterations, cg_tolerance
        Inner iterations of the volume update, and where the innermost stop.
    pose_iterations, max_trials
        Inner iterations of the pose update, and steps tried in a line search.
    poses_first
        Whether an outer iteration begins with the poses. If it ends with them, as in
        the paper's Algorithm 1, no map is made of the last poses.
    keep_duals
        Whether the multipliers persist from one outer iteration to the next.
    batch_size
        Number of particles at a time. It bounds the memory and changes no result but by
        rounding. The default is the fastest of 2, 4 and 8 for Algorithm 3 at 90 voxels
        on two cores; an accelerator is better used by more.
    """

    lam: Schedule
    rho: Schedule
    steps: StepRule
    regulariser: tv.Regulariser = tv.IsotropicTV()
    rho_nonnegative: float | None = None
    eta: float = 0.25
    iterations: int = eqx.field(static=True, default=20)
    admm_iterations: int = eqx.field(static=True, default=5)
    cg_iterations: int = eqx.field(static=True, default=20)
    cg_tolerance: float = eqx.field(static=True, default=1e-4)
    pose_iterations: int = eqx.field(static=True, default=3)
    max_trials: int = eqx.field(static=True, default=10)
    poses_first: bool = eqx.field(static=True, default=False)
    keep_duals: bool = eqx.field(static=True, default=True)
    batch_size: int = eqx.field(static=True, default=4)

    def volume_update(self, iteration: Int[Array, ""]) -> admm.ADMMConfig:
        """Return the parameters of the volume update in an outer iteration."""
        return admm.ADMMConfig(
            self.lam(iteration, self.iterations),
            self.rho(iteration, self.iterations),
            self.rho_nonnegative,
            iterations=self.admm_iterations,
            cg_iterations=self.cg_iterations,
            cg_tolerance=self.cg_tolerance,
        )

    def pose_update(
        self, problem: "Problem", state: "Algorithm1State"
    ) -> algorithm3.PoseConfig:
        """Return the parameters of the pose update in a state's outer iteration."""
        return algorithm3.PoseConfig(
            *self.steps(problem, state, self.iterations),
            self.eta,
            iterations=self.pose_iterations,
            max_trials=self.max_trials,
            batch_size=self.batch_size,
        )


class Algorithm1State(eqx.Module):
    """What the next outer iteration needs; all that a checkpoint must hold."""

    euler_poses: EulerPoses
    volume: admm.ADMMState
    iteration: Int[Array, ""]

    @property
    def poses(self) -> Poses:
        """The poses so far."""
        return self.euler_poses.poses


class Algorithm1Info(eqx.Module):
    """What is reported of an outer iteration."""

    volume: admm.ADMMInfo
    pose: algorithm3.PoseInfo


class Problem(eqx.Module):
    """The data and the imaging model, fixed during a refinement.

    Attributes
    ----------
    images
        Images of shape ``(P, m, m)``.
    footprint, image_filter
        The imaging model, see :mod:`jaxrefine.operators.spatial`.
    support
        Where the coefficients may differ from zero.
    """

    images: Images
    footprint: Footprint
    image_filter: ImageFilter
    support: Support

    @staticmethod
    def of(
        images: Images,
        basis: kbwf.KBWF | None = None,
        psf: IsotropicPSF | None = None,
        support: Support | None = None,
    ) -> "Problem":
        """Tabulate the imaging model of images.

        Parameters
        ----------
        images
            Images of shape ``(P, m, m)``.
        basis
            The window of the reconstruction; by default, the paper's.
        psf
            Optional isotropic point-spread function.
        support
            Where the coefficients may differ from zero; by default, the ball that fits
            in a cube of side ``m``.
        """
        footprint = spatial.footprint(basis or kbwf.KBWF(), psf)
        m = images.shape[-1]
        return Problem(
            images,
            footprint,
            spatial.spline_filter(footprint, m),
            spatial.Support.ball(m) if support is None else support,
        )


def init(poses: Poses, coefficients: Volume) -> Algorithm1State:
    """Start from given poses and coefficients, in the coefficients' precision."""
    poses = jax.tree.map(lambda leaf: leaf.astype(coefficients.dtype), poses)
    return Algorithm1State(
        EulerPoses.of(poses), admm.init(coefficients), jnp.zeros((), jnp.int32)
    )


def update_volume(
    state: Algorithm1State, problem: Problem, config: Algorithm1Config
) -> tuple[Algorithm1State, admm.ADMMInfo]:
    """Line 3 of Algorithm 1: Algorithm 2 at the current poses."""
    return _update_volume(state, _data_term(state, problem, config), config)


def _data_term(
    state: Algorithm1State, problem: Problem, config: Algorithm1Config
) -> admm.DataTerm:
    c = state.volume.coefficients
    data = admm.data_term(
        problem.footprint,
        problem.image_filter,
        problem.images,
        state.poses,
        c.shape[0],
        config.batch_size,
    )
    support = problem.support
    mask = support.extend(jnp.ones(len(support.index), c.dtype))
    return dataclasses.replace(data, support=mask)


def _update_volume(
    state: Algorithm1State, data: admm.DataTerm, config: Algorithm1Config
) -> tuple[Algorithm1State, admm.ADMMInfo]:
    settings = config.volume_update(state.iteration)
    start = state.volume
    if not config.keep_duals:
        start = admm.init(start.coefficients)
    volume, info = admm.run(start, data, settings, config.regulariser)
    if config.rho_nonnegative is not None:
        feasible = jnp.maximum(volume.coefficients, 0.0)
        volume = eqx.tree_at(lambda v: v.coefficients, volume, feasible)
    return eqx.tree_at(lambda s: s.volume, state, volume), info


def update_poses(
    state: Algorithm1State, problem: Problem, config: Algorithm1Config
) -> tuple[Algorithm1State, algorithm3.PoseInfo]:
    """Line 4 of Algorithm 1: Algorithm 3 at the current map."""
    poses, info = algorithm3.run(
        state.euler_poses,
        problem.images,
        state.volume.coefficients,
        problem.footprint,
        problem.image_filter,
        problem.support,
        config.pose_update(problem, state),
    )
    return eqx.tree_at(lambda s: s.euler_poses, state, poses), info


def step(
    state: Algorithm1State, problem: Problem, config: Algorithm1Config
) -> tuple[Algorithm1State, Algorithm1Info]:
    """Make one outer iteration of Algorithm 1.

    Parameters
    ----------
    state
        Poses, coefficients and multipliers so far.
    problem
        The data and the imaging model.
    config
        Parameters; its schedules are read at ``state.iteration``.
    """
    if config.poses_first:
        state, pose_info = update_poses(state, problem, config)
        state, volume_info = update_volume(state, problem, config)
    else:
        state, volume_info = update_volume(state, problem, config)
        state, pose_info = update_poses(state, problem, config)
    return _next(state), Algorithm1Info(volume_info, pose_info)


def _next(state: Algorithm1State) -> Algorithm1State:
    """Count an outer iteration."""
    return eqx.tree_at(lambda s: s.iteration, state, state.iteration + 1)


Callback = Callable[[Algorithm1State, Algorithm1Info], None]
"""Called after every outer iteration: progress, metrics, checkpoints."""


def refine(
    state: Algorithm1State,
    problem: Problem,
    config: Algorithm1Config,
    callback: Callback | None = None,
) -> Algorithm1State:
    """Run Algorithm 1 from a state to the last outer iteration.

    A state saved by a callback and passed in again continues where it was saved, with
    the same result as an uninterrupted run.

    Parameters
    ----------
    state
        From :func:`init`, or a saved one.
    problem
        The data and the imaging model.
    config
        Parameters, for instance :func:`released_preset`.
    callback
        Called with the state and its information after every outer iteration.

    Raises
    ------
    InputError
        If images, poses and volume do not fit each other, or are not finite.
    """
    check(state, problem)
    for _ in range(int(state.iteration), config.iterations):
        state, info = step(state, problem, config)
        if callback is not None:
            callback(state, info)
    return state


def reconstruct(
    state: Algorithm1State,
    problem: Problem,
    config: Algorithm1Config,
    callback: Callable[[Algorithm1State, admm.ADMMInfo], None] | None = None,
) -> Algorithm1State:
    """Run the volume updates of Algorithm 1 alone, with the poses kept.

    The same schedules and the same number of iterations as :func:`refine`, so that
    results from known or unrefined poses compare with refined ones. The images are
    visited once.
    """
    check(state, problem)
    data = _data_term(state, problem, config)
    for _ in range(int(state.iteration), config.iterations):
        state, info = _update_volume(state, data, config)
        state = _next(state)
        if callback is not None:
            callback(state, info)
    return state


def check(state: Algorithm1State, problem: Problem) -> None:
    """Refuse data that do not fit each other.

    Raises
    ------
    InputError
        If images, poses, volume and support do not fit each other, or are not finite.
    """
    images, poses, c = problem.images, state.euler_poses, state.volume.coefficients
    if images.ndim != 3 or images.shape[1] != images.shape[2] or not images.shape[0]:
        raise InputError(
            f"images must have the shape (particles, m, m), got {images.shape}"
        )
    if poses.angles.shape != (images.shape[0], 3):
        raise InputError(
            f"angles of {images.shape[0]} images must have the shape "
            f"({images.shape[0]}, 3), got {poses.angles.shape}"
        )
    if poses.shifts.shape != (images.shape[0], 2):
        raise InputError(
            f"shifts of {images.shape[0]} images must have the shape "
            f"({images.shape[0]}, 2), got {poses.shifts.shape}"
        )
    if c.ndim != 3 or len(set(c.shape)) != 1:
        raise InputError(f"coefficients must have the shape (n, n, n), got {c.shape}")
    if problem.support.n != c.shape[0]:
        raise InputError(
            f"the support must be one of the coefficients, {c.shape[0]} voxels a side, "
            f"got one of {problem.support.n}"
        )
    for name, array in (
        ("images", images),
        ("angles", poses.angles),
        ("shifts", poses.shifts),
        ("coefficients", c),
    ):
        if array.dtype != c.dtype:
            raise InputError(
                f"{name} must have the type of the coefficients, {c.dtype}, got "
                f"{array.dtype}"
            )
        bad = int(jnp.sum(~jnp.isfinite(array)))
        if bad:
            raise InputError(f"{name} must be finite, got {bad} that are not")
