"""What ``jaxrefine reconstruct`` can be told."""

from dataclasses import dataclass
from pathlib import Path

from jaxrefine.cli.commands import shared
from jaxrefine.cli.commands.command import Command
from jaxrefine.runs.options import group, option


@dataclass(frozen=True, kw_only=True)
class ReconstructSettings:
    """How a map is made of particles."""

    particles: Path = option(
        positional=True, metavar="PARTICLES.star", help="the particles, with poses"
    )
    out: Path = option(affects_results=False, metavar="MAP.mrc", help="map to write")
    symmetry: str = shared.symmetry()
    tau: float | None = shared.tau()
    half_sets: bool = option(
        False,
        help="also write maps of two halves of the particles, MAP_half1.mrc and "
        "MAP_half2.mrc, which are not regularised",
    )
    seed: int = shared.seed("dealing the particles into halves")
    batch_size: int = shared.batch_size(256)
    devices: int | None = shared.devices()
    memory: float | None = shared.memory()
    processes: shared.ProcessSettings = group(
        shared.ProcessSettings, "several processes"
    )
    cryosparc: shared.CryosparcSettings = group(
        shared.CryosparcSettings, "cryoSPARC's tables"
    )
    images: shared.ImageSettings = group(shared.ImageSettings, "images")


def run(settings: ReconstructSettings) -> None:
    """Make the map."""
    from jaxrefine.cli import reconstruct

    reconstruct.run(settings)


RECONSTRUCT = Command(
    name="reconstruct",
    summary="make a map of particles, whose poses are kept",
    description="Write the map that the particles make at the poses that they have.",
    settings=ReconstructSettings,
    run=run,
)
