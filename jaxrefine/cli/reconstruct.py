"""``jaxrefine reconstruct``: a map from particles at the poses that they have."""

import argparse
from pathlib import Path

import jax

from jaxrefine import io
from jaxrefine.cli import _images
from jaxrefine.cli._outputs import check_output, check_writable
from jaxrefine.errors import InputError
from jaxrefine.refinement.config import RefineConfig
from jaxrefine.refinement.reconstruction import reconstruct


def add(commands) -> None:
    """Declare the command."""
    command = commands.add_parser(
        "reconstruct", help="make a map of particles, whose poses are kept"
    )
    option = command.add_argument
    option("particles", type=Path, metavar="PARTICLES.star")
    option("--out", type=Path, required=True, metavar="MAP.mrc", help="file to write")
    option(
        "--symmetry",
        type=str.upper,
        default="C1",
        help="point group of the map (default C1)",
    )
    option(
        "--half-sets",
        action="store_true",
        help="write maps of two halves of the particles, too: MAP_half1.mrc and "
        "MAP_half2.mrc, which are not regularised",
    )
    option("--seed", type=int, default=0, help="deals the particles into halves")
    option("--batch-size", type=int, help="particles computed at once")
    _images.add_options(option)
    command.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    """Make the map, and the half maps if they were asked for."""
    out = options.out
    written = [out]
    if options.half_sets:
        written += [out.with_name(f"{out.stem}_half{i}{out.suffix}") for i in (1, 2)]
    for path in written:
        check_writable(path)
    if options.batch_size is not None and options.batch_size < 1:
        raise InputError(
            f"--batch-size wants a value of at least 1, not {options.batch_size}."
        )
    if not 0 <= options.seed < 2**31:
        raise InputError(
            f"--seed wants a value from 0 to 2^31 - 1, not {options.seed}."
        )
    chosen = {} if options.batch_size is None else {"batch_size": options.batch_size}
    config = RefineConfig(symmetry=options.symmetry, **chosen)
    source = _images.read(options, with_poses=True)
    for path in written:
        check_output(path, source.path, *source.stacks.values())

    key = jax.random.key(options.seed)
    subsets = source.random_subset if options.half_sets else None
    result = reconstruct(
        source.particles, source.poses, config, key=key, subsets=subsets
    )
    pixel = source.particles.pixel_size_in_angstroms
    maps = [result.volume, *(result.half_maps if options.half_sets else ())]
    for path, volume in zip(written, maps, strict=True):
        io.write_mrc(path, volume, pixel)
    names = ", ".join(str(path) for path in written)
    print(f"{len(source)} particles, lambda {result.lam:.4g}: {names}")
