"""``jaxrefine match``: particles and a map in, the particles' poses on a grid out."""

import math
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from jaxrefine import io
from jaxrefine.cli import _maps, _particles, _usable
from jaxrefine.cli._memory import free_bytes
from jaxrefine.cli._outputs import check_can_be_written, check_is_no_input
from jaxrefine.cli._sign import check_same_sign
from jaxrefine.cli.commands.match import MatchSettings
from jaxrefine.cli.commands.refine import RefineSettings
from jaxrefine.data.particles import Particles
from jaxrefine.errors import InputError
from jaxrefine.euler import euler_to_matrix
from jaxrefine.geometry import Poses
from jaxrefine.poses import matching
from jaxrefine.poses.grid import FARTHEST, PoseGrid
from jaxrefine.poses.search import half_period_turn
from jaxrefine.refinement import memory
from jaxrefine.refinement.config import RefineConfig
from jaxrefine.refinement.contrast import Contrast, contrast
from jaxrefine.runs import options
from jaxrefine.runs.progress import Bars

# Comparisons of an image with a projection, of which a search may take 100 days at 100
# million a second. Two cores do about a tenth of that.
_RATE, _MOST_DAYS = 1e8, 100
_DAY_S, _GIB = 86400, 2**30
_CYCLES = 3  # in the particle's diameter, at which its sign is looked at
_RANDOM = 3  # mean square of what `matching.Match` has for the angle of any rotation
# Options of both commands that do not suit the table which is written: shifts are from
# the positions that were found, and it is a STAR file, whatever was read.
_OF_WHAT_WAS_READ = {"max_shift", "shift_spread", "passthrough", "class_"}
_REFINED = Path("refined")  # the folder of the refinement, as it is suggested


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
        If the particles or the map cannot be used, the search cannot come to an end, or
        the table cannot be written.
    """
    out = settings.out
    check_can_be_written(out)
    source = _particles.read(
        settings.particles,
        settings.images,
        settings.cryosparc,
        with_poses=False,
        diameter_used=True,
    )
    check_is_no_input(
        out, source.path, settings.map, *source.joined, *source.stacks.values()
    )
    config = _configure(settings, source.particles)
    search = matching.search_of(config, source.particles.image_size)
    config = _planned(settings, config, search, len(source))
    volume = _maps.read_map_for(
        source,
        settings.map,
        settings.map_voxel_size,
        settings.resample,
        settings.images.trust_contrast,
    )
    chosen = _usable.usable(source, settings.images, with_poses=False)
    particles = chosen.particles(source.particles)
    with Bars() as bars:
        if not settings.images.trust_contrast:
            found = _contrast_without_poses(
                particles, volume, config, search.grid, bars
            )
            check_same_sign(found, source, volume, settings)
        result = _matched(match, particles, volume, config, bars)
    search = result.search
    spread = search.grid.shift_spread
    columns = {
        "jaxrefineCorrelation": chosen.of_table(result.scores, 0.0),
        "jaxrefineEvidence": chosen.of_table(result.log_likelihood, 0.0),
        "jaxrefineAngleStd": np.rad2deg(
            chosen.of_table(result.angle_std, math.sqrt(_RANDOM))
        ),
        "jaxrefineShiftStd": chosen.of_table(result.shift_std, math.sqrt(2) * spread),
        "jaxrefineUndetermined": chosen.left_out.astype(int),
    }
    poses = chosen.poses(source.poses, result.poses)
    io.write_particles(out, source, poses, columns)
    detail = source.particles.box_in_angstroms / search.r_max
    print(
        f"{len(particles)} particles, {math.degrees(search.grid.in_plane_step):g} "
        f"degree steps, details down to {detail:.3g} A, median correlation "
        f"{float(np.median(result.scores)):.3f}: {out}"
    )
    print(_advice(result, settings))


def _configure(settings: MatchSettings, particles: Particles) -> matching.MatchConfig:
    """Return the parameters in radians, pixels, cycles per box and boxes."""
    r_max, config = None, matching.MatchConfig()
    if settings.resolution is not None:
        r_max = _particles.shell_of("--resolution", settings.resolution, particles)
    if settings.max_shift is not None:
        side = particles.image_size
        _particles.check_shift("--max-shift", settings.max_shift, side)
    diameter = config.particle_diameter
    if settings.images.particle_diameter is not None:
        diameter = settings.images.particle_diameter / particles.box_in_angstroms
    return matching.MatchConfig(
        math.radians(settings.angle_step),
        settings.max_shift,
        settings.shift_step,
        r_max=r_max,
        batch_size=settings.batch_size,
        particle_diameter=diameter,
        shift_spread=settings.shift_spread,
        symmetry=settings.symmetry,
    )


def _planned(
    settings: MatchSettings,
    config: matching.MatchConfig,
    search: matching.Search,
    count: int,
) -> matching.MatchConfig:
    """Return the parameters with a batch that fits into memory, and tell of the plan.

    Raises
    ------
    InputError
        If the search would not come to an end, or if not even one particle at a time
        fits.
    """
    free, grid = free_bytes(settings.memory), search.grid
    size = memory.fitting_batch(
        search.estimate_bytes, min(config.batch_size, count), 1, free
    )
    needed = search.estimate_bytes(size)
    days = grid.orientation_count * grid.shift_count * count / _RATE / _DAY_S
    tried = (
        f"{_rounded(grid.orientation_count)} orientations ({settings.angle_step:g} "
        f"degrees apart) with {_rounded(grid.shift_count)} shifts "
        f"({grid.shift_step:.2g} pixels apart)"
    )
    if days > _MOST_DAYS:
        last = (search.image_size - 1) // 2
        finest = half_period_turn(config.particle_diameter, last) / FARTHEST
        raise InputError(
            "--angle-step, --shift-step and --max-shift must make a search that can "
            f"end, got {tried}: {days:.2g} days for {count} images at 1e8 comparisons "
            f"a second; these images show no step below {math.degrees(finest):.2g} "
            "degrees, and 7.5 are usual"
        )
    if free is not None and needed > free:
        parts = search.parts_of_memory(size)
        largest = max(parts, key=parts.__getitem__)
        whose = "--memory"
        if settings.memory is None:
            whose = "the free memory, or --memory,"
        raise InputError(
            f"{whose} must be at least {needed / _GIB:.3g} GiB for {tried} of images "
            f"of {search.image_size} pixels, {size} at a time, got {free / _GIB:.3g} "
            f"GiB; {parts[largest] / _GIB:.2g} GiB, the largest part, are for {largest}"
        )
    there = "" if free is None else f" of {free / _GIB:.1f} GiB that are free"
    kind = jax.local_devices()[0].device_kind
    print(
        f"{tried}, {size} particles at a time on {kind}, about {needed / _GIB:.1f} GiB"
        f" of memory{there}",
        file=sys.stderr,
    )
    return replace(config, batch_size=size)


def _rounded(count: float) -> str:
    """Return about how many, in two digits."""
    return f"{float(f'{count:.2g}'):,.0f}" if count < 1e9 else f"{count:.2g}"


def _contrast_without_poses(
    particles: Particles,
    volume: jax.Array,
    config: matching.MatchConfig,
    grid: PoseGrid,
    bars: Bars,
) -> Contrast:
    """Correlate images with projections from all around, at low resolution.

    That of a particle from another direction still has its size and its sign. The
    directions of the grid are dealt out in the order of the images.

    Parameters
    ----------
    particles, volume
        The images and the map.
    config
        Gives the diameter of the particle, and the batch size.
    grid
        The poses that will be tried.
    bars
        Shows how far it is.
    """
    count, views = len(particles), grid.directions()
    unturned = np.pad(views, ((0, 0), (0, 1)))[np.arange(count) * len(views) // count]
    rotations = euler_to_matrix(jnp.asarray(unturned, jnp.float32))
    poses = Poses(rotations, jnp.zeros((count, 2), jnp.float32))
    cycles = max(1, round(_CYCLES / config.particle_diameter))
    chosen = RefineConfig(first_r_max=cycles, batch_size=config.batch_size)
    return contrast(particles, poses, volume, chosen, bars.watch)


def _matched(
    match: Callable[..., matching.Match],
    particles: Particles,
    volume: jax.Array,
    config: matching.MatchConfig,
    bars: Bars,
) -> matching.Match:
    """Match the particles, with fewer at a time whenever memory runs out."""

    def attempt(batch_size: int) -> matching.Match:
        chosen = replace(config, batch_size=batch_size)
        advance = bars.next("matching", math.ceil(len(particles) / batch_size))
        return match(particles, volume, chosen, callback=lambda done: advance(done, {}))

    def say(sentence: str) -> None:
        print(sentence, file=sys.stderr)

    return memory.retry_on_out_of_memory(attempt, config.batch_size, say, least=1)


def _advice(result: matching.Match, settings: MatchSettings) -> str:
    """Return how to go on: the command that refines the poses, on the last line.

    It says how well they are known, the root mean square of the errors that are
    expected, for each component, and all that `refine` can be told of what `match` was.
    """
    default = math.degrees(RefineConfig().angle_spread)
    angle, shift = (
        float(np.sqrt(np.mean(np.square(values)) / components))
        for values, components in ((result.angle_std, 3), (result.shift_std, 2))
    )
    angle = math.degrees(angle)
    shared = {each.name for each in options.declared(RefineSettings)}
    shared -= _OF_WHAT_WAS_READ
    values = {
        each.name: each.value(settings)
        for each in options.declared(MatchSettings)
        if each.name in shared and each.value(settings) != each.default
    }
    values |= {"particles": settings.out, "out": _REFINED}
    if angle < default:
        known = "with how well the poses are known"
        values["angle_spread"] = float(f"{angle:.2g}")
    else:
        known = (
            "though many poses are not known to within the default of --angle-spread, "
            f"{default:.1f} degrees"
        )
    if result.search.grid.max_shift > 0:  # otherwise no error of shifts was measured
        values["shift_spread"] = float(f"{shift:.2g}")
    refine = options.settings_from(RefineSettings, values)
    return f"to go on, {known}:\n{options.command_line('refine', refine)}"
