"""Images of blobs with white noise, in two halves, for sums and for folds."""

import jax.numpy as jnp
import numpy as np
import pytest
from helpers import blobs, draw, draw_poses

from jaxrefine.maps.sums import insert
from jaxrefine.operators import slices
from jaxrefine.operators.gridding import Gridding

GRIDDING = Gridding(4, 2.0)  # relative error 2e-3 on white noise: see test_gridding


class NoisyHalves:
    """The images' spectra and poses, and for each half of them the sums."""

    def __init__(self, n=16, r_max=7, sigma=1.5, count=24):
        self.disc, self.sigma = slices.disc(n, r_max), sigma
        poses = draw_poses(count)
        reference = GRIDDING.spectrum(blobs(n), r_max)
        clean = slices.project(reference, self.disc, poses)
        noise = sigma * draw(count, n, n, seed=6)
        spectra = clean + slices.image_spectra(noise, self.disc)
        self.poses = [poses.take(half) for half in np.split(np.arange(count), 2)]
        self.spectra = jnp.split(spectra, 2)
        self.sums = [
            self.insert(*each) for each in zip(self.spectra, self.poses, strict=True)
        ]

    def insert(self, spectra, poses):
        weights = jnp.full(spectra.shape, 1 / self.sigma**2)
        return insert(GRIDDING, self.disc, spectra, poses, None, weights)


@pytest.fixture(scope="session")
def noisy():
    return NoisyHalves()
