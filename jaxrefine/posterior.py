r"""The pose update for production: search, polish and weigh candidate poses.

Visits the particles in batches from wherever their images are kept. A particle's result
depends neither on the batch it is in nor on the batches' size (but for rounding): its
candidates are drawn with a key of its own.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from typing import final

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Complex, Float, Int, Key, PRNGKeyArray

from jaxrefine import search, slices
from jaxrefine._types import Images
from jaxrefine.ctf import CTF
from jaxrefine.gridding import Spectrum
from jaxrefine.hypotheses import Hypotheses, Prior, merge
from jaxrefine.particles import Particles
from jaxrefine.slices import Disc
from jaxrefine.tangent import Estimate, PoseUpdate, retract

NEGLIGIBLE = 1e-2
"""Hypotheses less probable than this are not followed."""

_HIGHEST = jax.lax.Precision.HIGHEST
_LEAST_CURVATURE = 0.1  # of that of Gauss and Newton
_POINTS_AT_ONCE = 2**21  # slice samples in a batch of the search: 16 MiB of spectra


@final
class View(eqx.Module):
    r"""How images are compared with maps: a band limit and the noise there.

    All groups of particles are seen with one noise, of the least power :math:`N` of
    all in each shell: the spectra of a group whose noise has the power :math:`N_g` and
    its transfer functions are multiplied by :math:`\sqrt{N / N_g}`, which leaves the
    likelihood as it is.

    Attributes
    ----------
    disc
        Frequencies that are compared.
    weights
        Multiplicity over the power of the noise; zero at the origin, since an image's
        mean says much about the background, and in shells without power.
    inverse_noise
        One over the power of the noise in a *pixel*: its power in the spectrum over
        the number of pixels. Zero where the weights are.
    factor
        What each group's spectra and transfer functions are multiplied by; None if
        there is one group.
    frequencies_in_inverse_angstroms
        Frequencies of the disc, for the optics.
    """

    disc: Disc
    weights: Float[Array, "k"]
    inverse_noise: Float[Array, "k"]
    factor: Float[Array, "groups k"] | None
    frequencies_in_inverse_angstroms: Float[Array, "k 2"]

    def spectra(
        self, images: Images, group: Int[Array, "particles"] | None
    ) -> Complex[Array, "particles k"]:
        """Return the images' spectra on the disc, at the common noise."""
        spectra = slices.image_spectra(images, self.disc)
        if self.factor is None:
            return spectra
        return spectra * self.factor[group].astype(spectra.dtype)

    def transfer(
        self, ctf: CTF | None, group: Int[Array, "particles"] | None
    ) -> Float[Array, "particles k"] | None:
        """Return the particles' transfer functions on the disc, at the common noise."""
        factor = None if self.factor is None else self.factor[group]
        if ctf is None:
            return factor
        values = jax.vmap(lambda one: one(self.frequencies_in_inverse_angstroms))(ctf)
        return values if factor is None else values * factor


def relative_precision(
    noise: Float[Array, "groups shells"],
) -> Float[Array, "groups shells"]:
    """Return one over each group's noise, in units of the least of all in a shell.

    From 0, of infinite noise, to 1; also 1 where the noise of all groups is infinite.
    """
    least = jnp.min(noise, axis=0, keepdims=True)
    return jnp.where(noise > least, least / noise, 1.0)


def view(
    particles: Particles, r_max: int, noise: Float[Array, "*groups shells"]
) -> View:
    """Compare up to ``r_max`` cycles per box, with the noise's power in each shell.

    The power is that of every group, or one for all particles.
    """
    m = particles.image_size
    disc = slices.disc(m, r_max)
    noise = jnp.atleast_2d(noise)
    power = jnp.min(noise, axis=0)[disc.shells]
    inverse = jnp.where((disc.shells > 0) & (power < jnp.inf), m**2 / power, 0.0)
    weights = disc.multiplicity.astype(noise.dtype) * inverse / m**2
    factor = None
    if len(noise) > 1:
        factor = jnp.sqrt(relative_precision(noise))[:, disc.shells]
    frequencies = disc.frequencies.astype(noise.dtype)
    physical = frequencies / (m * particles.pixel_size_in_angstroms)
    return View(disc, weights, inverse, factor, physical)


def batches(indices: Int[np.ndarray, " some"], size: int) -> Iterator[tuple]:
    """Cut indices into batches of one size, the last one filled up by repetition.

    Yields the batch and how many of it are new.
    """
    for first in range(0, len(indices), size):
        part = indices[first : first + size]
        yield np.resize(part, size), len(part)


def _visit(
    particles: Particles,
    owners: Int[np.ndarray, " some"],
    prior: Prior,
    size: int,
    function: Callable[..., Iterable[Array]],
) -> list[np.ndarray]:
    """Call ``function`` batch by batch and join its results.

    Its arguments are places in ``owners``, the particles that are wanted, and the
    images, optics, groups and priors there. No batch is larger than the particles are
    many.
    """
    size, done = min(size, len(particles)), []
    for places, new in batches(np.arange(len(owners)), size):
        some = owners[places]
        images, ctf = particles.batch(some)
        group = particles.group_of(some)
        results = function(places, images, ctf, group, prior.take(some))
        done.append([np.asarray(result)[:new] for result in results])
    return [np.concatenate(result) for result in zip(*done, strict=True)]


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
        return search.explore(
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


def explore(
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
    offsets = jnp.asarray(search.shift_grid(scan.shift_steps), dtype) * scan.shift_step
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

    rotations, moved = _visit(particles, chosen, prior, size, search_batch)
    return rotations, moved


@eqx.filter_jit
def _polish(
    spectrum: Spectrum,
    view: View,
    images: Images,
    ctf: CTF | None,
    group: Int[Array, "b"],
    prior: Prior,
    rotations: Float[Array, "b 3 3"],
    shifts: Float[Array, "b 2"],
    update: PoseUpdate,
) -> tuple[Estimate, Float[Array, "b"]]:
    data, transfer = view.spectra(images, group), view.transfer(ctf, group)

    def one(data, transfer, prior, rotation, shift):
        # A fixed component has its prior's information and no other, which takes it out
        # of the evidence, too: its integral over the prior is 1.
        free = prior.free

        def objective(rotation, shift):
            cost, gradient, information = slices.normal_equations(
                spectrum, view.disc, data, rotation, shift, transfer, view.weights
            )
            return (
                cost + prior.cost(rotation, shift),
                free * (gradient + prior.gradient(rotation, shift)),
                free[:, None] * free[None] * information + prior.information(),
            )

        estimate = update.minimise(objective, rotation, shift, prior.clip)
        energy = jnp.sum(view.weights * (data.real**2 + data.imag**2)) / 2
        _, volume = jnp.linalg.slogdet(estimate.information)
        mass = 2.5 * jnp.log(2 * jnp.pi) - volume / 2
        return estimate, energy - estimate.cost + mass

    return jax.vmap(one)(data, transfer, prior, rotations, shifts)


@final
class Polished(eqx.Module):
    """What became of some candidates (leading axis: candidates).

    Attributes
    ----------
    rotations, shifts, information, damping
        See `tangent.Estimate`.
    evidence
        Logarithm of the posterior mass about the pose, relative to the probability
        that the image shows no particle.
    """

    rotations: Float[np.ndarray, "c 3 3"]
    shifts: Float[np.ndarray, "c 2"]
    information: Float[np.ndarray, "c 5 5"]
    damping: Float[np.ndarray, "c iterations"]
    evidence: Float[np.ndarray, "c"]


def polish(
    particles: Particles,
    owners: Int[np.ndarray, " c"],
    spectrum: Spectrum,
    view: View,
    prior: Prior,
    rotations: Float[np.ndarray, "c 3 3"],
    shifts: Float[np.ndarray, "c 2"],
    update: PoseUpdate,
    batch_size: int,
) -> Polished:
    """Take candidate poses to their optima on the continuum.

    Parameters
    ----------
    particles, owners
        All particles, and the one that each candidate belongs to.
    spectrum, view, prior
        As for :func:`explore`.
    rotations, shifts
        The candidates.
    update
        How, for instance `tangent.LevenbergMarquardt()`.
    batch_size
        Candidates at a time, at most as many as there are particles.
    """

    def polish_batch(places, images, ctf, group, prior):
        estimate, evidence = _polish(
            spectrum,
            view,
            images,
            ctf,
            group,
            prior,
            jnp.asarray(rotations[places]),
            jnp.asarray(shifts[places]),
            update,
        )
        return (
            estimate.rotation,
            estimate.shift,
            estimate.information,
            estimate.damping,
            evidence,
        )

    return Polished(*_visit(particles, owners, prior, batch_size, polish_batch))


@eqx.filter_jit
def weigh(
    rotations: Float[Array, "p h 3 3"],
    shifts: Float[Array, "p h 2"],
    evidence: Float[Array, "p h"],
    separation: Float[Array, ""],
    keep: int,
    operators: Float[Array | np.ndarray, "order 3 3"] | None = None,
) -> tuple[Hypotheses, Int[Array, "p h"]]:
    """Rank the candidates of every particle and keep the best; see `hypotheses.merge`.

    Parameters
    ----------
    rotations, shifts
        Poses of ``h`` candidates of every particle, shifts in pixels.
    evidence
        Their posterior masses, logarithms; see `Polished`.
    separation
        Angle below which two of them are one, radians.
    keep
        How many to keep.
    operators
        Of the map's symmetry, if any.

    Returns
    -------
    What is kept, the best first, with weights that add up to 1, and the places of all
    candidates in that order.
    """
    ranked, order = jax.vmap(lambda r, t, e: merge(r, t, e, separation, operators))(
        rotations, shifts, evidence
    )
    kept = jax.tree.map(lambda leaf: leaf[:, :keep], ranked)
    weights = jax.nn.log_softmax(kept.log_weights, axis=-1)
    return Hypotheses(kept.rotations, kept.shifts, weights), order


@eqx.filter_jit
def _curvature(
    spectrum: Spectrum,
    view: View,
    images: Images,
    ctf: CTF | None,
    group: Int[Array, "b"],
    prior: Prior,
    rotations: Float[Array, "b 3 3"],
    shifts: Float[Array, "b 2"],
    information: Float[Array, "b 5 5"],
) -> Float[Array, "b 5 5"]:
    data, transfer = view.spectra(images, group), view.transfer(ctf, group)

    def one(data, transfer, prior, rotation, shift, information):
        root, free = jnp.linalg.cholesky(information), prior.free
        # Columns are five independent errors of one standard deviation.
        half = jnp.linalg.inv(root).T
        steps = math.sqrt(5) * jnp.concatenate([half.T, -half.T])

        def gradient(step):
            place = retract(rotation, shift, free * step)
            _, slope = slices.cost_and_gradient(
                spectrum, view.disc, data, *place, transfer, view.weights
            )
            still = (1 - free) * jnp.diag(prior.information()) * step
            slope = free * (slope + prior.gradient(*place)) + still
            return jnp.matmul(half.T, slope, precision=_HIGHEST)

        slopes = jax.lax.map(gradient, steps)
        mean = (slopes[:5] - slopes[5:]) / (2 * math.sqrt(5))
        whitened = (mean + mean.T) / 2
        found = jnp.matmul(root, whitened, precision=_HIGHEST)
        found = jnp.matmul(found, root.T, precision=_HIGHEST)
        sound = jnp.linalg.eigvalsh(whitened)[0] > _LEAST_CURVATURE
        return jnp.where(sound, found, information)

    return jax.vmap(one)(data, transfer, prior, rotations, shifts, information)


def curvature(
    particles: Particles,
    owners: Int[np.ndarray, " c"],
    spectrum: Spectrum,
    view: View,
    prior: Prior,
    rotations: Float[np.ndarray, "c 3 3"],
    shifts: Float[np.ndarray, "c 2"],
    information: Float[np.ndarray, "c 5 5"],
    batch_size: int,
) -> Float[np.ndarray, "c 5 5"]:
    r"""Return the mean Hessian of the cost over the Gaussian posterior of each pose.

    .. math:: \mathbb{E}[\nabla^2 J] = \Sigma^{-1}\, \mathbb{E}[\delta\, \nabla
       J(\delta)^T], \qquad \delta \sim \mathcal{N}(0, \Sigma)

    by the cubature rule of third degree: gradients at plus and minus :math:`\sqrt 5`
    standard deviations along five axes. Unlike the information of Gauss and Newton it
    knows the residual and how the cost flattens away from its optimum, so ellipsoids
    of its inverse cover what they should more nearly. Where it is not safely positive
    definite, the given information is returned.
    """

    def curvature_of_batch(places, images, ctf, group, prior):
        found = _curvature(
            spectrum,
            view,
            images,
            ctf,
            group,
            prior,
            jnp.asarray(rotations[places]),
            jnp.asarray(shifts[places]),
            jnp.asarray(information[places]),
        )
        return (found,)

    return _visit(particles, owners, prior, batch_size, curvature_of_batch)[0]
