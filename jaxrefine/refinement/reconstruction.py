"""A map of particles at given poses."""

from dataclasses import replace

import jax.numpy as jnp
import numpy as np
from jaxtyping import Int, PRNGKeyArray

from jaxrefine.data.particles import Particles
from jaxrefine.geometry import Poses
from jaxrefine.maps import folds
from jaxrefine.refinement import map_step
from jaxrefine.refinement.config import RefineConfig
from jaxrefine.refinement.result import Reconstruction
from jaxrefine.refinement.sets import checked, halves, make_particle_set


def reconstruct(
    particles: Particles,
    poses: Poses,
    config: RefineConfig | None = None,
    *,
    key: PRNGKeyArray,
    subsets: Int[np.ndarray, " particles"] | None = None,
) -> Reconstruction:
    """Make a map of particles at given poses, which are kept.

    The noise's power spectrum is measured with a first map; the regulariser's weight
    is then chosen by cross-validation.

    Parameters
    ----------
    particles, poses
        Images, optics and poses.
    config
        Parameters, of which those of the volume update matter.
    key
        Deals the particles into two halves.
    subsets
        The half of each particle, 1 or 2; dealt at random without it.

    Raises
    ------
    InputError
        If images and poses do not fit each other, or are not finite.
    """
    config = RefineConfig() if config is None else config
    n = particles.image_size
    poses, volume = checked(particles, poses, jnp.zeros((n, n, n), jnp.float32))
    particle_set = make_particle_set(particles, poses, key, config)
    if subsets is not None:
        fold = np.zeros(len(particles), int)
        fold[halves(len(particles), key, subsets)[1]] = 1
        particle_set = replace(particle_set, fold=fold)
    state = map_step.start(particle_set, volume)
    everyone = np.ones(len(particles), bool)
    sums = map_step.sum_up(particle_set, state.hypotheses, state.noise, everyone)
    state = map_step.update_maps(particle_set, state, folds.folds(sums))
    state = map_step.assess(particle_set, state)
    sums = map_step.sum_up(particle_set, state.hypotheses, state.noise, everyone)
    state, errors = map_step.choose_tau(particle_set, state, sums)
    final = map_step.final_map(config, sums, state)
    return Reconstruction(np.asarray(final.volume), sums, final.lam, final.tau, errors)
