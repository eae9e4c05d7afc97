"""The sign of the protein: images and maps that are the negative of each other."""

import sys

import numpy as np

from jaxrefine import io
from jaxrefine._types import Volume
from jaxrefine.cli.commands.match import MatchSettings
from jaxrefine.cli.commands.refine import RefineSettings
from jaxrefine.cli.commands.shared import ImageSettings
from jaxrefine.errors import InputError
from jaxrefine.maps.scale import is_negative
from jaxrefine.refinement.contrast import Contrast


def check_same_sign(
    found: Contrast,
    source: io.ParticleFile,
    volume: Volume | np.ndarray,
    settings: RefineSettings | MatchSettings,
) -> None:
    """Refuse images that look like the negative of the map; tell if it is chance.

    Parameters
    ----------
    found
        How images and map correlate.
    source, volume
        The particles and the map.
    settings
        Of the command that compares them.

    Raises
    ------
    InputError
        If they do; it names the one of which the particle seems to be dark.
    """
    got = f"correlation {found.correlation:.2f} over {found.count} particles"
    if not found.is_opposite:
        if found.is_chance:
            print(
                f"{settings.particles}: images do not correlate with {settings.map} "
                f"({got}): is it a map of this particle?",
                file=sys.stderr,
            )
        return
    if is_negative(volume):
        raise InputError(
            f"{settings.map} seems to have dark protein, unlike {settings.particles} "
            f"({got}): multiply it by -1, or --trust-contrast"
        )
    seems, remedy = contrary(source, settings.images)
    raise InputError(
        f"{settings.particles} seems to {seems} ({got}): {remedy}, or --trust-contrast"
    )


def contrary(source: io.ParticleFile, images: ImageSettings) -> tuple[str, str]:
    """Return what particles of the contrary sign seem to do, and what helps.

    Parameters
    ----------
    source, images
        The particles, and how their images are prepared.
    """
    if images.invert:
        return "have bright protein before --invert", "leave out --invert"
    if source.protein_is_dark:
        return (
            "have bright protein, and says that it is dark",
            "change the sign (rlnCtfScalefactor, or blob/sign)",
        )
    return "have dark protein", "--invert"
