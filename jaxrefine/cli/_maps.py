"""Maps and masks that a command reads, on the grid that it needs them on."""

import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from jaxrefine import io
from jaxrefine.errors import InputError
from jaxrefine.maps.mask import check_mask
from jaxrefine.operators.resample import resample

_SAME_VOXEL = 1e-3  # relative difference of sizes, as headers round them


def read_pair(first: Path, second: Path) -> tuple[np.ndarray, np.ndarray, float]:
    """Read two maps on one grid, and its voxel size in angstroms.

    A voxel size that is not given is the other's; if neither is, it is 1.

    Raises
    ------
    InputError
        If they are not on one grid.
    """
    a, b = io.read_mrc(first)[0], io.read_mrc(second)[0]
    if a.shape != b.shape:
        raise InputError(
            f"the maps must have the same size, got {a.shape[0]}^3 ({first}) and "
            f"{b.shape[0]}^3 ({second})"
        )
    voxel, other = io.voxel_size_in_angstroms(first), io.voxel_size_in_angstroms(second)
    if voxel and other and not _same(voxel, other):
        raise InputError(
            f"the maps must have the same voxel size, got {voxel:g} A ({first}) and "
            f"{other:g} A ({second})"
        )
    return a, b, voxel or other or 1.0


def read_mask_of(map_path: Path, side: int, path: Path) -> np.ndarray:
    """Read the mask of a map; voxel sizes that are not given are taken to fit.

    Parameters
    ----------
    map_path, side
        The map and its side in voxels.
    path
        The mask.

    Raises
    ------
    InputError
        If it is on another grid, not from 0 to 1, or zero.
    """
    mask, _ = io.read_mrc(path)
    if len(mask) != side:
        raise InputError(
            f"the mask must have the size of the maps, {side}^3, got {len(mask)}^3 "
            f"({path})"
        )
    own, voxel = io.voxel_size_in_angstroms(path), io.voxel_size_in_angstroms(map_path)
    if own and voxel and not _same(own, voxel):
        raise InputError(
            f"the mask must have the voxel size of the maps, {voxel:g} A, got {own:g} "
            f"A ({path})"
        )
    check_mask(mask, path)
    return mask


def read_map_for(source: io.ParticleFile, path: Path, resampled: bool) -> jax.Array:
    """Read the map that particles are compared with, on the grid of their images.

    Parameters
    ----------
    source
        The particles.
    path
        The map.
    resampled
        Whether a map on another grid may be resampled.

    Raises
    ------
    InputError
        If it is zero, or on another grid and may not be resampled.
    """
    volume = _on_grid_of(source, path, io.read_mrc(path)[0], resampled)
    if not volume.any():
        raise InputError(f"{path} must not be zero everywhere, got zeros only")
    return volume


def read_mask_for(source: io.ParticleFile, path: Path, resampled: bool) -> jax.Array:
    """Read the mask of such a map; parameters as for :func:`read_map_for`.

    Raises
    ------
    InputError
        If it is not from 0 to 1, is zero, or is on another grid and may not be
        resampled.
    """
    values, _ = io.read_mrc(path)
    check_mask(values, path)
    mask = jnp.clip(_on_grid_of(source, path, values, resampled), 0, 1)
    check_mask(mask, path)
    return mask


def _on_grid_of(
    source: io.ParticleFile, path: Path, volume: np.ndarray, resampled: bool
) -> jax.Array:
    """Return a map on the grid of the images.

    A map of their side whose voxel size is unset is taken to be on it.
    """
    n, m = volume.shape[0], source.particles.image_size
    pixel, voxel = (
        source.particles.pixel_size_in_angstroms,
        io.voxel_size_in_angstroms(path),
    )
    if voxel is None and n == m:
        voxel = pixel
    if voxel is None:
        raise InputError(
            f"{path} must give its voxel size in its header or have {m}^3 voxels, as "
            f"many as the images of {source.path}, got {n}^3 voxels of no size"
        )
    if n == m and _same(voxel, pixel):
        return jnp.asarray(volume)
    if resampled:
        print(
            f"{path}: {n}^3 voxels of {voxel:g} A, resampled to {m}^3 of {pixel:g} A",
            file=sys.stderr,
        )
        return resample(jnp.asarray(volume), voxel, m, pixel)
    expected, received = f"voxels of {pixel:g} A", f"voxels of {voxel:g} A"
    if n != m:
        expected, received = f"{m}^3 voxels", f"{n}^3 voxels"
    raise InputError(
        f"{path} must have {expected}, the grid of the images of {source.path}, "
        f"got {received}; --resample brings it to that grid"
    )


def _same(voxel: float, other: float) -> bool:
    return abs(voxel - other) <= _SAME_VOXEL * voxel
