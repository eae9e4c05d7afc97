"""The joint refinement against the truth, the oracle and RELION.

Every case is a data set of :mod:`datasets`. FSC is against the truth, without a mask,
as it stands. The parts of a case are

- ``relion``: ``relion_reconstruct`` from the true STAR file, where it is installed;
- ``joint``: the refinement from the initial poses and map;
- ``oracle``: our volume update from the true poses;
- ``bound``: the true poses polished against the true map at the known noise: RMS
  errors, the Cramer-Rao bound, and how many true poses lie in the 95 % ellipsoids.

The joint refinement is timed in a process of its own, compilation included.
"""

import shutil
import subprocess
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from benchmark import Settings
from datasets import DATA_SETS, describe, mean_fsc, poses, simulate
from records import Record, markdown_table
from refine_dataset import refine

import jaxrefine as jr
from jaxrefine.data import observation
from jaxrefine.geometry import matrix_to_rotvec
from jaxrefine.operators.gridding import Gridding
from jaxrefine.poses.polish import polish_poses
from jaxrefine.poses.prior import priors_about
from jaxrefine.poses.solvers import LevenbergMarquardt
from jaxrefine.poses.uncertainty import mean_curvatures

CASES = ("hjc64", "ptch64", "hjc64-low", "hjc90", "hjc128")
CASES += ("hjc64-2000", "hjc64-4000", "hjc64-8000")
PARTS = ("relion", "joint", "oracle", "bound")


def relion(data: dict[str, np.ndarray]) -> float | None:
    """Reconstruct from the true poses with RELION; the mean FSC with the truth."""
    program = shutil.which("relion_reconstruct")
    if program is None:
        return None
    import mrcfile

    n, poses = data["volume"].shape[0], []
    for i, (angles, shift) in enumerate(
        zip(np.rad2deg(data["angles"]), -data["shifts"], strict=True), start=1
    ):
        numbers = " ".join(f"{value:.6f}" for value in (*angles, *shift))
        poses.append(f"{i:06d}@particles.mrcs {numbers} 1")
    optics = ["OpticsGroup", "OpticsGroupName", "ImagePixelSize", "ImageSize"]
    optics += ["ImageDimensionality", "Voltage", "SphericalAberration"]
    optics += ["AmplitudeContrast"]
    columns = ["ImageName", "AngleRot", "AngleTilt", "AnglePsi", "OriginXAngst"]
    columns += ["OriginYAngst", "OpticsGroup"]
    lines = ["data_optics", "", "loop_", *(f"_rln{name}" for name in optics)]
    lines += [f"1 group1 1.0 {n} 2 300 2.7 0.1", "", "data_particles", "", "loop_"]
    lines += [*(f"_rln{name}" for name in columns), *poses, ""]
    with tempfile.TemporaryDirectory() as folder:
        with mrcfile.new(Path(folder) / "particles.mrcs") as file:
            file.set_data(data["images"])
            file.voxel_size = 1.0
        (Path(folder) / "true.star").write_text("\n".join(lines))
        command = [program, "--i", "true.star", "--o", "map.mrc"]
        subprocess.run(command, cwd=folder, check=True, capture_output=True)
        with mrcfile.open(Path(folder) / "map.mrc") as file:
            return mean_fsc(np.asarray(file.data), data["volume"])


def oracle(data: dict[str, np.ndarray]) -> dict[str, Any]:
    """Reconstruct from the true poses by our volume update."""
    truth = poses(data["angles"], data["shifts"])
    begin = time.perf_counter()
    result = jr.reconstruct(jr.Particles(data["images"]), truth, key=jax.random.key(1))
    return {
        "mean_fsc": mean_fsc(result.volume, data["volume"]),
        "tau": result.tau,
        "tau_errors": result.errors,
        "wall_s": time.perf_counter() - begin,
    }


def bound(data: dict[str, np.ndarray]) -> dict[str, float]:
    """Polish the true poses against the true map; compare with the Cramer-Rao bound."""
    particles = jr.Particles(data["images"])
    n, last = particles.image_size, (particles.image_size - 1) // 2
    truth = poses(data["angles"], data["shifts"])
    noise = jnp.full(n // 2 + 1, data["sigma"] ** 2 * n**2, jnp.float32)
    spectrum = Gridding().spectrum(jnp.asarray(data["volume"]), last)
    view = observation.view(particles, last, noise)
    known = priors_about(truth, 10.0, 1000.0, np.pi, 1000.0)
    everyone = np.arange(len(particles))
    compared = particles, everyone, spectrum, view, known
    rotations, shifts = np.asarray(truth.rotations), np.asarray(truth.shifts)
    polished = polish_poses(*compared, rotations, shifts, LevenbergMarquardt(6), 256)
    pose = (
        np.asarray(polished.rotations),
        np.asarray(polished.shifts),
        np.asarray(polished.information),
    )
    curvature = mean_curvatures(*compared, *pose, 256)
    turned = np.einsum("pij,pkj->pik", pose[0], rotations)
    vector = np.asarray(matrix_to_rotvec(jnp.asarray(turned)))
    error = np.concatenate([vector, pose[1] - data["shifts"]], axis=1)
    covariance = np.linalg.inv(pose[2].astype(float))
    distance = np.einsum("pi,pij,pj->p", error, curvature, error)
    expected = np.einsum("pii->pi", covariance)
    return {
        "rms_angle_in_degrees": float(
            np.rad2deg(np.sqrt((error[:, :3] ** 2).sum(1).mean()))
        ),
        "bound_angle_in_degrees": float(
            np.rad2deg(np.sqrt(expected[:, :3].sum(1).mean()))
        ),
        "rms_shift_in_pixels": float(np.sqrt((error[:, 3:] ** 2).sum(1).mean())),
        "bound_shift_in_pixels": float(np.sqrt(expected[:, 3:].sum(1).mean())),
        # The 95 % quantile of chi squared with five degrees of freedom.
        "covered_by_95": float(np.mean(distance < 11.0705)),
    }


def measure(case: str, settings: Settings) -> dict[str, Any]:
    """Measure the parts of a case."""
    data = simulate(DATA_SETS[case], settings.data)
    functions = {"relion": relion, "joint": refine, "oracle": oracle, "bound": bound}
    figures: dict[str, Any] = DATA_SETS[case]._asdict()
    for part, function in functions.items():
        if settings.measures(part):
            figures[part] = function(data)
    return figures


def table(records: Sequence[Record]) -> str:
    """Return three tables: the maps of every case, their poses, what they cost."""
    map_rows, pose_rows, cost_rows = [], [], []
    for each in records:
        figures, case = each["figures"], f"`{each['case']}`"
        joint, at_truth, polished = (figures.get(part) for part in PARTS[1:])
        joint_fsc, relion_fsc = joint["mean_fsc"], figures.get("relion")
        oracle_fsc = at_truth and at_truth["mean_fsc"]
        map_rows.append(
            (
                describe(each["case"], figures),
                *(
                    "" if value is None else f"{value:.3f}"
                    for value in (joint_fsc, oracle_fsc, relion_fsc)
                ),
                _ratio(joint_fsc, oracle_fsc),
                _ratio(joint_fsc, relion_fsc),
                _ratio(oracle_fsc, relion_fsc),
            )
        )
        pose_rows.append(
            (
                case,
                f"{100 * joint['fraction_within_10_degrees']:.0f} %",
                f"{joint['angle_error_in_degrees_median']:.2f}",
                f"{joint['shift_error_in_pixels_median']:.2f}",
                _ratio(
                    polished["rms_angle_in_degrees"], polished["bound_angle_in_degrees"]
                )
                if polished
                else "",
                f"{100 * polished['covered_by_95']:.1f} %" if polished else "",
            )
        )
        cost_rows.append(
            (
                case,
                f"{joint['wall_s']:.0f}",
                f"{joint['peak_rss_mib']:.0f}",
                f"{joint['images_mib']:.0f}",
            )
        )
    of_maps = ("data", "joint", "oracle", "RELION, true poses", "joint / oracle")
    of_maps += ("joint / RELION", "oracle / RELION")
    of_poses = ("case", "within 10 degrees", "median error (degrees)")
    of_poses += ("median shift error (pixels)", "RMS error / Cramér-Rao bound")
    of_poses += ("true poses in the 95 % ellipsoids",)
    of_costs = ("case", "time (s)", "peak memory (MiB)", "images (MiB)")
    return "\n".join(
        (
            f"Maps: mean FSC with the truth.\n\n{markdown_table(of_maps, map_rows)}",
            "Poses: errors of the joint refinement, and, with the true map, those of "
            f"polished true poses.\n\n{markdown_table(of_poses, pose_rows)}",
            "Cost of the joint refinement from a cold start, compilation included.\n\n"
            + markdown_table(of_costs, cost_rows),
        )
    )


def _ratio(value: float | None, reference: float | None) -> str:
    return "" if value is None or reference is None else f"{value / reference:.2f}"
