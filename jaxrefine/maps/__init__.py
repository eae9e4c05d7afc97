"""The map at fixed poses: TV, ADMM, sums over images, noise, resolution, masks."""

from jaxrefine.maps import admm as admm
from jaxrefine.maps import align as align
from jaxrefine.maps import centre as centre
from jaxrefine.maps import detector as detector
from jaxrefine.maps import filters as filters
from jaxrefine.maps import folds as folds
from jaxrefine.maps import fsc as fsc
from jaxrefine.maps import mask as mask
from jaxrefine.maps import noise as noise
from jaxrefine.maps import padded as padded
from jaxrefine.maps import postprocess as postprocess
from jaxrefine.maps import sums as sums
from jaxrefine.maps import tv as tv
