"""The presets ``paper`` and ``released`` of ``jaxrefine refine``: the spatial model."""

import time
from functools import partial
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxrefine import io, paper
from jaxrefine.cli._refinement import Inputs, Outcome, Refinement
from jaxrefine.cli.commands.refine import RefineSettings
from jaxrefine.data.preprocess import outside
from jaxrefine.errors import InputError
from jaxrefine.operators import kbwf, spatial
from jaxrefine.runs.folder import RunFolder
from jaxrefine.runs.progress import Bars

_MEASURED = 500  # images that the noise is measured in


def prepare(settings: RefineSettings, inputs: Inputs) -> Refinement:
    """Return what the published algorithm is to do.

    Raises
    ------
    InputError
        If the particles have optics, which the published algorithm cannot correct for.
    """
    config = _configure(settings, inputs.source)
    resolved = {"iterations": config.iterations, "batch_size": config.batch_size}
    return Refinement(config, resolved, partial(_run, inputs, config))


def _configure(
    settings: RefineSettings, source: io.ParticleFile
) -> paper.Algorithm1Config:
    """Return the preset, at the noise level of the images."""
    if source.particles.ctf is not None:
        raise InputError(
            f"--preset must be default for particles with contrast-transfer functions, "
            f"as {source.path} has, got {settings.preset}"
        )
    chosen: dict[str, Any] = {}
    if settings.batch_size is not None:
        chosen["batch_size"] = settings.batch_size
    if settings.iterations is not None:
        chosen["iterations"] = settings.iterations
    if settings.preset == "paper":
        return paper.paper_preset(_noise(source), **chosen)
    return paper.released_preset(**chosen)


def _noise(source: io.ParticleFile) -> float:
    """Return the standard deviation of the pixels outside of the inscribed circle."""
    count, m = min(len(source), _MEASURED), source.particles.image_size
    images, _ = source.particles.batch(np.arange(count))
    return float(np.std(np.asarray(images, np.float64)[:, outside(m, float(m))]))


def _run(
    inputs: Inputs, config: paper.Algorithm1Config, folder: RunFolder, bars: Bars
) -> Outcome:
    """Refine from the last checkpoint, or from the given poses and map."""
    begin, source = time.perf_counter(), inputs.source
    basis = kbwf.KBWF()
    images, _ = source.particles.batch(np.arange(len(source)))
    footprint = spatial.footprint(basis)
    image_filter = spatial.spline_filter(footprint, source.particles.image_size)
    problem = paper.Problem(images, footprint, image_filter)
    start = paper.init(source.poses, kbwf.expand(basis, inputs.volume))
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
    refined = kbwf.evaluate(basis, state.volume.coefficients)
    return Outcome(state.poses, np.asarray(refined))
