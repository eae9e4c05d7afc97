r"""The pose update of an outer iteration, for one set of particles.

`update_poses` searches, polishes and weights candidate poses; `measure_information`
measures how well the poses are known in the end, and `determined` tells which images
show a particle.
"""

from dataclasses import dataclass
from typing import final

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Int, PRNGKeyArray

from jaxrefine._types import Volume
from jaxrefine.data import observation
from jaxrefine.maps.filters import filter_shells
from jaxrefine.maps.folds import FOLDS
from jaxrefine.operators import slices
from jaxrefine.poses import polish, uncertainty
from jaxrefine.poses.hypotheses import Hypotheses
from jaxrefine.poses.search import Search, covering_count, search_poses, shift_grid
from jaxrefine.refinement.config import RefineConfig
from jaxrefine.refinement.sets import ParticleSet
from jaxrefine.refinement.state import SetState


@final
@dataclass(frozen=True)
class PoseReport:
    """What the pose update did.

    Attributes
    ----------
    searched, search_r_max
        Number of particles that were searched for, and the band limit of the search,
        cycles per box; 0 without a search.
    decided
        Fraction of the particles whose best hypothesis has a weight of at least
        ``Tuning.decided``.
    damping
        Median damping in each iteration of the polishing.
    angle_change, shift_change
        Median changes of the best poses, radians and pixels.
    """

    searched: int
    search_r_max: int
    decided: float
    damping: list[float]
    angle_change: float
    shift_change: float


def update_poses(
    particle_set: ParticleSet,
    state: SetState,
    iteration: int,
    r_max: int,
    key: PRNGKeyArray,
) -> tuple[SetState, PoseReport]:
    """Search for, polish and weight the poses of all particles at a band limit.

    Parameters
    ----------
    particle_set, state
        The particles, and what is known of them.
    iteration
        Outer iteration, from 0.
    r_max
        Band limit, cycles per box, one of `slices.bucket`.
    key
        Draws the candidates.

    Returns
    -------
    The state with the new poses, and what was done.
    """
    config, count, tuning = (
        particle_set.config,
        len(particle_set),
        particle_set.config.tuning,
    )
    keep, everyone = config.hypotheses, np.arange(count)
    # The last place keeps the best pose so far, which a search may not find again.
    places = np.arange(keep + 1) % keep
    rotations = np.asarray(state.hypotheses.rotations)[:, places]
    shifts = np.asarray(state.hypotheses.shifts)[:, places]
    active = np.asarray(state.hypotheses.weights)[:, places] > tuning.negligible
    active[:, keep] = False
    is_wide = iteration in config.multi_start
    undecided = np.asarray(state.hypotheses.weights)[:, 0] < tuning.decided
    after_multi_start = iteration > config.last_multi_start
    searched = undecided if after_multi_start else np.ones(count, bool)
    search_r_max = slices.bucket(
        min(r_max, config.search_r_max), particle_set.particles.image_size
    )
    view = observation.view(particle_set.particles, r_max, state.noise)
    results = []
    for fold in range(FOLDS):
        of_fold = particle_set.of_fold(fold)
        chosen = of_fold[searched[of_fold]]
        volume = reference_map(particle_set, state, fold)
        if len(chosen):
            candidates = search_candidates(
                particle_set, state, chosen, volume, search_r_max, is_wide, key
            )
            rotations[chosen, :keep], shifts[chosen, :keep] = candidates
            active[chosen, :keep] = True
            active[chosen, keep] = _were_compared(state)
        rows, columns = np.nonzero(active[of_fold])
        owners = of_fold[rows]
        polished = polish.polish_poses(
            particle_set.particles,
            owners,
            config.interpolation.spectrum(volume, r_max),
            view,
            particle_set.prior,
            rotations[owners, columns],
            shifts[owners, columns],
            config.update,
            config.batch_size,
        )
        results.append((owners, columns, polished))

    information = np.zeros((*active.shape, 5, 5), np.float32)
    evidence = np.full(active.shape, -np.inf, np.float32)
    for owners, columns, polished in results:
        rotations[owners, columns] = polished.rotations
        shifts[owners, columns] = polished.shifts
        information[owners, columns] = polished.information
        evidence[owners, columns] = polished.evidence
    dtype = state.noise.dtype
    hypotheses, order = polish.weigh(
        jnp.asarray(rotations, dtype),
        jnp.asarray(shifts, dtype),
        jnp.asarray(evidence, dtype),
        jnp.asarray(config.search_cell(r_max), dtype),
        keep,
        config.operators,
    )
    best = np.asarray(order)[:, 0]
    damping = np.concatenate([polished.damping for *_, polished in results])
    angle_change, shift_change = _median_changes(state.hypotheses, hypotheses)
    report = PoseReport(
        searched=int(searched.sum()),
        search_r_max=search_r_max if searched.any() else 0,
        decided=float(np.mean(np.asarray(hypotheses.weights)[:, 0] >= tuning.decided)),
        damping=np.median(damping, axis=0).tolist(),
        angle_change=angle_change,
        shift_change=shift_change,
    )
    state = eqx.tree_at(
        lambda s: (s.hypotheses, s.information, s.evidence),
        state,
        (
            hypotheses,
            jnp.asarray(information[everyone, best], dtype),
            jnp.asarray(evidence[everyone, best], dtype),
        ),
    )
    return state, report


def _median_changes(before: Hypotheses, after: Hypotheses) -> tuple[float, float]:
    """Return the median changes of the best poses, radians and pixels."""
    trace = np.einsum("pij,pij->p", before.rotations[:, 0], after.rotations[:, 0])
    turned = np.arccos(np.clip((trace - 1) / 2, -1, 1))
    moved = np.linalg.norm(after.shifts[:, 0] - before.shifts[:, 0], axis=-1)
    return float(np.median(turned)), float(np.median(moved))


def reference_map(particle_set: ParticleSet, state: SetState, fold: int) -> Volume:
    """Return the map that a fold's particles are compared with, at the data's scale."""
    volume = particle_set.masked(state.maps[fold].coefficients)
    return filter_shells(volume, state.gain)


def _were_compared(state: SetState) -> bool:
    """Whether the poses have been compared with images yet."""
    return bool(np.asarray(state.evidence).any())


def wide_search(
    config: RefineConfig, image_size: int, dtype: jax.typing.DTypeLike
) -> tuple[int, Search]:
    """Return the band limit of the search of the whole prior, and the search.

    Only what is refined is searched: a fixed orientation, or shift, is the only
    candidate.
    """
    r_max = slices.bucket(config.first_r_max, image_size)
    step = image_size / (config.tuning.shifts_per_period * r_max)
    steps = max(1, round(2 * config.shift_spread / step))
    count = covering_count(config.angle_spread, config.search_cell(r_max))
    return r_max, _search(config, r_max, config.angle_spread, count, step, steps, dtype)


def local_search(
    config: RefineConfig,
    image_size: int,
    r_max: int,
    spread: float,
    centres: int,
    dtype: jax.typing.DTypeLike,
) -> Search:
    """Return the search about given orientations at a band limit.

    Only what is refined is searched, as in `wide_search`.

    Parameters
    ----------
    config, image_size, r_max
        Parameters, side of the images in pixels, and band limit in cycles per box.
    spread
        Standard deviation of the candidates about each centre, radians.
    centres
        Number of orientations to search about, which share the candidates.
    dtype
        Type of the arrays.
    """
    step = image_size / (config.tuning.shifts_per_period * r_max)
    steps = config.tuning.local_shift_steps
    count = max(1, config.candidates * config.hypotheses // centres)
    return _search(config, r_max, spread, count, step, steps, dtype)


def _search(
    config: RefineConfig,
    r_max: int,
    spread: float,
    count: int,
    step: float,
    steps: int,
    dtype: jax.typing.DTypeLike,
) -> Search:
    grid = shift_grid(steps if config.refines_shifts else 0)
    return Search(
        jnp.asarray(spread, dtype),
        jnp.asarray(grid, dtype) * step,
        jnp.asarray(config.half_period_turn(r_max), dtype),
        count if config.refines_angles else 1,
        config.hypotheses,
    )


def all_centres(
    hypotheses: Hypotheses,
    chosen: Int[np.ndarray, " chosen"],
    rotations: Float[np.ndarray, "chosen h 3 3"],
) -> Float[np.ndarray, "particles 2*h 3 3"]:
    """Return the centres of a local search: results of a wide search, and hypotheses.

    Parameters
    ----------
    hypotheses
        Of all particles, ``h`` of each.
    chosen, rotations
        The particles that were searched for, and the orientations that were found.
    """
    centres = np.tile(np.array(hypotheses.rotations), (1, 2, 1, 1))
    centres[chosen, : rotations.shape[1]] = rotations
    return centres


def search_candidates(
    particle_set: ParticleSet,
    state: SetState,
    chosen: Int[np.ndarray, " chosen"],
    volume: Volume,
    r_max: int,
    is_wide: bool,
    key: PRNGKeyArray,
) -> tuple[Float[np.ndarray, "chosen keep 3 3"], Float[np.ndarray, "chosen keep 2"]]:
    """Search about the current hypotheses and, if it is wide, in the whole prior first.

    Parameters
    ----------
    particle_set, state
        The particles, and what is known of them.
    chosen
        The particles to search for.
    volume
        The map that they are compared with.
    r_max
        Band limit, cycles per box.
    is_wide
        Whether the whole prior is searched before, at the first band limit.
    key
        Draws the candidates.
    """
    config, size = particle_set.config, particle_set.particles.image_size
    dtype = state.noise.dtype
    centres = np.array(state.hypotheses.rotations)
    shifts = np.array(state.hypotheses.shifts[:, 0])
    spread = config.search_cell(r_max)

    def run(number, search, r_max, centres, shifts):
        return search_poses(
            search,
            jax.random.fold_in(key, number),
            particle_set.particles,
            chosen,
            config.search_interpolation.spectrum(volume, r_max),
            observation.view(particle_set.particles, r_max, state.noise),
            particle_set.prior,
            centres,
            shifts,
        )

    if is_wide:
        first, search = wide_search(config, size, dtype)
        given = np.asarray(particle_set.prior.rotations)[:, None]
        origin = np.asarray(particle_set.prior.shifts)
        rotations, moved = run(0, search, first, given, origin)
        centres = all_centres(state.hypotheses, chosen, rotations)
        # Later, the polished shifts are better than those of the wide search.
        if not _were_compared(state):
            shifts[chosen] = moved[:, 0]
        spread = config.search_cell(first)
    search = local_search(config, size, r_max, spread, centres.shape[1], dtype)
    return run(1, search, r_max, centres, shifts)


def measure_information(
    particle_set: ParticleSet, state: SetState, r_max: int
) -> Float[np.ndarray, "particles 5 5"]:
    """Return the information on every best pose, by `uncertainty.mean_curvatures`."""
    poses = state.hypotheses.best()
    rotations, shifts = np.asarray(poses.rotations), np.asarray(poses.shifts)
    information = np.array(state.information)
    view = observation.view(particle_set.particles, r_max, state.noise)
    for fold in range(FOLDS):
        owners = particle_set.of_fold(fold)
        volume = reference_map(particle_set, state, fold)
        information[owners] = uncertainty.mean_curvatures(
            particle_set.particles,
            owners,
            particle_set.config.interpolation.spectrum(volume, r_max),
            view,
            particle_set.prior,
            rotations[owners],
            shifts[owners],
            information[owners],
            particle_set.config.batch_size,
        )
    return information


def determined(state: SetState) -> Bool[np.ndarray, " particles"]:
    """Return which images are more probable with the particle than without one."""
    return np.asarray(state.evidence) > 0
