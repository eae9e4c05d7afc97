r"""Algorithm 3: the poses at a fixed map, by semi-coordinate-wise gradient descent.

The cost of one particle, eqs. (15) and (34), is

.. math:: J_p(\theta, t) = \tfrac12 c^T (w(\theta) * c)
   - \sum_k c[k]\,(g_p * \psi^\vee)(M_\theta k + t) + \tfrac12 \|g_p\|^2 .

The first term is a sum over a tube of the map's autocorrelation, computed once per map
(:mod:`jaxrefine.operators.normal`), so no 3-D convolution is made per particle. Both
terms depend on the angles through :math:`M_\theta` alone: their derivatives with
respect to the six entries of ``M``, contracted with
:math:`\partial M/\partial\theta_i`, are Theorem 1.
"""

from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Bool, Float, Int

from jaxrefine._batching import map_over_particles
from jaxrefine._types import Angles, Images, Rotations, Scalar, Shifts, Volume
from jaxrefine.euler import euler_to_matrix, matrix_to_euler, projection_jacobian
from jaxrefine.geometry import Poses
from jaxrefine.operators import normal
from jaxrefine.operators.radial import RadialSeries
from jaxrefine.operators.spatial import (
    Footprint,
    ImageFilter,
    PixelSum,
    Support,
    image_points,
)
from jaxrefine.operators.spline import Spline2D

_HIGHEST = jax.lax.Precision.HIGHEST


class EulerPoses(eqx.Module):
    """Poses as Algorithm 3 moves them: by their Euler angles.

    Attributes
    ----------
    angles
        ``theta`` of eq. (5): ``(rot, tilt, psi)`` in radians, see `jaxrefine.euler`.
    shifts
        ``(x, y)`` in pixels.
    """

    angles: Angles
    shifts: Shifts

    @staticmethod
    def of(poses: Poses) -> "EulerPoses":
        """Return poses by their Euler angles."""
        return EulerPoses(matrix_to_euler(poses.rotations), poses.shifts)

    @property
    def rotations(self) -> Rotations:
        """The rotation matrices."""
        return euler_to_matrix(self.angles)

    @property
    def poses(self) -> Poses:
        """The poses by their rotations."""
        return Poses(self.rotations, self.shifts)


class MapTerms(eqx.Module):
    r"""What the pose costs need to know of the map.

    Attributes
    ----------
    points
        Coordinates x, y and z of the voxels of the map's support.
    moments
        Their coefficients ``c``, and the products of these with x, y and z.
    autocorrelation
        :math:`c * c^\vee`, ready for sums over viewing tubes.
    kernel
        :math:`\psi * \psi^\vee`, the function that is summed over the tube.
    """

    points: Float[Array, "3 voxels"]
    moments: Float[Array, "voxels 4"]
    autocorrelation: normal.TubeSamples
    kernel: RadialSeries


def map_terms(footprint: Footprint, coefficients: Volume, support: Support) -> MapTerms:
    """Prepare a map for any number of pose costs.

    Parameters
    ----------
    footprint
        The footprint ``psi`` and its autocorrelation.
    coefficients
        Coefficients of the map.
    support
        Where they count; elsewhere they are taken as zero.
    """
    kernel = footprint.autocorrelation
    inside = support.restrict(coefficients)
    autocorrelation = normal.autocorrelation(support.extend(inside))
    points = support.points.astype(inside.dtype)
    moments = jnp.stack([inside, *(inside[None] * points)], axis=-1)
    samples = normal.tube_samples(autocorrelation, kernel.radius)
    return MapTerms(points, moments, samples, kernel)


class Particle(eqx.Module):
    r"""What the pose costs need to know of one image.

    Attributes
    ----------
    filtered
        The continuous function :math:`g * \psi^\vee`.
    energy
        :math:`\|g\|^2 / 2`.
    """

    filtered: PixelSum | Spline2D
    energy: Scalar


def particle(image_filter: ImageFilter, image: Float[Array, "m m"]) -> Particle:
    """Prepare an image for any number of pose costs."""
    return Particle(image_filter(image), 0.5 * jnp.sum(image**2))


def _quadratic(terms: MapTerms, pose: EulerPoses) -> Scalar:
    """Return ``c^T (w(theta) * c) / 2``, the first term of eq. (34)."""
    return 0.5 * normal.sum_over_tube(
        terms.autocorrelation, terms.kernel, pose.rotations
    )


def _correlation(terms: MapTerms, particle: Particle, pose: EulerPoses) -> Scalar:
    """Return ``c^T H(theta, t)^T g``, the middle term of eq. (34)."""
    value = particle.filtered(*image_points(pose.poses, terms.points))
    return jnp.vdot(terms.moments[:, 0], value, precision=_HIGHEST)


def _correlation_gradient(terms: MapTerms, particle: Particle, pose: EulerPoses):
    """Return the derivatives of the middle term of (34) by M and by t."""

    def derivative(slope, pose: Poses):
        along = slope(*image_points(pose, terms.points))
        return jnp.matmul(along, terms.moments, precision=_HIGHEST)

    # Both derivatives are a batch of one program, and each has a pose, and so points,
    # of its own: what they shared XLA would write to memory (five times slower,
    # `benchmarks/spatial.py`). For the derivative by y, x and y change places.
    poses = pose.poses
    swapped = Poses(poses.rotations[jnp.array([1, 0, 2])], poses.shifts[::-1])
    both = jax.tree.map(lambda *leaves: jnp.stack(leaves), poses, swapped)
    sums = jax.vmap(derivative)(particle.filtered.slopes(), both)
    return sums[:, 1:], sums[:, 0]


def particle_cost(terms: MapTerms, particle: Particle, pose: EulerPoses) -> Scalar:
    """Return ``J_p(theta, t)``, eq. (34), of one particle."""
    correlation = _correlation(terms, particle, pose)
    return _quadratic(terms, pose) - correlation + particle.energy


def particle_cost_and_gradient(
    terms: MapTerms, particle: Particle, pose: EulerPoses
) -> tuple[Scalar, EulerPoses]:
    r"""Return ``J_p`` and its explicit gradient, Theorem 1, eqs. (18)-(22).

    .. math:: \frac{\partial J_p}{\partial\theta_i} = \sum_k
       \Big(\frac{\partial M}{\partial\theta_i} k\Big)^T \Big[\tfrac12
       (c * c^\vee)[k]\, \nabla(\psi * \psi^\vee)(M k)
       - c[k]\, \nabla(g_p * \psi^\vee)(M k + t)\Big], \quad
       \frac{\partial J_p}{\partial t} = -\sum_k c[k]\,
       \nabla(g_p * \psi^\vee)(M k + t)

    It is the exact gradient of :func:`particle_cost`, whatever the accuracy of the
    series and splines that both are evaluated with.

    Returns
    -------
    The cost, and a :class:`EulerPoses` that holds the derivatives with
    respect to (rot, tilt, psi) and to (x, y).
    """
    cost = particle_cost(terms, particle, pose)
    return cost, _gradient(terms, particle, pose)


def _gradient(terms: MapTerms, particle: Particle, pose: EulerPoses) -> EulerPoses:
    """Return Theorem 1."""
    _, quadratic_by_matrix = normal.sum_over_tube_and_gradient(
        terms.autocorrelation, terms.kernel, pose.rotations
    )
    linear_by_matrix, by_shift = _correlation_gradient(terms, particle, pose)
    by_matrix = 0.5 * quadratic_by_matrix - linear_by_matrix
    by_angles = jnp.sum(projection_jacobian(pose.angles) * by_matrix[None], (1, 2))
    return EulerPoses(by_angles, -by_shift)


@eqx.filter_jit
def curvature(
    terms: MapTerms,
    image_filter: ImageFilter,
    projections: Images,
    poses: EulerPoses,
    batch_size: int = 8,
) -> EulerPoses:
    r"""Return the second derivatives of ``J_p`` where an image is a projection.

    There they are

    .. math:: \Bigl\|\frac{\partial H(\theta, t)\, c}{\partial\theta_i}\Bigr\|^2
       \quad\text{and}\quad
       \Bigl\|\frac{\partial H(\theta, t)\, c}{\partial t_i}\Bigr\|^2

    up to the difference of pixel sum and integral, and a gradient step whose length is
    the inverse of one of them is a Newton step along that coordinate. They are computed
    as derivatives of Theorem 1.

    Parameters
    ----------
    terms
        The map, see `map_terms`.
    image_filter
        Makes the continuous function of each image.
    projections
        Projections of the map at the poses, of shape ``(P, m, m)``.
    poses
        Where to measure.
    batch_size
        Particles at a time.

    Returns
    -------
    The second derivative along each coordinate, per square radian and per square pixel,
    in the shape of the poses.
    """

    def of_particle(projection_and_pose):
        projection, pose = projection_and_pose
        data = particle(image_filter, projection)
        coordinates, from_coordinates = ravel_pytree(pose)

        def gradient(coordinates):
            by_pose = _gradient(terms, data, from_coordinates(coordinates))
            return ravel_pytree(by_pose)[0]

        def along(direction):
            _, change = jax.jvp(gradient, (coordinates,), (direction,))
            return jnp.vdot(change, direction)

        directions = jnp.eye(len(coordinates), dtype=coordinates.dtype)
        return from_coordinates(jax.lax.map(along, directions))

    return map_over_particles(of_particle, (projections, poses), batch_size)


class PoseConfig(eqx.Module):
    """Parameters of Algorithm 3.

    Parameters
    ----------
    angle_step, shift_step
        First steps ``alpha_theta`` and ``alpha_t`` of every line search, in square
        radians and square pixels per unit of the cost. Images multiplied by ``s`` need
        steps divided by ``s**2``.
    eta
        Factor in (0, 1) by which a rejected step shrinks.
    iterations
        Gradient steps on the angles and on the shifts, the paper's ``K_GD``.
    max_trials
        Steps tried in one line search before the particle stays where it is.
    batch_size
        Particles at a time.
    """

    angle_step: Float[Array, ""] = eqx.field(converter=jnp.asarray)
    shift_step: Float[Array, ""] = eqx.field(converter=jnp.asarray)
    eta: Float[Array, ""] = eqx.field(converter=jnp.asarray, default=0.25)
    iterations: int = eqx.field(static=True, default=3)
    max_trials: int = eqx.field(static=True, default=10)
    batch_size: int = eqx.field(static=True, default=4)


class PoseInfo(eqx.Module):
    """What is reported of each particle's update.

    Attributes
    ----------
    cost_before, cost
        ``J_p`` before and after.
    angle_moves, shift_moves
        Whether each line search found a lower cost.
    angle_trials, shift_trials
        How many steps each tried.
    """

    cost_before: Float[Array, "*particles"]
    cost: Float[Array, "*particles"]
    angle_moves: Bool[Array, "*particles k"]
    shift_moves: Bool[Array, "*particles k"]
    angle_trials: Int[Array, "*particles k"]
    shift_trials: Int[Array, "*particles k"]


def backtrack(
    cost: Callable[[Float[Array, "d"]], Scalar],
    start: Float[Array, "d"],
    value: Scalar,
    gradient: Float[Array, "d"],
    first_step: Scalar,
    eta: Scalar,
    max_trials: int,
) -> tuple[Float[Array, "d"], Scalar, Int[Array, ""]]:
    """Take the first of the steps ``first_step * eta**j`` that lowers the cost.

    Steps 6 and 12 of Algorithm 3: plain decrease, no sufficient-decrease constant. The
    search also ends where, to first order, a step lowers the cost by no more than its
    rounding.

    Parameters
    ----------
    cost
        The function of a point.
    start, value, gradient
        The point to begin with, and the function's value and gradient there.
    first_step
        First step tried, in units of the point over the gradient.
    eta
        Factor in (0, 1) from one step to the next.
    max_trials
        Steps tried.

    Returns
    -------
    The new point (the old one if no trial succeeds), its cost, the number of trials.
    """
    slope = jnp.sum(gradient**2)
    rounding = jnp.finfo(value.dtype).eps * jnp.abs(value)

    def searching(carry):
        _, trial_value, step, trials = carry
        can_be_seen = step * slope > rounding
        return ~(trial_value < value) & can_be_seen & (trials < max_trials)

    def shrink(carry):
        _, _, step, trials = carry
        point = start - step * gradient
        return point, cost(point), eta * step, trials + 1

    begin = (start, value, first_step, jnp.zeros((), jnp.int32))
    point, trial_value, _, trials = jax.lax.while_loop(searching, shrink, begin)
    lower = trial_value < value
    return jnp.where(lower, point, start), jnp.where(lower, trial_value, value), trials


def descend(
    terms: MapTerms, particle: Particle, pose: EulerPoses, config: PoseConfig
) -> tuple[EulerPoses, PoseInfo]:
    """Refine one pose by Algorithm 3: the angles, then the shift, ``K_GD`` times.

    The line searches leave the constant ``||g||^2 / 2`` out of the cost: in single
    precision the noise's energy would hide the changes that they look for.

    Parameters
    ----------
    terms, particle
        The map and the image, see `map_terms` and `particle`.
    pose
        Pose to begin with, radians and pixels.
    config
        Steps and loop lengths, of the pose's precision.

    Returns
    -------
    The new pose, and the information of this particle.
    """
    energy = particle.energy
    particle = Particle(particle.filtered, jnp.zeros_like(energy))

    def move(carry, _):
        pose, before = carry
        gradient = _gradient(terms, particle, pose)
        angles, value, angle_trials = backtrack(
            lambda angles: particle_cost(
                terms, particle, EulerPoses(angles, pose.shifts)
            ),
            pose.angles,
            before,
            gradient.angles,
            config.angle_step,
            config.eta,
            config.max_trials,
        )
        # The quadratic term does not depend on the shift, eq. (21).
        turned = EulerPoses(angles, pose.shifts)
        quadratic = _quadratic(terms, turned)
        _, by_shift = _correlation_gradient(terms, particle, turned)
        shifts, after, shift_trials = backtrack(
            lambda shifts: (
                quadratic - _correlation(terms, particle, EulerPoses(angles, shifts))
            ),
            pose.shifts,
            value,
            -by_shift,
            config.shift_step,
            config.eta,
            config.max_trials,
        )
        moves = value < before, after < value
        history = (after, *moves, angle_trials, shift_trials)
        return (EulerPoses(angles, shifts), after), history

    before = particle_cost(terms, particle, pose)
    (pose, _), (after, *searches) = jax.lax.scan(
        move, (pose, before), None, length=config.iterations
    )
    return pose, PoseInfo(before + energy, after[-1] + energy, *searches)


@eqx.filter_jit
def run(
    poses: EulerPoses,
    images: Images,
    coefficients: Volume,
    footprint: Footprint,
    image_filter: ImageFilter,
    support: Support,
    config: PoseConfig,
) -> tuple[EulerPoses, PoseInfo]:
    """Refine all poses against a map, ``config.batch_size`` particles at a time.

    Parameters
    ----------
    poses
        Current poses.
    images
        Images of shape ``(P, m, m)``.
    coefficients
        Coefficients of the map.
    footprint, image_filter
        The imaging model, see :mod:`jaxrefine.operators.spatial`.
    support
        Where the coefficients count.
    config
        Steps and loop lengths.

    Returns
    -------
    The new poses, none of which has a higher cost than before (to rounding), and the
    information of every particle.
    """
    terms = map_terms(footprint, coefficients, support)
    config = jax.tree.map(lambda leaf: leaf.astype(coefficients.dtype), config)

    def refine_one(image_and_pose):
        image, pose = image_and_pose
        return descend(terms, particle(image_filter, image), pose, config)

    return map_over_particles(refine_one, (images, poses), config.batch_size)
