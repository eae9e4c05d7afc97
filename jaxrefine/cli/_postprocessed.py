"""Post-processed half maps: how commands write them and what they tell of them."""

from pathlib import Path

from jaxrefine import io
from jaxrefine.maps.fsc import HALF_MAP_THRESHOLD, resolution
from jaxrefine.maps.postprocess import Postprocessed
from jaxrefine.report import plots


def write(out: Path, result: Postprocessed, voxel: float, caption: str) -> None:
    """Write the maps, the mask, and the picture of the curves to a folder.

    Parameters
    ----------
    out
        The folder.
    result
        What is written: ``postprocess.mrc``, ``postprocess_masked.mrc``, ``mask.mrc``
        and ``fsc.png``.
    voxel
        Edge of a voxel in angstroms.
    caption
        Which maps these are, and which mask it is, below the curves.

    Raises
    ------
    InputError
        If a file cannot be written.
    """
    io.write_mrc(out / "postprocess.mrc", result.volume, voxel)
    io.write_mrc(out / "postprocess_masked.mrc", result.masked_volume, voxel)
    io.write_mrc(out / "mask.mrc", result.mask, voxel)
    curves = plots.half_map_curves(result)
    plots.fsc_curves(out / "fsc.png", curves, len(result.mask), voxel, caption)


def mask_in_words(path: Path | None, *, moved: bool = False) -> str:
    """Return which mask it is: that of a file, or one made by the program.

    Parameters
    ----------
    path
        The file; None for a mask that was made by the program.
    moved
        Whether it is the given mask, moved with the origin and written to this file.
    """
    if path is None:
        return "automatic mask"
    return f"mask {path}" + (" (the given mask, moved with the origin)" * moved)


def lines(result: Postprocessed, voxel: float) -> list[str]:
    """Return the resolution, and the B factor if there is one to tell of, as lines."""
    n = len(result.mask)
    unmasked = resolution(result.fsc_unmasked, n, voxel)
    told = [
        f"resolution at FSC {HALF_MAP_THRESHOLD}: {result.resolution.text()} "
        f"(corrected for the mask; without a mask {unmasked.text()})"
    ]
    if result.b_factor_in_square_angstroms is not None:
        told.append(f"B factor: {result.b_factor_in_square_angstroms:.1f} A^2")
    elif result.not_sharpened_because is not None:
        told.append(f"not sharpened: {result.not_sharpened_because}")
    return told
