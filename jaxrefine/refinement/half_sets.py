"""Two sets of particles that are refined independently, in a common frame.

A rotation and shift of a map together with its poses changes no image, so nothing in
the data holds two sets to one frame, and they come to differ by a fraction of a degree.
Before their maps are compared or joined, the second is moved into the frame of the
first. Each set is told no more of the other than this motion, which is used where maps
are compared or joined, and what both have in common: the band limit, and whether an
iteration is kept. The correlation of their maps decides these
(:mod:`jaxrefine.refinement.schedule`, :mod:`jaxrefine.refinement.loop`).
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
    """Return the FSC of two sets' regularised maps, in one frame.

    It decides how far poses are compared next (`schedule.supported`), and its mean
    decides whether an iteration is kept (`schedule.score`). The prior of the maps makes
    them agree better than the images alone would, so that this curve is not where a
    resolution is read: that is `result.Result.fsc`.

    Parameters
    ----------
    first, second
        The sets; the map of the second is put into the frame of the first.
    particle_set
        Either set, whose parameters, image size and mask are those of both.

    Returns
    -------
    The correlation at the shells 0 to ``n // 2``.
    """
    moved = align.move_map(second.mean_map, *_motion(second, first, particle_set))
    return fsc(first.mean_map, moved)


def turned(state: SetState, reference: SetState, particle_set: ParticleSet) -> SetState:
    """Move a set's maps and poses together into the frame of another set.

    Poses stay within their limits.

    Parameters
    ----------
    state, reference
        The set to move, and the one to move it to.
    particle_set
        The particles and parameters of the set to move.

    Returns
    -------
    The state of the set to move, with its maps and poses in the frame of the reference.
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
    """Return the motion that aligns a set's map to another's, up to the search's band.

    If the given poses are known only up to a group, it is the best of the motions that
    begin with its operators: either set may have ended in another copy. With fixed
    angles there is no rotation, with fixed shifts no translation.
    """
    config, size = particle_set.config, particle_set.particles.image_size
    r_max = slices.bucket(config.search_r_max, size)
    moving, target = (
        particle_set.masked(each.mean_map, each.fold_fsc) for each in (state, reference)
    )

    def aligned(volume):
        found = align.align_maps(volume, target, r_max)
        return on_axes(*found, config.operators)

    def from_copy(operator):
        still = jnp.zeros(3, moving.dtype)
        turned = align.move_map(moving, operator, still, r_max)
        rotation, translation = aligned(turned)
        curve = fsc(align.move_map(turned, rotation, translation, r_max), target)
        whole = jnp.matmul(operator, rotation, precision=_HIGHEST)
        return float(jnp.mean(curve[1 : r_max + 1])), whole, translation

    if len(config.copies) == 1:
        rotation, translation = aligned(moving)
    else:
        operators = jnp.asarray(config.copies, moving.dtype)
        found = map(from_copy, operators)
        _, rotation, translation = max(found, key=lambda each: each[0])
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
    """Return the part of a motion that keeps a symmetric map on the axes of its group.

    The mean of the operators projects a vector onto those that all operators keep.

    Parameters
    ----------
    rotation, translation
        The motion, the translation in voxels.
    operators
        Of the map's symmetry.
    """
    mean = jnp.asarray(np.mean(operators, axis=0), rotation.dtype)
    vector = jnp.matmul(mean, matrix_to_rotvec(rotation), precision=_HIGHEST)
    moved = jnp.matmul(mean, translation, precision=_HIGHEST)
    return rotvec_to_matrix(vector), moved
