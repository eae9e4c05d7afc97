"""Visiting candidates in batches, each with the image of its particle."""

from collections.abc import Callable, Iterable

import numpy as np
from jaxtyping import Array, Int

from jaxrefine.data.observation import batches
from jaxrefine.data.particles import Particles
from jaxrefine.poses.prior import Prior


def visit(
    particles: Particles,
    owners: Int[np.ndarray, " some"],
    prior: Prior,
    size: int,
    function: Callable[..., Iterable[Array]],
) -> list[np.ndarray]:
    """Call ``function`` batch by batch and join its results.

    Its arguments are places in ``owners``, the particles that are wanted, and the
    images, optics, groups and priors there. No batch is larger than the particles are
    many.
    """
    size, done = min(size, len(particles)), []
    for places, new in batches(np.arange(len(owners)), size):
        some = owners[places]
        images, ctf = particles.batch(some)
        group = particles.group_of(some)
        results = function(places, images, ctf, group, prior.take(some))
        done.append([np.asarray(result)[:new] for result in results])
    return [np.concatenate(result) for result in zip(*done, strict=True)]
