"""The default engine of ``jaxrefine refine``: :mod:`jaxrefine.refine`."""

import argparse
import math
from typing import Any

import jax
import numpy as np
from jaxtyping import Int

from jaxrefine import io, progress, refine
from jaxrefine.cli._folder import RunFolder
from jaxrefine.cli._outcome import Outcome
from jaxrefine.errors import InputError
from jaxrefine.particles import Particles

# Standard deviations of each component, uniform in a ball and in a disc of radius 1.
_IN_BALL, _IN_DISC = 1 / math.sqrt(5), 1 / 2


def configure(
    options: argparse.Namespace, source: io.ParticleFile
) -> refine.RefineConfig:
    """Return the parameters that the options ask for.

    Without priors a largest change says how well the poses are known: they are taken to
    be spread as if uniformly up to it, but rotations no further than by default.

    Raises
    ------
    InputError
        If the initial resolution is not one of the images'.
    """
    chosen: dict[str, Any] = {"half_sets": options.half_sets}
    if options.initial_resolution is not None:
        chosen["first_r_max"] = _shell(options.initial_resolution, source.particles)
    for name in ("iterations", "batch_size"):
        if getattr(options, name) is not None:
            chosen[name] = getattr(options, name)
    if options.max_angle is not None:
        chosen["max_angle"] = math.radians(options.max_angle)
        spread = _IN_BALL * chosen["max_angle"]
        chosen["angle_spread"] = min(spread, refine.RefineConfig().angle_spread)
    if options.max_shift is not None:
        chosen["max_shift"] = options.max_shift
        chosen["shift_spread"] = _IN_DISC * options.max_shift
    if options.prior_angle is not None:
        chosen["angle_spread"] = math.radians(options.prior_angle)
    if options.prior_shift is not None:
        chosen["shift_spread"] = options.prior_shift
        chosen.setdefault("max_shift", 3 * options.prior_shift)
    return refine.RefineConfig(**chosen)


def _shell(resolution: float, particles: Particles) -> int:
    """Return a resolution in angstroms as a band limit in cycles per box."""
    box = particles.image_size * particles.pixel_size_in_angstroms
    shell, last = math.floor(box / resolution), (particles.image_size - 1) // 2
    if not 1 <= shell <= last:
        raise InputError(
            f"--initial-resolution wants {box / last:.3g} to {box:g} A for these "
            f"images, not {resolution:g}."
        )
    return shell


def run(
    options: argparse.Namespace,
    source: io.ParticleFile,
    volume: jax.Array,
    config: refine.RefineConfig,
    folder: RunFolder,
    bars: progress.Bars,
) -> Outcome:
    """Refine from the last checkpoint, or from the given poses and map."""
    key = jax.random.key(options.seed)
    subsets = _deal(source, options.seed) if config.half_sets else None
    what = (source.particles, source.poses, volume, config)
    state = folder.resume(lambda: refine.init(*what, key=key, subsets=subsets))
    done = 0 if state is None else int(state.iteration)
    advance = bars.next("refining", config.iterations, done)

    def record(state: Any, info: Any) -> None:
        row = info.row()
        folder.record(state, row)
        advance(state, row)

    result = refine.refine(
        *what,
        key=key,
        subsets=subsets,
        state=state,
        callback=record,
    )
    undetermined = np.asarray(result.undetermined)
    report: dict[str, Any] = {
        "undetermined": int(undetermined.sum()),
        "tau": float(result.tau),
    }
    further = columns(result.log_likelihood, result.covariances)
    further["jaxrefineUndetermined"] = undetermined.astype(int)
    if subsets is not None:
        further["rlnRandomSubset"] = subsets
    if result.fsc is not None:
        report["half_set_fsc"] = np.asarray(result.fsc).tolist()
    return Outcome(
        result.poses,
        np.asarray(result.volume),
        result.half_maps,
        further,
        report,
    )


def _deal(source: io.ParticleFile, seed: int) -> Int[np.ndarray, " particles"]:
    """Return the half set of each particle, 1 or 2: the file's, or dealt at random."""
    if source.random_subset is not None:
        return source.random_subset
    order = np.random.default_rng(seed).permutation(len(source))
    return 1 + order % 2


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
