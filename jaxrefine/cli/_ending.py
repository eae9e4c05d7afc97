"""How a refinement ends: its origin is moved if asked for, its half maps processed."""

from collections.abc import Callable
from dataclasses import replace
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from jaxrefine.cli._refinement import Inputs, Outcome
from jaxrefine.cli.commands.refine import RefineSettings
from jaxrefine.data.particles import Particles
from jaxrefine.errors import InputError
from jaxrefine.maps import centre
from jaxrefine.maps.mask import AutomaticMask
from jaxrefine.maps.postprocess import GuinierFit, Postprocessed, postprocess
from jaxrefine.refinement.memory import explained
from jaxrefine.symmetry import operators

_T = TypeVar("_T")


def check_recentring(settings: RefineSettings) -> None:
    """Refuse to move an origin that the symmetry fixes.

    Raises
    ------
    InputError
        If two axes of the group meet in it.
    """
    if not settings.recentre:
        return
    kept = operators(settings.symmetry).mean(axis=0)  # projects on the common axis
    if np.allclose(kept, 0, atol=1e-6):
        raise InputError(
            "--recentre must be given with a symmetry that leaves the origin free "
            f"along an axis, such as C1 or C4, got {settings.symmetry}"
        )


def recentred(
    settings: RefineSettings, inputs: Inputs, outcome: Outcome
) -> tuple[Inputs, Outcome]:
    """Move the origin of all maps and poses to the particle's centre of mass.

    Returns
    -------
    The inputs, with a mask that has moved, and the outcome, whose report says by how
    much the origin has moved (``recentred_by_in_voxels``). If the map has no centre of
    mass, the particle would leave the box, or memory runs out, both are as they were,
    and the report says why (``not_recentred_because``).
    """
    done = _or_reason(lambda: _moved(settings, inputs, outcome))
    if isinstance(done, str):
        told = outcome.report | {"not_recentred_because": done}
        return inputs, replace(outcome, report=told)
    return done


def _moved(
    settings: RefineSettings, inputs: Inputs, outcome: Outcome
) -> tuple[Inputs, Outcome]:
    """Move the origin; raises an InputError if it cannot be moved."""
    particles, mask = inputs.source.particles, inputs.mask
    pixel, volume = particles.pixel_size_in_angstroms, jnp.asarray(outcome.volume)
    place = centre.particle_centre(volume, pixel, mask, operators(settings.symmetry))
    centre.check_stays_inside(volume, pixel, -place)

    def moved(volume: np.ndarray) -> np.ndarray:
        array = jnp.asarray(volume)
        return np.asarray(centre.translated(array, jnp.asarray(-place, array.dtype)))

    halves = outcome.half_maps
    if mask is not None:
        mask = jnp.asarray(centre.translated_mask(mask, -place))
    return replace(inputs, mask=mask), replace(
        outcome,
        poses=centre.following(outcome.poses, place, _magnification(particles)),
        volume=moved(outcome.volume),
        half_maps=None if halves is None else (moved(halves[0]), moved(halves[1])),
        report=outcome.report | {"recentred_by_in_voxels": place.tolist()},
    )


def _magnification(particles: Particles) -> np.ndarray | None:
    """Return the anisotropic magnification of each image; None if there is none."""
    aberrations = particles.aberrations
    if aberrations is None or aberrations.magnification is None:
        return None
    groups = particles.group_of(np.arange(len(particles)))
    return np.asarray(aberrations.magnification, np.float64)[groups]


def postprocessed(
    settings: RefineSettings, inputs: Inputs, outcome: Outcome
) -> Postprocessed | str | None:
    """Do what ``jaxrefine postprocess --auto-b-factor`` does to the half maps.

    Returns
    -------
    The result; if the half maps cannot be processed or memory runs out, a sentence that
    says why, since poses and map are results without it; None without half sets.
    """
    halves = outcome.half_maps
    if halves is None:
        return None

    def processed() -> Postprocessed:
        half1, half2 = map(jnp.asarray, halves)
        result = postprocess(
            half1,
            half2,
            inputs.mask,
            inputs.source.particles.pixel_size_in_angstroms,
            key=jax.random.key(settings.seed),
            b_factor_in_square_angstroms=GuinierFit(),
        )
        # A device may run out of memory after the call that asked for it.
        jax.block_until_ready((result.volume, result.masked_volume))
        return result

    return _or_reason(processed)


def automatic_mask(inputs: Inputs, outcome: Outcome) -> np.ndarray | str:
    """Make the mask of the final map, as masks are made of those before.

    Returns
    -------
    The mask; a sentence that says why there is none if memory runs out, or if it would
    be 1 everywhere.
    """
    pixel = inputs.source.particles.pixel_size_in_angstroms

    def made() -> np.ndarray:
        mask = AutomaticMask().of(jnp.asarray(outcome.volume), pixel, 2 * pixel)
        if bool((mask == 1).all()):
            raise InputError(
                "it would be 1 everywhere, as no particle stands out from the solvent "
                "of the map, or it fills the box. If that is so in the maps before, "
                "too, poses were refined without a mask"
            )
        return np.asarray(mask)

    return _or_reason(made)


def _or_reason(work: Callable[[], _T]) -> _T | str:
    """Return the result of work, or why there is none, as a sentence."""
    try:
        with explained(
            "the memory must hold some more maps at the end, got too little"
        ):
            return work()
    except InputError as error:
        return str(error)
