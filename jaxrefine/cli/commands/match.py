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
    max_shift: float | None = option(
        None,
        unit="pixels",
        least=0,
        default_text="three times --shift-spread",
        implies="Sets --shift-spread to half of this, unless that is given.",
        help="largest shift",
    )
    shift_spread: float | None = option(
        None,
        unit="pixels",
        least=0,
        above=True,
        default_text="a twentieth of the particle's diameter",
        help="how well the particles are centred: standard deviation along x and y",
    )
    shift_step: float | None = option(
        None,
        unit="pixels",
        least=0,
        above=True,
        default_text="a quarter of --resolution, at most --max-shift",
        help="step between neighbouring shifts",
    )
    resolution: float | None = option(
        None,
        unit="angstroms",
        least=0,
        above=True,
        default_text="what the step of the angles supports for a particle of this "
        "diameter",
        help="finest detail that is compared",
    )
    symmetry: str = shared.symmetry()
    batch_size: int = shared.batch_size(64)
    memory: float | None = shared.memory()
    cryosparc: shared.CryosparcSettings = group(
        shared.CryosparcSettings, "cryoSPARC's tables"
    )
    images: shared.ImageSettings = group(
        shared.ImageSettings,
        "images",
        particle_diameter={
            "default_text": "three quarters of the box for --normalise and "
            "--mask-images, two thirds for the search",
            "implies": "Sets --resolution and --shift-spread, unless they are given.",
        },
    )


def run(settings: MatchSettings) -> None:
    """Match the particles."""
    from jaxrefine.cli import match

    match.run(settings)


MATCH = Command(
    name="match",
    summary="find the poses of particles in a map, starting from none",
    description="Write the table of particles with the most probable pose of each on "
    "a grid, and how well it is known. Poses that the particles have are not used.",
    settings=MatchSettings,
    run=run,
)
