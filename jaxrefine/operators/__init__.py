"""The paper's operators: the basis, H, its adjoint, and the normal operator H^T H."""

from jaxrefine.operators import complex as complex
from jaxrefine.operators import fourier as fourier
from jaxrefine.operators import gridding as gridding
from jaxrefine.operators import kbwf as kbwf
from jaxrefine.operators import normal as normal
from jaxrefine.operators import radial as radial
from jaxrefine.operators import resample as resample
from jaxrefine.operators import slices as slices
from jaxrefine.operators import spatial as spatial
from jaxrefine.operators import spline as spline
