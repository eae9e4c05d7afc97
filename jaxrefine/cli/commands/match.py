"""What ``jaxrefine match`` can be told."""

from dataclasses import dataclass
from pathlib import Path

from jaxrefine.cli.commands import shared
from jaxrefine.cli.commands.command import Command
from jaxrefine.runs.options import group, option


@dataclass(frozen=True, kw_only=True)
class MatchSettings:
    """How particles are matched with a map."""

    particles: Path = option(
        positional=True, metavar="PARTICLES.star", help="the particles"
    )
    map: Path = option(metavar="REF.mrc", help="the reference")
    out: Path = option(affects_results=False, metavar="OUT.star", help="table to write")
    map_voxel_size: float | None = shared.map_voxel_size()
    resample: bool = shared.resample()
    angle_step: float = option(
        7.5,
        unit="degrees",
        least=0,
        above=True,
        most=90,
        help="step between neighbouring directions, and in plane",
    )
    max_shift: float = option(4.0, unit="pixels", least=0, help="largest shift")
    shift_step: float = option(
        1.0, unit="pixels", least=0, above=True, help="step between neighbouring shifts"
    )
    resolution: float | None = option(
        None,
        unit="angstroms",
        least=0,
        above=True,
        default_text="what the step of the angles supports",
        help="finest detail that is compared",
    )
    batch_size: int = shared.batch_size(64)
    cryosparc: shared.CryosparcSettings = group(
        shared.CryosparcSettings, "cryoSPARC's tables"
    )
    images: shared.ImageSettings = group(shared.ImageSettings, "images")


def run(settings: MatchSettings) -> None:
    """Match the particles."""
    from jaxrefine.cli import match

    match.run(settings)


MATCH = Command(
    name="match",
    summary="find the poses of particles in a map, starting from none",
    description="Write the table of particles with the best pose of each on a grid. "
    "Poses that the particles have are not used.",
    settings=MatchSettings,
    run=run,
)
