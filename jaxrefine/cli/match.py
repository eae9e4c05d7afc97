"""``jaxrefine match``: particles and a map in, the particles' poses on a grid out."""

import argparse
import math
from dataclasses import replace
from pathlib import Path

import numpy as np

from jaxrefine import io
from jaxrefine.cli import _images
from jaxrefine.cli._outputs import check_output, check_writable
from jaxrefine.poses import matching
from jaxrefine.runs import progress


def add(commands) -> None:
    """Declare the command."""
    command = commands.add_parser(
        "match",
        help="find the poses of particles in a map, starting from none",
        description="Poses that the particles have are not used.",
    )
    default = matching.MatchConfig()
    option = command.add_argument
    option("particles", type=Path, metavar="PARTICLES.star")
    option("--map", type=Path, required=True, metavar="REF.mrc", help="the reference")
    option("--out", type=Path, required=True, metavar="OUT.star", help="file to write")
    _images.add_resample(option)
    option(
        "--angle-step",
        type=float,
        default=default.angle_step_in_degrees,
        help="between neighbouring directions, and in plane, degrees (default "
        "%(default)g)",
    )
    option(
        "--max-shift",
        type=float,
        default=default.max_shift,
        help="largest shift, pixels (default %(default)g)",
    )
    option(
        "--shift-step",
        type=float,
        default=default.shift_step,
        help="between neighbouring shifts, pixels (default %(default)g)",
    )
    option(
        "--resolution",
        type=float,
        help="finest detail compared, angstroms (default: what the step of the angles "
        "supports)",
    )
    option(
        "--batch-size",
        type=int,
        default=default.batch_size,
        help="particles computed at once (default %(default)d)",
    )
    _images.add_options(option)
    command.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    """Match the particles; write them with the poses found."""
    out = options.out
    check_writable(out)
    config = matching.MatchConfig(
        options.angle_step,
        options.max_shift,
        options.shift_step,
        batch_size=options.batch_size,
    )
    source = _images.read(options, with_poses=False)
    check_output(out, source.path, options.map, *source.stacks.values())
    volume = _images.read_map(options.map, source, options.resample)
    if options.resolution is not None:
        r_max = _images.shell("--resolution", options.resolution, source.particles)
        config = replace(config, r_max=r_max)
    with progress.Bars() as bars:
        advance = bars.next("matching", math.ceil(len(source) / config.batch_size))
        found = matching.match(
            source.particles, volume, config, callback=lambda done: advance(done, {})
        )
    columns = {"jaxrefineCorrelation": np.asarray(found.scores)}
    io.write_particles(out, source, found.poses, columns)
    median = float(np.median(columns["jaxrefineCorrelation"]))
    detail = _images.box_of(source.particles) / found.r_max
    print(
        f"{len(source)} particles, {found.step_in_degrees:g} degree steps, details "
        f"down to {detail:.3g} A, median correlation {median:.3f}: {out}"
    )
