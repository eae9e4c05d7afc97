"""``jaxrefine postprocess``: resolution, sharpening and filtering of half maps."""

import jax
import jax.numpy as jnp
import numpy as np

from jaxrefine import io
from jaxrefine.cli._maps import read_mask_of, read_pair
from jaxrefine.cli.commands.postprocess import PostprocessSettings
from jaxrefine.maps.mask import soft_mask
from jaxrefine.maps.postprocess import GuinierFit, Postprocessed, postprocess
from jaxrefine.report import plots
from jaxrefine.runs import options, provenance
from jaxrefine.runs.fingerprint import fingerprint
from jaxrefine.runs.folder import RunFolder


def run(settings: PostprocessSettings) -> None:
    """Measure and filter the half maps; write the results and print the figures.

    Raises
    ------
    InputError
        If the maps cannot be used, or the folder is not that of this run.
    """
    half1, half2, voxel = read_pair(
        settings.half1, settings.half2, settings.map_voxel_size
    )
    maps = jnp.asarray(half1), jnp.asarray(half2)
    if settings.mask is None:
        mask = soft_mask((maps[0] + maps[1]) / 2, voxel)
    else:
        mask = jnp.asarray(
            read_mask_of(
                settings.half1, len(half1), settings.mask, settings.map_voxel_size
            )
        )
    result = postprocess(
        *maps,
        mask,
        voxel,
        key=jax.random.key(settings.seed),
        b_factor_in_square_angstroms=(
            GuinierFit() if settings.auto_b_factor else settings.b_factor
        ),
        low_pass_in_angstroms=settings.low_pass,
    )
    if not _write(settings, result, mask, voxel):
        print(f"{settings.out} holds this result already")
    print(_summary(result))


def _write(
    settings: PostprocessSettings, result: Postprocessed, mask: jax.Array, voxel: float
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
        io.write_mrc(out / "postprocess.mrc", result.volume, voxel)
        io.write_mrc(out / "postprocess_masked.mrc", result.masked_volume, voxel)
        io.write_mrc(out / "mask.mrc", mask, voxel)
        curves = {
            "corrected": result.fsc_true,
            "masked": result.fsc_masked,
            "phases randomised": result.fsc_randomised,
            "unmasked": result.fsc_unmasked,
        }
        chosen = f"mask {settings.mask}" if settings.mask else "automatic mask"
        caption = f"{settings.half1} against {settings.half2}, {chosen}"
        plots.fsc_curves(out / "fsc.png", curves, len(mask), voxel, caption)
        names = ("fsc_true", "fsc_masked", "fsc_randomised", "fsc_unmasked")
        folder.finish(
            {
                "half1": str(settings.half1),
                "half2": str(settings.half2),
                "mask": str(settings.mask) if settings.mask else None,
                "voxel_size_in_angstroms": voxel,
                "resolution_in_angstroms": result.resolution_in_angstroms,
                "b_factor_in_square_angstroms": result.b_factor_in_square_angstroms,
                "not_sharpened_because": result.not_sharpened_because,
                "randomised_from_shell": result.randomised_from,
                **{name: getattr(result, name).tolist() for name in names},
            }
        )
    return True


def _summary(result: Postprocessed) -> str:
    """Return the figures as text."""
    text = f"{result.resolution_in_angstroms:.2f} A"
    if np.all(result.fsc_true[1:] >= 0.143):
        text = f"better than {text} (Nyquist)"
    lines = [f"resolution at FSC 0.143: {text}"]
    if result.b_factor_in_square_angstroms is not None:
        lines.append(f"B factor: {result.b_factor_in_square_angstroms:.1f} A^2")
    elif result.not_sharpened_because is not None:
        lines.append(f"not sharpened: {result.not_sharpened_because}")
    return "\n".join(lines)
