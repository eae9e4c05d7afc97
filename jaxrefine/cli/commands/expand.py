"""What ``jaxrefine expand`` can be told."""

from dataclasses import MISSING, dataclass
from pathlib import Path

from jaxrefine.cli.commands import shared
from jaxrefine.cli.commands.command import Command
from jaxrefine.runs.options import group, option


@dataclass(frozen=True, kw_only=True)
class ExpandSettings:
    """How a table is expanded."""

    particles: Path = option(
        positional=True, metavar="PARTICLES.star", help="the particles, with poses"
    )
    out: Path = option(affects_results=False, metavar="OUT.star", help="table to write")
    symmetry: str = shared.symmetry(MISSING)
    datadir: Path | None = shared.datadir()
    cryosparc: shared.CryosparcSettings = group(
        shared.CryosparcSettings, "cryoSPARC's tables"
    )


def run(settings: ExpandSettings) -> None:
    """Expand the table."""
    from jaxrefine.cli import expand

    expand.run(settings)


EXPAND = Command(
    name="expand",
    summary="write every particle once for each operator of a point group",
    description="Write a table in which every particle has one row for each operator "
    "of the symmetry, with the pose from which it looks the same. All other columns "
    "are copied. Nothing but the table is read: stacks need not be there.",
    settings=ExpandSettings,
    run=run,
)
