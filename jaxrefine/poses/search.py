r"""The search for orientations and shifts that explain an image at low resolution.

Candidate orientations are drawn about the current ones. For each of them one slice of
the map gives, by correlation, the log-likelihoods on a whole grid of shifts:

.. math:: \ell(R, t) = \Re \sum_k w_k\, \overline{S_k(R)}\, y_k\,
   e^{2\pi i\, \omega_k\cdot t / m} - \tfrac12 \sum_k w_k |S_k(R)|^2,

relative to that of an image without a particle. An orientation's score adds the prior
and is summed over the shifts; the best orientations that differ are kept.

All functions but `search_poses` are for one particle; use ``jax.vmap`` for many.
"""

import math
from typing import final

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PRNGKeyArray

from jaxrefine._types import Scalar
from jaxrefine.data.observation import Observation, View
from jaxrefine.data.particles import Particles
from jaxrefine.geometry import rotvec_to_matrix
from jaxrefine.operators.gridding import Spectrum
from jaxrefine.operators.slices import on_plane, slice_gain
from jaxrefine.poses.prior import Prior
from jaxrefine.poses.visit import visit

_HIGHEST = jax.lax.Precision.HIGHEST
# Orientations that a search of a whole prior tries: a few even if the prior is narrower
# than a cell, and no more than can be afforded. The upper bound is reached by a spread
# of 6.4 cells; beyond it the prior is searched more sparsely than by cells. Both bounds
# are conventions that no benchmark has set.
_FEWEST, _MOST = 24, 4096


def shift_grid(steps: int) -> Float[np.ndarray, "t 2"]:
    """Return the integer points within a circle of radius ``steps``, centre first."""
    y, x = np.mgrid[-steps : steps + 1, -steps : steps + 1]
    inside = x**2 + y**2 <= (steps + 0.5) ** 2
    points = np.stack([x[inside], y[inside]], axis=-1).astype(float)
    return points[np.argsort(np.sum(points**2, axis=-1), kind="stable")]


PARTICLE_DIAMETER = 2 / 3
"""Diameter of a particle whose size is not given, as a fraction of the box."""


def half_period_turn(particle_diameter: float, r_max: int) -> float:
    """Return the turn that moves the rim of a particle by half a period, radians.

    Parameters
    ----------
    particle_diameter
        As a fraction of the box.
    r_max
        Band limit, cycles per box.
    """
    return 1 / (particle_diameter * r_max)


def search_cell(particle_diameter: float, r_max: int) -> float:
    """Return the side of the cells that rotations are searched in, radians.

    It is two thirds of `half_period_turn`, so that neighbouring cells overlap. For a
    particle of `PARTICLE_DIAMETER` it is ``1 / r_max``.

    Parameters
    ----------
    particle_diameter, r_max
        As for `half_period_turn`.
    """
    return 2 / 3 * half_period_turn(particle_diameter, r_max)


def covering_count(spread: float, cell: float) -> int:
    r"""Return how many orientations cover a Gaussian distribution of rotations.

    This is its volume :math:`(2\pi)^{3/2} s^3` over that of a cell, but no less than 24
    and no more than 4096.

    Parameters
    ----------
    spread
        Standard deviation ``s`` of each component of the rotation vector, radians.
    cell
        Side of a cell, radians.
    """
    count = (2 * math.pi) ** 1.5 * (spread / cell) ** 3
    return int(min(max(math.ceil(count), _FEWEST), _MOST))


def propose(
    key: PRNGKeyArray,
    centres: Float[Array, "h 3 3"],
    spread: Scalar,
    count: int,
) -> Float[Array, "h*{count} 3 3"]:
    """Draw ``count`` orientations about each centre, the first being the centre.

    ``spread`` is the standard deviation of each component of the rotation vector.
    """
    shape = (centres.shape[0], count, 3)
    vectors = spread * jax.random.normal(key, shape, centres.dtype)
    turns = rotvec_to_matrix(vectors.at[:, 0].set(0.0))
    turned = jnp.einsum("hcij,hjk->hcik", turns, centres, precision=_HIGHEST)
    return turned.reshape(-1, 3, 3)


def log_likelihoods(
    reference: Spectrum,
    observation: Observation,
    rotations: Float[Array, "r 3 3"],
    shifts: Float[Array, "t 2"],
) -> Float[Array, "r t"]:
    """Return the log-likelihood ratio of every orientation with every shift.

    Relative to an image without a particle. Parameters as for `likelihood.cost`, whose
    cost is the negative log-likelihood.
    """
    disc, weights = observation.disc, observation.weights
    gain = slice_gain(disc, observation.transfer, weights.dtype)
    slices = jax.vmap(lambda rotation: reference(*on_plane(disc, rotation)[0]))(
        rotations
    )
    energy = jnp.matmul(
        slices.real**2 + slices.imag**2, weights * gain**2 / 2, precision=_HIGHEST
    )
    pull, data = weights * gain, observation.spectrum
    real, imaginary = pull * data.real, pull * data.imag
    # sum_k Re(conj(S) y e^{i a}) as one real matrix product over 2k columns.
    frequencies = disc.frequencies.astype(weights.dtype)
    angle = jnp.matmul(frequencies, shifts.T, precision=_HIGHEST)
    angle = angle * (2 * jnp.pi / disc.image_size)
    cosine, sine = jnp.cos(angle), jnp.sin(angle)
    by_real = real[:, None] * cosine - imaginary[:, None] * sine
    by_imaginary = imaginary[:, None] * cosine + real[:, None] * sine
    correlation = jnp.matmul(slices.real, by_real, precision=_HIGHEST)
    correlation = correlation + jnp.matmul(
        slices.imag, by_imaginary, precision=_HIGHEST
    )
    return correlation - energy[:, None]


@final
class Search(eqx.Module):
    """One pass of the search: which candidates are tried, and how many are kept.

    Attributes
    ----------
    spread
        Standard deviation of each component of the rotation vectors of the candidates
        about their centres, radians.
    offsets
        Shifts to try, in pixels, from the shift that the search begins at.
    separation
        Smallest angle between two candidates that are kept, radians.
    count
        Candidates about each centre, the centre among them.
    keep
        Candidates that are kept for each particle.
    """

    spread: Float[Array, ""]
    offsets: Float[Array, "t 2"]
    separation: Float[Array, ""]
    count: int = eqx.field(static=True)
    keep: int = eqx.field(static=True)

    def __call__(
        self,
        reference: Spectrum,
        observation: Observation,
        key: PRNGKeyArray,
        prior: Prior,
        centres: Float[Array, "h 3 3"],
        shift: Float[Array, "2"],
    ) -> tuple[Float[Array, "keep 3 3"], Float[Array, "keep 2"]]:
        """Return the best candidate poses of one particle, none near another.

        Parameters
        ----------
        reference, observation
            The map and the particle's image, as for `likelihood.cost`.
        key
            Draws the candidates.
        prior
            What is known of the pose.
        centres, shift
            Orientations and shift (pixels) to draw candidates about.
        """
        rotations = propose(key, centres, self.spread, self.count)
        shifts = shift[None] + self.offsets
        likelihoods = log_likelihoods(reference, observation, rotations, shifts)
        turned = jnp.einsum("rij,ij->r", rotations, prior.rotations, precision=_HIGHEST)
        moved = jnp.sum((shifts - prior.shifts[None]) ** 2, axis=-1)
        # 3 - tr is the squared angle to fourth order.
        by_rotation = -(3.0 - turned) / (2 * prior.angle_spread**2)
        within = 2.0 * (1.0 - jnp.cos(jnp.minimum(prior.max_angle, jnp.pi)))
        by_rotation = jnp.where(3.0 - turned > within + 1e-6, -jnp.inf, by_rotation)
        by_shift = -moved / (2 * prior.shift_spread**2)
        by_shift = jnp.where(moved > prior.max_shift**2, -jnp.inf, by_shift)
        posterior = likelihoods + by_shift[None]
        score = jax.nn.logsumexp(posterior, axis=1) + by_rotation
        best_shift = shifts[jnp.argmax(posterior, axis=1)]

        def pick(score, _):
            index = jnp.argmax(score)
            chosen = rotations[index]
            cosine = jnp.einsum("rij,ij->r", rotations, chosen, precision=_HIGHEST)
            rest = jnp.where(3.0 - cosine < self.separation**2, -jnp.inf, score)
            return rest, (chosen, best_shift[index])

        return jax.lax.scan(pick, score, None, self.keep)[1]


def search_poses(
    search: Search,
    key: PRNGKeyArray,
    particles: Particles,
    chosen: Int[np.ndarray, " chosen"],
    reference: Spectrum,
    view: View,
    prior: Prior,
    centres: Float[np.ndarray, "particles h 3 3"],
    shifts: Float[np.ndarray, "particles 2"],
    samples_at_once: int = 2**21,
) -> tuple[Float[np.ndarray, "chosen keep 3 3"], Float[np.ndarray, "chosen keep 2"]]:
    """Search for the best candidate poses of some of the particles.

    Parameters
    ----------
    search
        Which candidates are tried, and how many are kept.
    key
        Folded with the index of each particle, so that its candidates depend neither
        on the other particles nor on the batches.
    particles, chosen
        All particles, and which of them to visit.
    reference, view
        Spectrum of the map, and how images are compared with it.
    prior
        Priors of all particles.
    centres, shifts
        Orientations and shifts (pixels) to draw candidates about, for all particles.
    samples_at_once
        Samples of slices in a batch, which bounds its memory and changes no result. The
        default is 16 MiB of spectra; `jaxrefine.refinement.memory` counts on it.
    """
    indices = jnp.asarray(chosen)
    keys = jax.vmap(lambda index: jax.random.fold_in(key, index))(indices)
    samples = max(len(view.disc.shells), len(search.offsets))
    samples = samples * search.count * centres.shape[1]
    candidates = (keys, prior.take(chosen), centres[chosen], shifts[chosen])
    batch_size = max(1, samples_at_once // samples)
    return visit(search, particles, chosen, reference, view, candidates, batch_size)
