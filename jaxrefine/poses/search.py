r"""The search for orientations and shifts that explain an image at low resolution.

Candidate orientations are drawn about the current ones. For each of them one slice of
the map gives, by correlation, the log-likelihoods on a whole grid of shifts:

.. math:: \ell(R, t) = \Re \sum_k w_k\, \overline{S_k(R)}\, y_k\,
   e^{2\pi i\, \omega_k\cdot t / m} - \tfrac12 \sum_k w_k |S_k(R)|^2,

relative to that of an image without a particle. An orientation's score adds the prior
and is summed over the shifts; the best orientations that differ are kept.

All functions are for one particle; use ``jax.vmap`` for many.
"""

import math
from typing import final

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from jaxrefine._types import Scalar
from jaxrefine.data.observation import Observation
from jaxrefine.geometry import rotvec_to_matrix
from jaxrefine.operators.gridding import Spectrum
from jaxrefine.operators.slices import on_plane, phases, slice_gain
from jaxrefine.poses.prior import Prior

_HIGHEST = jax.lax.Precision.HIGHEST
# Orientations that a search of a whole prior tries: a few even if the prior is narrower
# than a cell, and no more than can be afforded. The upper bound is reached by a spread
# of 6.4 cells; beyond it the prior is searched more sparsely than by cells. Both bounds
# are conventions that no benchmark has set.
_FEWEST, _MOST = 24, 4096
# Orientations whose slices are read at a time. It bounds the memory, and changes no
# result.
_AT_ONCE = 32


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
    count: Int[Array, ""],
    most: int,
) -> Float[Array, "{most} 3 3"]:
    """Draw ``count`` orientations about each centre, the first being the centre.

    Parameters
    ----------
    key
        Draws them.
    centres
        Orientations to draw candidates about.
    spread
        Standard deviation of each component of the rotation vector, radians.
    count
        How many to draw about each centre.
    most
        How many to return; those beyond ``count`` times the number of centres are drawn
        about the last one.
    """
    places = jnp.arange(most, dtype=jnp.int32)
    vectors = spread * jax.random.normal(key, (most, 3), centres.dtype)
    vectors = jnp.where((places % count == 0)[:, None], 0.0, vectors)
    centre = centres[jnp.minimum(places // count, len(centres) - 1)]
    return jnp.matmul(rotvec_to_matrix(vectors), centre, precision=_HIGHEST)


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

    def part(seen: Observation) -> Float[Array, "r t"]:
        disc, weights = seen.disc, seen.weights
        gain = slice_gain(disc, seen.transfer, weights.dtype)
        slices = jax.vmap(
            lambda rotation: reference(*on_plane(disc, rotation, seen.magnification)[0])
        )(rotations)
        energy = jnp.matmul(
            slices.real**2 + slices.imag**2, weights * gain**2 / 2, precision=_HIGHEST
        )
        pull, data = weights * gain, seen.spectrum
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

    return observation.sum_over_parts(part)


@final
class Search(eqx.Module):
    """One pass of the search: which candidates are tried, and how many are kept.

    The shapes of its arrays do not depend on how many candidates are tried, so that one
    program serves several passes.

    Attributes
    ----------
    spread
        Standard deviation of each component of the rotation vectors of the candidates
        about their centres, radians.
    offsets
        Shifts to try, in pixels, from the shift that the search begins at.
    tried
        Which of the offsets to try; the others only fill up the array.
    separation
        Smallest angle between two candidates that are kept, radians.
    count
        Candidates about each centre, the centre among them.
    centres
        Number of centres that candidates are drawn about.
    most
        Candidates that there is room for: at least ``count`` times ``centres``.
    keep
        Candidates that are kept for each particle.
    """

    spread: Float[Array, ""]
    offsets: Float[Array, "t 2"]
    tried: Bool[Array, "t"]
    separation: Float[Array, ""]
    count: Int[Array, ""]
    centres: Int[Array, ""]
    most: int = eqx.field(static=True)
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

        If the rotation is known only up to a group, the best candidate near each of its
        copies is among them.

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
        room = self.most + -self.most % _AT_ONCE
        total = self.count * self.centres
        rotations = propose(key, centres, self.spread, self.count, room)
        # Seen from the shift, the offsets are those of all particles.
        unshifted = _without_shift(observation, shift)

        def compare(index, values):
            first = index * _AT_ONCE
            some = jax.lax.dynamic_slice_in_dim(rotations, first, _AT_ONCE)
            found = log_likelihoods(reference, unshifted, some, self.offsets)
            return jax.lax.dynamic_update_slice_in_dim(values, found, first, 0)

        empty = jnp.zeros((room, len(self.offsets)), self.offsets.dtype)
        rounds = (total + _AT_ONCE - 1) // _AT_ONCE
        likelihoods = jax.lax.fori_loop(0, rounds, compare, empty)

        shifts = shift[None] + self.offsets
        turned = jnp.einsum("rij,kij->rk", rotations, prior.centres, precision=_HIGHEST)
        moved = jnp.sum((shifts - prior.shifts[None]) ** 2, axis=-1)
        # 3 - tr is the squared angle to fourth order.
        by_rotation = jax.nn.logsumexp(
            -(3.0 - turned) / (2 * prior.angle_spread**2), axis=1
        )
        within = 2.0 * (1.0 - jnp.cos(jnp.minimum(prior.max_angle, jnp.pi)))
        is_allowed = (3.0 - jnp.max(turned, axis=1) <= within + 1e-6) & (
            jnp.arange(room, dtype=total.dtype) < total
        )
        by_rotation = jnp.where(is_allowed, by_rotation, -jnp.inf)
        by_shift = -moved / (2 * prior.shift_spread**2)
        is_allowed = (moved <= prior.max_shift**2) & self.tried
        by_shift = jnp.where(is_allowed, by_shift, -jnp.inf)
        posterior = likelihoods + by_shift[None]
        score = jax.nn.logsumexp(posterior, axis=1) + by_rotation
        best_shift = shifts[jnp.argmax(posterior, axis=1)]

        # First the best candidate near each copy of the given rotation, then the best
        # of all that are left.
        copy = jnp.argmax(turned, axis=1)
        count = turned.shape[1]

        def pick(carry, number):
            score, is_missing = carry
            wanted = (number >= count) | is_missing[copy]
            index = jnp.argmax(jnp.where(wanted, score, -jnp.inf))
            chosen = rotations[index]
            cosine = jnp.einsum("rij,ij->r", rotations, chosen, precision=_HIGHEST)
            rest = jnp.where(3.0 - cosine < self.separation**2, -jnp.inf, score)
            rest = (rest, is_missing.at[copy[index]].set(False))
            return rest, (chosen, best_shift[index])

        start = (score, jnp.ones(count, bool))
        return jax.lax.scan(pick, start, jnp.arange(self.keep))[1]


def _without_shift(observation: Observation, shift: Float[Array, "2"]) -> Observation:
    """Return an observation of the particle without a shift, in pixels."""
    spectrum = observation.spectrum * jnp.conj(phases(observation.disc, shift))
    return eqx.tree_at(lambda o: o.spectrum, observation, spectrum)
