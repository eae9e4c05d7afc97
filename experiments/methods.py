"""The ways of reconstructing that the studies compare, as `comparison.Method`."""

import dataclasses
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import relion
from comparison import Case, Method, Outcome, Record
from settings import PaperSettings, RelionSettings

from jaxrefine import evaluation, io, simulate
from jaxrefine._types import Volume
from jaxrefine.data.particles import Particles
from jaxrefine.geometry import Poses
from jaxrefine.maps.filters import low_pass
from jaxrefine.maps.mask import soft_mask
from jaxrefine.maps.postprocess import postprocess
from jaxrefine.operators import kbwf
from jaxrefine.paper import Algorithm1Config, algorithm1, algorithm3, paper_preset
from jaxrefine.poses.matching import MatchConfig, match
from jaxrefine.refinement import loop
from jaxrefine.refinement.config import RefineConfig
from jaxrefine.refinement.reconstruction import reconstruct
from jaxrefine.refinement.result import RefineInfo
from jaxrefine.refinement.state import RefineState
from jaxrefine.simulate import Dataset

Start = Callable[[Dataset], Poses]
"""Which poses of a data set a method starts from."""


def true_poses(dataset: Dataset) -> Poses:
    """Return the poses that the images were made at."""
    return dataset.truth


def initial_poses(dataset: Dataset) -> Poses:
    """Return the poses that a refinement starts from."""
    return dataset.initial


def particles_of(case: Case) -> Particles:
    """Return a case's images as the engine takes them."""
    images = np.asarray(case.dataset.images, np.float32)
    return Particles(images, None, case.voxel_size_in_angstroms)


# --- the engine


def reconstruction(start: Start, seed: int, remark: str = "") -> Method:
    """Make a map by our volume update, with the poses kept."""

    def run(case: Case, record: Record) -> Outcome:
        poses, key = start(case.dataset), jax.random.key(seed)
        record.expect(1)
        volume = reconstruct(particles_of(case), poses, key=key).volume
        record.add(volume, poses)
        return Outcome(volume, poses, remark=remark)

    return run


def refinement(
    config: RefineConfig, seed: int, matching: MatchConfig | None = None
) -> Method:
    """Refine poses and map jointly by the engine.

    From the initial poses, or those that matching with the initial map finds instead.
    """

    def run(case: Case, record: Record) -> Outcome:
        key, particles = jax.random.key(seed), particles_of(case)
        poses, matched = case.dataset.initial, record.folder / "matched.eqx"
        if matching is not None and matched.exists():
            poses, _ = io.load_checkpoint(matched, poses)
        elif matching is not None:
            poses = match(particles, case.initial_map, matching).poses
            io.save_checkpoint(matched, poses, {})
        problem = (particles, poses, case.initial_map, config)
        state = record.resume(loop.init(*problem, key=key))
        record.expect(config.iterations)

        def keep(state: RefineState, info: RefineInfo) -> None:
            record.add(state.volume, state.poses, state, **info.row())

        result = loop.refine(*problem, key=key, state=state, callback=keep)
        processed = None
        if result.half_maps is not None:
            processed = _post_processed(case, result.volume, result.half_maps, key)
        return Outcome(result.volume, result.poses, processed)

    return run


def _post_processed(
    case: Case,
    volume: np.ndarray,
    half_maps: tuple[np.ndarray, np.ndarray],
    key: jax.Array,
) -> np.ndarray:
    """Mask a map, and take away what is beyond the resolution of its half maps."""
    voxel, joint_map = case.voxel_size_in_angstroms, jnp.asarray(volume)
    mask = _tight_mask(joint_map, voxel)
    first, second = map(jnp.asarray, half_maps)
    processed = postprocess(first, second, mask, voxel, key=key)
    resolution = processed.resolution.in_angstroms
    return np.asarray(low_pass(joint_map, voxel, resolution) * mask)


def _tight_mask(volume: Volume, voxel_size_in_angstroms: float) -> Volume:
    """Return a mask, tight as in section IV-E, with margins of a share of the box."""
    n = len(volume)
    return soft_mask(volume, voxel_size_in_angstroms, extend=n / 45, edge=n / 15)


# --- the paper's algorithm


Preset = Callable[[algorithm1.Problem, algorithm1.Algorithm1State], Algorithm1Config]
"""Makes the settings for images and a start."""


def spatial_reconstruction(preset: Preset, start: Start) -> Method:
    """Run the volume updates of Algorithm 1 alone.

    The settings are those of the joint refinement, so that the results compare.
    """

    def run(case: Case, record: Record) -> Outcome:
        problem, state = spatial_problem(case)
        settings = preset(problem, state)
        poses = start(case.dataset)
        state = algorithm1.init(poses, state.volume.coefficients)
        record.expect(settings.iterations)

        def keep(state: algorithm1.Algorithm1State, info) -> None:
            record.add(_volume(state), poses, objective=float(info.objective[-1]))

        state = algorithm1.reconstruct(state, problem, settings, keep)
        return Outcome(np.asarray(_volume(state)), poses)

    return run


def spatial_refinement(preset: Preset, closing_update: bool = False) -> Method:
    """Run Algorithm 1, and a volume update after its last iteration if asked for."""

    def run(case: Case, record: Record) -> Outcome:
        problem, fresh = spatial_problem(case)
        settings = preset(problem, fresh)
        state = record.resume(fresh)
        record.expect(settings.iterations)

        def keep(
            state: algorithm1.Algorithm1State, info: algorithm1.Algorithm1Info
        ) -> None:
            moves = {
                "angle_moves": float(info.pose.angle_moves.mean()),
                "shift_moves": float(info.pose.shift_moves.mean()),
                "objective": float(info.volume.objective[-1]),
            }
            record.add(_volume(state), state.poses, state, **moves)

        state = algorithm1.refine(state, problem, settings, keep)
        if closing_update:
            last = eqx.tree_at(lambda s: s.iteration, state, state.iteration - 1)
            state, _ = algorithm1.update_volume(last, problem, settings)
        return Outcome(np.asarray(_volume(state)), state.poses)

    return run


def preset_of(
    settings: PaperSettings, make: Callable[..., Algorithm1Config] = paper_preset
) -> Preset:
    """Return a preset of as many iterations, and batches as large, as a study has."""
    loops = {"iterations": settings.paper_iterations, "batch_size": settings.batch_size}
    return partial(make, **loops)


def paper_algorithm(settings: PaperSettings, case: Case) -> dict[str, Method]:
    """Return the paper's algorithm, with its oracle and the unrefined poses."""
    del case
    preset = preset_of(settings)
    return {
        "oracle (paper)": spatial_reconstruction(preset, true_poses),
        "unrefined (paper)": spatial_reconstruction(preset, initial_poses),
        "joint (paper)": spatial_refinement(preset),
    }


_WIDTHS = (1.0, 0.75, 0.5, 0.25, 0.0)
_VISITS = 20  # iterations of Algorithm 3 in each map, by when poses hardly move


def descent_in_the_true_map(preset: Preset, blur: float) -> Method:
    """Run Algorithm 3 in the true map, which nothing but a local search needs.

    The map is blurred by ``blur`` voxels, then by less, and in the end not at all: one
    path of maps, each better than what a refinement has, and not a bound on what others
    lead to. The last row says how many of the particles that end more than 10 degrees
    off have a lower cost at their true poses. The map is the paper's, of the final
    poses.
    """

    def run(case: Case, record: Record) -> Outcome:
        problem, start = spatial_problem(case)
        record.expect(len(_WIDTHS))
        poses = start.euler_poses
        for width in _WIDTHS:
            seen = simulate.blur(case.truth, width * blur) if width else case.truth
            coefficients = kbwf.expand(_BASIS, seen)
            at = algorithm1.init(poses.poses, coefficients)
            steps = preset(problem, at).pose_update(problem, at)
            steps = dataclasses.replace(steps, iterations=_VISITS)
            poses, info = _descend(poses, problem, coefficients, steps)
            still = dataclasses.replace(
                steps, angle_step=jnp.zeros(()), shift_step=jnp.zeros(()), iterations=1
            )
            true = algorithm3.EulerPoses.of(case.dataset.truth)
            _, at_truth = _descend(true, problem, coefficients, still)
            errors = evaluation.pose_errors(poses.poses, case.dataset.truth)
            lost = errors.angle_in_degrees > 10
            better = jnp.sum(lost & (at_truth.cost < info.cost))
            counts = {"lost": int(jnp.sum(lost)), "lower_at_truth": int(better)}
            record.add(seen, poses.poses, blur_in_voxels=width * blur, **counts)
        final = algorithm1.init(poses.poses, start.volume.coefficients)
        state = algorithm1.reconstruct(final, problem, preset(problem, start))
        return Outcome(np.asarray(_volume(state)), poses.poses)

    return run


def _descend(
    poses: algorithm3.EulerPoses,
    problem: algorithm1.Problem,
    coefficients: Volume,
    steps: algorithm3.PoseConfig,
) -> tuple[algorithm3.EulerPoses, algorithm3.PoseInfo]:
    """Run Algorithm 3 on the particles of a problem."""
    model = problem.footprint, problem.image_filter, problem.support
    return algorithm3.run(poses, problem.images, coefficients, *model, steps)


_BASIS = kbwf.KBWF()


def spatial_problem(
    case: Case,
) -> tuple[algorithm1.Problem, algorithm1.Algorithm1State]:
    """Tabulate the imaging model, and start from the initial poses and map."""
    problem = algorithm1.Problem.of(case.dataset.images, _BASIS)
    coefficients = kbwf.expand(_BASIS, case.initial_map)
    return problem, algorithm1.init(case.dataset.initial, coefficients)


def _volume(state: algorithm1.Algorithm1State) -> Volume:
    return kbwf.evaluate(_BASIS, state.volume.coefficients)


# --- the baselines


def projection_matching(settings: MatchConfig, rounds: int, seed: int) -> Method:
    """Match with a grid of projections and reconstruct, ``rounds`` times.

    The given poses are not used; the maps are made by our volume update.
    """

    def run(case: Case, record: Record) -> Outcome:
        particles, key = particles_of(case), jax.random.key(seed)
        volume, poses = record.resume((case.initial_map, case.dataset.initial))
        record.expect(rounds)
        while len(record.rows) < rounds:
            matched = match(particles, volume, settings)
            poses = matched.poses
            volume = jnp.asarray(reconstruct(particles, poses, key=key).volume)
            step = float(np.rad2deg(matched.search.grid.in_plane_step))
            grid = {"step_in_degrees": step, "r_max": matched.search.r_max}
            record.add(volume, poses, (volume, poses), **grid)
        last = record.rows[-1]
        remark = (
            f"{rounds} rounds, steps of {last['step_in_degrees']:g} degrees, up to "
            f"{last['r_max']} cycles per box, maps by our volume update"
        )
        return Outcome(np.asarray(volume), poses, remark=remark)

    return run


def relion_methods(
    settings: RelionSettings, most_poses: int | None = None
) -> dict[str, Method]:
    """Return RELION's programs, where they are installed."""
    if not _relion_is_installed():
        return {}
    programs = {"RELION, true poses": relion_reconstruction(true_poses)}
    limit_s = 60 * settings.relion_limit_min
    if limit_s > 0:
        programs["RELION auto-refine"] = relion_refinement(
            settings.auto_refine_low_pass,
            settings.max_shift > 0,
            limit_s,
            settings.seed,
            most_poses,
        )
    return programs


def relion_local_searches(
    settings: RelionSettings, healpix_order: int, limit_s: float
) -> dict[str, Method]:
    """Return RELION's refinement of the initial poses, where it is installed.

    It is auto-refine, with searches that are local from the first one on, which has the
    given order.
    """
    if not _relion_is_installed():
        return {}
    method = relion_refinement(
        settings.auto_refine_low_pass,
        settings.max_shift > 0,
        limit_s,
        settings.seed,
        local_order=healpix_order,
    )
    return {"RELION, local searches": method}


def _relion_is_installed() -> bool:
    is_there = relion.available()
    if not is_there:
        print("RELION is not installed; its results are left out.", file=sys.stderr)
    return is_there


def relion_reconstruction(start: Start) -> Method:
    """Make a map by ``relion_reconstruct``, with the poses kept."""

    def run(case: Case, record: Record) -> Outcome:
        poses = start(case.dataset)
        star = _relion_particles(case, record.folder, poses)
        record.expect(1)
        volume = relion.reconstruct(record.folder, star)
        record.add(volume, poses)
        return Outcome(volume, poses)

    return run


def relion_refinement(
    low_pass_in_angstroms: float,
    shifts: bool,
    limit_s: float,
    seed: int,
    most_poses: int | None = None,
    local_order: int | None = None,
) -> Method:
    """Refine by ``relion_refine_mpi --auto_refine`` and ``relion_postprocess``.

    The range and the step of the offsets are the paper's. Searches begin in all
    orientations; or, if there is a ``local_order``, with this order and around the
    initial poses. Where the time limit stops it, the result is that of the last
    iteration, and marked as such.
    """
    orders = {}
    if local_order is not None:
        orders = {"healpix_order": local_order, "local_from_order": local_order}

    def run(case: Case, record: Record) -> Outcome:
        voxel = case.voxel_size_in_angstroms
        box = case.truth.shape[0] * voxel
        star = _relion_particles(case, record.folder, case.dataset.initial)

        record.resume(jnp.zeros((), jnp.int32))  # RELION keeps its own state
        record.expect(None)

        def keep(now: relion.Refined) -> None:
            recorded = [row["relion_iteration"] for row in record.rows]
            if now.iterations in recorded:  # before an interruption
                return
            number = jnp.asarray(now.iterations, jnp.int32)
            report = {"relion_iteration": now.iterations, **now.report}
            record.add(now.volume, now.poses, number, **report)

        reached = relion.auto_refine(
            record.folder,
            star,
            np.asarray(case.initial_map),
            diameter_in_angstroms=_DIAMETER * box,
            offset_range=4.0 if shifts else 0.0,
            offset_step=0.5 if shifts else 0.1,
            initial_low_pass_in_angstroms=low_pass_in_angstroms,
            seed=seed,
            limit_s=limit_s,
            **orders,
            most_poses=most_poses,
            callback=keep,
        )
        assert reached.half_maps is not None
        mean = (reached.half_maps[0] + reached.half_maps[1]) / 2
        mask = np.asarray(_tight_mask(jnp.asarray(mean), voxel))
        processed = relion.postprocess(record.folder, *reached.half_maps, mask, voxel)
        remark = (
            f"{reached.iterations} iterations, {reached.wall_s / 60:.0f} minutes, from "
            f"{low_pass_in_angstroms:.0f} Å"
        )
        if local_order is not None:
            step = 30 / 2**local_order
            within = relion.local_range_in_degrees(local_order)
            remark += (
                f", first in steps of {step:g} degrees within {within:g} degrees of "
                f"the initial poses (--healpix_order {local_order} "
                f"--auto_local_healpix_order {local_order})"
            )
        if most_poses is not None:
            remark += f", --maxsig {most_poses}"
        if not reached.finished:
            remark += ", not converged: stopped by a time limit"
        return Outcome(
            mean, reached.poses, processed, remark, reached.wall_s, reached.finished
        )

    return run


_DIAMETER = 0.9  # of the box: the soft circle that RELION's images are masked with


def _relion_particles(case: Case, folder: Path, poses: Poses) -> Path:
    images = np.asarray(case.dataset.images, np.float32)
    return relion.write_particles(folder, images, poses, case.voxel_size_in_angstroms)
