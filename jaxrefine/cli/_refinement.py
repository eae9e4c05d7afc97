"""What every preset of ``jaxrefine refine`` is given, and what it returns."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, final

import jax
import numpy as np

from jaxrefine import io
from jaxrefine.geometry import Poses
from jaxrefine.runs.folder import NoFolder, RunFolder
from jaxrefine.runs.progress import Bars


@final
@dataclass(frozen=True)
class Inputs:
    """What is refined.

    Attributes
    ----------
    source
        The particles, with poses to start from.
    volume
        The map to start from, on the grid of the images.
    mask
        The solvent mask on the same grid, if one is given.
    makes_masks
        Whether masks are made of the maps.
    """

    source: io.ParticleFile
    volume: jax.Array
    mask: jax.Array | None = None
    makes_masks: bool = False


@final
@dataclass(frozen=True)
class Outcome:
    """The results of a refinement.

    Attributes
    ----------
    poses, volume, half_maps
        The refined poses and map, and the maps of the half sets, if there are any.
    columns
        Further columns of the particles.
    report
        Further entries of ``run.json``.
    """

    poses: Poses
    volume: np.ndarray
    half_maps: tuple[np.ndarray, np.ndarray] | None = None
    columns: dict[str, Any] = field(default_factory=dict)
    report: dict[str, Any] = field(default_factory=dict)


@final
@dataclass(frozen=True)
class Refinement:
    """A refinement that is ready to run.

    Attributes
    ----------
    config
        The engine's parameters, a dataclass.
    resolved
        The values that the options have, by their names and in their units. None
        stands for what the refinement chooses by itself; options of what is fixed are
        left out.
    run
        Refines in a folder, from its last checkpoint if it has one, and shows how far
        it is.
    """

    config: Any
    resolved: dict[str, Any]
    run: Callable[[RunFolder | NoFolder, Bars], Outcome]
