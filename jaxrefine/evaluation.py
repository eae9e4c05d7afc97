"""Errors of poses and maps with respect to the truth, on simulated data.

A rigid motion of a map together with its poses changes no image, so a refinement may
end in a frame of its own. Poses are therefore compared with the true ones after the
best rigid motion of the map. Maps are compared both as they are and after the rigid
motion that their poses imply is undone.
"""

from dataclasses import dataclass
from typing import final

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxrefine._types import Scalar, Volume
from jaxrefine.data.particles import evenly_spaced
from jaxrefine.euler import matrix_to_euler
from jaxrefine.geometry import Poses, align_rotations, geodesic_distance
from jaxrefine.maps.align import move_map
from jaxrefine.maps.fsc import crossing, fsc, mean_fsc

_HIGHEST = jax.lax.Precision.HIGHEST

# Iterations of reweighted least squares, which converge linearly.
_REWEIGHTED = 20

# Motions from which the nearest symmetry-equivalent poses are searched for, and
# alternations between equivalents and motion, from the best of them. Both are
# conventions that no benchmark has set: one good pose among 64 makes a good start, from
# which few equivalents change.
_STARTS, _ALTERNATIONS = 64, 5

_PIXEL = 0.01  # radians that a pixel counts, as it is 100 pixels from the centre

_BATCH = 4096  # Particles whose equivalents are in memory at once.


def volume_snr_db(truth: Volume, estimate: Volume) -> Scalar:
    r"""Return :math:`20 \log_{10} (\|V\| / \|V - \tilde V\|)`, in decibels.

    Parameters
    ----------
    truth, estimate
        The maps ``V`` and ``V~``, of the same shape and in the same unit.
    """
    error = truth - estimate
    return 10 * jnp.log10(jnp.sum(truth**2) / jnp.sum(error**2))


@final
class PoseErrors(eqx.Module):
    """Distances of poses from the true ones, up to a rigid motion of the map.

    Attributes
    ----------
    angle_in_degrees, shift_in_pixels
        Geodesic distance of each rotation, and length of the difference of each shift.
    """

    angle_in_degrees: Float[Array, " particles"]
    shift_in_pixels: Float[Array, " particles"]


@final
class Motion(eqx.Module):
    """The rigid motion of a map that aligns its poses to the true ones.

    Attributes
    ----------
    rotation
        Global rotation ``G``: the map that fits the true poses is ``V(G (x - d))``.
    translation
        Global translation ``d``, in voxels.
    aligned
        The aligned rotations ``R_p G``.
    """

    rotation: Float[Array, "3 3"]
    translation: Float[Array, "3"]
    aligned: Float[Array, "particles 3 3"]


@eqx.filter_jit
def align_poses(poses: Poses, true_poses: Poses) -> Motion:
    r"""Find the rigid motion of the map that aligns poses to the true ones.

    A map that is rotated and translated fits the same images with other poses:

    .. math:: R_p G \approx R_p^\star, \qquad t_p - t_p^\star \approx M_p d

    with :math:`M_p` the first two rows of :math:`R_p G`, so that the result does not
    depend on the frame of the poses under test. Both fits are robust to outliers: ``G``
    is that of `geometry.align_rotations`, and ``d`` minimises the sum of the distances
    between the shifts, by iteratively reweighted least squares (Weiszfeld's algorithm).
    The hand of the map is not changed.

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
        weighted = weights[:, None, None] * rows
        gram = jnp.einsum("pix,piy->xy", weighted, rows, precision=_HIGHEST)
        moment = jnp.einsum("pix,pi->x", weighted, difference, precision=_HIGHEST)
        inverse = jnp.linalg.pinv(gram, hermitian=True)
        return jnp.matmul(inverse, moment, precision=_HIGHEST)

    def step(_, translation):
        moved = jnp.matmul(rows, translation, precision=_HIGHEST)
        distance = jnp.linalg.norm(difference - moved, axis=-1)
        return solve(1 / jnp.maximum(distance, floor))

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

    The motion is that of `align_poses`. Poses of a map with the opposite hand count as
    wrong.

    Parameters
    ----------
    poses, true_poses
        Poses of the same particles.
    operators
        Operators ``S`` of the true map's symmetry, if any, for which the rotations
        ``R`` and ``R S`` are equivalent. Each pose is compared with the nearest
        equivalent of the true one.

    Returns
    -------
    errors
        The geodesic distance of each rotation, and the length of the difference of each
        shift, after the motion.
    """
    true_rotations = true_poses.rotations
    if operators is not None:
        own = np.arange(len(poses))[:, None]
        _, true_rotations = _nearest(poses.rotations, true_rotations, own, operators)
    motion = align_poses(poses, Poses(true_rotations, true_poses.shifts))
    angle = geodesic_distance(motion.aligned, true_rotations)
    shift = jnp.linalg.norm(_shift_differences(motion, poses, true_poses), axis=-1)
    return PoseErrors(jnp.rad2deg(angle), shift)


def _shift_differences(
    motion: Motion, poses: Poses, true_poses: Poses
) -> Float[Array, "particles 2"]:
    """Return the shifts minus the true ones, after the motion of the map."""
    moved = jnp.matmul(motion.aligned[:, :2], motion.translation, precision=_HIGHEST)
    return poses.shifts - true_poses.shifts - moved


def nearest_places(
    poses: Poses,
    true_poses: Poses,
    places: Int[np.ndarray, "particles copies"],
    operators: Float[Array | np.ndarray, "order 3 3"] | None = None,
) -> Int[np.ndarray, " particles"]:
    """Return which of several true poses each pose is nearest to, after alignment.

    Parameters
    ----------
    poses, true_poses
        Poses, and the true ones, of which there may be another number.
    places
        Where the true poses of each particle are, such as those of the copies of its
        image, which come first; then any of them may be repeated. Particles with a
        place in common have all of them in common, in the same order.
    operators
        Of the true map's symmetry, as for `pose_errors`.

    Returns
    -------
    One of the places of each particle. As many particles as there are places that they
    have in common get one each, with the least sum of distances.
    """
    if places.shape[1] == 1:
        return places[:, 0]
    group = jnp.eye(3)[None] if operators is None else operators
    nearest, rotations = _nearest(poses.rotations, true_poses.rotations, places, group)
    for _ in range(_ALTERNATIONS):  # Copies of one rotation differ by their shifts.
        motion = align_poses(poses, Poses(rotations, true_poses.shifts[nearest]))
        distance, element = _distances(motion, poses, true_poses, places, group)
        chosen = _assigned(np.asarray(distance), places)
        rows = np.arange(len(places))
        nearest = places[rows, chosen]
        equivalent = jnp.asarray(group)[element[rows, chosen]]
        rotations = jnp.matmul(
            jnp.asarray(true_poses.rotations)[nearest], equivalent, precision=_HIGHEST
        )
    return np.asarray(nearest)


@eqx.filter_jit
def _distances(
    motion: Motion,
    poses: Poses,
    true_poses: Poses,
    places: Int[Array | np.ndarray, "particles copies"],
    operators: Float[Array | np.ndarray, "order 3 3"],
) -> tuple[Float[Array, "particles copies"], Int[Array, "particles copies"]]:
    """Return how far poses are from each of their true ones, and which equivalents.

    The distance is the angle in radians plus that of the shift (`_PIXEL`).
    """
    rotations, shifts = map(jnp.asarray, (true_poses.rotations, true_poses.shifts))
    group = jnp.asarray(operators, rotations.dtype)
    moved = jnp.matmul(motion.aligned[:, :2], motion.translation, precision=_HIGHEST)

    def of_one(particle):
        aligned, shift, candidates = particle
        relative = jnp.einsum(
            "cji,jl->cil", rotations[candidates], aligned, precision=_HIGHEST
        )
        trace = jnp.einsum("cil,sil->cs", relative, group, precision=_HIGHEST)
        angle = jnp.arccos(jnp.clip((jnp.max(trace, axis=1) - 1) / 2, -1, 1))
        offset = jnp.linalg.norm(shift[None] - shifts[candidates], axis=-1)
        return angle + _PIXEL * offset, jnp.argmax(trace, axis=1)

    particles = (motion.aligned, poses.shifts - moved, jnp.asarray(places))
    return jax.lax.map(of_one, particles, batch_size=_BATCH)


def _assigned(
    distance: Float[np.ndarray, "particles copies"],
    places: Int[np.ndarray, "particles copies"],
) -> Int[np.ndarray, " particles"]:
    """Return which of its places each particle gets: one each, or else the nearest."""
    from scipy.optimize import linear_sum_assignment  # slow to import

    chosen = distance.argmin(axis=1)
    order = np.argsort(places[:, 0], stable=True)
    _, starts = np.unique(places[order, 0], return_index=True)
    for rows in np.split(order, starts[1:]):
        copies = len(np.unique(places[rows[0]]))
        if len(rows) == copies > 1:
            chosen[rows] = linear_sum_assignment(distance[rows, :copies])[1]
    return chosen


@eqx.filter_jit
def _nearest(
    rotations: Float[Array | np.ndarray, "particles 3 3"],
    true_rotations: Float[Array | np.ndarray, "truths 3 3"],
    places: Int[Array | np.ndarray, "particles copies"],
    operators: Float[Array | np.ndarray, "order 3 3"],
) -> tuple[Int[Array, " particles"], Float[Array, "particles 3 3"]]:
    """Return the true rotation that is nearest to each rotation, after alignment.

    A rotation may have several true ones, and each of these has its equivalents. Which
    of them are the nearest and the motion of the map depend on each other. They are
    determined alternately, starting from the best of the motions that align the pose of
    a single particle exactly.

    Returns
    -------
    The place of the nearest true rotation, and its nearest equivalent.
    """
    rotations = jnp.asarray(rotations)
    truth, places = jnp.asarray(true_rotations), jnp.asarray(places)
    group = jnp.asarray(operators, rotations.dtype)

    def best(motion):
        def of_one(particle):
            rotation, candidates = particle
            relative = jnp.einsum(
                "cji,jk,kl->cil",
                truth[candidates],
                rotation,
                motion,
                precision=_HIGHEST,
            )
            each = jnp.einsum("cil,sil->cs", relative, group, precision=_HIGHEST)
            return jnp.max(each), jnp.argmax(each)

        return jax.lax.map(of_one, (rotations, places), batch_size=_BATCH)

    def distance(motion):
        similarity, _ = best(motion)
        return jnp.sum(jnp.sqrt(jnp.maximum(6 - 2 * similarity, 0)))

    def nearest(motion):
        copy, element = jnp.divmod(best(motion)[1], len(group))
        place = jnp.take_along_axis(places, copy[:, None], axis=1)[:, 0]
        return place, jnp.matmul(truth[place], group[element], precision=_HIGHEST)

    count = len(rotations)
    tried = evenly_spaced(count, _STARTS)
    starts = jnp.einsum(
        "pji,pjk->pik",
        rotations[tried],
        truth[places[tried, 0]],
        precision=_HIGHEST,
    )
    motion = starts[jnp.argmin(jax.lax.map(distance, starts))]
    for _ in range(_ALTERNATIONS):
        motion = align_rotations(rotations, nearest(motion)[1])
    return nearest(motion)


@eqx.filter_jit
def pose_differences(
    poses: Poses, true_poses: Poses
) -> tuple[Float[Array, "particles 3"], Float[Array, "particles 2"]]:
    r"""Return the signed differences that Figs. 5, 6, 11 and 12 of the paper show.

    Near the poles, rot and psi may differ much between nearly equal rotations, so
    `pose_errors` is the better measure.

    Parameters
    ----------
    poses, true_poses
        Poses of the same particles.

    Returns
    -------
    angles
        True minus refined (rot, tilt, psi), in degrees from -180 to 180, after the
        motion of `align_poses`.
    shifts
        True minus refined (x, y), in pixels, after that motion.
    """
    motion = align_poses(poses, true_poses)
    angles = matrix_to_euler(motion.aligned)
    turn = matrix_to_euler(true_poses.rotations) - angles
    turn = (turn + jnp.pi) % (2 * jnp.pi) - jnp.pi
    return jnp.rad2deg(turn), -_shift_differences(motion, poses, true_poses)


def summarise(errors: PoseErrors) -> dict[str, float]:
    """Return statistics of the errors: medians, percentiles, and fractions."""
    angle, shift = errors.angle_in_degrees, errors.shift_in_pixels
    return {
        "angle_error_in_degrees_median": float(jnp.median(angle)),
        "angle_error_in_degrees_p90": float(jnp.quantile(angle, 0.9)),
        "angle_error_in_degrees_p95": float(jnp.quantile(angle, 0.95)),
        "fraction_within_5_degrees": float(jnp.mean(angle <= 5)),
        "fraction_within_10_degrees": float(jnp.mean(angle <= 10)),
        "shift_error_in_pixels_median": float(jnp.median(shift)),
        "shift_error_in_pixels_p90": float(jnp.quantile(shift, 0.9)),
        "shift_error_in_pixels_p95": float(jnp.quantile(shift, 0.95)),
    }


Row = dict[str, int | float]
"""Numbers by name, for a row of a table or a JSON file."""


THRESHOLD = 0.5
"""Correlation that defines ``r_c``, section V-D."""


@final
@dataclass(frozen=True)
class Assessment:
    """A map and its poses, compared with the true ones.

    Attributes
    ----------
    curve, aligned_curve
        Fourier shell correlation with the true map at 0, ..., ``n // 2`` cycles per
        box: of the map as it is, and after the motion of `align_poses`.
    gauge_rotation_in_degrees
        Angle of that motion's rotation.
    errors
        Errors of the poses after that motion.
    """

    curve: Float[np.ndarray, " shells"]
    aligned_curve: Float[np.ndarray, " shells"]
    gauge_rotation_in_degrees: float
    errors: PoseErrors

    def row(self) -> Row:
        """Return the numbers of this result for a table.

        ``rc`` is in shells, that is in cycles per box.
        """
        aligned = resolution_row(jnp.asarray(self.aligned_curve))
        return {
            **resolution_row(jnp.asarray(self.curve)),
            **{f"{name}_aligned": value for name, value in aligned.items()},
            "gauge_rotation_in_degrees": self.gauge_rotation_in_degrees,
            **summarise(self.errors),
        }


def assess(
    volume: Volume | np.ndarray, poses: Poses, truth: Volume, true_poses: Poses
) -> Assessment:
    """Compare a map and its poses with the true ones.

    Parameters
    ----------
    volume, truth
        The map and the true one, both of shape ``(n, n, n)``.
    poses, true_poses
        Poses of the same particles.

    Returns
    -------
    The curves and errors, before and after the alignment of the poses.
    """
    volume = jnp.asarray(volume, truth.dtype)
    motion = align_poses(poses, true_poses)
    rotation, translation = (
        x.astype(truth.dtype) for x in (motion.rotation, motion.translation)
    )
    # A rotated map loses the corners of its spectrum; remove them from the truth, too.
    limit = truth.shape[0] // 2
    moved = move_map(volume, rotation, translation, limit)
    reference = move_map(truth, jnp.eye(3, dtype=truth.dtype), 0 * translation, limit)
    identity = jnp.eye(3, dtype=motion.rotation.dtype)
    return Assessment(
        np.asarray(fsc(volume, truth)),
        np.asarray(fsc(moved, reference)),
        float(jnp.rad2deg(geodesic_distance(motion.rotation, identity))),
        pose_errors(poses, true_poses),
    )


def resolution_row(curve: Float[Array, " shells"]) -> Row:
    """Return the two numbers that summarise a Fourier shell correlation."""
    return {
        "mean_fsc": float(mean_fsc(curve)),
        "rc": float(crossing(curve, THRESHOLD)),
    }
