"""The presets ``paper`` and ``released`` of ``jaxrefine refine``: the spatial model."""

import time
from functools import partial
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxrefine import paper
from jaxrefine.cli._refinement import Inputs, Outcome, Refinement
from jaxrefine.cli._usable import Usable, usable
from jaxrefine.cli.commands.refine import RefineSettings
from jaxrefine.errors import InputError
from jaxrefine.geometry import Poses
from jaxrefine.maps.noise import white_noise
from jaxrefine.maps.scale import at_unit_scale
from jaxrefine.operators import kbwf
from jaxrefine.runs.folder import NoFolder, RunFolder
from jaxrefine.runs.progress import Bars


def prepare(settings: RefineSettings, inputs: Inputs, folder: RunFolder) -> Refinement:
    """Return what the published algorithm is to do in a folder.

    Raises
    ------
    InputError
        If the particles have optics, which the published algorithm cannot correct for,
        if the initial map is blank or does not have the sign of the images, or if the
        images show no noise.
    """
    source, basis = inputs.source, kbwf.KBWF()
    optics = source.particles.ctf, source.particles.aberrations
    words = "contrast-transfer functions", "an anisotropic magnification"
    for kind, what in zip(optics, words, strict=True):
        if kind is not None:
            raise InputError(
                f"--preset must be default for particles with {what}, as {source.path} "
                f"has, got {settings.preset}"
            )
    chosen = usable(source, settings.images, with_poses=True, folder=folder)
    particles, poses = chosen.particles(source.particles), chosen.given(source.poses)
    images, _ = particles.batch(np.arange(len(particles)))
    problem = paper.Problem.of(images, basis)
    given = paper.init(poses, kbwf.expand(basis, at_unit_scale(inputs.volume)))
    start = paper.match_contrast(problem, given)
    config = _configure(settings, problem, start)
    resolved = {"iterations": config.iterations, "batch_size": config.batch_size}
    run = partial(_run, problem, start, config, source.poses, chosen)
    return Refinement(config, resolved, run)


def _configure(
    settings: RefineSettings, problem: paper.Problem, start: paper.Algorithm1State
) -> paper.Algorithm1Config:
    """Return the preset, in the units of the images and at their noise level."""
    given = {"batch_size": settings.batch_size, "iterations": settings.iterations}
    chosen: dict[str, Any] = {k: v for k, v in given.items() if v is not None}
    if settings.preset == "paper":
        return paper.paper_preset(problem, start, **chosen)
    return paper.released_preset(white_noise(problem.images), **chosen)


def _run(
    problem: paper.Problem,
    start: paper.Algorithm1State,
    config: paper.Algorithm1Config,
    poses: Poses,
    chosen: Usable,
    folder: RunFolder | NoFolder,
    bars: Bars,
) -> Outcome:
    """Refine from the last checkpoint, or from the given poses and map."""
    begin = time.perf_counter()
    state = folder.history.resume(lambda: start) or start
    advance = bars.next("refining", config.iterations, int(state.iteration))

    def record(state: paper.Algorithm1State, info: paper.Algorithm1Info) -> None:
        row = {
            "iteration": int(state.iteration),
            "objective": float(info.volume.objective[-1]),
            "cg_residual": float(info.volume.cg_residual[-1]),
            "angle_moves": float(jnp.mean(info.pose.angle_moves)),
            "shift_moves": float(jnp.mean(info.pose.shift_moves)),
            "elapsed_s": time.perf_counter() - begin,
        }
        folder.history.record(state, row)
        advance(state, row)

    state = paper.refine(state, problem, config, record)
    refined = kbwf.evaluate(kbwf.KBWF(), state.volume.coefficients)
    columns = {}
    if chosen.left_out.any():
        columns["jaxrefineUndetermined"] = chosen.left_out.astype(int)
    poses = chosen.poses(poses, state.poses)
    report = {"left_out": int(chosen.left_out.sum())}
    return Outcome(poses, np.asarray(refined), columns=columns, report=report)
