r"""Multi-start: the orientations and shifts that explain an image at low resolution.

Candidate orientations are drawn about the current ones. For each of them one slice of
the map gives, by correlation, the log-likelihoods on a whole grid of shifts:

.. math:: \ell(R, t) = \Re \sum_k w_k\, \overline{S_k(R)}\, y_k\,
   e^{2\pi i\, \omega_k\cdot t / m} - \tfrac12 \sum_k w_k |S_k(R)|^2,

relative to that of an image without a particle. An orientation's score adds the prior
and is summed over the shifts; the best orientations that differ are kept.

All functions are for one particle; ``jax.vmap`` makes it many.
"""

import math
from typing import final

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Complex, Float, Int, Key, PRNGKeyArray

from jaxrefine._types import Images, Scalar
from jaxrefine.ctf import CTF
from jaxrefine.data.observation import View
from jaxrefine.data.particles import Particles
from jaxrefine.geometry import rotvec_to_matrix
from jaxrefine.operators.gridding import Spectrum
from jaxrefine.operators.slices import Disc
from jaxrefine.poses._visit import visit
from jaxrefine.poses.prior import Prior

_HIGHEST = jax.lax.Precision.HIGHEST


def shift_grid(steps: int) -> Float[np.ndarray, "t 2"]:
    """Return the integer points within a circle of radius ``steps``, centre first."""
    y, x = np.mgrid[-steps : steps + 1, -steps : steps + 1]
    inside = x**2 + y**2 <= (steps + 0.5) ** 2
    points = np.stack([x[inside], y[inside]], axis=-1).astype(float)
    return points[np.argsort(np.sum(points**2, axis=-1), kind="stable")]


def wanted_candidates(spread: float, r_max: int) -> int:
    r"""Return how many orientations cover a Gaussian of a standard deviation.

    Its volume :math:`(2\pi)^{3/2} s^3` over that of a cell of side ``1 / r_max``
    radians, by which the pattern of a particle of two thirds of the box moves by half a
    period at most; from 24 to 4096.
    """
    count = (2 * math.pi) ** 1.5 * (spread * r_max) ** 3
    return int(min(max(math.ceil(count), 24), 4096))


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
    spectrum: Spectrum,
    disc: Disc,
    data: Complex[Array, "k"],
    rotations: Float[Array, "r 3 3"],
    shifts: Float[Array, "t 2"],
    transfer: Float[Array, "k"] | None,
    weights: Float[Array, "k"],
) -> Float[Array, "r t"]:
    """Return the log-likelihood ratio of every orientation with every shift.

    Parameters as for `likelihood.cost`; a negative log-likelihood is that cost.
    """
    gain = disc.envelope.astype(weights.dtype)
    if transfer is not None:
        gain = gain * transfer
    x, y = disc.frequencies.astype(weights.dtype).T
    right, down = rotations[:, 0, :, None], rotations[:, 1, :, None]
    slices = spectrum(*(right[:, i] * x[None] + down[:, i] * y[None] for i in range(3)))
    power = jnp.matmul(
        slices.real**2 + slices.imag**2, weights * gain**2 / 2, precision=_HIGHEST
    )
    pull = weights * gain
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
    return correlation - power[:, None]


def search_pose(
    key: PRNGKeyArray,
    spectrum: Spectrum,
    disc: Disc,
    data: Complex[Array, "k"],
    transfer: Float[Array, "k"] | None,
    weights: Float[Array, "k"],
    prior: Prior,
    centres: Float[Array, "h 3 3"],
    shift: Float[Array, "2"],
    spread: Scalar,
    offsets: Float[Array, "t 2"],
    count: int,
    keep: int,
    separation: Scalar,
) -> tuple[Float[Array, "keep 3 3"], Float[Array, "keep 2"]]:
    """Return the best of many candidate poses, no two of them alike.

    Parameters
    ----------
    key
        Draws the candidates.
    spectrum, disc, data, transfer, weights
        The map, and the particle's image, as for `likelihood.cost`.
    prior
        What is known of the pose.
    centres
        Orientations to draw candidates about.
    shift, offsets
        Shifts to try: the offsets (pixels) from a shift.
    spread
        Standard deviation of the candidates about their centres, radians.
    count
        Candidates about each centre, itself among them.
    keep
        How many to return.
    separation
        Smallest angle between two of them, radians.
    """
    rotations = propose(key, centres, spread, count)
    shifts = shift[None] + offsets
    likelihoods = log_likelihoods(
        spectrum, disc, data, rotations, shifts, transfer, weights
    )
    turned = jnp.einsum("rij,ij->r", rotations, prior.rotations, precision=_HIGHEST)
    moved = jnp.sum((shifts - prior.shifts[None]) ** 2, axis=-1)
    # 3 - tr is the squared angle to fourth order.
    by_rotation = -(3.0 - turned) / (2 * prior.angle_std**2)
    within = 2.0 * (1.0 - jnp.cos(jnp.minimum(prior.max_angle, jnp.pi)))
    by_rotation = jnp.where(3.0 - turned > within + 1e-6, -jnp.inf, by_rotation)
    by_shift = -moved / (2 * prior.shift_std**2)
    by_shift = jnp.where(moved > prior.max_shift**2, -jnp.inf, by_shift)
    posterior = likelihoods + by_shift[None]
    score = jax.nn.logsumexp(posterior, axis=1) + by_rotation
    best_shift = shifts[jnp.argmax(posterior, axis=1)]

    def pick(score, _):
        index = jnp.argmax(score)
        chosen = rotations[index]
        cosine = jnp.einsum("rij,ij->r", rotations, chosen, precision=_HIGHEST)
        rest = jnp.where(3.0 - cosine < separation**2, -jnp.inf, score)
        return rest, (chosen, best_shift[index])

    return jax.lax.scan(pick, score, None, keep)[1]


_POINTS_AT_ONCE = 2**21  # slice samples in a batch of the search: 16 MiB of spectra


@eqx.filter_jit
def _search(
    keys: Key[Array, "b"],
    spectrum: Spectrum,
    view: View,
    images: Images,
    ctf: CTF | None,
    group: Int[Array, "b"],
    prior: Prior,
    centres: Float[Array, "b h 3 3"],
    shifts: Float[Array, "b 2"],
    spread: Float[Array, ""],
    offsets: Float[Array, "t 2"],
    count: int,
    keep: int,
    separation: Float[Array, ""],
):
    data, transfer = view.spectra(images, group), view.transfer(ctf, group)

    def one(key, data, transfer, prior, centres, shift):
        return search_pose(
            key,
            spectrum,
            view.disc,
            data,
            transfer,
            view.weights,
            prior,
            centres,
            shift,
            spread,
            offsets,
            count,
            keep,
            separation,
        )

    return jax.vmap(one)(keys, data, transfer, prior, centres, shifts)


@final
class Scan(eqx.Module):
    """One pass of the search: where candidates are drawn, and how many.

    Attributes
    ----------
    spread
        Standard deviation of the candidates about their centres, radians.
    shift_step, shift_steps
        Spacing (pixels) and radius (in steps) of the grid of shifts.
    count
        Candidates about each centre.
    """

    spread: float
    shift_step: float
    shift_steps: int = eqx.field(static=True)
    count: int = eqx.field(static=True)


def search_poses(
    key: PRNGKeyArray,
    particles: Particles,
    chosen: Int[np.ndarray, " chosen"],
    spectrum: Spectrum,
    view: View,
    prior: Prior,
    centres: Float[np.ndarray, "particles h 3 3"],
    shifts: Float[np.ndarray, "particles 2"],
    scan: Scan,
    keep: int,
    diameter: float = 2 / 3,
) -> tuple[Float[np.ndarray, "chosen keep 3 3"], Float[np.ndarray, "chosen keep 2"]]:
    """Search for the best candidate poses of some of the particles.

    Parameters
    ----------
    key
        Folded with each particle's index.
    particles, chosen
        All particles, and which of them to visit.
    spectrum, view
        The map, and how images are compared with it.
    prior
        Priors of all particles.
    centres, shifts
        Where to search, for all particles.
    scan
        How to search.
    keep
        Candidates to return for each particle.
    diameter
        Of the particle, as a fraction of the box. Two candidates differ if they move
        its rim by more than half a period.
    """
    dtype = view.weights.dtype
    offsets = jnp.asarray(shift_grid(scan.shift_steps), dtype) * scan.shift_step
    total = scan.count * centres.shape[1]
    size = max(1, _POINTS_AT_ONCE // (total * max(len(view.disc.shells), len(offsets))))
    separation = jnp.asarray(1 / (diameter * view.disc.r_max), dtype)
    spread = jnp.asarray(scan.spread, dtype)

    def search_batch(places, images, ctf, group, prior):
        some = chosen[places]
        keys = jax.vmap(lambda i: jax.random.fold_in(key, i))(jnp.asarray(some))
        return _search(
            keys,
            spectrum,
            view,
            images,
            ctf,
            group,
            prior,
            jnp.asarray(centres[some]),
            jnp.asarray(shifts[some]),
            spread,
            offsets,
            scan.count,
            keep,
            separation,
        )

    rotations, moved = visit(particles, chosen, prior, size, search_batch)
    return rotations, moved
