"""The presets ``paper`` and ``released`` of ``jaxrefine refine``: the spatial model."""

import argparse
import time

import jax
import jax.numpy as jnp
import numpy as np

from jaxrefine import io
from jaxrefine.cli._outcome import Outcome
from jaxrefine.data.preprocess import outside
from jaxrefine.errors import InputError
from jaxrefine.operators import kbwf, spatial
from jaxrefine.paper import algorithm1, presets
from jaxrefine.runs import progress
from jaxrefine.runs.folder import RunFolder

_BATCH_SIZE = 8
_MEASURED = 500  # images, for the noise


def configure(
    options: argparse.Namespace, source: io.ParticleFile
) -> algorithm1.Algorithm1Config:
    """Return the preset, at the noise level of the images.

    Raises
    ------
    InputError
        If the options or the particles ask for what the preset cannot do.
    """
    names = ("half_sets", "initial_resolution", "max_angle", "max_shift")
    names += ("prior_angle", "prior_shift", "fix_angles", "fix_shifts", "symmetry")
    names += ("max_resolution", "memory", "mask", "mask_images")
    for name in names:
        if getattr(options, name) not in (None, False, "C1"):
            raise InputError(
                f"--{name.replace('_', '-')} does not go with --preset "
                f"{options.preset}; the default preset has it."
            )
    if source.particles.ctf is not None:
        raise InputError(
            f"{source.path} has contrast-transfer functions, which --preset "
            f"{options.preset} cannot correct for; the default preset can."
        )
    chosen = {"batch_size": options.batch_size or _BATCH_SIZE}
    if options.iterations is not None:
        chosen["iterations"] = options.iterations
    if options.preset == "paper":
        return presets.paper_preset(_noise(source), **chosen)
    return presets.released_preset(**chosen)


def _noise(source: io.ParticleFile) -> float:
    """Return the standard deviation of the pixels outside of the inscribed circle."""
    count, m = min(len(source), _MEASURED), source.particles.image_size
    images, _ = source.particles.batch(np.arange(count))
    return float(np.std(np.asarray(images, np.float64)[:, outside(m, float(m))]))


def run(
    options: argparse.Namespace,
    source: io.ParticleFile,
    volume: jax.Array,
    mask: jax.Array | None,
    config: algorithm1.Algorithm1Config,
    folder: RunFolder,
    bars: progress.Bars,
) -> Outcome:
    """Refine from the last checkpoint, or from the given poses and map."""
    del options, mask
    begin = time.perf_counter()
    basis = kbwf.KBWF()
    images, _ = source.particles.batch(np.arange(len(source)))
    footprint = spatial.footprint(basis)
    image_filter = spatial.spline_filter(footprint, source.particles.image_size)
    problem = algorithm1.Problem(images, footprint, image_filter)
    start = algorithm1.init(source.poses, kbwf.expand(basis, volume))
    state = folder.resume(lambda: start) or start
    advance = bars.next("refining", config.iterations, int(state.iteration))

    def record(
        state: algorithm1.Algorithm1State, info: algorithm1.Algorithm1Info
    ) -> None:
        row = {
            "iteration": int(state.iteration),
            "objective": float(info.volume.objective[-1]),
            "cg_residual": float(info.volume.cg_residual[-1]),
            "angle_moves": float(jnp.mean(info.pose.angle_moves)),
            "shift_moves": float(jnp.mean(info.pose.shift_moves)),
            "elapsed_s": time.perf_counter() - begin,
        }
        folder.record(state, row)
        advance(state, row)

    state = algorithm1.refine(state, problem, config, record)
    refined = kbwf.evaluate(basis, state.volume.coefficients)
    return Outcome(state.poses, np.asarray(refined))
