"""What ``jaxrefine evaluate`` can be told."""

from dataclasses import dataclass
from pathlib import Path

from jaxrefine.cli.commands import shared
from jaxrefine.cli.commands.command import Command
from jaxrefine.runs.options import group, option


@dataclass(frozen=True, kw_only=True)
class EvaluateSettings:
    """Which poses are compared."""

    result: Path = option(
        positional=True, metavar="RESULT.star", help="table of poses, or a .cs file"
    )
    truth: Path = option(
        positional=True, metavar="TRUTH.star", help="table of the true poses"
    )
    symmetry: str = shared.symmetry()
    json: Path | None = option(
        None, affects_results=False, metavar="FILE", help="write the figures as JSON"
    )
    cryosparc: shared.CryosparcSettings = group(
        shared.CryosparcSettings, "cryoSPARC's tables"
    )


def run(settings: EvaluateSettings) -> None:
    """Compare the poses."""
    from jaxrefine.cli import evaluate

    evaluate.run(settings)


EVALUATE = Command(
    name="evaluate",
    summary="compare poses with the true ones, up to a rigid motion",
    description="Tables are RELION's or cryoSPARC's (.cs). Shifts are compared in the "
    "pixels of RESULT, or as they stand if a table gives no pixel size.",
    settings=EvaluateSettings,
    run=run,
)
