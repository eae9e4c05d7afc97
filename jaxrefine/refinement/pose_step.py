r"""The pose update of an outer iteration, for one set of particles.

`update_poses` searches, polishes and weights candidate poses in the maps that
`reference_maps` returns; `measure_information` measures how well the poses are known in
the end. `evidence_anywhere` measures whether an image shows a particle, and `included`
decides which images maps are made of.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

import equinox as eqx
import jax
import numpy as np
from jaxtyping import Bool, Float, PRNGKeyArray

from jaxrefine._arrays import on_device
from jaxrefine._processes import of_first
from jaxrefine._types import Volume
from jaxrefine._watch import Stage
from jaxrefine.data import observation
from jaxrefine.data.visit import visit
from jaxrefine.maps.filters import filter_shells
from jaxrefine.maps.folds import FOLDS
from jaxrefine.operators import slices
from jaxrefine.poses import presence, uncertainty, update
from jaxrefine.poses.hypotheses import Hypotheses
from jaxrefine.poses.polish import Polish
from jaxrefine.poses.search import Search, covering_count, shift_grid
from jaxrefine.refinement.config import RefineConfig
from jaxrefine.refinement.sets import FEWEST, ParticleSet, in_order
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
    evaluations
        Mean number of evaluations of a particle's likelihood at the band limit.
    angle_change, shift_change
        Median changes of the best poses, radians and pixels.
    """

    searched: int
    search_r_max: int
    decided: float
    evaluations: float
    angle_change: float
    shift_change: float


def update_poses(
    particle_set: ParticleSet,
    state: SetState,
    references: Sequence[Volume],
    iteration: int,
    r_max: int,
    key: PRNGKeyArray,
) -> tuple[SetState, PoseReport]:
    """Search for, polish and weight the poses of all particles at a band limit.

    Parameters
    ----------
    particle_set, state
        The particles, and what is known of them.
    references
        What those of each fold are compared with, from `reference_maps`.
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
    config, tuning = particle_set.config, particle_set.config.tuning
    size = particle_set.particles.image_size
    weights = np.asarray(state.hypotheses.weights)
    after_multi_start = iteration > config.last_multi_start
    undecided = weights[:, 0] < tuning.decided
    searched = undecided if after_multi_start else np.ones(len(particle_set), bool)
    search_r_max = slices.bucket(min(r_max, config.search_r_max), size)
    steps = visit_steps(
        config,
        size,
        search_r_max,
        r_max,
        is_wide=iteration in config.multi_start,
        compared=_were_compared(state),
        key=key,
    )
    view = observation.view(
        particle_set.particles,
        particle_set.last_shell,
        state.noise,
        observation.PART,
    )
    known = jax.tree.map(
        np.asarray,
        update.Known(
            np.arange(len(particle_set), dtype=np.int32),
            particle_set.prior,
            state.hypotheses,
            searched,
        ),
    )
    coarse = slices.bucket(max(config.first_r_max, config.search_r_max), size)
    members = [particle_set.of_fold(fold) for fold in range(FOLDS)]
    of_folds = []
    stage = Stage(particle_set.watch, "poses", len(particle_set))
    for volume, of_fold in zip(references, members, strict=True):
        reference = update.Reference(
            config.search_interpolation.spectrum(volume, coarse),
            config.interpolation.spectrum(volume, particle_set.last_shell),
            view,
        )
        of_folds.append(
            visit(
                update.update_block,
                (steps, reference),
                particle_set.particles,
                of_fold,
                jax.tree.map(lambda leaf, at=of_fold: leaf[at], known),
                config.batch_size,
                stage,
            )
        )

    found = in_order(of_folds, members)
    updated = jax.tree.map(on_device, found)
    angle_change, shift_change = _median_changes(state.hypotheses, found.hypotheses)
    best = np.exp(found.hypotheses.log_weights[:, 0])
    report = PoseReport(
        searched=int(searched.sum()),
        search_r_max=search_r_max if searched.any() else 0,
        decided=float(np.mean(best >= tuning.decided)),
        evaluations=float(np.mean(found.evaluations)),
        angle_change=angle_change,
        shift_change=shift_change,
    )
    state = eqx.tree_at(
        lambda s: (s.hypotheses, s.information, s.evidence),
        state,
        (updated.hypotheses, updated.information, updated.evidence),
    )
    return state, report


def visit_steps(
    config: RefineConfig,
    image_size: int,
    search_r_max: int,
    r_max: int,
    *,
    is_wide: bool,
    compared: bool,
    key: PRNGKeyArray,
) -> update.Steps:
    """Return what a visit of the particles does in an outer iteration.

    Parameters
    ----------
    config, image_size
        Parameters, and side of the images in pixels.
    search_r_max, r_max
        Band limits of the search and of the polishing, cycles per box.
    is_wide
        Whether the whole prior is searched first, at the first band limit.
    compared
        Whether poses have been compared with images before.
    key
        Draws the candidates.
    """
    first = slices.bucket(config.first_r_max, image_size)
    cell = config.search_cell(first if is_wide else search_r_max)
    centres = config.places * (2 if is_wide else 1)
    searches = (
        wide_search(config, image_size),
        local_search(config, image_size, search_r_max, cell, centres),
    )
    return update.Steps(
        key,
        jax.tree.map(lambda *leaves: on_device(np.stack(leaves)), *searches),
        on_device(np.array([first, search_r_max], np.int32)),
        on_device(np.int32(0 if is_wide else 1)),
        on_device(np.array([search_r_max, r_max], np.int32)),
        on_device(np.int32(0 if search_r_max < r_max else 1)),
        on_device(np.bool_(compared)),
        on_device(np.float32(config.tuning.negligible)),
        on_device(np.float32(config.search_cell(r_max))),
        on_device(np.asarray(config.operators, np.float32)),
        Polish(config.update),
    )


def _median_changes(before: Hypotheses, after: Hypotheses) -> tuple[float, float]:
    """Return the median changes of the best poses, radians and pixels."""
    (turns, moves), (new_turns, new_moves) = (
        [np.asarray(each)[:, 0] for each in (known.rotations, known.shifts)]
        for known in (before, after)
    )
    trace = np.einsum("pij,pij->p", turns, new_turns)
    turned = np.arccos(np.clip((trace - 1) / 2, -1, 1))
    moved = np.linalg.norm(new_moves - moves, axis=-1)
    return float(np.median(turned)), float(np.median(moved))


def reference_maps(particle_set: ParticleSet, state: SetState) -> list[Volume]:
    """Return the maps that each fold's particles are compared with.

    They are masked, and at the scale of the data. A state's are made once, as automatic
    masks take long.
    """
    masked = [
        particle_set.masked(fold.coefficients, state.fold_fsc) for fold in state.maps
    ]
    return [filter_shells(volume, state.gain) for volume in masked]


def _were_compared(state: SetState) -> bool:
    """Whether the poses have been compared with images yet."""
    return bool(np.asarray(state.evidence).any())


def wide_search(config: RefineConfig, image_size: int) -> Search:
    """Return the search of the whole prior, at the first band limit.

    Only what is refined is searched: a fixed orientation, or shift, is the only
    candidate.

    Parameters
    ----------
    config, image_size
        Parameters, and side of the images in pixels.
    """
    r_max = slices.bucket(config.first_r_max, image_size)
    count, steps = _wide_extent(config, image_size, r_max)
    centres = len(config.copies)
    return _search(
        config, image_size, r_max, config.angle_spread, count, centres, steps
    )


def local_search(
    config: RefineConfig, image_size: int, r_max: int, spread: float, centres: int
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
    """
    steps = config.tuning.local_shift_steps
    count = max(1, config.candidates * config.places // centres)
    return _search(config, image_size, r_max, spread, count, centres, steps)


def _wide_extent(config: RefineConfig, image_size: int, r_max: int) -> tuple[int, int]:
    """Return how many orientations, and steps of the shift, the whole prior takes."""
    step = _shift_step(config, image_size, r_max)
    steps = max(1, round(2 * config.shift_spread / step))
    return covering_count(config.angle_spread, config.search_cell(r_max)), steps


def _shift_step(config: RefineConfig, image_size: int, r_max: int) -> float:
    """Return the spacing of the grid of shifts at a band limit, pixels."""
    return image_size / (config.tuning.shifts_per_period * r_max)


def _search(
    config: RefineConfig,
    image_size: int,
    r_max: int,
    spread: float,
    count: int,
    centres: int,
    steps: int,
) -> Search:
    """Return a search whose arrays have the shapes of all searches of a refinement."""
    first = slices.bucket(config.first_r_max, image_size)
    most, most_steps = _wide_extent(config, image_size, first)
    most = max(most * len(config.copies), config.candidates * config.places)
    most = max(most, 2 * config.places)
    most_steps = max(most_steps, config.tuning.local_shift_steps)
    if not config.refines_shifts:
        steps = most_steps = 0
    if not config.refines_angles:
        count, most = 1, 2 * config.places
    grid = shift_grid(most_steps)
    tried = len(shift_grid(steps))
    step = _shift_step(config, image_size, r_max)
    return Search(
        on_device(np.float32(spread)),
        on_device(np.asarray(grid * step, np.float32)),
        on_device(np.arange(len(grid)) < tried),
        on_device(np.float32(config.half_period_turn(r_max))),
        on_device(np.int32(count)),
        on_device(np.int32(centres)),
        most,
        config.places,
    )


def measure_information(
    particle_set: ParticleSet,
    state: SetState,
    references: Sequence[Volume],
    r_max: int,
) -> Float[np.ndarray, "particles 5 5"]:
    """Return the information on every best pose, by `uncertainty.mean_curvatures`.

    Parameters are those of `update_poses`.
    """
    poses = state.hypotheses.best()
    rotations, shifts = np.asarray(poses.rotations), np.asarray(poses.shifts)
    information = np.array(state.information)
    view = observation.view(particle_set.particles, r_max, state.noise)
    stage = Stage(particle_set.watch, "error bars", len(particle_set))
    for fold, volume in enumerate(references):
        owners = particle_set.of_fold(fold)
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
            stage,
        )
    return information


def evidence_anywhere(
    particle_set: ParticleSet, state: SetState
) -> Float[np.ndarray, " particles"]:
    """Return the evidence of each particle, after the search has been paid for.

    It is taken over all rotations, and over all positions at which the particle lies
    within its image, but no fewer than may be searched. What the configuration fixes is
    taken to be known, even if a search found it; see :mod:`jaxrefine.poses.presence`.
    All processes take what the first one finds, as decisions are made of it.
    """
    config, size = particle_set.config, particle_set.particles.image_size
    radius = max((1 - config.particle_diameter) * size / 2, config.max_shift)
    space = presence.Space.of(len(config.operators), radius)
    found = presence.evidence_anywhere(
        space,
        particle_set.prior,
        state.hypotheses,
        state.information,
        state.evidence,
    )
    return of_first(np.asarray(found))


def included(
    particle_set: ParticleSet, state: SetState
) -> Bool[np.ndarray, " particles"]:
    """Return which particles to make maps of: those whose images show one.

    If there are too few of them in a fold for a map, as at a start that leads nowhere,
    it is everyone.
    """
    shown = presence.shown(
        evidence_anywhere(particle_set, state),
        np.asarray(state.hypotheses.best().shifts),
        particle_set.particles.image_size,
    )
    of_folds = [shown[particle_set.of_fold(fold)] for fold in range(FOLDS)]
    enough = min(int(of_fold.sum()) for of_fold in of_folds) >= FEWEST // FOLDS
    return shown if enough else np.ones_like(shown)
