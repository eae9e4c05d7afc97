r"""The volume update of an outer iteration, for one set of particles.

`start` makes the first state, `update_maps` the maps of the folds from sums over their
images (:mod:`jaxrefine.refinement.insertion`); `assess` measures their scale, noise and
correlation, and `choose_tau` and `final_map` make one map of all particles.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from jaxrefine._arrays import on_device
from jaxrefine._types import Scalar, Volume
from jaxrefine._watch import Stage, Watch, unwatched
from jaxrefine.data import observation
from jaxrefine.data.observation import Observation
from jaxrefine.data.particles import evenly_spaced
from jaxrefine.data.visit import Comparison, visit
from jaxrefine.geometry import Poses
from jaxrefine.maps import admm, folds
from jaxrefine.maps.filters import filter_shells
from jaxrefine.maps.folds import FOLDS
from jaxrefine.maps.fsc import fsc
from jaxrefine.maps.noise import ShellSums, noise_power, shell_sums
from jaxrefine.maps.scale import at_unit_scale
from jaxrefine.maps.sums import Sums, data_term, solve
from jaxrefine.operators.gridding import Spectrum
from jaxrefine.operators.resample import resample
from jaxrefine.poses.hypotheses import Hypotheses, certain
from jaxrefine.refinement.config import RefineConfig
from jaxrefine.refinement.optics_step import first_optics
from jaxrefine.refinement.sets import ParticleSet
from jaxrefine.refinement.state import SetState

# Guards against images that are filtered or noiseless, and so empty in some shells.
# They are far below the power of noisy data, and far above rounding.
_EMPTY_SHELL = 1e-10  # power of an empty shell, relative to the fullest
_LEAST_NOISE = 1e-2  # noise of a shell, relative to the median of its group
_LEAST_INITIAL_NOISE = 1e-6  # relative to the fullest shell


def start(particle_set: ParticleSet, volume: Volume) -> SetState:
    """Return the first state: a map at the scale of the images, and white noise.

    Only the shells of the map below the first band limit are used. The power of the
    noise in each group is that of the group's images in the last quarter of their
    shells, where noise dominates; groups without images, or of empty ones, get the
    largest of these. The map is scaled such that, in the first three shells, the power
    of its projections is that of the images less that of the noise, for which the poses
    need not be right.

    Parameters
    ----------
    particle_set
        The particles, with their given poses.
    volume
        The map to start from, of shape ``(n, n, n)`` and any scale.
    """
    count, config = len(particle_set), particle_set.config
    given = Poses(particle_set.prior.rotations, particle_set.prior.shifts)
    hypotheses = certain(given, config.places)
    shells = particle_set.particles.image_size // 2 + 1
    ones = on_device(np.ones(shells, volume.dtype))
    volume = _up_to(at_unit_scale(volume), config.first_r_max)
    # Of a map that is cut off there, nothing is known beyond.
    made = on_device((np.arange(shells) <= config.first_r_max).astype(volume.dtype))
    everyone = np.ones(count, bool)
    masked = particle_set.masked(volume, made)
    sums = _measure(particle_set, hypotheses, [masked] * FOLDS, everyone)
    share = on_device(np.asarray(particle_set.particles.noise_share, volume.dtype))
    scale, noise = _first_levels(sums, share, particle_set.last_shell)
    first = admm.init(scale * volume)
    return SetState(
        hypotheses,
        information=on_device(np.zeros((count, 5, 5), volume.dtype)),
        evidence=on_device(np.zeros(count, volume.dtype)),
        maps=(first,) * FOLDS,
        gain=ones,
        noise=noise,
        tau=on_device(np.asarray(config.tau or 1.0, volume.dtype)),
        fold_fsc=made,
        optics=first_optics(particle_set),
    )


@eqx.filter_jit
def _first_levels(
    sums: ShellSums, noise_share: Scalar, last_shell: int
) -> tuple[Scalar, Float[Array, "groups shells"]]:
    """Return the scale of the first map, and the noise of each group; see `start`."""
    power = sums.data / jnp.maximum(sums.count, 1.0)
    outer = jnp.mean(power[:, 3 * last_shell // 4 : last_shell + 1], axis=1)
    level = jnp.maximum(outer, _LEAST_INITIAL_NOISE * jnp.max(power[:, 1:], axis=1))
    largest = jnp.max(level)
    level = jnp.where(level > 0, level, jnp.where(largest > 0, largest, 1.0))
    noise = jnp.repeat(level[:, None], power.shape[1], axis=1)
    first = slice(1, 4)
    signal = jnp.sum((sums.data - noise * sums.count)[:, first])
    model = jnp.sum(sums.model[:, first])
    model = jnp.where(model > 0, model, jnp.inf)  # an empty map stays empty
    return jnp.sqrt(jnp.maximum(signal, 0.0) / model), noise / noise_share


@eqx.filter_jit
def _up_to(volume: Volume, r_max: int) -> Volume:
    """Return the map up to a shell, with a cosine edge of 3 shells."""
    shells = np.arange(volume.shape[0] // 2 + 1)
    edge = np.clip((shells - r_max) / 3, 0.0, 1.0)
    return filter_shells(
        volume, jnp.asarray(0.5 + 0.5 * np.cos(np.pi * edge), volume.dtype)
    )


def compare_shells(
    reference: Spectrum,
    observation: Observation,
    rotation: Float[Array, "3 3"],
    shift: Float[Array, "2"],
) -> ShellSums:
    """Compare one image with a map, a function that a visit takes."""
    return shell_sums(
        reference,
        observation.disc,
        observation.spectrum,
        rotation,
        shift,
        observation.transfer,
        observation.magnification,
    )


def _measure(
    particle_set: ParticleSet,
    hypotheses: Hypotheses,
    maps: Sequence[Volume],
    included: Bool[np.ndarray, " particles"],
) -> ShellSums:
    """Compare a sample of images with the masked maps of the other fold, by groups."""
    particles, dtype = particle_set.particles, maps[0].dtype
    tuning = particle_set.config.tuning
    ones = on_device(np.ones(particles.image_size // 2 + 1, dtype))
    view = observation.view(particles, particle_set.last_shell, ones)
    groups = np.arange(particles.groups)[:, None]
    rotations, shifts = (
        np.asarray(each)[:, 0] for each in (hypotheses.rotations, hypotheses.shifts)
    )
    samples, of_folds = [], []
    for fold in range(FOLDS):
        of_fold = particle_set.of_fold(fold)
        of_fold = of_fold[included[of_fold]]
        group = particles.group_of(of_fold)
        share = max(tuning.sample // len(groups), tuning.least_per_group) // FOLDS
        members = [of_fold[group == g] for g in groups]
        samples.append(
            np.concatenate([each[evenly_spaced(len(each), share)] for each in members])
        )
    chosen = np.concatenate(samples)
    stage = Stage(particle_set.watch, "noise", len(chosen))
    for volume, sample in zip(maps, samples, strict=True):
        spectrum = particle_set.config.interpolation.spectrum(
            volume, particle_set.last_shell
        )
        of_folds.append(
            visit(
                Comparison(compare_shells),
                (spectrum, view),
                particles,
                sample,
                (rotations[sample], shifts[sample]),
                particle_set.config.batch_size,
                stage,
            )
        )
    each = jax.tree.map(lambda *leaves: np.concatenate(leaves), *of_folds)
    return each.of_groups(particles.group_of(chosen) == groups)


def update_maps(
    particle_set: ParticleSet, state: SetState, data: folds.Folds
) -> SetState:
    """Make the folds' maps, each from the other fold.

    Maps of fewer voxels than the images have are made from sums of that side, and
    sampled anew on the images' grid. Their multipliers are not kept.

    Parameters
    ----------
    particle_set
        The particles, of which only the parameters are used.
    state
        The maps and multipliers to start from, and ``tau``.
    data
        The data terms of the folds, see `insertion.sum_up` and `folds.folds`.
    """
    config, n = particle_set.config, particle_set.particles.image_size
    side = data.own[0].backprojection.shape[0]
    starts = state.maps
    if side < n:
        starts = [admm.init(_resized(fold.coefficients, side)) for fold in starts]
    stage = Stage(particle_set.watch, "maps", FOLDS)
    maps = folds.solve_all(
        data, starts, state.tau, config.regulariser, config.admm_iterations, stage
    )
    if side < n:
        maps = tuple(admm.init(_resized(fold.coefficients, n)) for fold in maps)
    return eqx.tree_at(lambda s: s.maps, state, maps)


@eqx.filter_jit
def _resized(coefficients: Volume, side: int) -> Float[Array, "{side} {side} {side}"]:
    """Sample a map on another number of voxels in the same box, keeping its spectrum.

    The spectrum is a sum over voxels, so values grow as voxels do.
    """
    n = coefficients.shape[0]
    return (n / side) ** 3 * resample(coefficients, 1.0, side, n / side)


def assess(
    particle_set: ParticleSet,
    state: SetState,
    included: Bool[np.ndarray, " particles"],
    side: int | None = None,
) -> SetState:
    """Measure scale and noise from the images, and the correlation of the maps.

    The scale is common to all groups. The power of the noise is that within the circle
    if the images are masked. It is infinite in shells where a group's images are empty;
    groups without images, or of empty ones, keep the power that they have.

    Parameters
    ----------
    particle_set
        The particles, a sample of which is compared with the maps.
    state
        Their poses, the folds' maps, and the noise by which groups are weighted.
    included
        Which particles the maps were made of: the others are not in the sample.
    side
        Side of the sums that the maps were made from, by default that of the images.
        Scale and correlation are zero in the shells that a smaller side leaves out,
        where a map holds nothing but what the regulariser has put there. The residual
        has the signal there, so that the noise keeps its level where that is lower.
    """
    n = particle_set.particles.image_size
    last_made = n // 2 if side in (None, n) else (side - 1) // 2
    made = on_device(np.arange(n // 2 + 1) <= last_made)
    volumes = [fold.coefficients for fold in state.maps]
    masked = [particle_set.masked(volume, state.fold_fsc) for volume in volumes]
    sums = _measure(particle_set, state.hypotheses, masked, included)
    share = on_device(np.asarray(particle_set.particles.noise_share, state.noise.dtype))
    gain, noise = _levels(sums, state.noise, share, made, particle_set.last_shell)
    correlation = on_device(np.where(made, fsc(*volumes), 0).astype(gain.dtype))
    return eqx.tree_at(
        lambda s: (s.gain, s.noise, s.fold_fsc), state, (gain, noise, correlation)
    )


@eqx.filter_jit
def _levels(
    sums: ShellSums,
    noise: Float[Array, "groups shells"],
    noise_share: Scalar,
    made: Bool[Array, "shells"],
    last_shell: int,
) -> tuple[Float[Array, "shells"], Float[Array, "groups shells"]]:
    """Return the gain of the maps and the noise of each group; see `assess`."""
    gain = sums.pooled(observation.relative_precision(noise)).gain
    gain = jnp.where(made, gain, 0.0)
    # Where the images are empty the residual is small, but says nothing of the noise.
    data = sums.data / jnp.maximum(sums.count, 1.0)
    inside = slice(1, last_shell + 1)
    fullest = jnp.max(data[:, inside], axis=1, keepdims=True)
    empty = data <= _EMPTY_SHELL * fullest
    residual, count = (
        jnp.where(empty, 0.0, values) for values in (sums.residual(gain), sums.count)
    )
    power = noise_power(residual, count) / noise_share
    median = jnp.nanmedian(
        jnp.where(empty, jnp.nan, power)[:, inside], axis=1, keepdims=True
    )
    power = jnp.where(empty, jnp.inf, jnp.maximum(power, _LEAST_NOISE * median))
    power = jnp.where(made, power, jnp.minimum(power, noise))
    measured = (fullest > 0) & (np.arange(data.shape[1])[None] <= last_shell)
    return gain, jnp.where(measured, power, noise)


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
    """

    volume: Volume
    lam: float
    tau: float


def choose_tau(
    particle_set: ParticleSet, state: SetState, sums: list[Sums]
) -> tuple[SetState, dict[float, float]]:
    """Choose the regulariser's weight by cross-validation, unless it is given.

    Parameters
    ----------
    particle_set
        The particles, whose parameters may give the weight.
    state
        The folds' maps to start from, and the weight to begin with.
    sums
        The sums of both folds, see `insertion.sum_up`.

    Returns
    -------
    The state with the chosen weight and the folds' maps made with it, and the errors of
    prediction of the weights that were tried; none if the weight is given.
    """
    config = particle_set.config
    if config.tau is not None:
        return state, {}
    tau, maps, errors = folds.cross_validate(
        folds.folds(sums),
        state.maps,
        state.tau,
        config.regulariser,
        config.admm_iterations,
        watch=particle_set.watch,
    )
    return eqx.tree_at(lambda s: (s.maps, s.tau), state, (maps, tau)), errors


def final_map(
    config: RefineConfig, sums: list[Sums], state: SetState, watch: Watch = unwatched
) -> FinalMap:
    """Make one map of both folds, with the state's weight ``tau`` of the regulariser.

    Parameters
    ----------
    config
        The regulariser, and how many iterations are made.
    sums
        The sums of both folds; without images the map is empty.
    state
        The folds' maps, whose mean the iterations start from, and ``tau``.
    watch
        Told how many rounds of iterations have been made.
    """
    total = sums[0] + sums[1]
    data = data_term(total)
    solution = _mean(*state.maps)
    stage = Stage(watch, "final map", config.tuning.final_rounds)
    for _ in range(config.tuning.final_rounds):
        solution = solve(
            data,
            total.peak,
            solution,
            state.tau,
            config.regulariser,
            config.admm_iterations,
        )
        jax.block_until_ready(solution)
        stage.advance()
    lam = float(state.tau) * math.sqrt(float(total.peak))
    return FinalMap(solution.coefficients, lam, float(state.tau))


@eqx.filter_jit
def _mean(first: admm.ADMMState, second: admm.ADMMState) -> admm.ADMMState:
    return jax.tree.map(lambda a, b: (a + b) / 2, first, second)
