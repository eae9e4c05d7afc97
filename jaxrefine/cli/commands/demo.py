"""What ``jaxrefine demo`` can be told."""

import math
from dataclasses import dataclass
from pathlib import Path

from jaxrefine.cli.commands import shared
from jaxrefine.cli.commands.command import Command
from jaxrefine.runs.options import option


@dataclass(frozen=True, kw_only=True)
class DemoSettings:
    """What the demonstration simulates."""

    out: Path = option(affects_results=False, metavar="DIR", help="folder to write to")
    size: int = option(
        64, unit="voxels", least=16, help="side of the volume and of the images"
    )
    particles: int = option(1000, least=4, help="number of particles")
    snr_db: float = option(
        -5.0,
        unit="decibels",
        least=-100,
        most=100,
        help="signal-to-noise ratio in a pixel",
    )
    max_angle_error: float = option(
        math.degrees(0.7),
        unit="degrees",
        least=0,
        default_text="40.1, the paper's 0.7 radians",
        help="largest initial error of each Euler angle",
    )
    max_shift: float = option(
        3.0, unit="pixels", least=0, help="largest shift along x and y"
    )
    initial_blur: float = option(
        4.0,
        unit="voxels",
        least=0,
        above=True,
        help="the initial map is the truth blurred by a Gaussian of this width",
    )
    seed: int = shared.seed("everything random")
    batch_size: int = shared.batch_size(256)


def run(settings: DemoSettings) -> None:
    """Run the demonstration."""
    from jaxrefine.cli import demo

    demo.run(settings)


DEMO = Command(
    name="demo",
    summary="simulate the built-in phantom, refine it, and compare with the truth",
    description="Simulate images of the built-in phantom, refine poses and map "
    "jointly, and compare the map with those at the true poses (oracle) and at the "
    "initial ones (unrefined). Maps, pictures and summary.json are written to a "
    "folder; the same command carries on where it was stopped.",
    settings=DemoSettings,
    run=run,
)
