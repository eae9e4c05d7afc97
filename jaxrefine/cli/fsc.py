"""``jaxrefine fsc``."""

import argparse
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from jaxrefine import io
from jaxrefine.cli._maps import read_mask, read_pair
from jaxrefine.cli._outputs import check_output, check_writable
from jaxrefine.errors import InputError
from jaxrefine.maps.fsc import crossing, fsc, mean_fsc, resolution_in_angstroms
from jaxrefine.report import plots


def add(commands) -> None:
    """Declare the command."""
    command = commands.add_parser(
        "fsc", help="Fourier shell correlation of two maps, and their resolution"
    )
    command.add_argument("a", type=Path, metavar="A.mrc")
    command.add_argument("b", type=Path, metavar="B.mrc")
    command.add_argument(
        "--mask", type=Path, metavar="M.mrc", help="multiply both maps by this one"
    )
    command.add_argument("--json", type=Path, help="write the curve as JSON")
    command.add_argument("--png", type=Path, help="draw the curve")
    command.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    """Print the curve and the resolutions; write them where it was asked for."""
    inputs = [path for path in (options.a, options.b, options.mask) if path is not None]
    for path in (options.json, options.png):
        if path is not None:
            check_writable(path)
            check_output(path, *inputs)
    if options.json is not None and options.json == options.png:
        raise InputError(f"--json and --png want two files, not {options.json} twice.")
    a, b, voxel = read_pair(options.a, options.b)
    mask = None
    if options.mask is not None:
        mask = read_mask(options.mask, len(a), options.a)
    for path, volume in ((options.a, a), (options.b, b)):
        if not (volume if mask is None else volume * mask).any():
            where = "everywhere" if mask is None else f"within {options.mask}"
            raise InputError(f"{path} is zero {where}; there is nothing to compare.")
    n = a.shape[0]
    masking = None if mask is None else jnp.asarray(mask)
    correlation = fsc(jnp.asarray(a), jnp.asarray(b), masking)
    curve = np.asarray(correlation)
    resolutions = {
        str(threshold): float(
            resolution_in_angstroms(crossing(correlation, threshold), n, voxel)
        )
        for threshold in (0.5, 0.143)
    }
    reaches_nyquist = {
        threshold: bool(np.all(curve[1:] >= float(threshold)))
        for threshold in resolutions
    }
    if options.json is not None:
        content = {
            "fsc": curve.tolist(),
            "mean_fsc": float(mean_fsc(correlation)),
            "resolution_in_angstroms": resolutions,
            "reaches_nyquist": reaches_nyquist,
            "voxel_size_in_angstroms": voxel,
            "mask": str(options.mask) if options.mask else None,
        }
        io.write_json(options.json, content)
    if options.png is not None:
        caption = f"{options.a} against {options.b}"
        if options.mask is not None:
            caption += f", mask {options.mask}"
        plots.fsc_curves(options.png, {"FSC": curve}, n, voxel, caption)
    print("# shell  resolution_A  fsc")
    for shell, value in enumerate(curve):
        period = n * voxel / shell if shell else float("inf")
        print(f"{shell:7d}  {period:12.3f}  {value:.6f}")
    for threshold, resolution in resolutions.items():
        text = f"{resolution:.2f} A"
        if reaches_nyquist[threshold]:
            text = f"better than {text} (Nyquist)"
        print(f"# resolution at FSC {threshold}: {text}")
