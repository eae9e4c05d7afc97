"""What ``jaxrefine simulate`` can be told."""

import math
from dataclasses import dataclass
from pathlib import Path

from jaxrefine.cli.commands import shared
from jaxrefine.cli.commands.command import Command
from jaxrefine.errors import InputError
from jaxrefine.runs.options import option


@dataclass(frozen=True, kw_only=True)
class SimulateSettings:
    """What data set is simulated.

    Raises
    ------
    InputError
        If the level of the noise or the particles are not given, or what is said of
        poses contradicts the table that they are from.
    """

    map: Path = option(positional=True, metavar="MAP.mrc", help="the true map")
    out: Path = option(affects_results=False, metavar="DIR", help="folder to write to")
    particles: int | None = option(
        None,
        least=1,
        most=10**9,
        help="number of particles, unless --like is given",
    )
    like: Path | None = option(
        None,
        metavar="PARTICLES.star",
        excludes=(
            "particles",
            "ctf",
            "voltage",
            "spherical_aberration",
            "amplitude_contrast",
        ),
        help="take the optics and the poses of every particle from this table, whose "
        "stacks need not be there",
    )
    draw_poses: bool = option(
        False, help="draw poses at random, whatever the table of --like says"
    )
    snr_db: float | None = option(
        None,
        unit="decibels",
        least=-200,
        most=200,
        excludes=("sigma",),
        help="signal-to-noise ratio in a pixel, unless --sigma is given",
    )
    sigma: float | None = option(
        None,
        least=0,
        most=1e30,
        help="standard deviation of the noise, in units of the projections",
    )
    max_shift: float = option(
        0.0, unit="pixels", least=0, most=10**6, help="largest shift along x and y"
    )
    max_angle_error: float = option(
        math.degrees(0.7),
        unit="degrees",
        least=0,
        most=360,
        default_text="40.1, the paper's 0.7 radians",
        help="largest initial error of each Euler angle",
    )
    initial_blur: float = option(
        4.0,
        unit="pixels",
        least=0,
        most=1000,
        help="the initial map is the truth blurred by a Gaussian of this width",
    )
    size: int | None = option(
        None,
        unit="voxels",
        least=8,
        default_text="that of the map",
        help="crop the map to this side in Fourier space",
    )
    ctf: bool = option(False, help="give each image a defocus of its own")
    voltage: float = option(
        300.0,
        unit="kilovolts",
        least=1,
        most=10**4,
        metavar="KV",
        help="acceleration voltage",
    )
    spherical_aberration: float = option(
        2.7,
        unit="millimetres",
        least=0,
        most=100,
        metavar="MM",
        help="spherical aberration",
    )
    amplitude_contrast: float = option(
        0.1, least=0, most=1, help="share of amplitude contrast in the images"
    )
    seed: int = shared.seed("everything random")
    batch_size: int = shared.batch_size(256)

    def __post_init__(self):
        if self.snr_db is None and self.sigma is None:
            raise InputError("--snr-db or --sigma must be given, got neither")
        if self.particles is None and self.like is None:
            raise InputError("--particles or --like must be given, got neither")
        if self.draw_poses and self.like is None:
            raise InputError("--draw-poses must be given with --like, got it alone")
        if self.max_shift and self.like is not None and not self.draw_poses:
            raise InputError(
                "--max-shift must be given with --draw-poses if poses are from a "
                f"table, got --like {self.like} alone"
            )


def run(settings: SimulateSettings) -> None:
    """Simulate the data set."""
    from jaxrefine.cli import simulate

    simulate.run(settings)


SIMULATE = Command(
    name="simulate",
    summary="make a data set from a map, with its truth",
    description="Write a data set that RELION reads, too: particles.star and "
    "particles.mrcs, initial poses and noisy images; truth.star and truth.mrc; and "
    "init.star and init.mrc, where to start. --like takes optics and poses from a "
    "table of your own.",
    settings=SimulateSettings,
    run=run,
)
