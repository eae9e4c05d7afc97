"""The functions that the commands refine and make maps with."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import final

from jaxrefine import refinement
from jaxrefine.refinement.reconstruction import Reconstruction
from jaxrefine.refinement.result import Result
from jaxrefine.refinement.state import RefineState


@final
@dataclass(frozen=True)
class Engine:
    """Those of :mod:`jaxrefine.refinement`, or stand-ins with the same parameters."""

    init: Callable[..., RefineState] = refinement.init
    refine: Callable[..., Result] = refinement.refine
    reconstruct: Callable[..., Reconstruction] = refinement.reconstruct


DEFAULT = Engine()
