"""Images as they come, and what of them a map is compared with."""

from jaxrefine.data import observation as observation
from jaxrefine.data import particles as particles
from jaxrefine.data import preprocess as preprocess
