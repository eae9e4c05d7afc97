"""``jaxrefine demo``."""

import argparse
from dataclasses import fields
from pathlib import Path

from jaxrefine import demo

_HELP = {
    "size": "side of the volume and of the images, voxels",
    "particles": "number of particles",
    "snr_db": "signal-to-noise ratio in a pixel, decibels",
    "max_angle_error": "largest initial error of each Euler angle, radians",
    "max_shift": "largest shift along x and y, pixels",
    "initial_blur": "the initial map is the truth blurred by this many voxels",
    "seed": "seed of everything random",
    "batch_size": "particles computed at once; memory grows with it",
}


def add(commands) -> None:
    """Declare the command."""
    command = commands.add_parser(
        "demo",
        help="simulate the built-in phantom, refine it, compare with the oracle",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    command.add_argument("--out", type=Path, required=True, help="folder to write to")
    for option in fields(demo.DemoConfig):
        command.add_argument(
            f"--{option.name.replace('_', '-')}",
            type=type(option.default),
            default=option.default,
            help=_HELP[option.name],
        )
    command.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    """Run the demonstration and print its report."""
    chosen = {f.name: getattr(options, f.name) for f in fields(demo.DemoConfig)}
    summary = demo.run(demo.DemoConfig(**chosen), options.out)
    print(demo.report(summary))
    print(f"maps, pictures and summary.json are in {options.out}")
