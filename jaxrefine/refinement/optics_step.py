"""The update of contrast and defocus of an outer iteration, for one set of particles.

Both are found anew in each iteration, at the best pose of each particle, from the map
of the fold that it is not in (:mod:`jaxrefine.poses.optics`). From there on they are in
its transfer function, and so in its likelihood, in its noise, and in the weights with
which it is summed up.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import final

import equinox as eqx
import jax
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jaxrefine._arrays import on_device
from jaxrefine._types import Images, Volume
from jaxrefine._watch import Stage
from jaxrefine.aberrations import magnified
from jaxrefine.ctf import CTF, transparent
from jaxrefine.data import observation
from jaxrefine.data.observation import View
from jaxrefine.data.visit import visit
from jaxrefine.maps.folds import FOLDS
from jaxrefine.operators.gridding import Spectrum
from jaxrefine.poses import optics
from jaxrefine.poses.optics import AtLimit, Optics, OpticsEstimate, OpticsPrior
from jaxrefine.refinement.config import RefineConfig
from jaxrefine.refinement.sets import ParticleSet, in_order
from jaxrefine.refinement.state import SetState


def first_optics(particle_set: ParticleSet) -> Optics | None:
    """Return contrast and defocus as they are given; None if neither is refined."""
    if _prior(particle_set) is None:
        return None
    count = len(particle_set)
    ones, zeros = np.ones(count, np.float32), np.zeros(count, np.float32)
    return Optics(on_device(ones), on_device(zeros))


def applied(particle_set: ParticleSet, state: SetState) -> ParticleSet:
    """Return the particles with the contrast and the defocus that are in their state.

    Parameters
    ----------
    particle_set
        The particles with the optics that are given.
    state
        What is known of them.
    """
    if state.optics is None:
        return particle_set
    found, given = (
        jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), each)
        for each in (state.optics, _given(particle_set))
    )
    ctf = found.applied(given)
    return replace(particle_set, particles=replace(particle_set.particles, ctf=ctf))


def update_optics(
    particle_set: ParticleSet,
    state: SetState,
    references: Sequence[Volume],
    r_max: int,
    shown: Bool[np.ndarray, " particles"],
) -> tuple[SetState, OpticsEstimate | None]:
    """Find the contrast and the defocus of all particles at their best poses.

    The contrast and its standard deviation are divided by the mean contrast of the
    images that show a particle, as these do not tell it from the scale of the map. The
    others, whose contrast is near the least that is allowed, would move the mean.

    Parameters
    ----------
    particle_set
        The particles with the optics that are given.
    state
        What is known of them, poses among others.
    references
        What those of each fold are compared with, from `pose_step.reference_maps`.
    r_max
        Band limit, cycles per box.
    shown
        Which images show a particle; if there are none, no contrast is divided.

    Returns
    -------
    The state with contrast and defocus, and what is known of them; the state as it is,
    and None, if neither is refined. The limits are those before the division.
    """
    prior = _prior(particle_set)
    if prior is None:
        return state, None
    particles, config = particle_set.particles, particle_set.config
    particles = replace(particles, ctf=_given(particle_set))
    view = observation.view(
        particles, particle_set.last_shell, state.noise, observation.PART
    )
    best = state.hypotheses.best()
    poses = np.asarray(best.rotations), np.asarray(best.shifts)
    stage = Stage(particle_set.watch, "optics", len(particle_set))
    members = [particle_set.of_fold(fold) for fold in range(FOLDS)]
    of_folds = []
    for volume, owners in zip(references, members, strict=True):
        reference = config.interpolation.spectrum(volume, particle_set.last_shell)
        of_folds.append(
            visit(
                _Measure(prior),
                (reference, view, on_device(np.int32(r_max))),
                particles,
                owners,
                jax.tree.map(lambda leaf, at=owners: leaf[at], poses),
                config.batch_size,
                stage,
            )
        )
    found = in_order(of_folds, members)
    scale = 1.0
    if config.contrast_spread and shown.any():
        scale = np.mean(found.optics.contrast[shown], dtype=np.float64)
    contrast, error = (
        (each.contrast / scale).astype(np.float32)
        for each in (found.optics, found.errors)
    )
    new = Optics(on_device(contrast), on_device(found.optics.defocus))
    state = eqx.tree_at(
        lambda s: s.optics, state, new, is_leaf=lambda leaf: leaf is None
    )
    errors = replace(found.errors, contrast=error)
    return state, replace(found, optics=new, errors=errors)


def of_determined(
    found: OpticsEstimate | None,
    config: RefineConfig,
    determined: Bool[np.ndarray, " particles"],
) -> OpticsEstimate | None:
    """Return what is known of contrast and defocus.

    Of a particle that is not determined it is what was given, with the priors' spreads.
    """
    if found is None:
        return None
    unknown = OpticsEstimate(
        Optics(np.asarray(1.0), np.asarray(0.0)),
        Optics(np.asarray(config.contrast_spread), np.asarray(config.defocus_spread)),
        AtLimit(np.asarray(False), np.asarray(False)),
    )
    return jax.tree.map(
        lambda one, other: np.where(determined, one, other), found, unknown
    )


def of_all(
    of_sets: Sequence[OpticsEstimate | None],
    indices: Sequence[Int[np.ndarray, " _"]],
) -> OpticsEstimate | None:
    """Return what is known of all particles' optics from what is of those of the sets.

    Parameters
    ----------
    of_sets
        That of each set; None if neither is refined.
    indices
        Where the particles of each set are among all.
    """
    if any(each is None for each in of_sets):
        return None
    return in_order(of_sets, indices)


@final
class _Measure(eqx.Module):
    """The block function that estimates contrast and defocus; see `visit`."""

    prior: OpticsPrior

    def __call__(
        self,
        common: tuple[Spectrum, View, Int[Array, ""]],
        images: Images,
        ctf: CTF,
        group: Int[Array, "p"],
        exists: Bool[Array, "p"],
        poses: tuple[Float[Array, "p 3 3"], Float[Array, "p 2"]],
    ) -> OpticsEstimate:
        del exists
        reference, view, r_max = common
        view = view.up_to(r_max)
        spectra, moved = view.spectra(images, group), view.magnifications(group)
        factor, gamma = jax.tree.map(
            lambda leaf: leaf[group], (view.factor, view.gamma)
        )

        def measure(spectrum, factor, magnification, gamma, ctf, rotation, shift):
            frequencies = magnified(
                magnification, view.frequencies_in_inverse_angstroms
            )
            seen = optics.compare(
                reference,
                view.observation(spectrum, factor, magnification),
                rotation,
                shift,
                frequencies,
                gamma,
            )
            return optics.estimate(self.prior, ctf, seen)

        return jax.vmap(measure)(spectra, factor, moved, gamma, ctf, *poses)


def _prior(particle_set: ParticleSet) -> OpticsPrior | None:
    """Return how well contrast and defocus are known; None if neither is refined."""
    config = particle_set.config
    if not (config.contrast_spread or config.defocus_spread):
        return None
    return OpticsPrior(config.contrast_spread, config.defocus_spread)


def _given(particle_set: ParticleSet) -> CTF:
    """Return the transfer functions that are given, of value 1 if there are none."""
    particles = particle_set.particles
    return transparent(len(particles)) if particles.ctf is None else particles.ctf
