r"""Projection matching: the poses of images in a map, without initial poses.

Templates are slices of the map's spectrum along near-uniform viewing directions, read
on rings up to a band limit. With an image's spectrum :math:`\hat g` and its contrast
transfer function ``h`` on the same rings, a shift ``t`` is a phase and the in-plane
angle a turn of the slice :math:`S_d` of direction ``d``:

.. math:: C(d, \psi, t) = \sum_{r, \phi} r\, \Re\bigl(\overline{S_d(r, \phi + \psi)}\,
   h(r, \phi)\, \hat g(r, \phi)\, e^{2\pi i\, \omega\cdot t / m}\bigr),

the factor ``r`` being proportional to the area of a ring. For all ``psi`` at once this
is a product of matrices over the rings for each angular frequency, and a Fourier
transform (Joyeux and Penczek, Ultramicroscopy 92, 2002, compare such methods). The
score is ``C`` divided by the norms of the image and of the template times ``h``.

The phases of aberrations are taken from an image's spectrum first. Where the
magnification depends on the direction, the rings are those of the map, and an image is
read at the frequencies that are mapped to them (:mod:`jaxrefine.aberrations`).

A spectrum at :math:`\phi + \pi` is the conjugate of that at :math:`\phi`. The sum of
its real part, all of whose angular frequencies are even, and its imaginary part, whose
are odd, is a real function on the circle with the same inner products (the Hartley
transform): this is what is correlated.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import final

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Complex, Float, Int

from jaxrefine._batching import map_over_particles
from jaxrefine._types import Images, Volume
from jaxrefine.aberrations import Aberrations
from jaxrefine.ctf import CTF
from jaxrefine.data.observation import batches
from jaxrefine.data.particles import Particles
from jaxrefine.data.preprocess import outside
from jaxrefine.errors import InputError
from jaxrefine.euler import euler_to_matrix, projection_matrix
from jaxrefine.geometry import Poses
from jaxrefine.maps.scale import at_unit_scale
from jaxrefine.operators.gridding import Gridding
from jaxrefine.poses.search import PARTICLE_DIAMETER, search_cell

_HIGHEST = jax.lax.Precision.HIGHEST
# 32 MiB of scores in single precision; products and transforms of the same size take
# about three times as much while they are made.
_SCORES_AT_ONCE = 2**23
# Slices read at a time. It bounds the memory of the interpolation and changes no
# result; the number itself is a convention.
_TEMPLATES_AT_ONCE = 64


@final
@dataclass(frozen=True)
class MatchConfig:
    """Parameters of projection matching.

    Attributes
    ----------
    angle_step
        Between neighbouring directions, and in plane; radians, at most ``pi / 2``.
        Where it does not divide half a turn, the next smaller one that does is taken.
    max_shift, shift_step
        Radius and spacing of the grid of shifts, pixels.
    r_max
        Band limit, cycles per box. None takes the largest one for which the angular
        step is at most `search.search_cell`, for a particle of
        `search.PARTICLE_DIAMETER`, but none beyond Nyquist.
    batch_size
        Particles at a time. Memory grows with it, with the shifts and with the band.

    Raises
    ------
    InputError
        If the shifts or the batch size are out of range; `match` checks the others.
    """

    angle_step: float = math.radians(7.5)
    max_shift: float = 4.0
    shift_step: float = 1.0
    r_max: int | None = None
    batch_size: int = 64

    def __post_init__(self):
        if not 0 <= self.max_shift < math.inf:
            raise InputError(
                f"max_shift must be at least 0 pixels and finite, got {self.max_shift}"
            )
        if not 0 < self.shift_step < math.inf:
            raise InputError(
                f"shift_step must be a positive number of pixels, got {self.shift_step}"
            )
        if self.batch_size < 1:
            raise InputError(f"batch_size must be at least 1, got {self.batch_size}")


@final
@dataclass(frozen=True)
class Match:
    """The best pose of each particle on the grid.

    Attributes
    ----------
    poses
        Rotation matrices ``(P, 3, 3)`` and shifts ``(P, 2)``, pixels.
    scores
        Normalised cross-correlation of each image and its template within the band,
        from -1 to 1 (with astigmatism roughly so, see `match`).
    angle_step, r_max
        The in-plane step, radians, and the band limit, cycles per box, that were used.
    """

    poses: Poses
    scores: Float[Array, "particles"]
    angle_step: float
    r_max: int


def directions(step: float) -> Float[np.ndarray, "d 2"]:
    """Return near-uniform viewing directions ``(rot, tilt)``, in radians.

    They lie on parallels of latitude from pole to pole, at most a step apart, and on
    each at most a step apart. No direction of the sphere is further than about 0.75
    steps from one of them.

    Parameters
    ----------
    step
        Angular step, radians.

    Raises
    ------
    InputError
        If the step is not positive, or more than ``pi / 2``.
    """
    if not 0 < step <= math.pi / 2:
        raise InputError(
            "the angular step must be more than 0 and at most pi / 2 radians, got "
            f"{step}"
        )
    parallels = []
    for tilt in np.linspace(0, math.pi, _steps(math.pi, step) + 1):
        count = max(_steps(2 * math.pi * math.sin(tilt), step), 1)
        rot = 2 * math.pi / count * np.arange(count)
        parallels.append(np.stack([rot, np.full(count, tilt)], axis=-1))
    return np.concatenate(parallels)


def match(
    particles: Particles,
    volume: Volume,
    config: MatchConfig | None = None,
    *,
    callback: Callable[[int], None] | None = None,
) -> Match:
    """Find the pose of every particle by projection matching, on a grid of poses.

    An image's background, the mean outside the circle inscribed in it, is subtracted,
    so that a constant added to an image changes nothing. The map's background should be
    zero. Where an image or a template has no power in the band, the score is 0.

    The norm of a template is that with the square of the contrast transfer function
    averaged over each ring, which is exact without astigmatism.

    Parameters
    ----------
    particles
        ``P`` images of side ``n``, which are read in batches, and their optics.
    volume
        The map, of shape ``(n, n, n)``, with voxels of the images' pixel size.
    config
        Parameters; by default `MatchConfig()`.
    callback
        Called after each batch with the number of particles done so far.

    Returns
    -------
    The best pose of each particle on the grid, and its score.

    Raises
    ------
    InputError
        If the angular step, the band limit or the largest shift is out of range, the
        map does not have the side of the images, or an image is not finite.
    """
    config = MatchConfig() if config is None else config
    m = particles.image_size
    if volume.shape != (m,) * 3:
        text = " x ".join(map(str, volume.shape))
        raise InputError(
            f"the map must have the side of the images, {m} pixels, got {text} voxels"
        )
    if config.max_shift > m / 2:
        raise InputError(
            f"max_shift must be at most half of the side of the images, {m // 2} "
            f"pixels, got {config.max_shift:g}"
        )
    views = directions(config.angle_step)
    half_turn = _steps(math.pi, config.angle_step)
    r_max = _band_limit(config.r_max, config.angle_step, m)
    if particles.aberrations is not None:
        r_max = min(r_max, _farthest_ring(particles.aberrations, m))
    points = _rings(r_max, half_turn)
    shifts = jnp.asarray(_shifts(config.max_shift, config.shift_step), jnp.float32)
    size = min(config.batch_size, len(particles))
    most = max(_SCORES_AT_ONCE // (2 * half_turn * size * len(shifts)), 1)
    chunks = -(-len(views) // most)
    templates = _templates(
        at_unit_scale(volume.astype(jnp.float32)),
        points,
        jnp.asarray(views, jnp.float32),
        chunks,
    )
    results, done = [], 0
    for places, count in batches(np.arange(len(particles)), size):
        images, ctf = particles.batch(places)
        best = _best(
            images,
            ctf,
            templates,
            points,
            shifts,
            particles.pixel_size_in_angstroms,
            particles.aberrations,
            jnp.asarray(particles.group_of(places), jnp.int32),
        )
        results.append([np.asarray(values)[:count] for values in best])
        done += count
        if callback is not None:
            callback(done)
    columns = zip(*results, strict=True)
    scores, angles, moves = (jnp.asarray(np.concatenate(x)) for x in columns)
    poses = Poses(euler_to_matrix(angles), moves)
    return Match(poses, scores, math.pi / half_turn, r_max)


def _steps(length: float, step: float) -> int:
    """Return how many equal parts of a length are no longer than a step."""
    return math.ceil(length / step - 1e-9)


def _band_limit(r_max: int | None, step: float, image_size: int) -> int:
    last = (image_size - 1) // 2
    if r_max is None:
        # The cell is inversely proportional to the band limit.
        supported = search_cell(PARTICLE_DIAMETER, 1) / step
        return max(min(int(supported + 1e-9), last), 1)
    if not 1 <= r_max <= last:
        raise InputError(
            f"the band limit of images of {image_size} pixels must be from 1 to {last} "
            f"cycles per box, got {r_max}"
        )
    return r_max


def _farthest_ring(aberrations: Aberrations, image_size: int) -> int:
    """Return the last ring that images with a magnification have below Nyquist."""
    last = (image_size - 1) // 2
    if aberrations.magnification is None:
        return last
    least = np.linalg.norm(np.asarray(aberrations.magnification), -2, axis=(1, 2)).min()
    return max(1, min(last, int(last * least)))


def _shifts(radius: float, step: float) -> Float[np.ndarray, "t 2"]:
    """Return the points of a square grid within a circle, its centre among them."""
    reach = int(radius / step + 1e-9)
    y, x = step * np.mgrid[-reach : reach + 1, -reach : reach + 1]
    inside = x**2 + y**2 <= radius**2 * (1 + 1e-9)
    return np.stack([x[inside], y[inside]], axis=-1)


def _rings(r_max: int, half_turn: int) -> Float[Array, "r h 2"]:
    """Return the frequencies ``(x, y)`` of half circles, in cycles per box."""
    angles = np.pi / half_turn * np.arange(half_turn)
    circle = np.stack([np.cos(angles), np.sin(angles)], axis=-1)
    radii = np.arange(1, r_max + 1)
    return jnp.asarray(radii[:, None, None] * circle, jnp.float32)


def _series(spectra: Complex[Array, "*b r h"]) -> Complex[Array, "*b r l"]:
    """Return the Fourier series around the rings of the Hartley transform."""
    near, far = spectra.real + spectra.imag, spectra.real - spectra.imag
    return jnp.fft.rfft(jnp.concatenate([near, far], axis=-1))


def _ring_power(spectra: Complex[Array, "*b r h"]) -> Float[Array, "*b r"]:
    """Return the energy of whole rings."""
    return 2 * jnp.sum(spectra.real**2 + spectra.imag**2, axis=-1)


def _unit(angle: Float[Array, "*b"]) -> Complex[Array, "*b"]:
    return jax.lax.complex(jnp.cos(angle), jnp.sin(angle))


def _inverse_root(energy: Float[Array, "*b"]) -> Float[Array, "*b"]:
    """Return one over the square root, and 0 for 0."""
    return jnp.where(energy > 0, jax.lax.rsqrt(jnp.where(energy > 0, energy, 1)), 0)


class _Templates(eqx.Module):
    """The slices of viewing directions, in chunks of equal size."""

    views: Float[Array, "*chunks c 2"]
    series: Complex[Array, "*chunks l r c"]
    power: Float[Array, "*chunks r c"]


@eqx.filter_jit
def _templates(
    volume: Volume,
    points: Float[Array, "r h 2"],
    views: Float[Array, "d 2"],
    chunks: int,
) -> _Templates:
    """Read the slices; the last chunk is filled up with the first directions."""
    spectrum = Gridding().spectrum(volume, len(points))
    x, y = points[..., 0], points[..., 1]
    # psi is zero: turning the particle by psi turns its slice's argument by psi.
    angles = jnp.pad(views, ((0, 0), (0, 1)))
    count = -(-len(views) // chunks)
    angles = jnp.resize(angles, (chunks * count, 3))

    def read(angles):
        right, down = projection_matrix(angles)
        values = spectrum(*(right[i] * x + down[i] * y for i in range(3)))
        return _series(values), _ring_power(values)

    series, power = map_over_particles(read, angles, _TEMPLATES_AT_ONCE)
    series, power, angles = (
        leaf.reshape(chunks, count, *leaf.shape[1:]) for leaf in (series, power, angles)
    )
    return _Templates(angles[..., :2], series.swapaxes(1, 3), power.swapaxes(1, 2))


def _image_spectra(
    images: Images, points: Float[Array, "r h 2"]
) -> Complex[Array, "particles r h"]:
    """Return the Fourier transforms of images on rings, by their definition."""
    m = images.shape[-1]
    around = jnp.asarray(outside(m, float(m)))
    images = images - jnp.mean(images, axis=(1, 2), where=around[None], keepdims=True)
    values = jax.lax.complex(images, jnp.zeros_like(images))
    turns = jnp.asarray(-2 * math.pi / m * (np.arange(m) - m // 2), images.dtype)

    def ring(points):
        by_x, by_y = (_unit(jnp.outer(turns, points[:, i])) for i in range(2))
        return jnp.einsum("pyx,yh,xh->ph", values, by_y, by_x, precision=_HIGHEST)

    return jnp.moveaxis(jax.lax.map(ring, points), 0, 1)


def _moves(
    shifts: Float[Array, "t 2"], points: Float[Array, "r h 2"], m: int
) -> Complex[Array, "t r h"]:
    """Return the phases that undo shifts of an image of side ``m``."""
    phase = jnp.einsum("ti,rhi->trh", shifts, points, precision=_HIGHEST)
    return _unit(2 * math.pi / m * phase)


def _read(
    images: Images,
    points: Float[Array, "r h 2"],
    shifts: Float[Array, "t 2"],
    magnification: Float[Array, "particles 2 2"] | None,
) -> tuple[Complex[Array, "particles r h"], Complex[Array, "_ t r h"]]:
    """Return the spectra of images on rings, and the phases that undo shifts there."""
    m = images.shape[-1]
    if magnification is None:
        return _image_spectra(images, points), _moves(shifts, points, m)[None]
    back = jnp.linalg.inv(magnification.astype(points.dtype))
    own = jnp.einsum("pij,rhj->prhi", back, points, precision=_HIGHEST)
    spectra = jax.vmap(lambda image, at: _image_spectra(image[None], at)[0])
    return spectra(images, own), jax.vmap(lambda at: _moves(shifts, at, m))(own)


@eqx.filter_jit
def _best(
    images: Images,
    ctf: CTF | None,
    templates: _Templates,
    points: Float[Array, "r h 2"],
    shifts: Float[Array, "t 2"],
    pixel_size_in_angstroms: float,
    aberrations: Aberrations | None,
    group: Int[Array, "particles"],
) -> tuple[
    Float[Array, "particles"], Float[Array, "particles 3"], Float[Array, "particles 2"]
]:
    """Return the scores, angles and shifts of the best templates."""
    m = images.shape[-1]
    physical = points.reshape(-1, 2) / (m * pixel_size_in_angstroms)
    aberrations = Aberrations() if aberrations is None else aberrations
    # The rings are frequencies of the map, which are not mapped once more.
    on_rings = Aberrations(aberrations.odd, aberrations.even)
    tables = (on_rings.phase(physical), on_rings.gamma(physical))
    phases, gamma, magnification = jax.tree.map(
        lambda table: table[group], (*tables, aberrations.magnification)
    )
    spectra, moves = _read(images, points, shifts, magnification)
    if phases is not None:
        spectra = spectra * jnp.conj(phases).reshape(spectra.shape)
    count, rings, half_turn = spectra.shape
    radii = jnp.arange(1, rings + 1, dtype=images.dtype)
    transfer = jnp.ones_like(spectra.real)
    if ctf is not None:
        values = jax.vmap(lambda optics, gamma: optics(physical, gamma))(ctf, gamma)
        transfer = values.reshape(spectra.shape)
    energy = jnp.matmul(_ring_power(spectra), radii, precision=_HIGHEST)
    gain = radii[None] * jnp.mean(transfer**2, axis=-1)
    pull = (radii[None, :, None] * transfer).astype(spectra.dtype) * spectra
    moved = pull[:, None] * moves
    series = jnp.moveaxis(jnp.conj(_series(moved)), -1, 0)
    series = series.reshape(half_turn + 1, -1, rings)
    everyone = jnp.arange(count)

    def look(chunk):
        product = jnp.matmul(series, chunk.series, precision=_HIGHEST)
        correlation = jnp.fft.irfft(product, 2 * half_turn, axis=0)
        correlation = correlation.reshape(2 * half_turn, count, len(shifts), -1)
        norm = jnp.matmul(gain, chunk.power, precision=_HIGHEST)
        scores = correlation.max(axis=0) * _inverse_root(norm)[:, None]
        scores = scores.reshape(count, -1)
        place = jnp.argmax(scores, axis=1)
        turns = correlation.reshape(2 * half_turn, count, -1)[:, everyone, place]
        psi = (math.pi / half_turn) * jnp.argmax(turns, axis=0).astype(images.dtype)
        shift, view = jnp.divmod(place, len(chunk.views))
        angles = jnp.concatenate([chunk.views[view], psi[:, None]], axis=1)
        return scores[everyone, place], angles, shifts[shift]

    scores, angles, moves = jax.lax.map(look, templates)
    best = jnp.argmax(scores, axis=0)
    scores = scores[best, everyone] * _inverse_root(energy)
    return scores, angles[best, everyone], moves[best, everyone]
