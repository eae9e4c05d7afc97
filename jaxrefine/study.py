"""Comparisons on simulated data: the same data reconstructed in several ways.

The paper's three curves are the *oracle* (true poses kept), *unrefined* (initial poses
kept) and *joint* (initial poses refined), all started from the same initial map. Each
becomes an :class:`Outcome` with its map, its resolution curve and its pose errors.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, field

import equinox as eqx
import jax.numpy as jnp
import numpy as np

from jaxrefine import kbwf, metrics
from jaxrefine import paper as joint
from jaxrefine._types import Volume
from jaxrefine.ctf import IsotropicPSF
from jaxrefine.geometry import Poses, geodesic_distance
from jaxrefine.simulate import Dataset
from jaxrefine.spatial import footprint, spline_filter

Row = dict[str, int | float]
"""Numbers by name, as a table or a JSON file wants them."""

THRESHOLD = 0.5
"""Correlation that defines ``r_c``, section V-D."""


class Study(eqx.Module):
    """A simulated data set, the truth behind it and a common start.

    Attributes
    ----------
    truth
        The map that the images show.
    dataset
        The images with their true and their initial poses.
    start
        Initial coefficients.
    basis
        The basis of the reconstruction.
    problem
        Images and imaging model, as the refinement wants them.
    """

    truth: Volume
    dataset: Dataset
    start: Volume
    basis: kbwf.KBWF
    problem: joint.Problem


@dataclass(frozen=True)
class Outcome:
    """What one way of reconstructing came to.

    Attributes
    ----------
    volume
        The map on the voxel grid.
    curve, aligned_curve
        Its Fourier shell correlation with the truth: as it stands, and after the rigid
        motion that its poses have drifted by (`metrics.align_poses`) is undone.
    gauge_rotation_deg
        Angle of that motion.
    errors
        Errors of its poses, after global alignment.
    history
        One row of numbers per outer iteration.
    wall_s
        Seconds of refining, compilation included.
    """

    volume: np.ndarray
    curve: np.ndarray
    aligned_curve: np.ndarray
    gauge_rotation_deg: float
    errors: metrics.PoseErrors
    history: list[Row] = field(repr=False)
    wall_s: float

    def row(self) -> Row:
        """Return the numbers that stand for this outcome in a table.

        ``rc`` is in shells, that is in periods per box.
        """
        aligned = resolution_row(jnp.asarray(self.aligned_curve))
        return {
            **resolution_row(jnp.asarray(self.curve)),
            **{f"{name}_aligned": value for name, value in aligned.items()},
            "gauge_rotation_deg": self.gauge_rotation_deg,
            **metrics.summarise(self.errors),
            "wall_s": self.wall_s,
        }


def resolution_row(curve) -> Row:
    """Return the two numbers that stand for a resolution curve."""
    return {
        "mean_fsc": float(metrics.mean_fsc(curve)),
        "rc": float(metrics.crossing(curve, THRESHOLD)),
    }


def prepare(
    truth: Volume,
    dataset: Dataset,
    initial_map: Volume,
    basis: kbwf.KBWF | None = None,
    psf: IsotropicPSF | None = None,
) -> Study:
    """Expand the initial map and tabulate the imaging model.

    Parameters
    ----------
    truth
        The map that the images show.
    dataset
        From :func:`jaxrefine.simulate.make_dataset`.
    initial_map
        Where every reconstruction starts.
    basis
        Basis of the reconstruction; the paper's by default.
    psf
        The PSF that the data set was simulated with, if any.
    """
    basis = kbwf.KBWF() if basis is None else basis
    psi = footprint(basis, psf)
    image_filter = spline_filter(psi, dataset.images.shape[-1])
    problem = joint.Problem(dataset.images, psi, image_filter)
    start = kbwf.expand(basis, initial_map)
    return Study(truth, dataset, start, basis, problem)


Progress = Callable[[joint.RefineState, Row], None]
"""Called after every outer iteration with the state and a row of numbers."""


def _no_progress(state: joint.RefineState, row: Row) -> None:
    del state, row


def reconstruct_from(
    study: Study,
    poses: Poses,
    config: joint.RefineConfig,
    progress: Progress = _no_progress,
) -> Outcome:
    """Reconstruct from given poses, which are kept: the oracle, or unrefined."""
    return _run(study, joint.init(poses, study.start), config, progress, False)


def refine_from(
    study: Study,
    state: joint.RefineState,
    config: joint.RefineConfig,
    progress: Progress = _no_progress,
) -> Outcome:
    """Refine map and poses jointly from a state, new or saved."""
    return _run(study, state, config, progress, True)


def initial_state(study: Study) -> joint.RefineState:
    """Return the state from which the joint refinement starts."""
    return joint.init(study.dataset.initial, study.start)


def _run(study, state, config, progress, refines_poses) -> Outcome:
    begin = time.perf_counter()
    history = []
    truth = study.dataset.truth

    def assess(state):
        volume = kbwf.evaluate(study.basis, state.volume.coefficients)
        curve = metrics.fsc(volume, study.truth)
        errors = metrics.pose_errors(
            state.poses.angles, state.poses.shifts, truth.angles, truth.shifts
        )
        return volume, curve, errors

    def record(state, info):
        _, curve, errors = assess(state)
        row = {"iteration": int(state.iteration), **resolution_row(curve)}
        if refines_poses:
            row |= metrics.summarise(errors)
            row["angle_moves"] = float(jnp.mean(info.pose.angle_moves))
            row["shift_moves"] = float(jnp.mean(info.pose.shift_moves))
        volume_info = info.volume if refines_poses else info
        row["objective"] = float(volume_info.objective[-1])
        row["cg_residual"] = float(volume_info.cg_residual[-1])
        row["elapsed_s"] = time.perf_counter() - begin
        history.append(row)
        progress(state, row)

    run = joint.refine if refines_poses else joint.reconstruct
    state = run(state, study.problem, config, record)
    wall = time.perf_counter() - begin
    volume, curve, errors = assess(state)
    motion = metrics.align_poses(
        state.poses.angles, state.poses.shifts, truth.angles, truth.shifts
    )
    moved = kbwf.evaluate_moved(
        study.basis, state.volume.coefficients, motion.rotation, motion.translation
    )
    identity = jnp.eye(3, dtype=motion.rotation.dtype)
    return Outcome(
        np.asarray(volume),
        np.asarray(curve),
        np.asarray(metrics.fsc(moved, study.truth)),
        float(jnp.rad2deg(geodesic_distance(motion.rotation, identity))),
        errors,
        history,
        wall,
    )
