"""What ``jaxrefine fsc`` can be told."""

from dataclasses import dataclass
from pathlib import Path

from jaxrefine.cli.commands import shared
from jaxrefine.cli.commands.command import Command
from jaxrefine.runs.options import option


@dataclass(frozen=True, kw_only=True)
class FscSettings:
    """Which maps are compared."""

    a: Path = option(positional=True, metavar="A.mrc", help="a map")
    b: Path = option(positional=True, metavar="B.mrc", help="a map on the same grid")
    mask: Path | None = option(
        None, metavar="MASK.mrc", help="multiply both maps by this one"
    )
    map_voxel_size: float | None = shared.map_voxel_size("the maps")
    json: Path | None = option(
        None, affects_results=False, metavar="FILE", help="write the curve as JSON"
    )
    png: Path | None = option(
        None, affects_results=False, metavar="FILE", help="draw the curve"
    )


def run(settings: FscSettings) -> None:
    """Compare the maps."""
    from jaxrefine.cli import fsc

    fsc.run(settings)


FSC = Command(
    name="fsc",
    summary="print the Fourier shell correlation of two maps, and their resolution",
    description="Print the curve, and the resolutions at 0.5 and at 0.143.",
    settings=FscSettings,
    run=run,
)
