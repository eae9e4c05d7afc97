r"""The pose side of an outer iteration, for one set of particles.

`update_poses` searches, polishes and weighs; `measure_information` says how well the
poses are known at last, `undetermined` which particles show nothing.
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
from jaxrefine.poses import polish, search, uncertainty
from jaxrefine.poses.polish import NEGLIGIBLE
from jaxrefine.poses.search import Scan, wanted_candidates
from jaxrefine.refinement.sets import ParticleSet
from jaxrefine.refinement.state import SetState

# Shifts are sampled finely enough by an eighth of the finest period.
_SHIFTS_PER_PERIOD = 8
_LOCAL_SHIFTS = 3
_CERTAIN = 0.99


@final
@dataclass(frozen=True)
class PoseReport:
    """What the pose update did.

    Attributes
    ----------
    searched, search_r_max
        How many particles were searched for, and up to which band limit, cycles per
        box; 0 without a search.
    decided
        Fraction of the particles with one hypothesis left.
    damping
        Median damping in each iteration of the polishing.
    angle_change_in_degrees, shift_change_in_pixels
        Median changes of the best poses.
    """

    searched: int
    search_r_max: int
    decided: float
    damping: list[float]
    angle_change_in_degrees: float
    shift_change_in_pixels: float


def update_poses(
    whole: ParticleSet, state: SetState, iteration: int, r_max: int, key: PRNGKeyArray
) -> tuple[SetState, PoseReport]:
    """Search for, polish and weigh the poses of all particles at a band limit.

    Parameters
    ----------
    whole, state
        The particles, and what is known of them.
    iteration
        Outer iteration, from 0.
    r_max
        Band limit, cycles per box, one of `slices.bucket`.
    key
        Draws the candidates.
    """
    config, count = whole.config, len(whole.particles)
    keep, places = config.hypotheses, np.arange(count)
    # The last place is for the best pose so far, which no search may lose.
    last = np.arange(keep + 1) % keep
    candidates = np.asarray(state.hypotheses.rotations)[:, last]
    shifts = np.asarray(state.hypotheses.shifts)[:, last]
    active = np.asarray(state.hypotheses.weights)[:, last] > NEGLIGIBLE
    active[:, keep] = False
    wide = iteration in config.multi_start
    undecided = np.asarray(state.hypotheses.weights)[:, 0] < _CERTAIN
    beyond = iteration > config.last_multi_start
    searched = undecided if beyond else np.ones(count, bool)
    size = whole.particles.image_size
    coarse_r = slices.bucket(min(r_max, config.search_r_max), size)
    fine = observation.view(whole.particles, r_max, state.noise)
    polished = []
    for fold in range(FOLDS):
        reference = _reference(whole, state, fold)
        members = whole.members(fold)
        chosen = members[searched[members]]
        if len(chosen):
            found = _explore(whole, state, chosen, reference, coarse_r, wide, key)
            candidates[chosen, :keep], shifts[chosen, :keep] = found
            active[chosen, :keep] = True
            active[chosen, keep] = _known(state)
        owners, column = np.nonzero(active[members])
        owners = members[owners]
        spectrum = config.interpolation.spectrum(reference, r_max)
        result = polish.polish_poses(
            whole.particles,
            owners,
            spectrum,
            fine,
            whole.prior,
            candidates[owners, column],
            shifts[owners, column],
            config.update,
            config.batch_size,
        )
        polished.append((owners, column, result))

    information = np.zeros((*active.shape, 5, 5), np.float32)
    evidence = np.full(active.shape, -np.inf, np.float32)
    for owners, column, result in polished:
        candidates[owners, column] = result.rotations
        shifts[owners, column] = result.shifts
        information[owners, column] = result.information
        evidence[owners, column] = result.evidence
    dtype = state.noise.dtype
    hypotheses, order = polish.weigh(
        jnp.asarray(candidates, dtype),
        jnp.asarray(shifts, dtype),
        jnp.asarray(evidence, dtype),
        jnp.asarray(config.cell(r_max), dtype),
        keep,
        config.operators,
    )
    best = np.asarray(order)[:, 0]
    before, after = state.hypotheses, hypotheses
    turn = np.einsum("pij,pij->p", before.rotations[:, 0], after.rotations[:, 0])
    moved = np.linalg.norm(after.shifts[:, 0] - before.shifts[:, 0], axis=-1)
    damping = np.concatenate([result.damping for *_, result in polished])
    report = PoseReport(
        searched=int(searched.sum()),
        search_r_max=coarse_r if searched.any() else 0,
        decided=float(np.mean(np.asarray(hypotheses.weights)[:, 0] >= _CERTAIN)),
        damping=np.median(damping, axis=0).tolist(),
        angle_change_in_degrees=float(
            np.rad2deg(np.median(np.arccos(np.clip((turn - 1) / 2, -1, 1))))
        ),
        shift_change_in_pixels=float(np.median(moved)),
    )
    state = eqx.tree_at(
        lambda s: (s.hypotheses, s.information, s.evidence),
        state,
        (
            hypotheses,
            jnp.asarray(information[places, best], dtype),
            jnp.asarray(evidence[places, best], dtype),
        ),
    )
    return state, report


def _reference(whole: ParticleSet, state: SetState, fold: int) -> Volume:
    """Return the map that a fold's particles are compared with, at the data's scale."""
    volume = whole.masked(state.maps[fold].coefficients)
    return filter_shells(volume, state.gain)


def _known(state: SetState) -> bool:
    """Whether the poses have been compared with images yet."""
    return bool(np.asarray(state.evidence).any())


def _explore(
    whole: ParticleSet,
    state: SetState,
    chosen: Int[np.ndarray, " chosen"],
    reference: Volume,
    r_max: int,
    wide: bool,
    key: PRNGKeyArray,
):
    """Search about the current hypotheses, and before that in the whole prior.

    Only what is free is searched: of a fixed orientation or shift there is one.
    """
    config, size = whole.config, whole.particles.image_size
    centres = np.array(state.hypotheses.rotations)
    shifts = np.array(state.hypotheses.shifts[:, 0])

    def run(number: int, r_max: int, centres, shifts, scan: Scan):
        spectrum = config.search_interpolation.spectrum(reference, r_max)
        return search.search_poses(
            jax.random.fold_in(key, number),
            whole.particles,
            chosen,
            spectrum,
            observation.view(whole.particles, r_max, state.noise),
            whole.prior,
            centres,
            shifts,
            scan,
            config.hypotheses,
            config.diameter,
        )

    spread = config.cell(r_max)
    if wide:
        first = slices.bucket(config.first_r_max, size)
        step = size / (_SHIFTS_PER_PERIOD * first)
        everywhere = Scan(
            config.angle_spread,
            step,
            max(1, round(2 * config.shift_spread / step)) if config.moves else 0,
            # A larger particle wants smaller cells, as a larger spread does.
            wanted_candidates(1.5 * config.diameter * config.angle_spread, first)
            if config.turns
            else 1,
        )
        about = np.asarray(whole.prior.rotations)[:, None]
        origin = np.asarray(whole.prior.shifts)
        rotations, moved = run(0, first, about, origin, everywhere)
        centres = np.tile(centres, (1, 2, 1, 1))
        centres[chosen, : config.hypotheses] = rotations
        # The wide search's shift is the better one only where nothing was known.
        if not _known(state):
            shifts[chosen] = moved[:, 0]
        spread = config.cell(first)
    nearby = Scan(
        spread,
        size / (_SHIFTS_PER_PERIOD * r_max),
        _LOCAL_SHIFTS if config.moves else 0,
        max(1, config.candidates * config.hypotheses // centres.shape[1])
        if config.turns
        else 1,
    )
    return run(1, r_max, centres, shifts, nearby)


def measure_information(
    whole: ParticleSet, state: SetState, r_max: int
) -> Float[np.ndarray, "particles 5 5"]:
    """Return the information on every best pose, the cost's curvature included."""
    poses = state.hypotheses.best()
    rotations = np.asarray(state.hypotheses.rotations)[:, 0]
    shifts, found = np.asarray(poses.shifts), np.array(state.information)
    view = observation.view(whole.particles, r_max, state.noise)
    for fold in range(FOLDS):
        members = whole.members(fold)
        found[members] = uncertainty.mean_curvature(
            whole.particles,
            members,
            whole.config.interpolation.spectrum(_reference(whole, state, fold), r_max),
            view,
            whole.prior,
            rotations[members],
            shifts[members],
            found[members],
            whole.config.batch_size,
        )
    return found


def undetermined(state: SetState) -> Bool[np.ndarray, " particles"]:
    """Return the particles whose images are more probable without a particle."""
    return ~(np.asarray(state.evidence) > 0)
