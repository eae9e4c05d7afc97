"""Whether images and an initial map have the same sign.

Images are correlated with the map's projections at their given poses. These may be
wrong by tens of degrees, and images may hold far more noise than signal: the sign shows
in the lowest frequencies, which turn little, and in the mean over some hundred images.
"""

from dataclasses import dataclass
from typing import final

import jax.numpy as jnp
import numpy as np

from jaxrefine._types import Volume
from jaxrefine._watch import Stage, Watch, unwatched
from jaxrefine.data import observation
from jaxrefine.data.particles import Particles, evenly_spaced
from jaxrefine.data.visit import Comparison, visit
from jaxrefine.geometry import Poses
from jaxrefine.maps.scale import at_unit_scale
from jaxrefine.refinement.config import RefineConfig
from jaxrefine.refinement.map_step import compare_shells

_SAMPLE = 256  # images that are compared
# Standard errors below zero from which a correlation is negative without a doubt, and
# the least correlation that counts: what all images share correlates by up to 0.05 with
# any map, and by more than 0.15 with a map of the particle, even at -20 dB.
_DOUBTLESS, _LEAST = 6.0, 0.06
# Standard errors above zero up to which a correlation may be chance, and the least
# number of images for which that is said.
_BY_CHANCE, _FEWEST = 2.0, 30


@final
@dataclass(frozen=True)
class Contrast:
    """How images and the projections of a map at their poses correlate.

    Attributes
    ----------
    correlation
        Mean correlation coefficient.
    standard_error
        Its standard error; infinite for a single image.
    count
        Number of images.
    """

    correlation: float
    standard_error: float
    count: int

    @property
    def is_opposite(self) -> bool:
        """Whether the images look like the negative of the map, beyond doubt."""
        limit = max(_DOUBTLESS * self.standard_error, _LEAST)
        return self.correlation < -limit

    @property
    def is_chance(self) -> bool:
        """Whether images and map, if there are enough, may have nothing in common.

        Images of the particle correlate at random poses, too: at -20 dB, 30 of them by
        more than 5 standard errors.
        """
        is_sure = self.correlation > _BY_CHANCE * self.standard_error
        return self.count >= _FEWEST and not is_sure


def contrast(
    particles: Particles,
    poses: Poses,
    volume: Volume,
    config: RefineConfig,
    watch: Watch = unwatched,
) -> Contrast:
    r"""Correlate images with a map at given poses, at the lowest frequencies.

    Of each image it is the correlation coefficient over the shells from 1 to the first
    band limit, where each shell s is weighted by the inverse of the images' mean power
    :math:`P_s` there,

    .. math:: \frac{\sum_s \langle g, S \rangle_s / P_s}
              {\sqrt{\sum_s |g|_s^2 / P_s \; \sum_s |S|_s^2 / P_s}}.

    Parameters
    ----------
    particles, poses, volume
        Images, their poses, and a map of any scale, of shape ``(n, n, n)``.
    config
        Gives the band limit and how projections are made.
    watch
        Told how many images have been compared.

    Returns
    -------
    The mean over at most 256 images.
    """
    count = len(particles)
    sample = evenly_spaced(count, _SAMPLE)
    last = (particles.image_size - 1) // 2
    ones = jnp.ones(particles.image_size // 2 + 1, jnp.float32)
    view = observation.view(particles, last, ones)
    unit = at_unit_scale(jnp.asarray(volume, jnp.float32))
    spectrum = config.interpolation.spectrum(unit, last)
    rotations, shifts = (
        np.asarray(each, np.float32) for each in (poses.rotations, poses.shifts)
    )
    sums = visit(
        Comparison(compare_shells),
        (spectrum, view),
        particles,
        sample,
        (rotations[sample], shifts[sample]),
        config.batch_size,
        Stage(watch, "contrast", len(sample)),
    )
    shells = slice(1, min(config.first_r_max, last) + 1)
    data, model, cross = (
        np.asarray(leaf, np.float64)[:, shells]
        for leaf in (sums.data, sums.model, sums.cross)
    )
    power = np.mean(data, axis=0)
    weight = np.where(power > 0, 1 / np.where(power > 0, power, 1.0), 0.0)
    norm = np.sqrt((data @ weight) * (model @ weight))
    each = (cross @ weight) / np.where(norm > 0, norm, 1.0)
    error = np.std(each, ddof=1) / np.sqrt(len(each)) if len(each) > 1 else np.inf
    return Contrast(float(np.mean(each)), float(error), len(each))
