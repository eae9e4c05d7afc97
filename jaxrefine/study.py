"""What a result is worth where the truth is known: on simulated data.

Turning a map and its poses together changes no image, so a refinement may end in a
frame of its own. Maps are compared with the truth both as they stand and after the
rigid motion that their poses imply is undone.
"""

from dataclasses import dataclass
from typing import final

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxrefine import metrics
from jaxrefine._types import Volume
from jaxrefine.alignment import move_map
from jaxrefine.geometry import Poses, geodesic_distance

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
        of `metrics.align_poses` is undone, up to ``n // 2`` cycles per box.
    gauge_rotation_deg
        Angle of that motion.
    errors
        Errors of the poses, the motion set aside.
    """

    curve: Float[np.ndarray, " shells"]
    aligned_curve: Float[np.ndarray, " shells"]
    gauge_rotation_deg: float
    errors: metrics.PoseErrors

    def row(self) -> Row:
        """Return the numbers that stand for this result in a table.

        ``rc`` is in shells, that is in periods per box.
        """
        aligned = resolution_row(jnp.asarray(self.aligned_curve))
        return {
            **resolution_row(jnp.asarray(self.curve)),
            **{f"{name}_aligned": value for name, value in aligned.items()},
            "gauge_rotation_deg": self.gauge_rotation_deg,
            **metrics.summarise(self.errors),
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
    pair = (poses.angles, poses.shifts, true_poses.angles, true_poses.shifts)
    volume = jnp.asarray(volume, truth.dtype)
    motion = metrics.align_poses(*pair)
    rotation, translation = (
        x.astype(truth.dtype) for x in (motion.rotation, motion.translation)
    )
    # The truth, too, without what a turned box cuts off: the corners.
    last = truth.shape[0] // 2
    moved = move_map(volume, rotation, translation, last)
    still = move_map(truth, jnp.eye(3, dtype=truth.dtype), 0 * translation, last)
    identity = jnp.eye(3, dtype=motion.rotation.dtype)
    return Assessment(
        np.asarray(metrics.fsc(volume, truth)),
        np.asarray(metrics.fsc(moved, still)),
        float(jnp.rad2deg(geodesic_distance(motion.rotation, identity))),
        metrics.pose_errors(*pair),
    )


def resolution_row(curve: Float[Array, " shells"]) -> Row:
    """Return the two numbers that stand for a resolution curve."""
    return {
        "mean_fsc": float(metrics.mean_fsc(curve)),
        "rc": float(metrics.crossing(curve, THRESHOLD)),
    }
