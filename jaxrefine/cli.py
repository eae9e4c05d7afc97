"""The command line: ``jaxrefine COMMAND``.

Bad input ends with one sentence on standard error and exit code 2, an interruption
with exit code 130.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from dataclasses import fields
from importlib.metadata import version
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from jaxrefine import demo, io, metrics, plots
from jaxrefine.errors import InputError


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; return its exit code."""
    options = _parser().parse_args(arguments)
    try:
        options.run(options)
        sys.stdout.flush()
    except InputError as error:
        print(f"jaxrefine {options.command}: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:
        # The reader has gone, as in ``| head``; Python's last flush must not fail too.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except OSError as error:
        sentence = f"The system refused: {error}."
        print(f"jaxrefine {options.command}: {sentence}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="jaxrefine",
        description="Joint refinement of poses and density map for cryo-EM.",
    )
    parser.add_argument(
        "--version", action="version", version=f"jaxrefine {version('jaxrefine')}"
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_demo(commands)
    _add_fsc(commands)
    return parser


def _add_demo(commands) -> None:
    command = commands.add_parser(
        "demo",
        help="simulate the built-in phantom, refine it, compare with the oracle",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    command.add_argument("--out", type=Path, required=True, help="folder to write to")
    for option in fields(demo.DemoConfig):
        command.add_argument(
            f"--{option.name.replace('_', '-')}",
            type=type(option.default),
            default=option.default,
            choices=sorted(demo.PRESETS) if option.name == "preset" else None,
            help=_DEMO_HELP[option.name],
        )
    command.set_defaults(run=_run_demo)


_DEMO_HELP = {
    "size": "side of the volume and of the images, voxels",
    "particles": "number of particles",
    "sigma": "standard deviation of the noise; the phantom's peak density is 1",
    "max_angle_error": "largest initial error of each Euler angle, radians",
    "max_shift": "largest shift along x and y, pixels",
    "initial_blur": "the initial map is the truth blurred by this many voxels",
    "seed": "seed of everything random",
    "preset": "settings of the refinement",
    "batch_size": "particles computed at once; memory grows with it",
}


def _run_demo(options: argparse.Namespace) -> None:
    chosen = {f.name: getattr(options, f.name) for f in fields(demo.DemoConfig)}
    summary = demo.run(demo.DemoConfig(**chosen), options.out)
    print(demo.report(summary))
    print(f"maps, pictures and summary.json are in {options.out}")


def _add_fsc(commands) -> None:
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
    command.set_defaults(run=_run_fsc)


def _run_fsc(options: argparse.Namespace) -> None:
    for path in (options.json, options.png):
        if path is not None and not path.parent.is_dir():
            raise InputError(f"Cannot write {path}: {path.parent} is not a folder.")
    a, voxel = io.read_mrc(options.a)
    b, other = io.read_mrc(options.b)
    if a.shape != b.shape:
        raise InputError(
            f"The maps want the same size, not {a.shape[0]}^3 ({options.a}) and "
            f"{b.shape[0]}^3 ({options.b})."
        )
    if abs(voxel - other) > 1e-3 * voxel:
        raise InputError(
            f"The maps want the same voxel size, not {voxel:g} A ({options.a}) and "
            f"{other:g} A ({options.b})."
        )
    mask = None
    if options.mask is not None:
        mask, _ = io.read_mrc(options.mask)
        if mask.shape != a.shape:
            raise InputError(
                f"The mask wants the maps' size {a.shape[0]}^3, not "
                f"{mask.shape[0]}^3 ({options.mask})."
            )
    n = a.shape[0]
    masking = None if mask is None else jnp.asarray(mask)
    correlation = metrics.fsc(jnp.asarray(a), jnp.asarray(b), masking)
    curve = np.asarray(correlation)
    resolutions = {
        str(threshold): float(
            metrics.resolution_in_angstroms(
                metrics.crossing(correlation, threshold), n, voxel
            )
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
            "mean_fsc": float(metrics.mean_fsc(correlation)),
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


if __name__ == "__main__":
    sys.exit(main())
