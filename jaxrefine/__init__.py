"""Joint refinement of poses and density map for single-particle cryo-EM, in JAX.

Pure functions on small frozen pytrees, one module per concept, lowest layer first:

- :mod:`~jaxrefine.kbwf` the basis, :mod:`~jaxrefine.geometry` the poses,
  :mod:`~jaxrefine.tv` the prior, :mod:`~jaxrefine.ctf` the optics;
- :mod:`~jaxrefine.spatial` the projector, :mod:`~jaxrefine.normal` its normal operator;
- :mod:`~jaxrefine.admm` the volume update, :mod:`~jaxrefine.pose` the pose update;
- :mod:`~jaxrefine.refine` the joint refinement;
- :mod:`~jaxrefine.simulate` and :mod:`~jaxrefine.metrics` synthetic data and figures
  of merit, :mod:`~jaxrefine.io` files.

Importing the package changes no configuration and opens no device.
"""

from jaxrefine import admm as admm
from jaxrefine import ctf as ctf
from jaxrefine import geometry as geometry
from jaxrefine import io as io
from jaxrefine import kbwf as kbwf
from jaxrefine import metrics as metrics
from jaxrefine import normal as normal
from jaxrefine import paper as paper
from jaxrefine import pose as pose
from jaxrefine import refine as refine
from jaxrefine import simulate as simulate
from jaxrefine import spatial as spatial
from jaxrefine import tv as tv
from jaxrefine.errors import InputError as InputError
from jaxrefine.geometry import Poses as Poses
from jaxrefine.kbwf import KBWF as KBWF
