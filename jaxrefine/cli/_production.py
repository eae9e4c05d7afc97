"""The default engine of ``jaxrefine refine``: :mod:`jaxrefine.refinement.loop`."""

import argparse
import math
import sys
from dataclasses import replace
from typing import Any

import jax
import numpy as np
from jaxtyping import Int

from jaxrefine import io
from jaxrefine.cli._images import box_of, shell
from jaxrefine.cli._outcome import Outcome
from jaxrefine.data.particles import Particles
from jaxrefine.errors import InputError
from jaxrefine.geometry import Poses
from jaxrefine.refinement import loop, memory
from jaxrefine.refinement.config import RefineConfig
from jaxrefine.refinement.sets import deal
from jaxrefine.runs import progress
from jaxrefine.runs.folder import RunFolder

# Standard deviations of each component, uniform in a ball and in a disc of radius 1.
_IN_BALL, _IN_DISC = 1 / math.sqrt(5), 1 / 2


def configure(options: argparse.Namespace, source: io.ParticleFile) -> RefineConfig:
    """Return the parameters that the options ask for.

    Without priors a largest change says how well the poses are known: they are taken to
    be spread as if uniformly up to it, but rotations no further than by default.

    Raises
    ------
    InputError
        If a resolution is not one of the images', or if options contradict each other.
    """
    chosen: dict[str, Any] = {
        "half_sets": options.half_sets,
        "symmetry": options.symmetry,
        **_band_limits(options, source.particles),
    }
    for what, fixed in (("angle", options.fix_angles), ("shift", options.fix_shifts)):
        for other in (f"max_{what}", f"prior_{what}"):
            if fixed and getattr(options, other) is not None:
                raise InputError(
                    f"--{other.replace('_', '-')} does not go with --fix-{what}s."
                )
        if fixed:
            chosen[f"max_{what}"] = 0.0
    for name in ("iterations", "batch_size"):
        if getattr(options, name) is not None:
            chosen[name] = getattr(options, name)
    if options.max_angle is not None:
        chosen["max_angle"] = math.radians(options.max_angle)
        spread = _IN_BALL * chosen["max_angle"]
        chosen["angle_spread"] = min(spread, RefineConfig().angle_spread)
    if options.max_shift is not None:
        chosen["max_shift"] = options.max_shift
        chosen["shift_spread"] = _IN_DISC * options.max_shift
    if options.prior_angle is not None:
        chosen["angle_spread"] = math.radians(options.prior_angle)
    if options.prior_shift is not None:
        chosen["shift_spread"] = options.prior_shift
        chosen.setdefault(
            "max_shift", min(3 * options.prior_shift, source.particles.image_size / 2)
        )
    return RefineConfig(**chosen)


def _band_limits(options: argparse.Namespace, particles: Particles) -> dict[str, Any]:
    """Return the band limits, cycles per box, and the diameter in boxes.

    A particle of another size than by default is first compared, and searched for, at
    as many cycles per diameter.
    """
    default, chosen = RefineConfig(), {}
    box, last = box_of(particles), (particles.image_size - 1) // 2
    if options.particle_diameter is not None:
        chosen["particle_diameter"] = options.particle_diameter / box
        for name in ("first_r_max", "search_r_max"):
            cycles = (
                getattr(default, name)
                * default.particle_diameter
                / chosen["particle_diameter"]
            )
            chosen[name] = min(round(cycles), last)
    first = chosen.get("first_r_max", default.first_r_max)
    if options.initial_resolution is not None:
        first = shell("--initial-resolution", options.initial_resolution, particles)
    if options.max_resolution is not None:
        most = shell("--max-resolution", options.max_resolution, particles)
        if options.initial_resolution is not None and first > most:
            raise InputError(
                f"--max-resolution wants at most --initial-resolution, "
                f"{options.initial_resolution:g} A, not {options.max_resolution:g}."
            )
        chosen["max_r_max"], first = most, min(first, most)
    return {**chosen, "first_r_max": first}


def run(
    options: argparse.Namespace,
    source: io.ParticleFile,
    volume: jax.Array,
    mask: jax.Array | None,
    config: RefineConfig,
    folder: RunFolder,
    bars: progress.Bars,
) -> Outcome:
    """Refine from the last checkpoint, or from the given poses and map."""
    key = jax.random.key(options.seed)
    subsets = _subsets(source, options.seed) if config.half_sets else None
    plan = _plan(options, source, config)
    # Another one would change the last bits of a run that is resumed.
    batch_size = options.batch_size or folder.keep("batch_size", plan.batch_size)
    batch_size = min(batch_size, len(source))
    plan = memory.with_batch(plan, config, batch_size)
    print(plan.describe(), file=sys.stderr)
    what = (source.particles, source.poses, volume, config)
    state = folder.resume(lambda: loop.init(*what, key=key, subsets=subsets, mask=mask))
    done = 0 if state is None else int(state.iteration)
    advance = bars.next("refining", config.iterations, done)

    def record(new: Any, info: Any) -> None:
        nonlocal state
        row = info.row()
        folder.record(new, row)
        state = new
        advance(new, row)

    def attempt(batch_size: int) -> Any:
        return loop.refine(
            *what[:3],
            replace(config, batch_size=batch_size),
            key=key,
            subsets=subsets,
            mask=mask,
            state=state,
            callback=record,
        )

    result = memory.retry_on_out_of_memory(attempt, batch_size, _say)
    undetermined = np.asarray(result.undetermined)
    report: dict[str, Any] = {
        "undetermined": int(undetermined.sum()),
        "tau": float(result.tau),
        "planned_batch_size": batch_size,
        "estimated_peak_mib": plan.estimated_bytes / 2**20,
    }
    further = columns(result.log_likelihood, result.covariances)
    further["jaxrefineUndetermined"] = undetermined.astype(int)
    if subsets is not None and source.random_subset is None:
        further["rlnRandomSubset"] = subsets
    if result.fsc is not None:
        report["half_set_fsc"] = np.asarray(result.fsc).tolist()
    else:
        report["fold_fsc"] = np.asarray(result.state.sets[0].fold_fsc).tolist()
    found, given = result.poses, source.poses
    return Outcome(
        Poses(
            given.rotations if options.fix_angles else found.rotations,
            given.shifts if options.fix_shifts else found.shifts,
        ),
        np.asarray(result.volume),
        result.half_maps,
        further,
        report,
    )


def _plan(
    options: argparse.Namespace, source: io.ParticleFile, config: RefineConfig
) -> memory.Plan:
    """Return what the run will use, within the memory that is given or free."""
    free = memory.available_bytes()
    if options.memory is not None:
        free = int(options.memory * 2**30)
    return memory.plan(len(source), source.particles.image_size, config, free)


def _say(sentence: str) -> None:
    print(sentence, file=sys.stderr)


def _subsets(source: io.ParticleFile, seed: int) -> Int[np.ndarray, " particles"]:
    """Return the half set of each particle, 1 or 2: the file's, or dealt at random."""
    if source.random_subset is not None:
        return source.random_subset
    return deal(len(source), jax.random.key(seed))


def columns(log_likelihood: Any, covariances: Any) -> dict[str, np.ndarray]:
    """Return what is known of each particle's pose, for its table.

    The errors are root mean squares to be expected: of the angle of the rotation, in
    degrees, and of the length of the shift, in pixels.
    """
    variances = np.diagonal(np.asarray(covariances, np.float64), axis1=1, axis2=2)
    return {
        "rlnLogLikeliContribution": np.asarray(log_likelihood),
        "jaxrefineAngleStd": np.rad2deg(np.sqrt(variances[:, :3].sum(axis=1))),
        "jaxrefineShiftStd": np.sqrt(variances[:, 3:].sum(axis=1)),
    }
