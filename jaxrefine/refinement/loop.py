r"""The joint refinement for production, from poses known to within tens of degrees.

One outer iteration, at a band limit ``r_max`` that grows with what the map supports:

1. *search* (:mod:`jaxrefine.poses.search`): many candidate poses of every particle
   whose pose is still undecided are compared with the map at low resolution; the best
   few are kept;
2. *polish* (:mod:`jaxrefine.poses.solvers`): Levenberg-Marquardt takes each of them to
   its optimum on the continuum, at the search's band limit first and then those that
   are likely at ``r_max``; their posterior masses (Laplace) are their weights
   (:mod:`jaxrefine.poses.update` makes both steps in one visit);
3. *volume* (:mod:`jaxrefine.maps.sums`): the weighted images are summed up, in two
   folds, and a TV-regularised map is made of each, with larger voxels as long as the
   band limit is low (`schedule.map_side`). A particle is compared with the map of the
   fold that it is not in;
4. scale and noise are measured shell by shell from the folds; the supported resolution
   is measured from the half sets or, without half sets, from the folds.

Half sets go through this independently, but for the band limit and for whether an
iteration is kept, which both have in common and which the correlation of their maps
decides. Since nothing in the data holds them to a common frame, the second is rotated
and shifted into the frame of the first before they are compared or joined
(:mod:`jaxrefine.refinement.half_sets`).

At the end the regulariser's weight is chosen by cross-validation, and one map is made
of all particles. Images are read in batches, and need not fit into memory.
"""

from collections.abc import Callable
from dataclasses import replace

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from jaxrefine._arrays import on_device
from jaxrefine._processes import of_first
from jaxrefine._types import Volume
from jaxrefine._watch import Watch, unwatched
from jaxrefine.data.particles import Particles
from jaxrefine.geometry import Poses
from jaxrefine.maps import folds
from jaxrefine.maps.fsc import fsc
from jaxrefine.maps.mask import AutomaticMask
from jaxrefine.maps.sums import least_squares
from jaxrefine.operators import slices
from jaxrefine.poses import presence
from jaxrefine.poses.prior import Prior
from jaxrefine.refinement import (
    half_sets,
    insertion,
    map_step,
    optics_step,
    pose_step,
    schedule,
)
from jaxrefine.refinement.config import RefineConfig
from jaxrefine.refinement.result import RefineInfo, Result
from jaxrefine.refinement.sets import ParticleSet, checked, divide
from jaxrefine.refinement.state import RefineState, SetState

Callback = Callable[[RefineState, RefineInfo], None]
"""Called after every outer iteration: progress, metrics, checkpoints."""


def init(
    particles: Particles,
    poses: Poses,
    volume: Volume,
    config: RefineConfig | None = None,
    *,
    key: PRNGKeyArray,
    subsets: Int[np.ndarray, " particles"] | None = None,
    mask: Float[Array, "_ _ _"] | AutomaticMask | None = None,
) -> RefineState:
    """Return the state that :func:`refine` begins with.

    Parameters
    ----------
    particles, poses, volume, config, key, subsets, mask
        As for :func:`refine`.

    Returns
    -------
    The state before the first outer iteration, for instance as a template for
    `io.load_checkpoint`.

    Raises
    ------
    InputError
        As :func:`refine` does.
    """
    config = RefineConfig() if config is None else config
    poses, volume = checked(particles, poses, volume)
    _, particle_sets = divide(particles, poses, config, key, subsets, mask)
    return _start(particle_sets, volume)


def refine(
    particles: Particles,
    poses: Poses,
    volume: Volume,
    config: RefineConfig | None = None,
    *,
    key: PRNGKeyArray,
    subsets: Int[np.ndarray, " particles"] | None = None,
    mask: Float[Array, "_ _ _"] | AutomaticMask | None = None,
    state: RefineState | None = None,
    callback: Callback | None = None,
    watch: Watch = unwatched,
) -> Result:
    """Refine poses and map jointly, until another iteration would not improve them.

    Parameters
    ----------
    particles
        At least 4 images, of side ``n``, 16 pixels or more, and their optics.
    poses
        Poses to start from: rotation matrices ``(P, 3, 3)``, and shifts ``(P, 2)`` in
        pixels.
    volume
        Initial map, of shape ``(n, n, n)``, with voxels of the images' pixel size. Its
        scale does not matter.
    config
        Parameters; by default `RefineConfig()`, which needs no tuning.
    key
        Deals the particles into sets and folds, those of a cluster
        (`Particles.cluster`) into one, and draws candidate poses.
    subsets
        With half sets, the set of each particle, 1 or 2, which is kept even where it
        divides a cluster; dealt at random without it.
    mask
        From 0 in the solvent to 1 in the particle, of shape ``(n, n, n)`` and with the
        map's symmetry; or `AutomaticMask()`, which makes one of each map. Particles are
        compared with masked maps. Correlations are those of maps without the mask,
        whose shape would correlate, too; nor are the returned maps masked.
    state
        A state that the callback was given, to continue from; with the same other
        arguments the result is that of an uninterrupted run.
    callback
        Called with the state and its information after every outer iteration.
    watch
        Called within iterations: ``watch("poses", 256, 1000)`` says that of 1000
        particles 256 have their new poses.

    Returns
    -------
    The refined poses with their covariances, the map, with half sets their maps and
    FSC, and the last state.

    Raises
    ------
    InputError
        If there are fewer than 4 particles, or fewer than 4 in a half set; if the
        images have a side of less than 16 pixels; if images, poses, map, mask and
        subsets do not fit each other; if poses, map or an image are not finite; if the
        rotations are not rotation matrices, the mask is not from 0 to 1, or the subsets
        are not 1 and 2.
    """
    config = RefineConfig() if config is None else config
    poses, volume = checked(particles, poses, volume)
    draw, particle_sets = divide(particles, poses, config, key, subsets, mask, watch)
    if state is None:
        state = _start(particle_sets, volume)
    while int(state.iteration) < config.iterations and not bool(state.finished):
        state, info = _iterate(particle_sets, state, draw)
        # What is the same on equal machines may differ in its last bits on others.
        state = of_first(state)
        if callback is not None:
            callback(state, info)
    return _conclude(particle_sets, poses, state)


def _start(particle_sets: list[ParticleSet], volume: Volume) -> RefineState:
    """Return the state before the first iteration."""
    config, dtype = particle_sets[0].config, volume.dtype
    size = particle_sets[0].particles.image_size
    return RefineState(
        tuple(map_step.start(particle_set, volume) for particle_set in particle_sets),
        tuple(
            on_device(particle_set.indices.astype(np.int32))
            for particle_set in particle_sets
        ),
        on_device(np.int32(0)),
        on_device(np.int32(slices.bucket(config.first_r_max, size))),
        on_device(np.asarray(np.inf, dtype)),
        on_device(np.full(size // 2 + 1, -1, dtype)),
        on_device(np.bool_(False)),
    )


def _iterate(
    particle_sets: list[ParticleSet], state: RefineState, key: PRNGKeyArray
) -> tuple[RefineState, RefineInfo]:
    """Make one outer iteration on every set, and keep it unless it made maps worse."""
    config, iteration = particle_sets[0].config, int(state.iteration)
    before, last = np.asarray(state.correlation), particle_sets[0].last_shell
    is_early = iteration <= config.last_multi_start

    def next_band_limit(r_max: int, correlation: Float[np.ndarray, "shells"]) -> int:
        supported = schedule.supported(correlation, config, last)
        return schedule.next_band_limit(r_max, supported, particle_sets[0])

    r_max = next_band_limit(int(state.r_max), before)
    set_states, reports = [], []
    size = particle_sets[0].particles.image_size
    side = schedule.map_side(iteration, r_max, size, config)
    # Smaller maps lack shells, so that their score says nothing about larger ones.
    before_side = schedule.map_side(iteration - 1, int(state.r_max), size, config)
    best = -np.inf if before_side < side else schedule.score(before, last)
    for i, (particle_set, known) in enumerate(
        zip(particle_sets, state.set_states, strict=True)
    ):
        draw = jax.random.fold_in(jax.random.fold_in(key, iteration), i)
        known, included, report = _update_particles(
            particle_set, known, iteration, r_max, draw
        )
        particle_set = optics_step.applied(particle_set, known)
        # Nested, so that nothing holds the sums while maps are made of them.
        known = map_step.update_maps(
            particle_set,
            known,
            folds.folds(
                insertion.sum_up(
                    particle_set, known.hypotheses, known.noise, included, side
                )
            ),
        )
        set_states.append(map_step.assess(particle_set, known, included, side))
        reports.append(report)

    def mean(name: str) -> float:
        return float(np.mean([getattr(report, name) for report in reports]))

    fold_fsc = np.mean([np.asarray(known.fold_fsc) for known in set_states], axis=0)
    correlation, gold_score = fold_fsc, None
    if len(set_states) == 2:
        gold = half_sets.correlation(set_states[0], set_states[1], particle_sets[0])
        # That of folds is zero in the shells that were not made, where maps have only
        # what the regulariser has put there.
        correlation = np.where(fold_fsc == 0, 0, np.asarray(gold))
        gold_score = schedule.score(correlation, last)
    is_kept = is_early or gold_score is None or gold_score >= best
    angle_change, shift_change = mean("angle_change"), mean("shift_change")
    info = RefineInfo(
        iteration=iteration + 1,
        r_max=r_max,
        search_r_max=max(report.search_r_max for report in reports),
        searched=sum(report.searched for report in reports),
        decided=mean("decided"),
        evaluations=mean("evaluations"),
        angle_change_in_degrees=float(np.rad2deg(angle_change)),
        shift_change_in_pixels=shift_change,
        tau=[float(known.tau) for known in set_states],
        fold_score=schedule.score(fold_fsc, last),
        gold_score=gold_score,
        is_kept=is_kept,
    )
    made = on_device(np.int32(iteration + 1))
    # Half sets share no noise. If their maps agree less than before, they have become
    # worse, whatever the folds say, which hand their noise back to each other.
    if not is_kept:
        ended = (made, on_device(np.bool_(True)))
        return eqx.tree_at(lambda s: (s.iteration, s.finished), state, ended), info
    change = angle_change if config.refines_angles else shift_change
    continues = (
        is_early
        or next_band_limit(r_max, correlation) > r_max
        or schedule.is_worth_another(
            change, float(state.pose_change), gold_score, best, set_states, config
        )
    )
    dtype = state.pose_change.dtype
    state = RefineState(
        tuple(set_states),
        state.indices,
        made,
        on_device(np.int32(r_max)),
        on_device(np.asarray(change, dtype)),
        on_device(correlation.astype(dtype)),
        on_device(np.bool_(not continues)),
    )
    return state, info


def _update_particles(
    particle_set: ParticleSet,
    known: SetState,
    iteration: int,
    r_max: int,
    key: PRNGKeyArray,
) -> tuple[SetState, Bool[np.ndarray, " particles"], pose_step.PoseReport]:
    """Find the poses, contrast and defocus of a set's particles in its maps.

    Returns
    -------
    The state with them, which particles to make maps of, and what was done.
    """
    references = pose_step.reference_maps(particle_set, known)
    known, report = pose_step.update_poses(
        optics_step.applied(particle_set, known),
        known,
        references,
        iteration,
        r_max,
        key,
    )
    included = pose_step.included(particle_set, known)
    known, _ = optics_step.update_optics(
        particle_set, known, references, r_max, included
    )
    return known, included, report


@eqx.filter_jit
def _given_information(prior: Prior) -> Float[Array, "particles 5 5"]:
    """Return what is known of every pose beforehand."""
    return jax.vmap(lambda each: each.information())(prior)


def _conclude(
    particle_sets: list[ParticleSet], given: Poses, state: RefineState
) -> Result:
    """Make the final maps, of the images that show a particle."""
    config, count = particle_sets[0].config, len(given)
    rotations, shifts = np.array(given.rotations), np.array(given.shifts)
    information = np.zeros((count, 5, 5), shifts.dtype)
    evidence = np.zeros(count, shifts.dtype)
    undetermined = np.zeros(count, bool)
    size, r_max = particle_sets[0].particles.image_size, int(state.r_max)
    sums_of_sets, set_states, optics = [], [], []
    for particle_set, known in zip(particle_sets, state.set_states, strict=True):
        # The second set is put into the frame of the first.
        aligned = known
        if set_states:
            aligned = half_sets.turned(known, state.set_states[0], particle_set)
        best, indices = aligned.hypotheses.best(), particle_set.indices
        # Of the set as it was, in whose frame the priors are.
        found = pose_step.evidence_anywhere(particle_set, known)
        determined = of_first(presence.shown(found, np.asarray(best.shifts), size))
        references = pose_step.reference_maps(particle_set, known)
        known, estimate = optics_step.update_optics(
            particle_set, known, references, r_max, determined
        )
        aligned = replace(aligned, optics=known.optics)
        particle_set = optics_step.applied(particle_set, known)
        if config.refines_angles:
            rotations[indices[determined]] = np.asarray(best.rotations)[determined]
        if config.refines_shifts:
            shifts[indices[determined]] = np.asarray(best.shifts)[determined]
        refined = pose_step.measure_information(particle_set, known, references, r_max)
        del references  # before there are sums
        unrefined = np.asarray(_given_information(particle_set.prior))
        information[indices] = np.where(determined[:, None, None], refined, unrefined)
        evidence[indices] = found
        undetermined[indices] = ~determined
        optics.append(optics_step.of_determined(estimate, config, determined))
        sums = insertion.sum_up(
            particle_set, aligned.hypotheses, aligned.noise, determined
        )
        sums_of_sets.append(sums)
        set_states.append(map_step.choose_tau(particle_set, aligned, sums)[0])
    total, joined = sums_of_sets[0], set_states[0]
    half_maps = curve = informed_up_to = None
    if len(particle_sets) == 2:
        maps = [least_squares(first + second) for first, second in sums_of_sets]
        half_maps = (np.asarray(maps[0]), np.asarray(maps[1]))
        curve = np.asarray(fsc(*maps))
        last = particle_sets[0].last_shell
        known = np.asarray(state.correlation)
        supported = schedule.supported(known, config, last)
        informed_up_to = int(min(supported, r_max))
        total = [a + b for a, b in zip(*sums_of_sets, strict=True)]
        tau = jnp.sqrt(set_states[0].tau * set_states[1].tau)
        joined = eqx.tree_at(lambda s: s.tau, set_states[0], tau)
    final = map_step.final_map(config, total, joined, particle_sets[0].watch)
    fixed_are_zero = np.repeat([config.refines_angles, config.refines_shifts], [3, 2])
    return Result(
        Poses(rotations, shifts),
        np.linalg.inv(information) * fixed_are_zero,
        evidence,
        undetermined,
        np.asarray(final.volume),
        half_maps,
        curve,
        informed_up_to,
        final.tau,
        eqx.tree_at(lambda s: s.set_states, state, tuple(set_states)),
        optics_step.of_all(optics, [each.indices for each in particle_sets]),
    )
