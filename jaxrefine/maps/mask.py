"""Solvent masks: made from a map, or checked when one is given."""

from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from jaxrefine._types import Volume
from jaxrefine.errors import InputError
from jaxrefine.maps.filters import low_pass

_BINS = 256  # of the histogram of densities


def soft_mask(
    volume: Volume,
    pixel_size_in_angstroms: float,
    *,
    threshold: float | None = None,
    low_pass_in_angstroms: float = 15.0,
    extend: float = 3.0,
    edge: float = 6.0,
) -> Volume:
    """Separate the particle from the solvent, with a soft edge.

    The map is low-pass filtered and cut at a threshold; its largest connected part is
    grown, and surrounded by an edge that falls from 1 to 0 as a cosine.

    Parameters
    ----------
    volume
        The mean of the half maps. Protein is positive.
    pixel_size_in_angstroms
        Edge of a voxel.
    threshold
        Density of the filtered map at the surface. By default that of the triangle
        method (Zack, Rogers and Latt, J. Histochem. Cytochem. 25, 1977): where the
        histogram is farthest below the line from its peak, the solvent, to its end.
    low_pass_in_angstroms
        Cut-off of the filter, that of `postprocess`.
    extend, edge
        Width in voxels of what is added, and of the edge around it.

    Returns
    -------
    mask
        Values from 0 to 1, of the map's type.

    Raises
    ------
    InputError
        If the map is flat or not finite, no voxel is above the threshold, or a number
        is out of range.
    """
    from scipy import ndimage  # slow to import

    if min(extend, edge) < 0:
        raise InputError(
            f"The mask is to grow by {extend:g} and an edge of {edge:g} voxels; "
            "0 or more is wanted."
        )
    if not (jnp.isfinite(volume).all() and jnp.ptp(volume) > 0):
        raise InputError("A flat map or one that is not finite cannot make a mask.")
    smooth = np.asarray(
        low_pass(volume, pixel_size_in_angstroms, low_pass_in_angstroms)
    )
    level = _triangle_threshold(smooth) if threshold is None else threshold
    labelled: Any = ndimage.label(smooth > level)
    parts, count = labelled
    if not count:
        raise InputError(
            f"No voxel of the filtered map is above {level:g}; its largest is "
            f"{smooth.max():g}."
        )
    largest = 1 + np.argmax(np.bincount(parts.ravel())[1:])
    distance = np.asarray(ndimage.distance_transform_edt(parts != largest))
    place = np.clip((distance - extend) / max(edge, 1e-6), 0, 1)
    return jnp.asarray(0.5 + 0.5 * np.cos(np.pi * place), volume.dtype)


def check_mask(mask: Array | np.ndarray, name: object = "The mask") -> None:
    """Refuse what is not from 0 to 1, or nowhere more than 0.

    Raises
    ------
    InputError
        If it is so, naming it.
    """
    # NumPy's, which are NaN if a value is.
    low, high = np.asarray(mask).min(), np.asarray(mask).max()
    if not (-1e-6 <= low and 0 < high <= 1 + 1e-6):
        raise InputError(
            f"{name} runs from {low:g} to {high:g}; 0 in the solvent to 1 is wanted."
        )


def _triangle_threshold(values: np.ndarray) -> float:
    """Return where the histogram is farthest below the line from peak to end."""
    count, edges = np.histogram(values, _BINS)
    peak = int(np.argmax(count))
    line = np.linspace(count[peak], count[-1], _BINS - peak)
    return float(edges[peak + np.argmax(line - count[peak:]) + 1])
