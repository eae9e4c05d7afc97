"""``jaxrefine postprocess``: resolution, sharpening and filtering of half maps."""

import jax
import jax.numpy as jnp

from jaxrefine import io
from jaxrefine.cli import _postprocessed
from jaxrefine.cli._maps import read_mask_of, read_pair
from jaxrefine.cli.commands.postprocess import PostprocessSettings
from jaxrefine.maps.detector import ModulationTransfer
from jaxrefine.maps.postprocess import GuinierFit, Postprocessed, postprocess
from jaxrefine.runs import options, provenance
from jaxrefine.runs.fingerprint import fingerprint
from jaxrefine.runs.folder import RunFolder


def run(settings: PostprocessSettings) -> None:
    """Measure and filter the half maps; write the results and print the figures.

    Raises
    ------
    InputError
        If a map, the mask or the detector's transfer function cannot be used, or the
        folder is not that of this run.
    """
    half1, half2, voxel = read_pair(
        settings.half1, settings.half2, settings.map_voxel_size
    )
    mask = None
    if settings.mask is not None:
        mask = jnp.asarray(
            read_mask_of(
                settings.half1, len(half1), settings.mask, settings.map_voxel_size
            )
        )
    mtf = None
    if settings.mtf is not None:
        mtf = io.read_mtf(settings.mtf, settings.detector_pixel_size or voxel)
    result = postprocess(
        jnp.asarray(half1),
        jnp.asarray(half2),
        mask,
        voxel,
        key=jax.random.key(settings.seed),
        b_factor_in_square_angstroms=(
            GuinierFit() if settings.auto_b_factor else settings.b_factor
        ),
        low_pass_in_angstroms=settings.low_pass,
        mtf=mtf,
    )
    if not _write(settings, result, voxel, mtf):
        print(f"{settings.out} holds this result already")
    print("\n".join(_postprocessed.lines(result, voxel)))
    if mtf is not None:
        print("\n".join(_division(settings, result, voxel, mtf)))


def _division(
    settings: PostprocessSettings,
    result: Postprocessed,
    voxel: float,
    mtf: ModulationTransfer,
) -> list[str]:
    """Return what the map was divided by, as lines."""
    pixel = mtf.pixel_size_in_angstroms
    by_default = ""
    if settings.detector_pixel_size is None:
        by_default = " (the voxel size of the maps; --detector-pixel-size says another)"
    told = [
        f"divided by the transfer function of {settings.mtf}, for detector pixels of "
        f"{pixel:g} A{by_default}"
    ]
    resolved = result.resolution.in_angstroms
    # Nothing is divided beyond the Nyquist frequency.
    finest = max(min(resolved, settings.low_pass or resolved), 2 * voxel)
    last = pixel / mtf.frequencies[-1]
    if last > finest:
        told.append(
            f"the table of {settings.mtf} ends at {last:.2f} A, and its last value is "
            f"used from there to {finest:.2f} A"
        )
    return told


def _write(
    settings: PostprocessSettings,
    result: Postprocessed,
    voxel: float,
    mtf: ModulationTransfer | None,
) -> bool:
    """Write the maps, the curves and their picture, unless they are there."""
    out = settings.out
    details = {
        "command": options.command_line("postprocess", settings),
        **provenance.environment(),
    }
    identity = fingerprint(settings)
    with RunFolder(out, "postprocess.json", identity, details=details) as folder:
        if folder.finished:
            return False
        caption = f"{settings.half1} against {settings.half2}, "
        caption += _postprocessed.mask_in_words(settings.mask)
        _postprocessed.write(out, result, voxel, caption)
        folder.finish(
            {
                "half1": str(settings.half1),
                "half2": str(settings.half2),
                "mask": str(settings.mask) if settings.mask else None,
                "mtf": str(settings.mtf) if settings.mtf else None,
                "detector_pixel_size_in_angstroms": (
                    mtf.pixel_size_in_angstroms if mtf else None
                ),
                "voxel_size_in_angstroms": voxel,
                **result.row(),
            }
        )
    return True
