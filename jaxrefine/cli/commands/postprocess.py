"""What ``jaxrefine postprocess`` can be told."""

from dataclasses import dataclass
from pathlib import Path

from jaxrefine.cli.commands import shared
from jaxrefine.cli.commands.command import Command
from jaxrefine.errors import InputError
from jaxrefine.runs.options import option


@dataclass(frozen=True, kw_only=True)
class PostprocessSettings:
    """How half maps are masked, sharpened and filtered.

    Raises
    ------
    InputError
        If the pixel size of a detector is given without its transfer function.
    """

    half1: Path = option(positional=True, metavar="HALF1.mrc", help="one half map")
    half2: Path = option(positional=True, metavar="HALF2.mrc", help="the other one")
    out: Path = option(affects_results=False, metavar="DIR", help="folder to write to")
    mask: Path | None = option(
        None,
        metavar="MASK.mrc",
        default_text="made from the mean of the maps",
        help="1 in the particle, 0 in the solvent, soft edge",
    )
    map_voxel_size: float | None = shared.map_voxel_size("the maps")
    b_factor: float | None = option(
        None,
        unit="square angstroms",
        metavar="B",
        default_text="no sharpening",
        help="filter by this B factor: negative sharpens, positive blurs",
    )
    auto_b_factor: bool = option(
        False,
        excludes=("b_factor",),
        help="sharpen by the B factor of the Guinier plot from 10 angstroms to the "
        "resolution",
    )
    mtf: Path | None = option(
        None,
        metavar="MTF.star",
        default_text="it stays in the map",
        help="divide by the modulation transfer function of the detector, a STAR file "
        "as RELION takes",
    )
    detector_pixel_size: float | None = option(
        None,
        unit="angstroms",
        least=0,
        above=True,
        metavar="A",
        default_text="the voxel size of the maps",
        help="with --mtf, physical pixel size of the detector: that of the raw "
        "micrographs, before binning and not of super-resolution",
    )
    low_pass: float | None = option(
        None,
        unit="angstroms",
        least=0,
        above=True,
        default_text="the resolution",
        help="cut-off of the low-pass filter",
    )
    seed: int = shared.seed("the random phases")

    def __post_init__(self):
        if self.detector_pixel_size is not None and self.mtf is None:
            raise InputError(
                "--detector-pixel-size must be given with --mtf, got it without"
            )


def run(settings: PostprocessSettings) -> None:
    """Post-process the half maps."""
    from jaxrefine.cli import postprocess

    postprocess.run(settings)


POSTPROCESS = Command(
    name="postprocess",
    summary="measure the resolution of two half maps; sharpen and filter their mean",
    description="Write postprocess.mrc, postprocess_masked.mrc, mask.mrc, the curves "
    "in postprocess.json, and fsc.png to a folder.",
    settings=PostprocessSettings,
    run=run,
)
