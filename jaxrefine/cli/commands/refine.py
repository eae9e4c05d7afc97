"""What ``jaxrefine refine`` can be told."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from jaxrefine.cli.commands import shared
from jaxrefine.cli.commands.command import Command
from jaxrefine.runs.options import group, option

PRESETS = ("default", "paper", "released")
_DEFAULT = PRESETS[:1]

# A largest change says how well poses are known: the standard deviation of each
# component is that of points spread uniformly in a ball, or in a disc, of this radius.
ANGLE_SPREAD_OF_LIMIT = 1 / math.sqrt(5)
SHIFT_SPREAD_OF_LIMIT = 1 / 2
SHIFT_LIMIT_OF_SPREAD = 3
# How well contrast and defocus are known: particles lie at several heights of a layer
# of ice that is often 300 to 1000 angstroms thick, and their contrast varies with it.
CONTRAST_SPREAD = 0.2
DEFOCUS_SPREAD = 300.0


def _mask(text: str) -> Path | Literal["auto"]:
    """Return what the text of ``--mask`` stands for.

    A path that is not the word stays so where it is written, as in ``run.json`` and in
    the command of the report.
    """
    if text == "auto":
        return "auto"
    path = Path(text)
    return path.absolute() if str(path) == "auto" else path


@dataclass(frozen=True, kw_only=True)
class RefineSettings:
    """How poses and map are refined."""

    particles: Path = option(
        positional=True,
        metavar="PARTICLES.star",
        help="the particles, with rough poses",
    )
    map: Path = option(metavar="INIT.mrc", help="the map to start from")
    out: Path = option(affects_results=False, metavar="DIR", help="folder to write to")
    mask: Path | Literal["auto"] | None = option(
        None,
        presets=_DEFAULT,
        convert=_mask,
        metavar="MASK.mrc|auto",
        help="1 in the particle, 0 in the solvent, soft edge: poses are refined with "
        "masked maps; those that are written are not masked. `auto` makes masks of the "
        "maps, tighter as these sharpen",
    )
    map_voxel_size: float | None = shared.map_voxel_size()
    resample: bool = shared.resample()
    half_sets: bool = option(
        False,
        presets=_DEFAULT,
        help="refine two halves of the particles independently, and end with the "
        "resolution, the mask and the sharpened map of their half maps",
    )
    recentre: bool = option(
        False,
        excludes=("fix_shifts",),
        help="at the end, move the origin of maps and poses to the centre of mass of "
        "the mask, or of the map if there is none",
    )
    preset: str = option(
        "default",
        choices=PRESETS,
        help="default is fast and corrects for contrast-transfer functions; paper and "
        "released are the published algorithm, with constants in the units of the "
        "images and as its authors released it",
    )
    iterations: int | None = option(
        None,
        least=1,
        default_text="12, paper 20, released 10",
        help="maximum number of outer iterations",
    )
    tau: float | None = shared.tau(presets=_DEFAULT)
    max_angle: float | None = option(
        None,
        unit="degrees",
        least=0,
        above=True,
        most=180,
        presets=_DEFAULT,
        excludes=("fix_angles",),
        default_text="180",
        implies=f"Sets --angle-spread to {ANGLE_SPREAD_OF_LIMIT:.2f} of this, at most "
        "its default, unless that is given.",
        help="largest turn of a pose from the given one",
    )
    max_shift: float | None = option(
        None,
        unit="pixels",
        least=0,
        above=True,
        presets=_DEFAULT,
        excludes=("fix_shifts",),
        default_text="6",
        implies=f"Sets --shift-spread to {SHIFT_SPREAD_OF_LIMIT:g} of this, unless "
        "that is given.",
        help="largest move of a particle from the given position",
    )
    angle_spread: float | None = option(
        None,
        unit="degrees",
        least=0,
        above=True,
        most=180,
        presets=_DEFAULT,
        excludes=("fix_angles",),
        default_text="25.8",
        help="how well the given angles are known: standard deviation of each "
        "component of the rotation",
    )
    shift_spread: float | None = option(
        None,
        unit="pixels",
        least=0,
        above=True,
        presets=_DEFAULT,
        excludes=("fix_shifts",),
        default_text="2",
        implies=f"Sets --max-shift to {SHIFT_LIMIT_OF_SPREAD} times this, at most half "
        "of the image, unless that is given.",
        help="how well the given positions are known: standard deviation along x and y",
    )
    fix_angles: bool = option(
        False, presets=_DEFAULT, help="keep the angles, refine the positions alone"
    )
    fix_shifts: bool = option(
        False, presets=_DEFAULT, help="keep the positions, refine the angles alone"
    )
    symmetry: str = shared.symmetry(presets=_DEFAULT)
    symmetry_relax: str = option(
        "C1",
        convert=str.upper,
        metavar="GROUP",
        presets=_DEFAULT,
        excludes=("fix_angles",),
        help="point group up to which the given poses are known, where the map does "
        "not have it: searches try all copies of a pose, and --max-angle and "
        "--angle-spread count from the nearest one",
    )
    initial_resolution: float | None = option(
        None,
        unit="angstroms",
        least=0,
        above=True,
        presets=_DEFAULT,
        default_text="a seventh of the box",
        help="resolution to which the initial map and poses are trusted",
    )
    max_resolution: float | None = option(
        None,
        unit="angstroms",
        least=0,
        above=True,
        presets=_DEFAULT,
        default_text="what the map supports",
        implies="Sets --initial-resolution to this if its default is finer, unless "
        "that is given.",
        help="finest detail that poses are compared in",
    )
    refine_scale: bool = option(
        False,
        presets=_DEFAULT,
        help="refine the contrast of each particle, a factor of its projection, which "
        f"is taken to be known to {CONTRAST_SPREAD:g} (standard deviation)",
    )
    refine_defocus: bool = option(
        False,
        presets=_DEFAULT,
        help="refine the defocus of each particle, which is taken to be known to "
        f"{DEFOCUS_SPREAD:g} angstroms (standard deviation)",
    )
    seed: int = shared.seed("everything random")
    batch_size: int | None = shared.batch_size(
        None, default_text="256 or what the memory allows, paper and released 4"
    )
    devices: int | None = shared.devices()
    memory: float | None = shared.memory(presets=_DEFAULT)
    processes: shared.ProcessSettings = group(
        shared.ProcessSettings, "several processes"
    )
    cryosparc: shared.CryosparcSettings = group(
        shared.CryosparcSettings, "cryoSPARC's tables"
    )
    images: shared.ImageSettings = group(
        shared.ImageSettings,
        "images",
        mask_images={"presets": _DEFAULT},
        particle_diameter={
            "default_text": "three quarters of the box for --normalise and "
            "--mask-images, two thirds for the search",
            "implies": "Sets --initial-resolution to 3/14 of this, unless that is "
            "given, and the resolution of the search in proportion: both then have as "
            "many cycles per diameter as by default.",
        },
    )


def run(settings: RefineSettings) -> None:
    """Refine poses and map."""
    from jaxrefine.cli import refine

    refine.run(settings)


REFINE = Command(
    name="refine",
    summary="refine the poses of particles and a map jointly",
    description="Write particles.star, map.mrc, report.html, run.json and "
    "metrics.jsonl to a folder; with --half-sets also half1.mrc and half2.mrc, and "
    "what `jaxrefine postprocess` makes of them. The same command carries on where it "
    "was stopped.",
    settings=RefineSettings,
    run=run,
)
