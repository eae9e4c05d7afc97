"""The poses at a fixed map: likelihood, prior, search, solvers, uncertainty."""

from jaxrefine.poses import grid as grid
from jaxrefine.poses import hypotheses as hypotheses
from jaxrefine.poses import likelihood as likelihood
from jaxrefine.poses import matching as matching
from jaxrefine.poses import polish as polish
from jaxrefine.poses import prior as prior
from jaxrefine.poses import search as search
from jaxrefine.poses import solvers as solvers
from jaxrefine.poses import uncertainty as uncertainty
from jaxrefine.poses import update as update
