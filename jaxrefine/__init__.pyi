from . import (
    aberrations,
    ctf,
    data,
    errors,
    euler,
    evaluation,
    geometry,
    io,
    maps,
    operators,
    paper,
    poses,
    refinement,
    simulate,
    symmetry,
)
from ._version import __version__
from .aberrations import Aberrations
from .ctf import CTF
from .data.particles import Particles
from .errors import InputError
from .geometry import Poses
from .operators.kbwf import KBWF
from .poses.matching import Match, MatchConfig, match
from .refinement.config import RefineConfig, Tuning
from .refinement.loop import refine
from .refinement.reconstruction import reconstruct
from .refinement.result import Reconstruction, Result

__all__ = [
    "CTF",
    "KBWF",
    "Aberrations",
    "InputError",
    "Match",
    "MatchConfig",
    "Particles",
    "Poses",
    "Reconstruction",
    "RefineConfig",
    "Result",
    "Tuning",
    "__version__",
    "aberrations",
    "ctf",
    "data",
    "errors",
    "euler",
    "evaluation",
    "geometry",
    "io",
    "maps",
    "match",
    "operators",
    "paper",
    "poses",
    "reconstruct",
    "refine",
    "refinement",
    "simulate",
    "symmetry",
]
