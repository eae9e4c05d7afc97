"""The default preset of ``jaxrefine refine``: :mod:`jaxrefine.refinement`.

Degrees and angstroms become radians and cycles per box here.
"""

import math
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import equinox as eqx
import jax
import numpy as np
from jaxtyping import Float

from jaxrefine import io
from jaxrefine._processes import of_first
from jaxrefine.cli._memory import free_bytes
from jaxrefine.cli._particles import (
    check_shift,
    half_sets,
    shell_of,
    tell_what_is_shared,
)
from jaxrefine.cli._refinement import Inputs, Outcome, Refinement
from jaxrefine.cli._sign import check_same_sign
from jaxrefine.cli._usable import Usable, usable
from jaxrefine.cli.commands.refine import (
    ANGLE_SPREAD_OF_LIMIT,
    CONTRAST_SPREAD,
    DEFOCUS_SPREAD,
    SHIFT_LIMIT_OF_SPREAD,
    SHIFT_SPREAD_OF_LIMIT,
    RefineSettings,
)
from jaxrefine.cli.engine import Engine
from jaxrefine.data.particles import Particles
from jaxrefine.errors import InputError
from jaxrefine.geometry import Poses
from jaxrefine.maps.fsc import resolution
from jaxrefine.maps.mask import AutomaticMask
from jaxrefine.poses.optics import OpticsPrior
from jaxrefine.refinement import memory
from jaxrefine.refinement.config import RefineConfig
from jaxrefine.refinement.contrast import contrast
from jaxrefine.runs.folder import NoFolder, RunFolder
from jaxrefine.runs.history import History, Unwritten
from jaxrefine.runs.progress import Bars


def prepare(settings: RefineSettings, inputs: Inputs, engine: Engine) -> Refinement:
    """Return what an engine is to do.

    Raises
    ------
    InputError
        If a resolution or a shift is not one of the images'.
    """
    config = _configure(settings, inputs.source)
    resolved = _resolved(config, inputs.source.particles)
    return Refinement(config, resolved, partial(_run, settings, inputs, config, engine))


def _configure(settings: RefineSettings, source: io.ParticleFile) -> RefineConfig:
    """Return the engine's parameters; those that are not given follow from others."""
    if settings.refine_defocus and source.particles.ctf is None:
        raise InputError(
            "--refine-defocus must be given with particles that have a defocus, got "
            f"none from {settings.particles}" + " and --no-ctf" * settings.images.no_ctf
        )
    chosen: dict[str, Any] = {
        "half_sets": settings.half_sets,
        "symmetry": settings.symmetry,
        "symmetry_relax": settings.symmetry_relax,
        "contrast_spread": CONTRAST_SPREAD if settings.refine_scale else 0.0,
        "defocus_spread": DEFOCUS_SPREAD if settings.refine_defocus else 0.0,
        "tau": settings.tau,
        **_rotations(settings),
        **_shifts(settings, source.particles.image_size),
        **_band_limits(settings, source.particles),
    }
    if settings.iterations is not None:
        chosen["iterations"] = settings.iterations
    if settings.batch_size is not None:
        chosen["batch_size"] = settings.batch_size
    return RefineConfig(**chosen)


def _rotations(settings: RefineSettings) -> dict[str, float]:
    """Return how well the rotations are known, and how far they may turn."""
    if settings.fix_angles:
        return {"max_angle": 0.0}
    chosen: dict[str, float] = {}
    if settings.max_angle is not None:
        chosen["max_angle"] = math.radians(settings.max_angle)
        implied = ANGLE_SPREAD_OF_LIMIT * chosen["max_angle"]
        chosen["angle_spread"] = min(implied, RefineConfig().angle_spread)
    if settings.angle_spread is not None:
        chosen["angle_spread"] = math.radians(settings.angle_spread)
    return chosen


def _shifts(settings: RefineSettings, image_size: int) -> dict[str, float]:
    """Return how well the shifts are known, and how far they may move."""
    if settings.fix_shifts:
        return {"max_shift": 0.0}
    chosen: dict[str, float] = {}
    for name in ("max_shift", "shift_spread"):
        value = getattr(settings, name)
        if value is None:
            continue
        check_shift(f"--{name.replace('_', '-')}", value, image_size)
        chosen[name] = value
    if "max_shift" in chosen:
        implied = SHIFT_SPREAD_OF_LIMIT * chosen["max_shift"]
        chosen.setdefault("shift_spread", implied)
    elif "shift_spread" in chosen:
        implied = SHIFT_LIMIT_OF_SPREAD * chosen["shift_spread"]
        chosen["max_shift"] = min(implied, image_size / 2)
    return chosen


def _band_limits(settings: RefineSettings, particles: Particles) -> dict[str, Any]:
    """Return the band limits, cycles per box, and the diameter in boxes.

    A particle of another size than by default is first compared, and searched for, at
    as many cycles per diameter.
    """
    default, chosen = RefineConfig(), {}
    last = (particles.image_size - 1) // 2
    diameter = settings.images.particle_diameter
    if diameter is not None:
        chosen["particle_diameter"] = diameter / particles.box_in_angstroms
        for name in ("first_r_max", "search_r_max"):
            cycles = getattr(default, name) * default.particle_diameter
            cycles /= chosen["particle_diameter"]
            chosen[name] = min(round(cycles), last)
    first = chosen.get("first_r_max", default.first_r_max)
    initial, finest = settings.initial_resolution, settings.max_resolution
    if initial is not None:
        first = shell_of("--initial-resolution", initial, particles)
    if finest is not None:
        most = shell_of("--max-resolution", finest, particles)
        if initial is not None and first > most:
            raise InputError(
                "--max-resolution must be at most --initial-resolution, "
                f"{initial:g} angstroms, got {finest:g}"
            )
        chosen["max_r_max"], first = most, min(first, most)
    return {**chosen, "first_r_max": first}


def _resolved(config: RefineConfig, particles: Particles) -> dict[str, Any]:
    """Return the values that the options have in this run, in the options' units.

    None stands for a value that the refinement chooses.
    """
    box = particles.box_in_angstroms
    finest = None if config.max_r_max is None else box / config.max_r_max
    angles = {
        "max_angle": math.degrees(config.max_angle),
        "angle_spread": math.degrees(config.angle_spread),
    }
    shifts = {
        "max_shift": float(config.max_shift),
        "shift_spread": float(config.shift_spread),
    }
    return {
        "iterations": config.iterations,
        "tau": config.tau,
        **(angles if config.max_angle else {}),
        **(shifts if config.max_shift else {}),
        "initial_resolution": box / config.first_r_max,
        "max_resolution": finest,
        "particle_diameter": config.particle_diameter * box,
    }


def _run(
    settings: RefineSettings,
    inputs: Inputs,
    config: RefineConfig,
    engine: Engine,
    folder: RunFolder | NoFolder,
    bars: Bars,
) -> Outcome:
    """Refine from the last checkpoint, or from the given poses and map."""
    source = inputs.source
    subsets = None
    if config.half_sets:
        subsets = half_sets(source, jax.random.key(settings.seed))
    tell_what_is_shared(source, subsets)
    chosen = usable(
        source, settings.images, with_poses=True, subsets=subsets, folder=folder
    )
    particles, poses = chosen.particles(source.particles), chosen.given(source.poses)
    plan = _plan(settings, particles, config)
    batch_size = min(settings.batch_size or plan.batch_size, len(particles))
    plan = memory.with_batch(plan, config, batch_size)
    print(plan.describe(), file=sys.stderr)

    data = (particles, poses, inputs.volume)
    further = {
        "key": jax.random.key(settings.seed),
        "subsets": None if subsets is None else subsets[chosen.indices],
        "mask": AutomaticMask() if inputs.makes_masks else inputs.mask,
    }
    state = _resumed(folder.history, lambda: engine.init(*data, config, **further))
    if state is None and not settings.images.trust_contrast:
        used = replace(config, batch_size=batch_size)
        _check_contrast(settings, inputs, particles, poses, used, bars)
    done = 0 if state is None else int(state.iteration)
    advance = bars.next("refining", config.iterations, done)

    def record(latest: Any, info: Any) -> None:
        nonlocal state
        row = info.row()
        folder.history.record(latest, row)
        state = latest
        advance(latest, row)

    def attempt(batch_size: int) -> Any:
        chosen = replace(config, batch_size=batch_size)
        progress = {"callback": record, "watch": bars.watch}
        return engine.refine(*data, chosen, **further, state=state, **progress)

    if jax.process_count() == 1:
        result = memory.retry_on_out_of_memory(attempt, batch_size, _say)
    else:  # The others would not know of another attempt.
        result = attempt(batch_size)
    undetermined = chosen.of_table(result.undetermined, True)
    report: dict[str, Any] = {
        "undetermined": int(result.undetermined.sum()),
        "reference_bias": bool(result.undetermined.mean() > 0.5),
        "fixed_and_not_paid_for": _fixed(config),
        "left_out": int(chosen.left_out.sum()),
        "tau": float(result.tau),
        "planned_batch_size": batch_size,
        "estimated_peak_mib": plan.estimated_bytes / 2**20,
    }
    columns = _columns(
        chosen.of_table(result.log_likelihood, 0.0),
        chosen.of_table(result.covariances, _prior_covariance(config)),
    )
    columns["jaxrefineUndetermined"] = undetermined.astype(int)
    columns |= _optics_columns(result, chosen, source.particles, config)
    report |= _at_limits(result, config)
    if subsets is not None and source.random_subset is None:
        columns["rlnRandomSubset"] = subsets
    if result.fsc is not None:
        report["half_set_fsc"] = np.asarray(result.fsc).tolist()
        informed = _period(result.informed_up_to, particles)
        report["poses_informed_to_in_angstroms"] = informed
        report["limits"] = _limits(
            np.asarray(result.fsc),
            result.informed_up_to,
            not report["reference_bias"],
            config,
            particles,
        )
    else:
        report["fold_fsc"] = np.asarray(result.state.correlation).tolist()
        report["limits"] = (
            "no resolution was measured, since all poses were refined in one set, "
            "whose folds are not independent: refine with --half-sets for one"
        )
    refined = chosen.poses(source.poses, result.poses)
    poses = _refined(settings, source.poses, refined)
    return Outcome(poses, np.asarray(result.volume), result.half_maps, columns, report)


def _fixed(config: RefineConfig) -> list[str]:
    """Return what is fixed, and costs the evidence for a particle nothing."""
    refines = {"angles": config.refines_angles, "shifts": config.refines_shifts}
    return [name for name, is_refined in refines.items() if not is_refined]


def _period(shell: int, particles: Particles) -> float:
    """Return the period of a shell in angstroms, cut to four digits.

    As an option it is read as the same shell, see `_particles.shell_of`.
    """
    box = particles.box_in_angstroms
    digit = 10.0 ** (math.floor(math.log10(box / shell)) - 3)
    count = math.floor(box / shell / digit)
    while math.floor(box / (period := float(f"{count * digit:.4g}"))) < shell:
        count -= 1
    return period


def _limits(
    curve: Float[np.ndarray, " shells"],
    informed_up_to: int,
    is_trusted: bool,
    config: RefineConfig,
    particles: Particles,
) -> str:
    """Return how far half maps and half sets agree, in a sentence.

    The second number is recommended as a limit where it says something: not if half
    maps agree no farther than the initial map was taken, nor if it is less than that.

    Parameters
    ----------
    curve
        Correlation of the half maps.
    informed_up_to
        As of `result.Result`.
    is_trusted
        Whether most of the images show a particle. If not, nothing is recommended.
    config, particles
        Parameters and images.
    """
    size, pixel = particles.image_size, particles.pixel_size_in_angstroms
    agreement, box = resolution(curve, size, pixel), particles.box_in_angstroms
    informed = _period(informed_up_to, particles)
    agree = "nowhere" if agreement.is_none else f"to {agreement.text()}"
    text = (
        f"the half maps agree {agree} without a mask; poses were "
        "compared, and the regularised maps of the half sets agree (FSC 0.5), to "
        f"{informed:g} A"
    )
    # The crossing lies between the last shell that agrees and the next.
    agree_up_to = math.floor(box / agreement.in_angstroms)
    if not agreement.is_a_bound and agree_up_to <= config.first_r_max:
        return (
            f"{text}; the initial map was taken to {box / config.first_r_max:.4g} A, "
            "so that the particles have told nothing that it has not"
        )
    if is_trusted and informed_up_to >= config.first_r_max:
        text += f", which bears out --max-resolution {informed:g} for these particles"
    return text


def _resumed(history: History | Unwritten, init: Callable[[], Any]) -> Any:
    """Return the last state of process 0 in all processes; None if there is none."""
    if not of_first(np.asarray(history.has_state)):
        return history.resume(init)
    begun = init()
    state = history.resume(lambda: begun)
    return of_first(begun if state is None else state)


def _check_contrast(
    settings: RefineSettings,
    inputs: Inputs,
    particles: Particles,
    poses: Poses,
    config: RefineConfig,
    bars: Bars,
) -> None:
    """Refuse images that look like the negative of the map.

    Raises
    ------
    InputError
        If they do; it names the one of which the particle seems to be dark.
    """
    volume = inputs.volume
    masked = volume if inputs.mask is None else volume * inputs.mask
    found = contrast(particles, poses, masked, config, bars.watch)
    check_same_sign(found, inputs.source, volume, settings)


def _prior_covariance(config: RefineConfig) -> np.ndarray:
    """Return what is known of a pose without its image; 0 for what is fixed."""
    angles = np.full(3, config.angle_spread if config.refines_angles else 0.0)
    shifts = np.full(2, config.shift_spread if config.refines_shifts else 0.0)
    return np.diag(np.concatenate([angles, shifts]) ** 2)


def _plan(
    settings: RefineSettings, particles: Particles, config: RefineConfig
) -> memory.Plan:
    """Return what the run will use, within the memory that is given or free."""
    free = free_bytes(settings.memory)
    return memory.plan(len(particles), particles.image_size, config, free)


def _say(sentence: str) -> None:
    print(sentence, file=sys.stderr)


def _refined(settings: RefineSettings, given: Poses, refined: Poses) -> Poses:
    """Return the refined poses, with the given ones for what is fixed, bit by bit."""
    if settings.fix_angles:
        shifts = given.shifts if settings.fix_shifts else refined.shifts
        return eqx.tree_at(lambda poses: poses.shifts, given, shifts)
    if settings.fix_shifts:
        return eqx.tree_at(lambda poses: poses.shifts, refined, given.shifts)
    return refined


def _optics_columns(
    result: Any, chosen: Usable, particles: Particles, config: RefineConfig
) -> dict[str, np.ndarray]:
    """Return contrast and defocus of each particle, if they are refined, for its table.

    The contrast is in RELION's scale factor of the transfer function, which both
    programs read; without transfer functions it is in a column of our own. Its error
    bar is in the same unit, that of the factor which was given.
    """
    columns: dict[str, np.ndarray] = {}
    ctf, known = particles.ctf, result.estimated_optics
    if config.contrast_spread:
        contrast = chosen.of_table(known.optics.contrast, 1.0)
        error = chosen.of_table(known.errors.contrast, config.contrast_spread)
        given = 1.0 if ctf is None else np.asarray(ctf.scale, float)
        name = "jaxrefineScale" if ctf is None else "rlnCtfScalefactor"
        columns[name] = given * contrast
        columns["jaxrefineScaleStd"] = np.abs(given) * error
    if config.defocus_spread and ctf is not None:
        change = chosen.of_table(known.optics.defocus, 0.0)
        error = chosen.of_table(known.errors.defocus, config.defocus_spread)
        columns["rlnDefocusU"] = np.asarray(ctf.defocus_u, float) + change
        columns["rlnDefocusV"] = np.asarray(ctf.defocus_v, float) + change
        columns["jaxrefineDefocusChange"] = change
        columns["jaxrefineDefocusStd"] = error
    return columns


def _at_limits(result: Any, config: RefineConfig) -> dict[str, Any]:
    """Return how many particles have a contrast or a defocus at a limit, in sentences.

    Each entry is there if there are such particles.
    """
    known = result.estimated_optics
    if known is None:
        return {}
    prior = OpticsPrior(config.contrast_spread, config.defocus_spread)
    low, high = prior.contrast_limits
    count, told = len(result.undetermined), {}
    for name, limit, others in (
        (
            "contrast",
            f"{low:g} or {high:g}",
            "their images are unlike the rest, or show something else",
        ),
        (
            "defocus",
            f"{prior.defocus_limit:g} angstroms",
            "the given defocus is farther off, or the images do not tell it",
        ),
    ):
        found = int(np.sum(getattr(known.at_limit, name)))
        if found:
            told[f"{name}_at_limit"] = found
            told[f"{name}_limits"] = (
                f"{found} of {count} particles have a {name} at the limit of {limit}: "
                f"{others}, or poses are wrong. It is no measurement, and its error "
                "bar is the spread of the prior"
            )
    return told


def _columns(log_likelihood: Any, covariances: Any) -> dict[str, np.ndarray]:
    """Return what is known of the pose of each particle, for its table.

    The errors are root mean squares to be expected: of the angle of the rotation, in
    degrees, and of the length of the shift, in pixels.
    """
    variances = np.diagonal(np.asarray(covariances, np.float64), axis1=1, axis2=2)
    return {
        "rlnLogLikeliContribution": np.asarray(log_likelihood),
        "jaxrefineAngleStd": np.rad2deg(np.sqrt(variances[:, :3].sum(axis=1))),
        "jaxrefineShiftStd": np.sqrt(variances[:, 3:].sum(axis=1)),
    }
