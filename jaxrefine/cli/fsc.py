"""``jaxrefine fsc``: the Fourier shell correlation of two maps."""

import jax.numpy as jnp
import numpy as np

from jaxrefine import io
from jaxrefine.cli._maps import check_not_hot, read_mask_of, read_pair
from jaxrefine.cli._outputs import check_can_be_written, check_is_no_input
from jaxrefine.cli.commands.fsc import FscSettings
from jaxrefine.errors import InputError
from jaxrefine.maps.fsc import fsc, mean_fsc, resolution
from jaxrefine.report import plots


def run(settings: FscSettings) -> None:
    """Print the curve and the resolutions, and write them to the files asked for.

    Raises
    ------
    InputError
        If the maps cannot be compared, or a file cannot be written.
    """
    _check_outputs(settings)
    a, b, voxel = read_pair(settings.a, settings.b, settings.map_voxel_size)
    mask = None
    if settings.mask is not None:
        mask = read_mask_of(settings.a, len(a), settings.mask, settings.map_voxel_size)
    for path, volume in ((settings.a, a), (settings.b, b)):
        if not (volume if mask is None else volume * mask).any():
            where = "everywhere" if mask is None else f"within {settings.mask}"
            raise InputError(f"{path} must not be zero {where}, got zeros only")
        check_not_hot(path, volume)
    n = a.shape[0]
    correlation = fsc(
        jnp.asarray(a), jnp.asarray(b), None if mask is None else jnp.asarray(mask)
    )
    curve = np.asarray(correlation)
    resolutions = {
        str(threshold): resolution(curve, n, voxel, threshold)
        for threshold in (0.5, 0.143)
    }
    if settings.json is not None:
        content = {
            "fsc": curve.tolist(),
            "mean_fsc": float(mean_fsc(correlation)),
            "resolution_in_angstroms": {
                threshold: None if each.is_none else each.in_angstroms
                for threshold, each in resolutions.items()
            },
            "resolution_is_a_bound": {
                threshold: each.is_a_bound for threshold, each in resolutions.items()
            },
            "voxel_size_in_angstroms": voxel,
            "mask": str(settings.mask) if settings.mask else None,
        }
        io.write_json(settings.json, content)
    if settings.png is not None:
        caption = f"{settings.a} against {settings.b}"
        if settings.mask is not None:
            caption += f", mask {settings.mask}"
        plots.fsc_curves(settings.png, {"FSC": curve}, n, voxel, caption)
    print("# shell  resolution_A  fsc")
    for shell, value in enumerate(curve):
        period = n * voxel / shell if shell else float("inf")
        print(f"{shell:7d}  {period:12.3f}  {value:.6f}")
    for threshold, each in resolutions.items():
        print(f"# resolution at FSC {threshold}: {each.text()}")


def _check_outputs(settings: FscSettings) -> None:
    """Refuse files that cannot be written, before the maps are compared."""
    inputs = [settings.a, settings.b, *([settings.mask] if settings.mask else [])]
    for path in (settings.json, settings.png):
        if path is not None:
            check_can_be_written(path)
            check_is_no_input(path, *inputs)
    if settings.json is not None and settings.json == settings.png:
        raise InputError(
            f"--json and --png must be two files, got {settings.json} twice"
        )
