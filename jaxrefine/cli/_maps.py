"""Maps and masks that a command reads, on the grid that it needs them on."""

import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from jaxrefine import io
from jaxrefine.errors import InputError
from jaxrefine.maps.mask import check_mask
from jaxrefine.maps.scale import has_no_particle, hot_voxel, offset
from jaxrefine.operators.resample import resample

_DEFAULT_VOXEL = 1.0  # angstroms, in headers that nobody has set
_SAME_VOXEL = 1e-3  # relative difference of sizes, as headers round them
_LEAST_SIDE = 4  # voxels: two shells
_OVERRULED = "; --map-voxel-size overrules the header"


def read_pair(
    first: Path, second: Path, voxel_size: float | None
) -> tuple[np.ndarray, np.ndarray, float]:
    """Read two maps on one grid, and its voxel size in angstroms.

    A voxel size that is not given is the other's; if neither is, it is 1. A header that
    says 1 A, which may have been set by nobody, is told of.

    Parameters
    ----------
    first, second
        The maps.
    voxel_size
        Their voxel size in angstroms, if their headers are to be overruled.

    Raises
    ------
    InputError
        If they are not on one grid, or have fewer than two shells.
    """
    a, b = io.read_densities(first), io.read_densities(second)
    if a.shape != b.shape:
        raise InputError(
            f"the maps must have the same size, got {a.shape[0]}^3 ({first}) and "
            f"{b.shape[0]}^3 ({second})"
        )
    if len(a) < _LEAST_SIDE:
        raise InputError(
            f"the maps must have at least {_LEAST_SIDE}^3 voxels to be compared, got "
            f"{len(a)}^3 ({first})"
        )
    if voxel_size is not None:
        return a, b, voxel_size
    voxel, other = io.voxel_size_in_angstroms(first), io.voxel_size_in_angstroms(second)
    if voxel and other and not _same(voxel, other):
        raise InputError(
            f"the maps must have the same voxel size, got {voxel:g} A ({first}) and "
            f"{other:g} A ({second}){_OVERRULED}"
        )
    if _DEFAULT_VOXEL in (voxel, other):
        path = first if voxel == _DEFAULT_VOXEL else second
        print(
            f"{path}: the header says voxels of 1 A, as programs write that know no "
            "voxel size; if they are not, resolutions are wrong by their ratio"
            f"{_OVERRULED}",
            file=sys.stderr,
        )
    return a, b, voxel or other or _DEFAULT_VOXEL


def read_mask_of(
    map_path: Path, side: int, path: Path, voxel_size: float | None
) -> np.ndarray:
    """Read the mask of a map; voxel sizes that are not given are taken to fit.

    Parameters
    ----------
    map_path, side
        The map and its side in voxels.
    path
        The mask.
    voxel_size
        The voxel size of both, if their headers are to be overruled.

    Raises
    ------
    InputError
        If it is on another grid, not from 0 to 1, or zero.
    """
    mask = io.read_densities(path)
    if len(mask) != side:
        raise InputError(
            f"the mask must have the size of the maps, {side}^3, got {len(mask)}^3 "
            f"({path})"
        )
    if voxel_size is None:
        own = io.voxel_size_in_angstroms(path)
        voxel = io.voxel_size_in_angstroms(map_path)
        if own and voxel and not _same(own, voxel):
            raise InputError(
                f"the mask must have the voxel size of the maps, {voxel:g} A, got "
                f"{own:g} A ({path}){_OVERRULED}"
            )
    check_mask(mask, path)
    return mask


def read_map_for(
    source: io.ParticleFile,
    path: Path,
    voxel_size: float | None,
    resampled: bool,
    trusted: bool,
) -> jax.Array:
    """Read the map that particles are compared with, on the grid of their images.

    Parameters
    ----------
    source
        The particles.
    path
        The map.
    voxel_size
        Its voxel size in angstroms, if its header is to be overruled.
    resampled
        Whether a map on another grid may be resampled.
    trusted
        Whether its values may be any, as long as they are not all the same.

    Raises
    ------
    InputError
        If its values are all the same, or cannot be those of a particle and are not
        trusted (see `maps.scale`); if it is on another grid and may not be resampled;
        or if its header says 1 A, unlike the images, and is not overruled.
    """
    return read_map_and_mask_for(source, path, None, voxel_size, resampled, trusted)[0]


def read_map_and_mask_for(
    source: io.ParticleFile,
    path: Path,
    mask_path: Path | None,
    voxel_size: float | None,
    resampled: bool,
    trusted: bool,
) -> tuple[jax.Array, jax.Array | None]:
    """Read such a map and its mask, if there is one.

    Parameters
    ----------
    source, path, resampled, trusted
        As for :func:`read_map_for`.
    mask_path
        The mask.
    voxel_size
        The voxel size in angstroms of the map, and of a mask with as many voxels, if
        their headers are to be overruled.

    Raises
    ------
    InputError
        As :func:`read_map_for`, or if the mask is not from 0 to 1, is zero, or is on
        another grid and may not be resampled.
    """
    pixel = source.particles.pixel_size_in_angstroms
    values = io.read_densities(path)
    voxel, hint = voxel_size, ""
    if voxel is None:
        voxel = io.voxel_size_in_angstroms(path)
        hint = _OVERRULED
        if voxel == _DEFAULT_VOXEL and not _same(_DEFAULT_VOXEL, pixel):
            raise InputError(
                f"{path} must have voxels of {pixel:g} A, as the images of "
                f"{source.path}, got a header with voxels of 1 A, as programs write "
                "that know no voxel size; say it with --map-voxel-size, and add "
                f"--resample if it is not {pixel:g}"
            )
    volume = _on_grid_of(source, path, values, voxel, resampled, hint)
    _check_plausible(path, values, trusted)
    if not volume.any():
        raise InputError(f"{path} must not be zero everywhere, got zeros only")
    if mask_path is None:
        return volume, None
    mask_values = io.read_densities(mask_path)
    check_mask(mask_values, mask_path)
    voxel = voxel_size
    if voxel is None or mask_values.shape != values.shape:
        voxel = io.voxel_size_in_angstroms(mask_path)
        if voxel == _DEFAULT_VOXEL and len(mask_values) == source.particles.image_size:
            voxel = pixel  # A header of 1 A may be set by nobody: it is on their grid.
    mask = _on_grid_of(source, mask_path, mask_values, voxel, resampled)
    mask = jnp.clip(mask, 0, 1)
    check_mask(mask, mask_path)
    return volume, mask


def _check_plausible(path: Path, values: np.ndarray, trusted: bool) -> None:
    """Refuse a map that no refinement can start from.

    Raises
    ------
    InputError
        If its values are all the same or, unless it is trusted, if most of its power is
        in a few hot voxels, its solvent is not near zero, or no particle stands out.
    """
    if not values.any():
        raise InputError(f"{path} must not be zero everywhere, got zeros only")
    if values.min() == values.max():
        raise InputError(
            f"{path} must not be constant, got {values.flat[0]:g} everywhere"
        )
    if trusted:
        return
    check_not_hot(path, values, "; --trust-contrast takes it as it is")
    solvent = offset(values)
    if solvent is not None:
        raise InputError(
            f"{path} must have a solvent near 0, got one of {solvent:g} with values "
            f"from {values.min():g} to {values.max():g}; --trust-contrast takes it as "
            "it is"
        )
    if has_no_particle(values):
        raise InputError(
            f"{path} must be the map of a particle in the middle of its box, got one "
            "whose corners are as strong, as of noise or a ramp; --trust-contrast "
            "takes it as it is"
        )


def check_not_hot(path: Path, values: np.ndarray, remedy: str = "") -> None:
    """Refuse a map that is a few hot voxels, with a remedy if there is one.

    Raises
    ------
    InputError
        If it is.
    """
    hot = hot_voxel(values)
    if hot is not None:
        raise InputError(
            f"{path} must be the map of a particle, got one with most of its power in "
            f"a few hot voxels of up to {hot:g}{remedy}"
        )


def _on_grid_of(
    source: io.ParticleFile,
    path: Path,
    volume: np.ndarray,
    voxel: float | None,
    resampled: bool,
    hint: str = "",
) -> jax.Array:
    """Return a map on the grid of the images.

    Parameters
    ----------
    source, path, volume
        The images, and a map.
    voxel
        Its voxel size in angstroms. If this is not known, a map of the images' side is
        taken to be on their grid.
    resampled
        Whether a map on another grid may be resampled.
    hint
        What else may help if the map is on another grid.
    """
    n, m = volume.shape[0], source.particles.image_size
    pixel = source.particles.pixel_size_in_angstroms
    if n == m and (voxel is None or _same(voxel, pixel)):
        return jnp.asarray(volume)
    if voxel is None:
        raise InputError(
            f"{path} must give its voxel size in its header or have {m}^3 voxels, as "
            f"many as the images of {source.path}, got {n}^3 voxels of no size{hint}"
        )
    if resampled:
        print(
            f"{path}: {n}^3 voxels of {voxel:g} A, resampled to {m}^3 of {pixel:g} A",
            file=sys.stderr,
        )
        return resample(jnp.asarray(volume), voxel, m, pixel)
    # With as many voxels, the header is more likely to be wrong than the grid.
    remedies = ["; --resample brings it to that grid", hint]
    raise InputError(
        f"{path} must have {m}^3 voxels of {pixel:g} A, the grid of the images of "
        f"{source.path}, got {n}^3 voxels of {voxel:g} A"
        f"{''.join(remedies[:: -1 if n == m else 1])}"
    )


def _same(voxel: float, other: float) -> bool:
    return abs(voxel - other) <= _SAME_VOXEL * voxel
