"""What poses and maps are worth where the truth is known: on simulated data.

A rotation and translation of a map together with its poses changes no image, so a
refinement may end in a frame of its own. Poses are compared with the true ones after
the best rigid motion of the map; maps are compared both as they stand and after the
rigid motion that their poses imply is undone.
"""

from dataclasses import dataclass
from typing import final

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxrefine._types import Scalar, Volume
from jaxrefine.euler import matrix_to_euler
from jaxrefine.geometry import Poses, align_rotations, geodesic_distance
from jaxrefine.maps.align import move_map
from jaxrefine.maps.fsc import crossing, fsc, mean_fsc

_HIGHEST = jax.lax.Precision.HIGHEST

_REWEIGHTED = 20  # solutions of a robust fit

_STARTS, _TURNS = 64, 5


def volume_snr_db(truth: Volume, estimate: Volume) -> Scalar:
    r"""Return :math:`20 \log_{10} (\|V\| / \|V - \tilde V\|)`, in decibels.

    Parameters
    ----------
    truth, estimate
        The maps ``V`` and ``V~``, of one shape and unit.
    """
    error = truth - estimate
    return 10 * jnp.log10(jnp.sum(truth**2) / jnp.sum(error**2))


@final
class PoseErrors(eqx.Module):
    """How far poses are from the true ones, the frame of the map set aside."""

    angle_in_degrees: Float[Array, " particles"]
    shift_in_pixels: Float[Array, " particles"]


@final
class Motion(eqx.Module):
    """The rigid motion of a map that brings its poses to the true ones.

    Attributes
    ----------
    rotation
        Global rotation ``G``: the map that fits the true poses is ``V(G (x - d))``.
    translation
        Global translation ``d``, in voxels.
    aligned
        The rotations ``R_p G``.
    """

    rotation: Float[Array, "3 3"]
    translation: Float[Array, "3"]
    aligned: Float[Array, "particles 3 3"]


@eqx.filter_jit
def align_poses(poses: Poses, true_poses: Poses) -> Motion:
    r"""Find the rigid motion of the map that poses leave undetermined.

    A map that is rotated and moved fits the same images with other poses:

    .. math:: R_p G \approx R_p^\star, \qquad t_p - t_p^\star \approx M_p d

    with :math:`M_p` the first two rows of :math:`R_p G`, so that the result does not
    depend on the frame of the poses under test. Both are robust to outliers: ``G`` as
    in `geometry.align_rotations`, and ``d`` minimises the sum of the distances that are
    left of the shifts, by iteratively reweighted least squares. The hand is taken as
    given.

    Parameters
    ----------
    poses, true_poses
        Poses of the same particles.
    """
    rotation = align_rotations(poses.rotations, true_poses.rotations)
    aligned = jnp.matmul(poses.rotations, rotation, precision=_HIGHEST)
    rows, difference = aligned[:, :2], poses.shifts - true_poses.shifts
    floor = float(jnp.finfo(difference.dtype).eps) ** 0.5

    def solve(weights):
        weighed = weights[:, None, None] * rows
        gram = jnp.einsum("pix,piy->xy", weighed, rows, precision=_HIGHEST)
        moment = jnp.einsum("pix,pi->x", weighed, difference, precision=_HIGHEST)
        inverse = jnp.linalg.pinv(gram, hermitian=True)
        return jnp.matmul(inverse, moment, precision=_HIGHEST)

    def step(_, translation):
        moved = jnp.matmul(rows, translation, precision=_HIGHEST)
        left = jnp.linalg.norm(difference - moved, axis=-1)
        return solve(1 / jnp.maximum(left, floor))

    start = solve(jnp.ones_like(difference[:, 0]))
    translation = jax.lax.fori_loop(0, _REWEIGHTED, step, start)
    return Motion(rotation, translation, aligned)


@eqx.filter_jit
def pose_errors(
    poses: Poses,
    true_poses: Poses,
    operators: Float[Array | np.ndarray, "order 3 3"] | None = None,
) -> PoseErrors:
    r"""Compare poses with the true ones, up to a rigid motion of the map.

    The motion is that of `align_poses`. A map of the other hand counts as wrong.

    Parameters
    ----------
    poses, true_poses
        Poses of the same particles.
    operators
        Of the true map's symmetry, if any, which makes ``R`` and ``R S`` one: each
        pose is compared with the nearest of the true one's equivalents.

    Returns
    -------
    errors
        The geodesic distance of each rotation and the length of each remaining shift.
    """
    true_rotations = true_poses.rotations
    if operators is not None:
        true_rotations = _nearest_equivalents(
            poses.rotations, true_rotations, operators
        )
    motion = align_poses(poses, Poses(true_rotations, true_poses.shifts))
    angle = geodesic_distance(motion.aligned, true_rotations)
    shift = jnp.linalg.norm(_shift_differences(motion, poses, true_poses), axis=-1)
    return PoseErrors(jnp.rad2deg(angle), shift)


def _shift_differences(
    motion: Motion, poses: Poses, true_poses: Poses
) -> Float[Array, "particles 2"]:
    """Return the shifts minus the true ones, after the motion is undone."""
    moved = jnp.matmul(motion.aligned[:, :2], motion.translation, precision=_HIGHEST)
    return poses.shifts - true_poses.shifts - moved


def _nearest_equivalents(
    rotations: Float[Array, "particles 3 3"],
    truth: Float[Array, "particles 3 3"],
    operators: Float[Array | np.ndarray, "order 3 3"],
) -> Float[Array, "particles 3 3"]:
    """Return the equivalents of the true rotations that are nearest, after alignment.

    Which they are and the motion of the map depend on each other. They are found in
    turns, from the best of the motions that make one of the particles' poses right.
    """
    group = jnp.asarray(operators, rotations.dtype)

    def likeness(motion):
        relative = jnp.einsum(
            "pji,pjk,kl->pil", truth, rotations, motion, precision=_HIGHEST
        )
        return jnp.einsum("pil,sil->ps", relative, group, precision=_HIGHEST)

    def distance(motion):
        squared = 6 - 2 * jnp.max(likeness(motion), axis=1)
        return jnp.sum(jnp.sqrt(jnp.maximum(squared, 0)))

    def nearest(motion):
        chosen = group[jnp.argmax(likeness(motion), axis=1)]
        return jnp.matmul(truth, chosen, precision=_HIGHEST)

    count = len(rotations)
    tried = np.linspace(0, count - 1, min(count, _STARTS)).astype(int)
    starts = jnp.einsum(
        "pji,pjk->pik", rotations[tried], truth[tried], precision=_HIGHEST
    )
    motion = starts[jnp.argmin(jax.lax.map(distance, starts))]
    for _ in range(_TURNS):
        motion = align_rotations(rotations, nearest(motion))
    return nearest(motion)


@eqx.filter_jit
def pose_differences(
    poses: Poses, true_poses: Poses
) -> tuple[Float[Array, "particles 3"], Float[Array, "particles 2"]]:
    r"""Return the signed differences that the paper shows, Figs. 5, 6, 11 and 12.

    True minus refined (rot, tilt, psi), in degrees from -180 to 180, and (x, y) in
    pixels, after the motion of `align_poses`. Near the poles rot and psi differ by much
    for little; `pose_errors` is the better measure. Parameters as there.
    """
    motion = align_poses(poses, true_poses)
    angles = matrix_to_euler(motion.aligned)
    turn = matrix_to_euler(true_poses.rotations) - angles
    turn = (turn + jnp.pi) % (2 * jnp.pi) - jnp.pi
    return jnp.rad2deg(turn), -_shift_differences(motion, poses, true_poses)


def summarise(errors: PoseErrors) -> dict[str, float]:
    """Return the numbers that stand for all particles in a report."""
    angle, shift = errors.angle_in_degrees, errors.shift_in_pixels
    return {
        "angle_error_deg_median": float(jnp.median(angle)),
        "angle_error_deg_p90": float(jnp.quantile(angle, 0.9)),
        "angle_error_deg_p95": float(jnp.quantile(angle, 0.95)),
        "fraction_within_5_deg": float(jnp.mean(angle <= 5)),
        "fraction_within_10_deg": float(jnp.mean(angle <= 10)),
        "shift_error_px_median": float(jnp.median(shift)),
        "shift_error_px_p90": float(jnp.quantile(shift, 0.9)),
        "shift_error_px_p95": float(jnp.quantile(shift, 0.95)),
    }


Row = dict[str, int | float]
"""Numbers by name, as a table or a JSON file wants them."""


THRESHOLD = 0.5
"""Correlation that defines ``r_c``, section V-D."""


@final
@dataclass(frozen=True)
class Assessment:
    """A map and its poses, compared with the true ones.

    Attributes
    ----------
    curve, aligned_curve
        Fourier shell correlation with the true map: as it stands, and after the motion
        of `align_poses` is undone, up to ``n // 2`` cycles per box.
    gauge_rotation_deg
        Angle of that motion.
    errors
        Errors of the poses, the motion set aside.
    """

    curve: Float[np.ndarray, " shells"]
    aligned_curve: Float[np.ndarray, " shells"]
    gauge_rotation_deg: float
    errors: PoseErrors

    def row(self) -> Row:
        """Return the numbers that stand for this result in a table.

        ``rc`` is in shells, that is in periods per box.
        """
        aligned = resolution_row(jnp.asarray(self.aligned_curve))
        return {
            **resolution_row(jnp.asarray(self.curve)),
            **{f"{name}_aligned": value for name, value in aligned.items()},
            "gauge_rotation_deg": self.gauge_rotation_deg,
            **summarise(self.errors),
        }


def assess(
    volume: Volume | np.ndarray, poses: Poses, truth: Volume, true_poses: Poses
) -> Assessment:
    """Compare a map and its poses with the true ones.

    Parameters
    ----------
    volume, truth
        The map and the true one, of one shape ``(n, n, n)``.
    poses, true_poses
        Poses of the same particles.
    """
    volume = jnp.asarray(volume, truth.dtype)
    motion = align_poses(poses, true_poses)
    rotation, translation = (
        x.astype(truth.dtype) for x in (motion.rotation, motion.translation)
    )
    # The truth, too, without what a turned box cuts off: the corners.
    last = truth.shape[0] // 2
    moved = move_map(volume, rotation, translation, last)
    still = move_map(truth, jnp.eye(3, dtype=truth.dtype), 0 * translation, last)
    identity = jnp.eye(3, dtype=motion.rotation.dtype)
    return Assessment(
        np.asarray(fsc(volume, truth)),
        np.asarray(fsc(moved, still)),
        float(jnp.rad2deg(geodesic_distance(motion.rotation, identity))),
        pose_errors(poses, true_poses),
    )


def resolution_row(curve: Float[Array, " shells"]) -> Row:
    """Return the two numbers that stand for a resolution curve."""
    return {
        "mean_fsc": float(mean_fsc(curve)),
        "rc": float(crossing(curve, THRESHOLD)),
    }
