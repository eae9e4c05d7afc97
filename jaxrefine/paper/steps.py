"""The first steps of Algorithm 3's line searches, in each outer iteration."""

from typing import NamedTuple, final

import equinox as eqx
import jax

from jaxrefine._types import Images, Scalar
from jaxrefine.data.particles import evenly_spaced
from jaxrefine.operators import spatial
from jaxrefine.paper import algorithm3
from jaxrefine.paper.algorithm1 import Algorithm1State, Problem, Schedule
from jaxrefine.paper.algorithm3 import EulerPoses

_MEASURED = 8  # particles whose images and projections are looked at


@final
class GivenSteps(eqx.Module):
    """Steps that are given, in square radians and square pixels per unit of the cost.

    Parameters
    ----------
    angle, shift
        First trial steps, per outer iteration.
    """

    angle: Schedule
    shift: Schedule

    def __call__(
        self, problem: Problem, state: Algorithm1State, iterations: int
    ) -> tuple[Scalar, Scalar]:
        """Return the first steps on the angles and on the shifts."""
        del problem
        at = state.iteration, iterations
        return self.angle(*at), self.shift(*at)


@final
class NewtonSteps(eqx.Module):
    r"""Steps in units of Newton's, with the curvature of the cost in the current map.

    A step is a fraction of :math:`1 / \kappa`, see `mean_curvatures`. As a map becomes
    sharper kappa grows, so a first step that fits a blurred map is too long for a
    sharper one, and every line search wastes trials.

    Parameters
    ----------
    fraction
        Fraction of a Newton step, per outer iteration.
    """

    fraction: Schedule

    def __call__(
        self, problem: Problem, state: Algorithm1State, iterations: int
    ) -> tuple[Scalar, Scalar]:
        """Return the first steps on the angles and on the shifts."""
        angle, shift = mean_curvatures(problem, state)
        fraction = self.fraction(state.iteration, iterations).astype(angle.dtype)
        return fraction / angle, fraction / shift


class Sample(NamedTuple):
    """Some of the images, and the map's projections at their poses.

    Attributes
    ----------
    images, poses
        Images, and their poses so far.
    projections
        Projections of the map, within its support, at these poses.
    """

    images: Images
    poses: EulerPoses
    projections: Images


def sample(problem: Problem, state: Algorithm1State) -> Sample:
    """Take evenly spaced particles, and project the map at their poses."""
    count, support = problem.images.shape[0], problem.support
    chosen = evenly_spaced(count, _MEASURED)
    poses = jax.tree.map(lambda leaf: leaf[chosen], state.euler_poses)
    c = support.extend(support.restrict(state.volume.coefficients))
    m = problem.images.shape[-1]
    seen = spatial.project(problem.footprint, c, poses.poses, m)
    return Sample(problem.images[chosen], poses, seen)


@eqx.filter_jit
def mean_curvatures(problem: Problem, state: Algorithm1State) -> tuple[Scalar, Scalar]:
    r"""Return the mean curvatures of the cost along an angle, and along a shift.

    The mean over a sample of :math:`\|\partial (H c)/\partial\theta_i\|^2`, and over
    the three angles, or of :math:`\|\partial (H c)/\partial t_i\|^2`, over both shifts:
    the second derivatives of the cost where projection and image agree
    (:func:`jaxrefine.paper.algorithm3.curvature`).
    """
    measured, c = sample(problem, state), state.volume.coefficients
    terms = algorithm3.map_terms(problem.footprint, c, problem.support)
    curvature = algorithm3.curvature(
        terms, problem.image_filter, measured.projections, measured.poses
    )
    return curvature.angles.mean(), curvature.shifts.mean()
