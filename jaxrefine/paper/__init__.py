"""The paper's Algorithms 1 and 3, literally, with its presets."""

from jaxrefine.paper import algorithm1 as algorithm1
from jaxrefine.paper import algorithm3 as algorithm3
from jaxrefine.paper import presets as presets
