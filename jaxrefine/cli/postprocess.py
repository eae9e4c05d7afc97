"""``jaxrefine postprocess``: resolution, sharpening and filtering of half maps."""

import argparse
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from jaxrefine import io
from jaxrefine.cli._maps import read_mask, read_pair
from jaxrefine.errors import InputError
from jaxrefine.maps.mask import soft_mask
from jaxrefine.maps.postprocess import GuinierFit, Postprocessed, postprocess
from jaxrefine.report import plots
from jaxrefine.runs.folder import RunFolder, file_digest


def add(commands) -> None:
    """Declare the command."""
    command = commands.add_parser(
        "postprocess",
        help="resolution of two half maps; sharpen and filter their mean",
        description="Write postprocess.mrc, postprocess_masked.mrc, mask.mrc, the "
        "curves in postprocess.json and fsc.png.",
    )
    option = command.add_argument
    option("half1", type=Path, metavar="HALF1.mrc")
    option("half2", type=Path, metavar="HALF2.mrc")
    option("--out", type=Path, required=True, metavar="DIR", help="folder to write to")
    option(
        "--mask",
        type=Path,
        metavar="M.mrc",
        help="1 in the particle, 0 in the solvent, soft edge (default: made from the "
        "maps' mean)",
    )
    sharpening = command.add_mutually_exclusive_group()
    sharpening.add_argument(
        "--b-factor",
        type=float,
        metavar="B",
        help="sharpen by this B factor, A^2, negative",
    )
    sharpening.add_argument(
        "--auto-b-factor",
        action="store_true",
        help="sharpen by the B factor of the Guinier plot from 10 A to the resolution",
    )
    option(
        "--low-pass",
        type=float,
        metavar="A",
        help="cut-off of the filter, Angstrom (default: the resolution)",
    )
    option("--seed", type=int, default=0, help="draws the random phases")
    command.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    """Measure and filter the half maps; write and print what came out."""
    if not 0 <= options.seed < 2**31:
        raise InputError(
            f"--seed wants a value from 0 to 2^31 - 1, not {options.seed}."
        )
    half1, half2, voxel = read_pair(options.half1, options.half2)
    maps = jnp.asarray(half1), jnp.asarray(half2)
    if options.mask is None:
        mask = soft_mask((maps[0] + maps[1]) / 2, voxel)
    else:
        mask = jnp.asarray(read_mask(options.mask, len(half1), options.half1))
    result = postprocess(
        *maps,
        mask,
        voxel,
        key=jax.random.key(options.seed),
        b_factor_in_square_angstroms=(
            GuinierFit() if options.auto_b_factor else options.b_factor
        ),
        low_pass_in_angstroms=options.low_pass,
    )
    if not _write(options, result, mask, voxel):
        print(f"{options.out} holds this result already")
    print(_summary(result))


def _write(
    options: argparse.Namespace, result: Postprocessed, mask: jax.Array, voxel: float
) -> bool:
    """Write the maps, the curves and their picture, unless they are there."""
    names = ("b_factor", "auto_b_factor", "low_pass", "seed")
    settings = {name: getattr(options, name) for name in names}
    for name in ("half1", "half2", "mask"):
        path = getattr(options, name)
        settings[f"{name}_sha256"] = file_digest(path) if path else None
    out, folder = options.out, RunFolder(options.out, "postprocess.json", settings)
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
    chosen = f"mask {options.mask}" if options.mask else "automatic mask"
    caption = f"{options.half1} against {options.half2}, {chosen}"
    plots.fsc_curves(out / "fsc.png", curves, len(mask), voxel, caption)
    names = ("fsc_true", "fsc_masked", "fsc_randomised", "fsc_unmasked")
    folder.finish(
        {
            "half1": str(options.half1),
            "half2": str(options.half2),
            "mask": str(options.mask) if options.mask else None,
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
