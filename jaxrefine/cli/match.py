"""``jaxrefine match``: particles and a map in, the particles' poses on a grid out."""

import math
from collections.abc import Callable

import numpy as np

from jaxrefine import io
from jaxrefine.cli import _maps, _particles, _usable
from jaxrefine.cli._outputs import check_can_be_written, check_is_no_input
from jaxrefine.cli.commands.match import MatchSettings
from jaxrefine.poses import matching
from jaxrefine.runs.progress import Bars


def run(
    settings: MatchSettings, match: Callable[..., matching.Match] = matching.match
) -> None:
    """Match the particles; write them with their poses.

    Parameters
    ----------
    settings
        What to do.
    match
        What matches them, or a stand-in.

    Raises
    ------
    InputError
        If the particles or the map cannot be used, or the table cannot be written.
    """
    out = settings.out
    check_can_be_written(out)
    source = _particles.read(
        settings.particles, settings.images, settings.cryosparc, with_poses=False
    )
    check_is_no_input(
        out, source.path, settings.map, *source.joined, *source.stacks.values()
    )
    volume = _maps.read_map_for(
        source,
        settings.map,
        settings.map_voxel_size,
        settings.resample,
        settings.images.trust_contrast,
    )
    r_max = None
    if settings.resolution is not None:
        r_max = _particles.shell_of(
            "--resolution", settings.resolution, source.particles
        )
    config = matching.MatchConfig(
        math.radians(settings.angle_step),
        settings.max_shift,
        settings.shift_step,
        r_max=r_max,
        batch_size=settings.batch_size,
    )
    chosen = _usable.usable(source, settings.images, with_poses=False)
    particles = chosen.particles(source.particles)
    with Bars() as bars:
        advance = bars.next("matching", math.ceil(len(particles) / config.batch_size))
        result = match(
            particles, volume, config, callback=lambda done: advance(done, {})
        )
    columns = {
        "jaxrefineCorrelation": chosen.of_table(result.scores, 0.0),
        "jaxrefineUndetermined": chosen.left_out.astype(int),
    }
    poses = chosen.poses(source.poses, result.poses)
    io.write_particles(out, source, poses, columns)
    median = float(np.median(result.scores))
    detail = source.particles.box_in_angstroms / result.r_max
    step = math.degrees(result.angle_step)
    print(
        f"{len(particles)} particles, {step:g} degree steps, details "
        f"down to {detail:.3g} A, median correlation {median:.3f}: {out}"
    )
