r"""The joint refinement for production: from poses known to tens of degrees to the end.

One outer iteration, at a band limit ``r_max`` that grows with what the map supports:

1. *search* (:mod:`jaxrefine.poses.search`): many candidate poses of every particle
   whose pose is still open are compared with the map at low resolution; the best few
   are kept;
2. *polish* (:mod:`jaxrefine.poses.solvers`): Levenberg-Marquardt takes each of them to
   its optimum on the continuum; their posterior masses (Laplace) are their weights;
3. *volume* (:mod:`jaxrefine.maps.sums`): the weighted images are summed up, in two
   folds, and a TV-regularised map is made of each. A particle is compared with the map
   of the fold that it is not in;
4. scale, noise and supported resolution are measured shell by shell from the folds.

Half sets go through this independently. Since nothing keeps them from drifting apart as
wholes, the second is put into the frame of the first before they are compared or joined
(:mod:`jaxrefine.refinement.half_sets`).

At the end the regulariser's weight is chosen by cross-validation, and one map is made
of all particles. The images are visited in batches, from wherever they are kept.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import final

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from jaxrefine._types import Volume
from jaxrefine.data.particles import Particles
from jaxrefine.geometry import Poses
from jaxrefine.maps import folds
from jaxrefine.maps.fsc import crossing, fsc
from jaxrefine.maps.sums import Sums, least_squares
from jaxrefine.operators import slices
from jaxrefine.refinement import half_sets, map_step, pose_step
from jaxrefine.refinement.config import RefineConfig
from jaxrefine.refinement.sets import (
    ParticleSet,
    checked,
    divide,
    halves,
    particle_set,
    take,
)
from jaxrefine.refinement.state import SetState

__all__ = [
    "Reconstruction",
    "RefineConfig",
    "RefineInfo",
    "RefineState",
    "Result",
    "init",
    "reconstruct",
    "refine",
]

_SUPPORTED = 0.5  # correlation of the folds' maps up to where poses are compared
_SETTLED = 0.3  # poses have settled that change by less of their error bars
_SLOW = 0.75  # or by more of what they changed before
_STALLED = 2e-3  # growth of the half sets' correlation that is worth an iteration


@final
class RefineState(eqx.Module):
    """What the next outer iteration needs; all that a checkpoint must hold.

    Attributes
    ----------
    sets, members
        The sets that are refined by themselves, and which particles are in them.
    iteration, r_max
        Outer iterations made, and the band limit of the next (of the last, at the end).
    pose_change, best_gold
        What the next iteration is compared with: the median change of the angles, in
        degrees (or of the shifts, in pixels, if the angles are fixed), and the best
        correlation of half sets.
    finished
        Whether the refinement has converged.
    """

    sets: tuple[SetState, ...]
    members: tuple[Int[Array, "_"], ...]
    iteration: Int[Array, ""]
    r_max: Int[Array, ""]
    pose_change: Float[Array, ""]
    best_gold: Float[Array, ""]
    finished: Bool[Array, ""]

    @property
    def poses(self) -> Poses:
        """The best poses so far, in the order of the particles."""
        best = [one.hypotheses.best() for one in self.sets]
        back = jnp.argsort(jnp.concatenate(self.members))
        return jax.tree.map(lambda *leaves: jnp.concatenate(leaves)[back], *best)

    @property
    def volume(self) -> Volume:
        """The mean of the maps so far."""
        maps = [one.mean_map for one in self.sets]
        return sum(maps[1:], maps[0]) / len(maps)


@final
@dataclass(frozen=True)
class RefineInfo:
    """What a human wants to know of an outer iteration.

    Attributes
    ----------
    iteration
        Its number, from 1.
    r_max, search_r_max
        Band limits of the polishing and of the search, cycles per box; 0 for a search
        that did not take place.
    searched
        How many particles were searched for.
    decided
        Fraction of the particles with one hypothesis left.
    damping
        Median damping of each iteration of the polishing.
    angle_change_in_degrees, shift_change_in_pixels
        Medians over the particles.
    tau
        Weight of the regulariser, for each set.
    fold_score
        Mean correlation of the folds' maps.
    gold_score
        Mean correlation of the half sets' regularised maps; None without half sets.
    """

    iteration: int
    r_max: int
    search_r_max: int
    searched: int
    decided: float
    damping: list[float]
    angle_change_in_degrees: float
    shift_change_in_pixels: float
    tau: list[float]
    fold_score: float
    gold_score: float | None = None

    def row(self) -> dict[str, int | float | list[float] | None]:
        """Return the numbers as a table wants them."""
        return dict(self.__dict__)


@final
@dataclass(frozen=True)
class Reconstruction:
    """A map, made of particles at given poses.

    Attributes
    ----------
    volume
        The map.
    sums
        What the map was made of, for the two halves of the particles.
    lam, tau
        Weight of the regulariser, absolute and in units of the noise.
    errors
        Errors of prediction that ``tau`` was chosen by, if it was.
    """

    volume: Float[np.ndarray, "n n n"]
    sums: list[Sums]
    lam: float
    tau: float
    errors: dict[float, float]

    @cached_property
    def half_maps(self) -> list[np.ndarray]:
        """Maps of the halves by themselves, not regularised, made when asked for."""
        return [np.asarray(least_squares(one)) for one in self.sums]


@final
@dataclass(frozen=True)
class Result:
    """What a refinement comes to.

    Attributes
    ----------
    poses
        Refined poses.
    covariances
        Of each rotation vector (radians) and shift (pixels); 0 for what is fixed.
    log_likelihood
        Logarithm of each particle's evidence: how much more probable the image is with
        the particle than without.
    undetermined
        Particles whose images are more probable without a particle. They keep the poses
        that they were given, and no map is made of them.
    volume
        The map.
    half_maps, fsc
        With half sets, their maps, not regularised, and the correlation of these.
    tau
        Weight of the regulariser.
    state
        The last state.
    """

    poses: Poses
    covariances: Float[np.ndarray, "particles 5 5"]
    log_likelihood: Float[np.ndarray, " particles"]
    undetermined: Bool[np.ndarray, " particles"]
    volume: Float[np.ndarray, "n n n"]
    half_maps: tuple[np.ndarray, np.ndarray] | None
    fsc: Float[np.ndarray, " shells"] | None
    tau: float
    state: RefineState


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
    mask: Float[Array, "_ _ _"] | None = None,
) -> RefineState:
    """Return the state that :func:`refine` begins with; parameters as there."""
    config = RefineConfig() if config is None else config
    poses, volume = checked(particles, poses, volume)
    _, members, sets = divide(particles, poses, config, key, subsets, mask)
    return _start(sets, members, poses, volume)


def refine(
    particles: Particles,
    poses: Poses,
    volume: Volume,
    config: RefineConfig | None = None,
    *,
    key: PRNGKeyArray,
    subsets: Int[np.ndarray, " particles"] | None = None,
    mask: Float[Array, "_ _ _"] | None = None,
    state: RefineState | None = None,
    callback: Callback | None = None,
) -> Result:
    """Refine poses and map jointly, until the folds' maps agree no better.

    Parameters
    ----------
    particles
        Images and optics.
    poses
        Poses to start from.
    volume
        Initial map, of the side of the images. Its scale does not matter.
    config
        Parameters; the defaults want no tuning.
    key
        Deals the particles into sets and folds, and draws candidate poses.
    subsets
        With half sets, the set of each particle, 1 or 2; dealt at random without it.
    mask
        From 0 in the solvent to 1, of the map's side and symmetry. Particles are
        compared with masked maps; correlations are those of whole ones, since masked
        ones agree by the mask's shape. The maps that are returned are whole, too.
    state
        A state that a callback got, to continue from it; with the same other arguments
        the result is that of an uninterrupted run.
    callback
        Called with the state and its information after every outer iteration.

    Raises
    ------
    InputError
        If images, poses, map and mask do not fit each other, or are not finite, or the
        mask is not from 0 to 1.
    """
    config = RefineConfig() if config is None else config
    poses, volume = checked(particles, poses, volume)
    draw, members, sets = divide(particles, poses, config, key, subsets, mask)
    if state is None:
        state = _start(sets, members, poses, volume)
    while int(state.iteration) < config.iterations and not bool(state.finished):
        state, info = _iterate(sets, state, draw)
        if callback is not None:
            callback(state, info)
    return _conclude(sets, members, poses, state)


def _start(
    sets: list[ParticleSet],
    members: list[Int[np.ndarray, " members"]],
    poses: Poses,
    volume: Volume,
) -> RefineState:
    """Return the state before the first iteration."""
    config, dtype = sets[0].config, volume.dtype
    size = sets[0].particles.image_size
    return RefineState(
        tuple(
            map_step.start(one, take(poses, some), volume)
            for one, some in zip(sets, members, strict=True)
        ),
        tuple(jnp.asarray(some, jnp.int32) for some in members),
        jnp.zeros((), jnp.int32),
        jnp.asarray(slices.bucket(config.first_r_max, size), jnp.int32),
        jnp.asarray(jnp.inf, dtype),
        jnp.zeros((), dtype),
        jnp.zeros((), bool),
    )


def _iterate(
    sets: list[ParticleSet], state: RefineState, key: PRNGKeyArray
) -> tuple[RefineState, RefineInfo]:
    """Make one outer iteration on every set."""
    config, iteration = sets[0].config, int(state.iteration)
    r_max = int(state.r_max)
    new, reports = [], []
    for i, (one, old) in enumerate(zip(sets, state.sets, strict=True)):
        draw = jax.random.fold_in(jax.random.fold_in(key, iteration), i)
        posed, report = pose_step.update_poses(one, old, iteration, r_max, draw)
        everyone = np.ones(len(one.particles), bool)
        sums = map_step.sum_up(one, posed.hypotheses, posed.noise, everyone)
        made = map_step.update_maps(one, posed, folds.folds(sums))
        new.append(map_step.assess(one, made))
        reports.append(report)

    last = sets[0].last
    curves = [one.fold_fsc[: last + 1] for one in new]
    supported = [float(crossing(curve, _SUPPORTED)) for curve in curves]
    scores = [float(jnp.mean(curve[1:])) for curve in curves]
    gold = None
    if len(new) == 2:
        curve = half_sets.correlation(new[0], new[1], sets[0])
        gold = float(jnp.mean(curve[1 : last + 1]))
    grown = _next_band_limit(r_max, float(np.mean(supported)), sets[0])
    if iteration + 1 == config.iterations:
        grown = r_max  # error bars are measured where the poses were polished

    def mean(name: str) -> float:
        return float(np.mean([getattr(report, name) for report in reports]))

    unit = "angle_change_in_degrees" if config.turns else "shift_change_in_pixels"
    change = mean(unit)
    if gold is None:
        least = _SETTLED * _error_bar(new, config)
        better = least < change < _SLOW * float(state.pose_change)
    else:
        better = gold > float(state.best_gold) + _STALLED
    searching = iteration <= config.last_multi_start
    dtype = state.pose_change.dtype
    state = RefineState(
        tuple(new),
        state.members,
        state.iteration + 1,
        jnp.asarray(grown, jnp.int32),
        jnp.asarray(change, dtype),
        jnp.asarray(max(gold or 0.0, float(state.best_gold)), dtype),
        jnp.asarray(not (better or searching or grown > r_max)),
    )
    info = RefineInfo(
        iteration=iteration + 1,
        r_max=r_max,
        search_r_max=max(report.search_r_max for report in reports),
        searched=sum(report.searched for report in reports),
        decided=mean("decided"),
        damping=np.mean([report.damping for report in reports], axis=0).tolist(),
        angle_change_in_degrees=mean("angle_change_in_degrees"),
        shift_change_in_pixels=mean("shift_change_in_pixels"),
        tau=[float(one.tau) for one in new],
        fold_score=float(np.mean(scores)),
        gold_score=gold,
    )
    return state, info


def _error_bar(sets: list[SetState], config: RefineConfig) -> float:
    """Return the median standard deviation of what is refined, degrees or pixels."""
    information = np.concatenate([np.asarray(one.information) for one in sets])
    variances = np.diagonal(np.linalg.inv(information), axis1=1, axis2=2)
    if config.turns:
        return float(np.rad2deg(np.median(np.sqrt(variances[:, :3].sum(axis=1)))))
    return float(np.median(np.sqrt(variances[:, 3:].sum(axis=1))))


def _next_band_limit(r_max: int, supported: float, whole: ParticleSet) -> int:
    """Grow the band limit to what the folds' maps support, at most twofold at a time.

    Shells that poses were compared in agree better than the maps are good, since the
    poses have adapted to both. The limit grows only if the maps agree in the shells
    beyond it, up to the next radius of `slices.bucket`.
    """
    size, most = whole.particles.image_size, whole.config.max_r_max or whole.last
    reached = slices.bucket(int(min(supported, 2 * r_max, whole.last, most)), size)
    return max(r_max, reached)


def _conclude(
    sets: list[ParticleSet],
    members: list[Int[np.ndarray, " members"]],
    initial: Poses,
    state: RefineState,
) -> Result:
    """Make the final maps of the particles that show something."""
    config, count = sets[0].config, len(initial.angles)
    angles, shifts = np.array(initial.angles), np.array(initial.shifts)
    information = np.zeros((count, 5, 5), angles.dtype)
    evidence = np.zeros(count, angles.dtype)
    silent = np.zeros(count, bool)
    sums, new = [], []
    for one, some, found in zip(sets, members, state.sets, strict=True):
        old = half_sets.turned(found, state.sets[0], one) if new else found
        nothing = pose_step.undetermined(old)
        best = old.hypotheses.best()
        moved = ~nothing
        if config.turns:
            angles[some[moved]] = np.asarray(best.angles)[moved]
        if config.moves:
            shifts[some[moved]] = np.asarray(best.shifts)[moved]
        known = pose_step.measure_information(one, found, int(state.r_max))
        unrefined = np.asarray(jax.vmap(lambda p: p.information())(one.prior))
        information[some] = np.where(nothing[:, None, None], unrefined, known)
        evidence[some] = old.evidence
        silent[some] = nothing
        part = map_step.sum_up(one, old.hypotheses, old.noise, moved)
        sums.append(part)
        new.append(map_step.choose_tau(one, old, part)[0])
    every, joined, half_maps, curve = sums[0], new[0], None, None
    if len(sets) == 2:
        halves = [least_squares(a + b) for a, b in sums]
        half_maps = (np.asarray(halves[0]), np.asarray(halves[1]))
        curve = np.asarray(fsc(*halves))
        every = [a + b for a, b in zip(*sums, strict=True)]
        tau = jnp.sqrt(new[0].tau * new[1].tau)
        joined = eqx.tree_at(lambda s: s.tau, new[0], tau)
    made = map_step.final_map(config, every, joined)
    return Result(
        Poses(jnp.asarray(angles), jnp.asarray(shifts)),
        np.linalg.inv(information) * np.repeat([config.turns, config.moves], [3, 2]),
        evidence,
        silent,
        np.asarray(made.volume),
        half_maps,
        curve,
        made.tau,
        eqx.tree_at(lambda s: s.sets, state, tuple(new)),
    )


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
    whole = particle_set(particles, poses, key, config)
    if subsets is not None:
        fold = np.zeros(len(particles), int)
        fold[halves(len(particles), key, subsets)[1]] = 1
        whole = replace(whole, fold=fold)
    state = map_step.start(whole, poses, volume)
    everyone = np.ones(len(particles), bool)
    sums = map_step.sum_up(whole, state.hypotheses, state.noise, everyone)
    state = map_step.update_maps(whole, state, folds.folds(sums))
    state = map_step.assess(whole, state)
    sums = map_step.sum_up(whole, state.hypotheses, state.noise, everyone)
    state, errors = map_step.choose_tau(whole, state, sums)
    found = map_step.final_map(config, sums, state)
    return Reconstruction(np.asarray(found.volume), sums, found.lam, found.tau, errors)
