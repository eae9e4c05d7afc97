"""What ``jaxrefine external-reconstruct`` can be told."""

from dataclasses import dataclass
from pathlib import Path

from jaxrefine.cli.commands.command import Command
from jaxrefine.runs.options import option


@dataclass(frozen=True, kw_only=True)
class ExternalReconstructSettings:
    """How a map is made of RELION's sums."""

    sums: Path = option(
        positional=True,
        metavar="ROOT_external_reconstruct.star",
        help="the file that names RELION's sums, and the map to write",
    )
    tau: float = option(
        1.0,
        least=0,
        above=True,
        help="weight of the total-variation regulariser, in units of the noise",
    )


def run(settings: ExternalReconstructSettings) -> None:
    """Make the map."""
    from jaxrefine.cli import external_reconstruct

    external_reconstruct.run(settings)


EXTERNAL_RECONSTRUCT = Command(
    name="external-reconstruct",
    summary="make the map of an iteration of relion_refine, in RELION's place",
    description="Write the map that relion_refine --external_reconstruct asks for. "
    "RELION runs this command itself, if the environment variable "
    "RELION_EXTERNAL_RECONSTRUCT_EXECUTABLE is 'jaxrefine external-reconstruct'.",
    settings=ExternalReconstructSettings,
    run=run,
)
