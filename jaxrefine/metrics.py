"""How good a map is, and how good poses are, when the truth is known."""

from typing import final

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxrefine import geometry
from jaxrefine._fourier import multiplicity, radii
from jaxrefine._types import Scalar, Volume

_HIGHEST = jax.lax.Precision.HIGHEST
_REWEIGHTED = 20  # solutions of a robust fit
_STARTS, _TURNS = 64, 5


@eqx.filter_jit
def fsc(a: Volume, b: Volume, mask: Volume | None = None) -> Float[Array, " shells"]:
    r"""Fourier shell correlation of two volumes.

    .. math:: \mathrm{FSC}(r) = \frac{\mathrm{Re} \sum_{k \in S_r} \hat a_k \hat b_k^*}
              {\sqrt{\sum_{k \in S_r} |\hat a_k|^2 \sum_{k \in S_r} |\hat b_k|^2}}

    with :math:`S_r` the integer frequencies whose radius rounds to r. This is eq. (25)
    with a square root in the denominator, which the printed formula lacks.

    Parameters
    ----------
    a, b
        The volumes, of one size n and one type.
    mask
        Multiplies both volumes first.

    Returns
    -------
    curve
        The correlation at r = 0, ..., n // 2; zero where a volume has no power.
    """
    if mask is not None:
        a, b = a * mask, b * mask
    n = a.shape[0]
    shell, weight = _half_space(n)

    def shell_sum(values: Float[Array, "n n half"]) -> Float[Array, " shells"]:
        weighted = values * jnp.asarray(weight, values.dtype)
        return jax.ops.segment_sum(weighted.ravel(), shell, num_segments=n // 2 + 1)

    a_hat, b_hat = jnp.fft.rfftn(a, norm="ortho"), jnp.fft.rfftn(b, norm="ortho")
    a_power = shell_sum(a_hat.real**2 + a_hat.imag**2)
    b_power = shell_sum(b_hat.real**2 + b_hat.imag**2)
    cross = shell_sum(a_hat.real * b_hat.real + a_hat.imag * b_hat.imag)
    positive = (a_power > 0) & (b_power > 0)
    a_norm = jnp.sqrt(jnp.where(positive, a_power, 1))
    b_norm = jnp.sqrt(jnp.where(positive, b_power, 1))
    return jnp.where(positive, cross / a_norm / b_norm, 0)


def mean_fsc(curve: Float[Array, " shells"]) -> Scalar:
    """Mean of a Fourier shell correlation over the shells 1, ..., n // 2."""
    return jnp.mean(curve[1:])


def crossing(curve: Float[Array, " shells"], threshold: float | Scalar) -> Scalar:
    """Radius at which a Fourier shell correlation first falls below a threshold.

    Between shells the curve is a straight line. Shell 0 does not count: a curve that is
    below the threshold at shell 1 crosses there.

    Parameters
    ----------
    curve
        The correlation at r = 0, ..., n // 2.
    threshold
        0.5 against the truth, 0.143 between half maps.

    Returns
    -------
    radius
        In shells; n // 2 if the curve never falls below the threshold.
    """
    tail = curve[1:]
    below = ~(tail >= threshold)
    first = jnp.argmax(below)
    previous = tail[jnp.maximum(first - 1, 0)]
    drop = jnp.where(first > 0, previous - tail[first], 1)
    step = jnp.where(first > 0, (previous - threshold) / drop, 1)
    return jnp.where(jnp.any(below), first.astype(curve.dtype) + step, tail.size)


def resolution_in_angstroms(
    radius: float | Scalar, n: int, voxel_size_in_angstroms: float
) -> float | Scalar:
    """Return the period, in Angstrom, of a Fourier shell of a box of n voxels."""
    return n * voxel_size_in_angstroms / radius


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
def align_poses(
    angles: Float[Array, "particles 3"],
    shifts: Float[Array, "particles 2"],
    true_angles: Float[Array, "particles 3"],
    true_shifts: Float[Array, "particles 2"],
) -> Motion:
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
    angles, true_angles
        (rot, tilt, psi) in radians.
    shifts, true_shifts
        (x, y) in pixels.
    """
    rotations = geometry.euler_to_matrix(angles)
    true_rotations = geometry.euler_to_matrix(true_angles)
    rotation = geometry.align_rotations(rotations, true_rotations)
    aligned = jnp.matmul(rotations, rotation, precision=_HIGHEST)
    rows, difference = aligned[:, :2], shifts - true_shifts
    floor = float(jnp.finfo(shifts.dtype).eps) ** 0.5

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

    start = solve(jnp.ones_like(shifts[:, 0]))
    translation = jax.lax.fori_loop(0, _REWEIGHTED, step, start)
    return Motion(rotation, translation, aligned)


@eqx.filter_jit
def pose_errors(
    angles: Float[Array, "particles 3"],
    shifts: Float[Array, "particles 2"],
    true_angles: Float[Array, "particles 3"],
    true_shifts: Float[Array, "particles 2"],
    operators: Float[Array | np.ndarray, "order 3 3"] | None = None,
) -> PoseErrors:
    r"""Compare poses with the true ones, up to a rigid motion of the map.

    The motion is that of `align_poses`. A map of the other hand counts as wrong.

    Parameters
    ----------
    angles, true_angles
        (rot, tilt, psi) in radians.
    shifts, true_shifts
        (x, y) in pixels.
    operators
        Of the true map's symmetry, if any, which makes ``R`` and ``R S`` one: each
        pose is compared with the nearest of the true one's equivalents.

    Returns
    -------
    errors
        The geodesic distance of each rotation and the length of each remaining shift.
    """
    if operators is not None:
        true_angles = _nearest_equivalents(angles, true_angles, operators)
    motion = align_poses(angles, shifts, true_angles, true_shifts)
    aligned, difference = motion.aligned, shifts - true_shifts
    true_rotations = geometry.euler_to_matrix(true_angles)
    angle = geometry.geodesic_distance(aligned, true_rotations)
    moved = jnp.matmul(aligned[:, :2], motion.translation, precision=_HIGHEST)
    shift = jnp.linalg.norm(difference - moved, axis=-1)
    return PoseErrors(jnp.rad2deg(angle), shift)


def _nearest_equivalents(
    angles: Float[Array, "particles 3"],
    true_angles: Float[Array, "particles 3"],
    operators: Float[Array | np.ndarray, "order 3 3"],
) -> Float[Array, "particles 3"]:
    """Return the equivalents of the true poses that are nearest, after alignment.

    Which they are and the motion of the map depend on each other. They are found in
    turns, from the best of the motions that make one of the particles' poses right.
    """
    rotations, truth = map(geometry.euler_to_matrix, (angles, true_angles))
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

    some = np.linspace(0, len(angles) - 1, min(len(angles), _STARTS)).astype(int)
    starts = jnp.einsum(
        "pji,pjk->pik", rotations[some], truth[some], precision=_HIGHEST
    )
    motion = starts[jnp.argmin(jax.lax.map(distance, starts))]
    for _ in range(_TURNS):
        motion = geometry.align_rotations(rotations, nearest(motion))
    return geometry.matrix_to_euler(nearest(motion))


@eqx.filter_jit
def pose_differences(
    angles: Float[Array, "particles 3"],
    shifts: Float[Array, "particles 2"],
    true_angles: Float[Array, "particles 3"],
    true_shifts: Float[Array, "particles 2"],
) -> tuple[Float[Array, "particles 3"], Float[Array, "particles 2"]]:
    r"""Return the signed differences that the paper shows, Figs. 5, 6, 11 and 12.

    True minus refined (rot, tilt, psi), in degrees from -180 to 180, and (x, y) in
    pixels, after the motion of `align_poses`. Near the poles rot and psi differ by much
    for little; `pose_errors` is the better measure. Parameters as there.
    """
    motion = align_poses(angles, shifts, true_angles, true_shifts)
    rotations = geometry.euler_to_matrix(true_angles)
    turned = [geometry.matrix_to_euler(r) for r in (rotations, motion.aligned)]
    turn = (turned[0] - turned[1] + jnp.pi) % (2 * jnp.pi) - jnp.pi
    moved = jnp.matmul(motion.aligned[:, :2], motion.translation, precision=_HIGHEST)
    return jnp.rad2deg(turn), true_shifts - shifts + moved


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


def _half_space(n: int) -> tuple[np.ndarray, np.ndarray]:
    """Shell of each frequency of ``rfftn`` (raveled), and how many it stands for."""
    return np.rint(radii(n)).astype(np.int32).ravel(), multiplicity(n)[None, None]
