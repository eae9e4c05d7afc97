"""A map of particles at given poses."""

from dataclasses import replace

import jax.numpy as jnp
import numpy as np
from jaxtyping import Int, PRNGKeyArray

from jaxrefine._watch import Watch, unwatched
from jaxrefine.data.particles import Particles
from jaxrefine.geometry import Poses
from jaxrefine.maps import folds
from jaxrefine.refinement import insertion, map_step
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
    watch: Watch = unwatched,
) -> Reconstruction:
    """Make a map of particles at given poses, which are kept.

    The noise's power spectrum is measured with a first map; the regulariser's weight
    is then chosen by cross-validation.

    Parameters
    ----------
    particles
        At least 4 images, of side ``n``, 16 pixels or more, and their optics.
    poses
        Rotation matrices ``(P, 3, 3)``, and shifts ``(P, 2)`` in pixels.
    config
        Parameters, by default `RefineConfig()`. Only those of the volume update have an
        effect.
    key
        Deals the particles into two halves, those of a cluster (`Particles.cluster`)
        into one. If one cluster has more than two thirds of all, they are dealt singly,
        and the maps of the halves share noise.
    subsets
        The half of each particle, 1 or 2, which is kept even where it divides a
        cluster; dealt at random without it.
    watch
        Told how far each stage is: ``watch("sums", 512, 1000)`` says that 512 of 1000
        images have been inserted.

    Returns
    -------
    The map, of shape ``(n, n, n)``, the weight of its regulariser, and the sums that
    the maps of the halves are made from.

    Raises
    ------
    InputError
        If there are fewer than 4 particles, or fewer than 4 in a given half; if the
        images have a side of less than 16 pixels; if images, poses and subsets do not
        fit each other; if poses or an image are not finite; if the rotations are not
        rotation matrices, or the subsets are not 1 and 2.
    """
    config = RefineConfig() if config is None else config
    n = particles.image_size
    poses, volume = checked(particles, poses, jnp.zeros((n, n, n), jnp.float32))
    particle_set = make_particle_set(particles, poses, key, config, watch=watch)
    if subsets is not None:
        fold = np.zeros(len(particles), int)
        fold[halves(particles, key, subsets)[1]] = 1
        particle_set = replace(particle_set, fold=fold)
    state = map_step.start(particle_set, volume)
    everyone = np.ones(len(particles), bool)
    # Nested, so that nothing holds the sums while maps are made of them.
    state = map_step.update_maps(
        particle_set,
        state,
        folds.folds(
            insertion.sum_up(particle_set, state.hypotheses, state.noise, everyone)
        ),
    )
    state = map_step.assess(particle_set, state, everyone)
    sums = insertion.sum_up(particle_set, state.hypotheses, state.noise, everyone)
    state, errors = map_step.choose_tau(particle_set, state, sums)
    final = map_step.final_map(config, sums, state, watch)
    return Reconstruction(np.asarray(final.volume), sums, final.lam, final.tau, errors)
