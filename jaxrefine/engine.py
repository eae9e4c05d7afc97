r"""One set of particles and its maps: the steps of an outer iteration.

`start` makes the state, `update_poses` searches, polishes and weighs, `update_maps`
makes the folds' maps and measures what they are worth, `final_map` makes one of all.
"""

from dataclasses import dataclass
from typing import final

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from jaxrefine import admm, crossfit, metrics, posterior, slices
from jaxrefine._types import Volume
from jaxrefine.crossfit import FOLDS
from jaxrefine.geometry import Poses, matrix_to_euler
from jaxrefine.gridding import Gridding
from jaxrefine.hypotheses import Hypotheses, certain
from jaxrefine.particle_set import ParticleSet, RefineConfig, SetState
from jaxrefine.posterior import NEGLIGIBLE, Scan, View
from jaxrefine.search import wanted_candidates

# A particle that is smaller than its box is sampled finely enough by cells of
# 1 / r_max radians and shifts of an eighth of the finest period.
_SHIFTS_PER_PERIOD = 8
_LOCAL_SHIFTS = 3
_CERTAIN = 0.99
_SAMPLE = 2000  # particles that scale and noise are measured from
_EMPTY, _QUIET = 1e-6, 1e-2  # of the median shell: no data, and the least noise
_FINAL_ROUNDS = 3
_ROUND = 512


def start(whole: ParticleSet, poses: Poses, volume: Volume) -> SetState:
    """Begin with a map of unknown scale, and with noise as strong as it is far out.

    The noise is taken to be white at first, with the power of the images in the last
    quarter of their shells. The map is scaled such that its projections have the power
    of the images beyond that in the first three shells, which does not need the poses.
    """
    count = len(whole.particles)
    hypotheses = certain(poses, whole.config.hypotheses)
    shells = whole.particles.image_size // 2 + 1
    one = jnp.ones(shells, volume.dtype)
    sums = _measure(whole, hypotheses, [volume] * FOLDS, one)
    power = sums.data / jnp.maximum(sums.count, 1.0)
    outer = power[3 * whole.last // 4 : whole.last + 1]
    level = jnp.maximum(jnp.mean(outer), _EMPTY * jnp.max(power[1:]))
    level = jnp.where(level > 0, level, 1.0)
    few = slice(1, 4)
    signal = jnp.sum(sums.data[few] - level * sums.count[few])
    model = jnp.sum(sums.model[few])
    model = jnp.where(model > 0, model, jnp.inf)  # an empty map stays empty
    scale = jnp.sqrt(jnp.maximum(signal, 0.0) / model)
    return SetState(
        hypotheses,
        information=jnp.zeros((count, 5, 5), volume.dtype),
        evidence=jnp.zeros(count, volume.dtype),
        maps=tuple(admm.init(scale * volume) for _ in range(FOLDS)),
        gain=one,
        noise=level * one,
        tau=jnp.asarray(whole.config.tau or 1.0, volume.dtype),
        fold_fsc=one,
    )


@final
@dataclass(frozen=True)
class PoseReport:
    """What the pose update did.

    Attributes
    ----------
    searched
        How many particles were searched for.
    decided
        Fraction of the particles with one hypothesis left.
    damping
        Median damping in each iteration of the polishing.
    angle_change_in_degrees, shift_change_in_pixels
        Median changes of the best poses.
    """

    searched: int
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
    beyond = iteration > max(config.multi_start, default=-1)
    searched = undecided if beyond else np.ones(count, bool)
    known = bool(np.asarray(state.evidence).any())

    coarse_r = slices.bucket(
        min(r_max, config.search_r_max), whole.particles.image_size
    )
    fine = posterior.view(whole.particles, r_max, state.noise)
    polished = []
    for fold in range(FOLDS):
        reference = crossfit.filter_shells(state.maps[fold].coefficients, state.gain)
        members = whole.members(fold)
        chosen = members[searched[members]]
        if len(chosen):
            found = _explore(whole, state, chosen, reference, coarse_r, wide, key)
            candidates[chosen, :keep], shifts[chosen, :keep] = found
            active[chosen, :keep] = True
            active[chosen, keep] = known
        owners, column = np.nonzero(active[members])
        owners = members[owners]
        spectrum = _spectrum(config.interpolation, reference, r_max)
        result = posterior.polish(
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
    hypotheses, order = posterior.weigh(
        jnp.asarray(candidates, dtype),
        jnp.asarray(shifts, dtype),
        jnp.asarray(evidence, dtype),
        jnp.asarray(1.0 / r_max, dtype),
        keep,
    )
    best = np.asarray(order)[:, 0]
    before, after = state.hypotheses, hypotheses
    turn = np.einsum("pij,pij->p", before.rotations[:, 0], after.rotations[:, 0])
    moved = np.linalg.norm(after.shifts[:, 0] - before.shifts[:, 0], axis=-1)
    damping = np.concatenate([result.damping for *_, result in polished])
    report = PoseReport(
        searched=int(searched.sum()),
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


def _explore(
    whole: ParticleSet,
    state: SetState,
    chosen: Int[np.ndarray, " chosen"],
    reference: Volume,
    r_max: int,
    wide: bool,
    key: PRNGKeyArray,
):
    """Search about the current hypotheses, and before that in the whole prior."""
    config, size = whole.config, whole.particles.image_size
    centres = np.array(state.hypotheses.rotations)
    shifts = np.array(state.hypotheses.shifts[:, 0])

    def run(number: int, r_max: int, centres, shifts, scan: Scan):
        spectrum = _spectrum(config.search_interpolation, reference, r_max)
        return posterior.explore(
            jax.random.fold_in(key, number),
            whole.particles,
            chosen,
            spectrum,
            posterior.view(whole.particles, r_max, state.noise),
            whole.prior,
            centres,
            shifts,
            scan,
            config.hypotheses,
        )

    spread = 1.0 / r_max
    if wide:
        first = slices.bucket(config.first_r_max, size)
        step = size / (_SHIFTS_PER_PERIOD * first)
        everywhere = Scan(
            config.angle_spread,
            step,
            max(1, round(2 * config.shift_spread / step)),
            wanted_candidates(config.angle_spread, first),
        )
        about = np.asarray(whole.prior.rotations)[:, None]
        origin = np.asarray(whole.prior.shifts)
        rotations, moved = run(0, first, about, origin, everywhere)
        centres = np.tile(centres, (1, 2, 1, 1))
        centres[chosen, : config.hypotheses] = rotations
        # The wide search's shift is the better one only where nothing was known.
        if not np.asarray(state.evidence).any():
            shifts[chosen] = moved[:, 0]
        spread = 1.0 / first
    nearby = Scan(
        spread,
        size / (_SHIFTS_PER_PERIOD * r_max),
        _LOCAL_SHIFTS,
        max(1, config.candidates * config.hypotheses // centres.shape[1]),
    )
    return run(1, r_max, centres, shifts, nearby)


@eqx.filter_jit
def _spectrum(interpolation: Gridding, volume: Volume, r_max: int):
    return interpolation.spectrum(volume, r_max)


@eqx.filter_jit
def _insert(insertion, view: View, images, ctf, poses: Poses, weights):
    return crossfit.insert(
        insertion,
        view.disc,
        view.spectra(images),
        poses,
        view.transfer(ctf),
        weights[:, None] * view.inverse_noise[None],
    )


def sum_up(
    whole: ParticleSet,
    hypotheses: Hypotheses,
    noise: Float[Array, "shells"],
    included: Bool[np.ndarray, " particles"],
) -> list[crossfit.Sums]:
    """Sum up the images of each fold at all their hypotheses, by their weights."""
    n = whole.particles.image_size
    everything = posterior.view(whole.particles, whole.last, noise)
    # Enough slices at a time to outweigh the FFT of the kernel's grid.
    size = max(_ROUND, n**3 * 2 // len(everything.disc.shells))
    weights = np.asarray(hypotheses.weights) * included[:, None]
    weights = np.where(weights > NEGLIGIBLE, weights, 0.0)
    sums = []
    for fold in range(FOLDS):
        members = whole.members(fold)
        owners, column = np.nonzero(weights[members])
        owners = members[owners]
        total = crossfit.Sums.zero(n, noise.dtype)
        places = np.arange(len(owners))
        for batch, new in posterior.batches(places, _rounded(len(owners), size)):
            owner, place = owners[batch], column[batch]
            images, ctf = whole.particles.batch(owner)
            weight = np.where(np.arange(len(batch)) < new, weights[owner, place], 0.0)
            poses = Poses(
                matrix_to_euler(hypotheses.rotations[owner, place]),
                hypotheses.shifts[owner, place],
            )
            total = total + _insert(
                whole.insertion,
                everything,
                images,
                ctf,
                poses,
                jnp.asarray(weight, noise.dtype),
            )
        sums.append(total)
    return sums


def _rounded(count: int, largest: int) -> int:
    """Return a batch size for so many, one of few so that few programs are compiled."""
    return min(max(1, -(-count // _ROUND)) * _ROUND, largest)


@eqx.filter_jit
def _compare(interpolation, volume, view: View, images, ctf, poses, included):
    spectrum = interpolation.spectrum(volume, view.disc.r_max)
    return crossfit.shell_sums(
        spectrum, view.disc, view.spectra(images), poses, view.transfer(ctf), included
    )


def _measure(
    whole: ParticleSet,
    hypotheses: Hypotheses,
    maps,
    noise: Float[Array, "shells"],
) -> crossfit.ShellSums:
    """Compare images with the maps that they are not in, at their best poses."""
    full = posterior.view(whole.particles, whole.last, noise)
    poses = hypotheses.best()
    total = None
    for fold in range(FOLDS):
        members = whole.members(fold)
        some = np.linspace(0, len(members) - 1, min(len(members), _SAMPLE // FOLDS))
        members = members[some.astype(int)]
        size = min(whole.config.batch_size, len(members))
        for batch, new in posterior.batches(members, size):
            images, ctf = whole.particles.batch(batch)
            part = _compare(
                whole.config.interpolation,
                maps[fold],
                full,
                images,
                ctf,
                Poses(poses.angles[batch], poses.shifts[batch]),
                jnp.asarray(np.arange(size) < new, noise.dtype),
            )
            total = part if total is None else total + part
    assert total is not None
    return total


def update_maps(whole: ParticleSet, state: SetState, data: crossfit.Folds) -> SetState:
    """Make the folds' maps, and measure scale, noise and correlation with them."""
    config = whole.config
    maps = crossfit.solve_all(
        data, state.maps, state.tau, config.regulariser, config.admm_iterations
    )
    return assess(whole, eqx.tree_at(lambda s: s.maps, state, maps))


def assess(whole: ParticleSet, state: SetState) -> SetState:
    """Measure scale and noise from the images, and the correlation of the maps.

    The power of the noise is infinite in shells that the images are empty in.
    """
    volumes = [one.coefficients for one in state.maps]
    sums = _measure(whole, state.hypotheses, volumes, state.noise)
    power, inside = sums.residual_power, slice(1, whole.last + 1)
    # A shell that the images are empty in says nothing, however small its residual.
    data = sums.data / jnp.maximum(sums.count, 1.0)
    empty = data <= _EMPTY * jnp.median(data[inside])
    noise = jnp.maximum(power, _QUIET * jnp.median(power[inside]))
    noise = jnp.where(empty, jnp.inf, noise)
    measured = jnp.arange(len(noise)) <= whole.last
    measured = measured & (jnp.max(data[inside]) > 0)
    noise = jnp.where(measured, noise, state.noise)
    return eqx.tree_at(
        lambda s: (s.gain, s.noise, s.fold_fsc),
        state,
        (sums.gain, noise, metrics.fsc(*volumes)),
    )


def measure_information(
    whole: ParticleSet, state: SetState, r_max: int
) -> Float[np.ndarray, "particles 5 5"]:
    """Return the information on every best pose, the cost's curvature included."""
    poses = state.hypotheses.best()
    rotations = np.asarray(state.hypotheses.rotations)[:, 0]
    shifts, found = np.asarray(poses.shifts), np.array(state.information)
    view = posterior.view(whole.particles, r_max, state.noise)
    for fold in range(FOLDS):
        members = whole.members(fold)
        reference = crossfit.filter_shells(state.maps[fold].coefficients, state.gain)
        found[members] = posterior.curvature(
            whole.particles,
            members,
            _spectrum(whole.config.interpolation, reference, r_max),
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


@final
@dataclass(frozen=True)
class FinalMap:
    """A map of all particles of a set.

    Attributes
    ----------
    volume
        The map.
    lam, tau
        Weight of the regulariser, absolute and in units of the noise.
    errors
        Errors of prediction that ``tau`` was chosen by, if it was.
    """

    volume: Volume
    lam: float
    tau: float
    errors: dict[float, float]


def final_map(
    whole: ParticleSet, state: SetState, sums: list[crossfit.Sums]
) -> tuple[FinalMap, SetState]:
    """Choose the regulariser's weight, and make one map of all particles."""
    config, errors = whole.config, {}
    if config.tau is None:
        tau, maps, errors = crossfit.cross_validate(
            crossfit.folds(sums),
            state.maps,
            state.tau,
            config.regulariser,
            config.admm_iterations,
        )
        state = eqx.tree_at(lambda s: (s.maps, s.tau), state, (maps, tau))
    return map_at(config, sums, state, errors), state


def map_at(
    config: RefineConfig,
    sums: list[crossfit.Sums],
    state: SetState,
    errors: dict[float, float] | None = None,
) -> FinalMap:
    """Make one map of all folds, starting between theirs, at the state's ``tau``."""
    total = sums[0] + sums[1]
    data = crossfit.data_term(total)
    solution = jax.tree.map(lambda a, b: (a + b) / 2, *state.maps)
    for _ in range(_FINAL_ROUNDS):
        solution, _ = crossfit.solve(
            data,
            total.peak,
            solution,
            state.tau,
            config.regulariser,
            config.admm_iterations,
        )
    lam = float(state.tau * jnp.sqrt(total.peak))
    return FinalMap(solution.coefficients, lam, float(state.tau), errors or {})
