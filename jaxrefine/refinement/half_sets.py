"""Two sets of particles that are refined by themselves, brought together.

Nothing in the data keeps them from drifting apart as wholes, by a fraction of a degree.
Before their maps are compared or joined, the second is put into the frame of the first.
Neither learns anything of the other but that.
"""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxrefine.geometry import matrix_to_rotvec, rotvec_to_matrix
from jaxrefine.maps import admm, align
from jaxrefine.maps.fsc import fsc
from jaxrefine.operators import slices
from jaxrefine.refinement.sets import ParticleSet
from jaxrefine.refinement.state import SetState

_HIGHEST = jax.lax.Precision.HIGHEST


def correlation(
    first: SetState, second: SetState, particle_set: ParticleSet
) -> Float[Array, "shells"]:
    """Return the FSC of two sets' maps, in one frame.

    The maps are regularised, and agree beyond what the images say: this tells whether
    an iteration was worth it. What the resolution is `result.Result.fsc` tells.

    Parameters
    ----------
    first, second
        The sets; the map of the second is put into the frame of the first.
    particle_set
        The particles and parameters of either.

    Returns
    -------
    The correlation at the shells 0 to ``n // 2``.
    """
    moved = align.move_map(second.mean_map, *_motion(second, first, particle_set))
    return fsc(first.mean_map, moved)


def turned(state: SetState, reference: SetState, particle_set: ParticleSet) -> SetState:
    """Turn and move a set's maps and poses, all together, to those of another set.

    Poses stay within their limits.

    Parameters
    ----------
    state, reference
        The set to move, and the one to move it to.
    particle_set
        The particles and parameters of the first.
    """
    rotation, translation = _motion(state, reference, particle_set)
    maps = [
        admm.init(align.move_map(fold.coefficients, rotation, translation))
        for fold in state.maps
    ]
    rotations = jnp.matmul(state.hypotheses.rotations, rotation, precision=_HIGHEST)
    moved = jnp.matmul(rotations[..., :2, :], translation, precision=_HIGHEST)
    rotations, shifts = jax.vmap(lambda prior, *poses: jax.vmap(prior.clip)(*poses))(
        particle_set.prior, rotations, state.hypotheses.shifts - moved
    )
    return eqx.tree_at(
        lambda s: (s.maps, s.hypotheses.rotations, s.hypotheses.shifts),
        state,
        (tuple(maps), rotations, shifts),
    )


def _motion(
    state: SetState, reference: SetState, particle_set: ParticleSet
) -> tuple[Float[Array, "3 3"], Float[Array, "3"]]:
    """Return the motion of a set's map to another's, found at the search's band.

    Angles that are fixed leave no rotation free, shifts no translation.
    """
    config, size = particle_set.config, particle_set.particles.image_size
    rotation, translation = align.align_maps(
        particle_set.masked(state.mean_map),
        particle_set.masked(reference.mean_map),
        slices.bucket(config.search_r_max, size),
    )
    rotation, translation = on_axes(rotation, translation, config.operators)
    if not config.refines_angles:
        rotation = jnp.eye(3, dtype=rotation.dtype)
    if not config.refines_shifts:
        translation = jnp.zeros_like(translation)
    return rotation, translation


def on_axes(
    rotation: Float[Array, "3 3"],
    translation: Float[Array, "3"],
    operators: Float[np.ndarray, "order 3 3"],
) -> tuple[Float[Array, "3 3"], Float[Array, "3"]]:
    """Return what a point group leaves free of a motion: a symmetric map stays on axes.

    The mean of the operators projects vectors onto those that all of them keep.
    """
    mean = jnp.asarray(np.mean(operators, axis=0), rotation.dtype)
    vector = jnp.matmul(mean, matrix_to_rotvec(rotation), precision=_HIGHEST)
    moved = jnp.matmul(mean, translation, precision=_HIGHEST)
    return rotvec_to_matrix(vector), moved
