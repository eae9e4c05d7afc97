"""``jaxrefine reconstruct``: a map from particles at the poses that they have."""

import sys
from dataclasses import replace

import jax

from jaxrefine import io
from jaxrefine._processes import check_same, wait_for_first
from jaxrefine.cli import _particles, _usable
from jaxrefine.cli._memory import free_bytes
from jaxrefine.cli._outputs import check_can_be_written, check_is_no_input
from jaxrefine.cli._runtime import check_devices
from jaxrefine.cli._sign import contrary
from jaxrefine.cli.commands.reconstruct import ReconstructSettings
from jaxrefine.cli.engine import DEFAULT, Engine
from jaxrefine.maps.scale import is_negative
from jaxrefine.refinement import memory
from jaxrefine.refinement.config import RefineConfig
from jaxrefine.runs import provenance
from jaxrefine.runs.progress import Bars

# Standard errors of noise from which a map is dark. Those of particles, blurred or with
# ten times as much noise, have 7 to 100, those of noise up to 3.
_DOUBTLESS = 4.0


def run(settings: ReconstructSettings, engine: Engine = DEFAULT) -> None:
    """Make the map, and the half maps if they were asked for.

    Parameters
    ----------
    settings
        What to do.
    engine
        What makes the map.

    Raises
    ------
    InputError
        If the particles cannot be used, memory is too little, or a file cannot be
        written.
    """
    out = settings.out
    check_devices(settings.devices)
    written = [out]
    if settings.half_sets:
        written += [out.with_name(f"{out.stem}_half{i}{out.suffix}") for i in (1, 2)]
    for path in written if jax.process_index() == 0 else ():
        check_can_be_written(path)
    config = RefineConfig(
        symmetry=settings.symmetry, tau=settings.tau, batch_size=settings.batch_size
    )
    source = _particles.read(
        settings.particles, settings.images, settings.cryosparc, with_poses=True
    )
    for path in written:
        check_is_no_input(path, source.path, *source.joined, *source.stacks.values())

    if jax.process_count() > 1:  # A single one need not read so much of the stacks.
        versions = provenance.environment()["versions"]
        check_same(_particles.identity(settings, source) | versions)
    key = jax.random.key(settings.seed)
    subsets = _particles.half_sets(source, key) if settings.half_sets else None
    _particles.tell_what_is_shared(source, subsets)
    chosen = _usable.usable(source, settings.images, with_poses=True, subsets=subsets)
    particles = chosen.particles(source.particles)
    plan = memory.plan_map(
        len(particles), particles.image_size, config, free_bytes(settings.memory)
    )
    print(plan.describe(), file=sys.stderr)
    config = replace(config, batch_size=plan.batch_size)
    with Bars() as bars:
        result = engine.reconstruct(
            particles,
            chosen.given(source.poses),
            config,
            key=key,
            subsets=None if subsets is None else subsets[chosen.indices],
            watch=bars.watch,
        )
    if jax.process_index() > 0:
        wait_for_first()
        return
    pixel = source.particles.pixel_size_in_angstroms
    maps = [result.volume, *(result.half_maps if settings.half_sets else ())]
    for path, volume in zip(written, maps, strict=True):
        io.write_mrc(path, volume, pixel)
    is_dark = is_negative(result.volume, _DOUBTLESS)
    if is_dark and not settings.images.trust_contrast:
        _, remedy = contrary(source, settings.images)
        print(f"{out} seems to have dark protein: if so, {remedy}", file=sys.stderr)
    names = ", ".join(str(path) for path in written)
    print(
        f"{len(chosen.indices)} particles, tau {result.tau:.4g}, lambda "
        f"{result.lam:.4g}: {names}"
    )
    wait_for_first()
