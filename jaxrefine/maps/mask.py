"""Solvent masks: made from a map, or checked if given by the user."""

from dataclasses import dataclass
from typing import Any, final

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from jaxrefine._types import Volume
from jaxrefine.errors import InputError
from jaxrefine.maps.filters import low_pass
from jaxrefine.maps.scale import hot_voxel
from jaxrefine.operators.ball import in_ball

# Of a mask by default: angstroms, and voxels.
_LOW_PASS, _EXTEND, _EDGE = 15.0, 3.0, 6.0
_BINS = 256  # of the histogram of densities; the threshold's accuracy is one bin.


@final
class NoParticleError(InputError):
    """A map shows no particle that a mask could be made of."""


@final
@dataclass(frozen=True)
class AutomaticMask:
    """A request to make a mask of each map that particles are compared with.

    The mask is a function of that very map and of one number, the resolution of the
    set, so a particle is told nothing by it that the map does not tell: with half sets
    nothing of the other half, and with folds nothing of its own noise, which is not in
    the map. A run that carries on makes the same masks of the same maps.

    It is made by `soft_mask`, which is tightened as the map sharpens: the map is
    low-pass filtered to its resolution, but to no finer detail than there; the
    particle is extended by half of the filter's cut-off, and the edge is as wide as the
    cut-off, both at least as wide as there. Only the largest connected component is
    kept, as there.
    """

    def of(
        self,
        volume: Volume,
        voxel_size_in_angstroms: float,
        resolution_in_angstroms: float,
    ) -> Volume:
        """Return the mask of a map; 1 everywhere if none can be made of it.

        Parameters
        ----------
        volume
            The map.
        voxel_size_in_angstroms
            Edge of a voxel.
        resolution_in_angstroms
            Period of the finest detail that it shows.

        Raises
        ------
        InputError
            If the map is not finite.
        """
        cut_off = max(_LOW_PASS, resolution_in_angstroms)
        voxels = cut_off / voxel_size_in_angstroms
        try:
            return soft_mask(
                volume,
                voxel_size_in_angstroms,
                low_pass_in_angstroms=cut_off,
                extend=max(_EXTEND, voxels / 2),
                edge=max(_EDGE, voxels),
            )
        except NoParticleError:
            return jnp.ones_like(volume)


def soft_mask(
    volume: Volume,
    voxel_size_in_angstroms: float,
    *,
    threshold: float | None = None,
    low_pass_in_angstroms: float = _LOW_PASS,
    extend: float = _EXTEND,
    edge: float = _EDGE,
) -> Volume:
    """Return a mask that separates the particle from the solvent, with a soft edge.

    The map is low-pass filtered and thresholded; its largest connected component is
    extended, and surrounded by an edge that falls from 1 to 0 as a cosine.

    Parameters
    ----------
    volume
        A map of shape ``(n, n, n)``, such as the mean of the half maps. Protein is
        positive.
    voxel_size_in_angstroms
        Edge of a voxel.
    threshold
        Density of the filtered map at the surface. The default is that of the triangle
        method (Zack, Rogers and Latt, J. Histochem. Cytochem. 25, 1977): the density at
        which the histogram is farthest below the line from its peak, which is the
        solvent, to its end. It is the histogram of the ball in the box
        (`operators.ball`), as there is nothing in the corners of some maps.
    low_pass_in_angstroms
        Cut-off of the low-pass filter, see `filters.low_pass`.
    extend, edge
        Width in voxels by which the component is extended, and of the soft edge around
        it.

    Returns
    -------
    mask
        Values from 0 to 1, of the map's shape and type.

    Raises
    ------
    NoParticleError
        If the map is constant or some hot voxels, or no voxel is above the threshold.
    InputError
        If the map is not finite, or a number is out of range.
    """
    from scipy import ndimage  # slow to import

    if min(extend, edge) < 0:
        raise InputError(
            f"extend and edge must be at least 0, got {extend:g} and {edge:g} voxels"
        )
    is_finite = bool(jnp.isfinite(volume).all())
    if not (is_finite and jnp.ptp(volume) > 0):
        refusal = NoParticleError if is_finite else InputError
        raise refusal(
            "the map that a mask is made from must be finite and not constant, got "
            f"values from {volume.min():g} to {volume.max():g}"
        )
    hot = hot_voxel(np.asarray(volume))
    if hot is not None:
        raise NoParticleError(
            "the map that a mask is made from must be that of a particle, got one with "
            f"most of its power in a few hot voxels of up to {hot:g}"
        )
    smooth = np.asarray(
        low_pass(volume, voxel_size_in_angstroms, low_pass_in_angstroms)
    )
    if threshold is None:
        threshold = _triangle_threshold(smooth[np.asarray(in_ball(len(smooth)))])
    labelled: Any = ndimage.label(smooth > threshold)
    components, count = labelled
    if not count:
        raise NoParticleError(
            "the threshold of a mask must be below the largest density of the filtered "
            f"map, {smooth.max():g}, got {threshold:g}"
        )
    largest = 1 + np.argmax(np.bincount(components.ravel())[1:])
    distance = np.asarray(ndimage.distance_transform_edt(components != largest))
    position_in_edge = np.clip((distance - extend) / max(edge, 1e-6), 0, 1)
    return jnp.asarray(0.5 + 0.5 * np.cos(np.pi * position_in_edge), volume.dtype)


def check_mask(mask: Array | np.ndarray, name: object = "the mask") -> None:
    """Check that a mask has values from 0 to 1, and is not 0 everywhere.

    Raises
    ------
    InputError
        If it has not; the message begins with `name`.
    """
    # NumPy's extrema are NaN if a value is, which the comparison refuses.
    low, high = np.asarray(mask).min(), np.asarray(mask).max()
    if not (-1e-6 <= low and 0 < high <= 1 + 1e-6):
        raise InputError(
            f"{name} must have values from 0 in the solvent to 1 in the particle, got "
            f"{low:g} to {high:g}"
        )


def _triangle_threshold(values: np.ndarray) -> float:
    """Return the value at which the histogram is farthest below a line.

    The line runs from the histogram's peak to its end.
    """
    count, edges = np.histogram(values, _BINS)
    peak = int(np.argmax(count))
    line = np.linspace(count[peak], count[-1], _BINS - peak)
    return float(edges[peak + np.argmax(line - count[peak:]) + 1])
