"""Two maps that are compared, and their mask."""

from pathlib import Path

import numpy as np

from jaxrefine import io
from jaxrefine.errors import InputError
from jaxrefine.maps.mask import check_mask

_SAME_VOXEL = 1e-3


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
            f"The maps want the same size, not {a.shape[0]}^3 ({first}) and "
            f"{b.shape[0]}^3 ({second})."
        )
    voxel, other = io.voxel_size(first), io.voxel_size(second)
    if voxel and other and abs(voxel - other) > _SAME_VOXEL * voxel:
        raise InputError(
            f"The maps want the same voxel size, not {voxel:g} A ({first}) and "
            f"{other:g} A ({second})."
        )
    return a, b, voxel or other or 1.0


def read_mask(path: Path, side: int, of: Path) -> np.ndarray:
    """Read a mask of a map of a side; voxel sizes that are not given fit.

    Raises
    ------
    InputError
        If it is on another grid, not from 0 to 1, or zero.
    """
    mask, _ = io.read_mrc(path)
    if len(mask) != side:
        raise InputError(
            f"The mask wants the maps' size {side}^3, not {len(mask)}^3 ({path})."
        )
    own, voxel = io.voxel_size(path), io.voxel_size(of)
    if own and voxel and abs(own - voxel) > _SAME_VOXEL * voxel:
        raise InputError(
            f"The mask wants the maps' voxel size {voxel:g} A, not {own:g} A ({path})."
        )
    check_mask(mask, path)
    return mask
