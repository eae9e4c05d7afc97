"""What every engine of ``jaxrefine refine`` returns."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from jaxrefine.geometry import Poses


@dataclass(frozen=True)
class Outcome:
    """What a refinement came to, with whatever it alone knows.

    Attributes
    ----------
    poses, volume, half_maps
        Refined.
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
