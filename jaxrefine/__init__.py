"""Joint refinement of poses and density map for single-particle cryo-EM, in JAX.

Pure functions on small frozen pytrees, one module per concept, lowest layer first:

- :mod:`~jaxrefine.kbwf` the basis, :mod:`~jaxrefine.geometry` the poses,
  :mod:`~jaxrefine.tv` the prior, :mod:`~jaxrefine.ctf` the optics;
- :mod:`~jaxrefine.spatial` and :mod:`~jaxrefine.slices` the two projectors,
  :mod:`~jaxrefine.normal` the normal operator, :mod:`~jaxrefine.admm` the map;
- :mod:`~jaxrefine.pose` the paper's pose update, :mod:`~jaxrefine.paper` its
  Algorithm 1;
- :mod:`~jaxrefine.search`, :mod:`~jaxrefine.tangent` and :mod:`~jaxrefine.crossfit`
  production's pose and volume updates, :mod:`~jaxrefine.refine` the joint refinement;
- :mod:`~jaxrefine.matching` projection matching, :mod:`~jaxrefine.postprocess` masks,
  gold-standard FSC and sharpening;
- :mod:`~jaxrefine.simulate` and :mod:`~jaxrefine.metrics` synthetic data and figures
  of merit, :mod:`~jaxrefine.io` files.

Importing the package changes no configuration and opens no device.
"""

from jaxrefine import admm as admm
from jaxrefine import ctf as ctf
from jaxrefine import geometry as geometry
from jaxrefine import io as io
from jaxrefine import kbwf as kbwf
from jaxrefine import matching as matching
from jaxrefine import metrics as metrics
from jaxrefine import normal as normal
from jaxrefine import paper as paper
from jaxrefine import pose as pose
from jaxrefine import postprocess as postprocess
from jaxrefine import refine as refine
from jaxrefine import simulate as simulate
from jaxrefine import slices as slices
from jaxrefine import spatial as spatial
from jaxrefine import tangent as tangent
from jaxrefine import tv as tv
from jaxrefine.errors import InputError as InputError
from jaxrefine.geometry import Poses as Poses
from jaxrefine.kbwf import KBWF as KBWF
from jaxrefine.particles import Particles as Particles
from jaxrefine.refine import RefineConfig as RefineConfig
