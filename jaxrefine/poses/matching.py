r"""Projection matching: the poses of images in a map, without initial poses.

Templates are slices of the map's spectrum along near-uniform viewing directions, read
on rings up to a band limit. With an image's spectrum :math:`\hat g` and its contrast
transfer function ``h`` on the same rings, a shift ``t`` is a phase and the in-plane
angle a turn of the slice :math:`S_d` of direction ``d``:

.. math:: C(d, \psi, t) = \sum_{r, \phi} \frac{r\,\Delta\phi}{N_r}\,
   \Re\bigl(\overline{S_d(r, \phi + \psi)}\,
   h(r, \phi)\, \hat g(r, \phi)\, e^{2\pi i\, \omega\cdot t / m}\bigr),

where :math:`r\,\Delta\phi` is the area that a point of a ring stands for, and
:math:`N_r` the power of the noise, by which images are whitened. For all ``psi`` at
once this is a product of matrices over the rings for each angular frequency, and a
Fourier transform (Joyeux and Penczek, Ultramicroscopy 92, 2002, compare such methods).

With :math:`E = \sum (r\,\Delta\phi / N_r) |S_d h|^2`, the image is more probable with
the particle than without one by the factor :math:`e^{\max(C, 0)^2 / 2E}`, the template
being at its best scale. With a prior on the pose this gives the best pose, how well it
is known, and the evidence for a particle:

.. math:: \log \sum_{d, \psi, t} p(d, \psi, t)\, e^{\max(C, 0)^2 / 2E}.

The power of the noise is that of the images, of which the particle has a small share
at the usual signal-to-noise ratios. Where it has a large one, poses are known better
than is said.

The phases of aberrations are taken from an image's spectrum first. Where the
magnification depends on the direction, the rings are those of the map, and an image is
read at the frequencies that are mapped to them (:mod:`jaxrefine.aberrations`).

A spectrum at :math:`\phi + \pi` is the conjugate of that at :math:`\phi`. The sum of
its real part, all of whose angular frequencies are even, and its imaginary part, whose
are odd, is a real function on the circle with the same inner products (the Hartley
transform): this is what is correlated. An image has angular frequencies up to
:math:`\sqrt 2\, \pi r` on ring ``r``, more than a step of the in-plane angle may
resolve: rings are read as densely as it takes, and the frequencies that the step does
not resolve are left out, instead of being taken for others.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import final

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Complex, Float, Int

from jaxrefine import symmetry
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
from jaxrefine.maps.noise import image_power
from jaxrefine.maps.scale import at_unit_scale
from jaxrefine.operators.gridding import Gridding
from jaxrefine.poses.grid import FARTHEST, PoseGrid, check_angle_step, steps
from jaxrefine.poses.search import PARTICLE_DIAMETER, half_period_turn

_HIGHEST = jax.lax.Precision.HIGHEST
# 32 MiB of scores in single precision; products and transforms of the same size take
# about three times as much while they are made.
_SCORES_AT_ONCE = 2**23
# Slices read at a time. It bounds the memory of the interpolation and changes no
# result; the number itself is a convention.
_TEMPLATES_AT_ONCE = 64

# What is taken of shifts that are not given: conventions, which for a particle of two
# thirds of a box of 64 pixels are the defaults of `RefineConfig` to within a tenth.
_SPREAD_OF_DIAMETER = 1 / 20  # standard deviation of the shift, in diameters
_LIMIT_OF_SPREAD = 3  # largest shift, in standard deviations
_SPREAD_OF_LIMIT = 1 / 2  # that of points spread uniformly in a disc
_STEPS_PER_PERIOD = 4  # shifts in one period of the finest detail that is compared

# Mean powers of images that can be whitened in single precision, with some margin: what
# is less or more becomes 0 or infinite when it is multiplied by a sum over a ring.
_POWERS = 1e-30, 1e30

# How often the arrays of `Search.estimate_bytes` are held at once, while others are
# made of them: what the compiler states for a CPU (``memory_analysis``; JAX 0.10, sides
# of 32 to 96, 8 and 64 particles), rounded up; and JAX with the compiled programs.
_TEMPLATES_HELD, _MOVED_HELD, _SCORES_HELD, _FOUND_HELD = 3, 2, 2, 12
_PIXELS_HELD, _VOXELS_HELD = 4, 8
_PROGRAMS = 600 * 2**20


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
        Radius and spacing of the grid of shifts, pixels. None for a radius of three
        times ``shift_spread``, and a spacing of a quarter of the finest period that is
        compared, but not more than the radius. If the radius is 0, no shift is tried.
    r_max
        Band limit, cycles per box. None takes the largest one at which the nearest
        direction of the grid moves the rim of the particle by at most half a period
        (`search.half_period_turn`), but none beyond Nyquist.
    batch_size
        Particles at a time. Memory grows with it, with the shifts and with the band.
    particle_diameter
        As a fraction of the box. The larger the particle, the farther a rotation moves
        its rim, and the coarser the detail that an angular step supports.
    shift_spread
        Standard deviation of the shifts along x and y that are to be expected, pixels.
        None for half of ``max_shift`` if that is given, and for a twentieth of the
        particle's diameter otherwise.
    symmetry
        Point group of the map, see :mod:`jaxrefine.symmetry`.

    Raises
    ------
    InputError
        If the shifts, the diameter or the batch size are out of range, or there is no
        such group; `match` checks the others.
    """

    angle_step: float = math.radians(7.5)
    max_shift: float | None = None
    shift_step: float | None = None
    r_max: int | None = None
    batch_size: int = 64
    particle_diameter: float = PARTICLE_DIAMETER
    shift_spread: float | None = None
    symmetry: str = "C1"

    def __post_init__(self):
        if self.max_shift is not None and not 0 <= self.max_shift < math.inf:
            raise InputError(
                f"max_shift must be at least 0 pixels and finite, got {self.max_shift}"
            )
        for name in ("shift_step", "shift_spread"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise InputError(
                    f"{name} must be a positive number of pixels, got {value}"
                )
        if self.batch_size < 1:
            raise InputError(f"batch_size must be at least 1, got {self.batch_size}")
        if not 0 < self.particle_diameter <= 1:
            raise InputError(
                "particle_diameter must be more than 0 and at most 1, a fraction of "
                f"the box, got {self.particle_diameter}"
            )
        symmetry.operators(self.symmetry)


@final
@dataclass(frozen=True)
class Search:
    """What `match` does with a configuration, for images of a given size.

    Attributes
    ----------
    grid
        The poses that are tried.
    r_max
        Band limit, cycles per box.
    image_size
        Side of the images, pixels.
    """

    grid: PoseGrid
    r_max: int
    image_size: int

    @property
    def ring(self) -> int:
        """Points of half a ring: a multiple of the in-plane angles in half a turn.

        Enough that no angular frequency of an image is taken for one that the in-plane
        step resolves.
        """
        half_turn = self.grid.half_turn
        least = (math.sqrt(2) * math.pi * self.r_max + half_turn) / 2
        return half_turn * math.ceil(least / half_turn)

    def chunks(self, directions: int, shifts: int, batch_size: int) -> int:
        """Return in how many parts the templates are compared with a batch.

        Parameters
        ----------
        directions, shifts, batch_size
            How many there are.
        """
        scores = 2 * self.grid.half_turn * batch_size * shifts
        return -(-directions // max(_SCORES_AT_ONCE // scores, 1))

    def estimate_bytes(self, batch_size: int) -> float:
        """Estimate the memory that is held with a batch of particles, in bytes.

        Parameters
        ----------
        batch_size
            Particles at a time.
        """
        return sum(self.parts_of_memory(batch_size).values())

    def parts_of_memory(self, batch_size: int) -> dict[str, float]:
        """Return what the memory is needed for, in words, and how many bytes of it.

        Parameters
        ----------
        batch_size
            Particles at a time.
        """
        grid, m = self.grid, self.image_size
        template = 8 * self.r_max * (grid.half_turn + 2)
        moved = 8 * self.r_max * self.ring * grid.shift_count
        scores = 4 * max(
            _SCORES_AT_ONCE, 2 * grid.half_turn * batch_size * grid.shift_count
        )
        views, images = grid.direction_count, _PIXELS_HELD * 4 * m**2
        held = {
            "JAX and its programs": _PROGRAMS,
            "the projections along all directions": _TEMPLATES_HELD * template * views,
            "the images at all shifts": batch_size * (_MOVED_HELD * moved + images),
            "what is found along all directions": batch_size * _FOUND_HELD * 4 * views,
            "the scores of a part of all poses": _SCORES_HELD * scores,
            "the map's spectrum": _VOXELS_HELD * 4 * m**3,
        }
        return {what: float(size) for what, size in held.items()}


def search_of(config: MatchConfig, image_size: int) -> Search:
    """Return what a configuration means for images of a given side, in pixels.

    Raises
    ------
    InputError
        If the angular step, the band limit or the largest shift is out of range, or if
        no shift but 0 is within the largest one, which is not 0.
    """
    step = config.angle_step
    spread, radius = config.shift_spread, config.max_shift
    if spread is None:
        spread = _SPREAD_OF_DIAMETER * config.particle_diameter * image_size
        if radius is not None:
            spread = _SPREAD_OF_LIMIT * radius or spread
    if radius is None:
        radius = min(_LIMIT_OF_SPREAD * spread, image_size / 2)
    if radius > image_size / 2:
        raise InputError(
            "max_shift must be at most half of the side of the images, "
            f"{image_size // 2} pixels, got {radius:g}"
        )
    check_angle_step(step)
    r_max = _band_limit(config, image_size)
    shift_step = config.shift_step
    if shift_step is None:
        shift_step = min(image_size / (_STEPS_PER_PERIOD * r_max), radius or math.inf)
    elif 0 < radius < shift_step:
        raise InputError(
            f"the step between shifts must be at most the largest one, {radius:g} "
            f"pixels, got {shift_step:g}"
        )
    grid = PoseGrid(
        step,
        steps(math.pi, step),
        radius,
        shift_step,
        spread,
        symmetry.operators(config.symmetry),
    )
    return Search(grid, r_max, image_size)


@final
@dataclass(frozen=True)
class Match:
    """The best pose of each particle on the grid, and how well it is known.

    Attributes
    ----------
    poses
        The most probable rotation matrices ``(P, 3, 3)`` and shifts ``(P, 2)``, pixels.
    scores
        Normalised cross-correlation of each whitened image and its template within the
        band, from -1 to 1 (with astigmatism roughly so, see `match`).
    log_likelihood
        Evidence: by how much an image is more probable with a particle of any pose than
        without one, natural logarithm, each projection being at its best scale. That
        costs about one unit: images of noise have some 1, not less than 0.
    angle_std, shift_std
        Expected errors of the poses: the root mean squares of the angle of the
        rotation, radians, and of the length of the shift, pixels, over the posterior
        on the grid and within its cells. Rotations are equivalent up to symmetry. Of a
        large angle it is twice the sine of its half, at most 2.
    search
        The grid and the band limit that were used.
    """

    poses: Poses
    scores: Float[Array, "particles"]
    log_likelihood: Float[Array, "particles"]
    angle_std: Float[Array, "particles"]
    shift_std: Float[Array, "particles"]
    search: Search


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
    zero. Images are whitened by their mean power in each shell, one spectrum for each
    group (:func:`jaxrefine.maps.noise.image_power`). Where an image or a template has
    no power in the band, the score is 0; some image must have power.

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
    The most probable pose of each particle on the grid, and how well it is known.

    Raises
    ------
    InputError
        If the angular step, the band limit, the largest shift or its step is out of
        range, the map does not have the side of the images, an image is not finite, or
        the mean power of the images in the band is not from 1e-30 to 1e30 (the square
        of a sum over pixels).
    """
    config = MatchConfig() if config is None else config
    m = particles.image_size
    if volume.shape != (m,) * 3:
        text = " x ".join(map(str, volume.shape))
        raise InputError(
            f"the map must have the side of the images, {m} pixels, got {text} voxels"
        )
    search = search_of(config, m)
    if particles.aberrations is not None:
        farthest = _farthest_ring(particles.aberrations, m)
        search = Search(search.grid, min(search.r_max, farthest), m)
    grid, views = search.grid, search.grid.directions()
    points = _rings(search.r_max, search.ring)
    tried = _Tried.of(grid)
    precision = _precision(particles, search.r_max, config.batch_size)
    size = min(config.batch_size, len(particles))
    templates = _templates(
        at_unit_scale(volume.astype(jnp.float32)),
        points,
        jnp.asarray(views, jnp.float32),
        search.chunks(len(views), len(tried.shifts), size),
        grid.half_turn,
    )
    results, done = [], 0
    for places, count in batches(np.arange(len(particles)), size):
        images, ctf = particles.batch(places)
        group = particles.group_of(places)
        best = _best(
            images,
            ctf,
            templates,
            points,
            tried,
            particles.pixel_size_in_angstroms,
            particles.aberrations,
            jnp.asarray(group, jnp.int32),
            jnp.asarray(precision[group], jnp.float32),
        )
        results.append([np.asarray(values)[:count] for values in best])
        done += count
        if callback is not None:
            callback(done)
    columns = zip(*results, strict=True)
    rotations, shifts, scores, evidence, angle_std, shift_std = (
        jnp.asarray(np.concatenate(x)) for x in columns
    )
    poses = Poses(rotations, shifts)
    return Match(poses, scores, evidence, angle_std, shift_std, search)


def _band_limit(config: MatchConfig, image_size: int) -> int:
    last = (image_size - 1) // 2
    if config.r_max is None:
        # The turn is inversely proportional to the band limit.
        turn = FARTHEST * config.angle_step
        supported = half_period_turn(config.particle_diameter, 1) / turn
        return max(min(int(supported + 1e-9), last), 1)
    if not 1 <= config.r_max <= last:
        raise InputError(
            f"the band limit of images of {image_size} pixels must be from 1 to {last} "
            f"cycles per box, got {config.r_max}"
        )
    return config.r_max


def _farthest_ring(aberrations: Aberrations, image_size: int) -> int:
    """Return the last ring that images with a magnification have below Nyquist."""
    last = (image_size - 1) // 2
    if aberrations.magnification is None:
        return last
    least = np.linalg.norm(np.asarray(aberrations.magnification), -2, axis=(1, 2)).min()
    return max(1, min(last, int(last * least)))


def _precision(
    particles: Particles, r_max: int, batch_size: int
) -> Float[np.ndarray, "groups r"]:
    """Return one over the noise's power on the rings of each group; 0 where it is 0.

    Raises
    ------
    InputError
        If the power is 0 on all rings, or too small or too large to compute with.
    """
    power = image_power(particles, batch_size)[:, 1 : r_max + 1]
    power = power / particles.noise_share
    least, most = _POWERS
    for peak in power.max(axis=1):
        if not least <= peak <= most:
            raise InputError(
                f"the mean power of the images must be from {least:g} to {most:g} up "
                f"to {r_max} cycles per box, got {peak:.3g}"
            )
    return np.where(power > 0, 1 / np.where(power > 0, power, 1.0), 0.0)


def _rings(r_max: int, half_ring: int) -> Float[Array, "r h 2"]:
    """Return the frequencies ``(x, y)`` of half circles, in cycles per box."""
    angles = np.pi / half_ring * np.arange(half_ring)
    circle = np.stack([np.cos(angles), np.sin(angles)], axis=-1)
    radii = np.arange(1, r_max + 1)
    return jnp.asarray(radii[:, None, None] * circle, jnp.float32)


def _series(
    spectra: Complex[Array, "*b r h"], half_turn: int
) -> Complex[Array, "*b r l"]:
    """Return the Fourier series around the rings of the Hartley transform.

    Up to the angular frequency ``half_turn``. It is the mean over the ring.
    """
    near, far = spectra.real + spectra.imag, spectra.real - spectra.imag
    series = jnp.fft.rfft(jnp.concatenate([near, far], axis=-1), norm="forward")
    return series[..., : half_turn + 1]


def _ring_power(spectra: Complex[Array, "*b r h"]) -> Float[Array, "*b r"]:
    """Return the mean power on whole rings."""
    return jnp.mean(spectra.real**2 + spectra.imag**2, axis=-1)


def _unit(angle: Float[Array, "*b"]) -> Complex[Array, "*b"]:
    return jax.lax.complex(jnp.cos(angle), jnp.sin(angle))


def _inverse_root(energy: Float[Array, "*b"]) -> Float[Array, "*b"]:
    """Return one over the square root, and 0 for 0."""
    return jnp.where(energy > 0, jax.lax.rsqrt(jnp.where(energy > 0, energy, 1)), 0)


class _Tried(eqx.Module):
    """The shifts that are tried, and what is known of all poses."""

    shifts: Float[Array, "t 2"]
    log_prior: Float[Array, "t"]
    operators: Float[Array, "order 3 3"]
    cell_variances: Float[Array, "2"]
    half_turn: int = eqx.field(static=True)

    @classmethod
    def of(cls, grid: PoseGrid) -> "_Tried":
        """Return those of a grid."""
        return cls(
            jnp.asarray(grid.shifts(), jnp.float32),
            jnp.asarray(grid.shift_log_prior(), jnp.float32),
            jnp.asarray(grid.operators, jnp.float32),
            jnp.asarray(grid.cell_variances(), jnp.float32),
            grid.half_turn,
        )


class _Templates(eqx.Module):
    """The slices of viewing directions, in chunks of equal size."""

    views: Float[Array, "*chunks c 2"]
    exists: Bool[Array, "*chunks c"]
    series: Complex[Array, "*chunks l r c"]
    power: Float[Array, "*chunks r c"]


@eqx.filter_jit
def _templates(
    volume: Volume,
    points: Float[Array, "r h 2"],
    views: Float[Array, "d 2"],
    chunks: int,
    half_turn: int,
) -> _Templates:
    """Read the slices; the last chunk is filled up with the first directions."""
    spectrum = Gridding().spectrum(volume, len(points))
    x, y = points[..., 0], points[..., 1]
    # psi is zero: turning the particle by psi turns its slice's argument by psi.
    angles = jnp.pad(views, ((0, 0), (0, 1)))
    count = -(-len(views) // chunks)
    exists = jnp.arange(chunks * count) < len(views)
    angles = jnp.resize(angles, (chunks * count, 3))

    def read(angles):
        right, down = projection_matrix(angles)
        values = spectrum(*(right[i] * x + down[i] * y for i in range(3)))
        return _series(values, half_turn), _ring_power(values)

    series, power = map_over_particles(read, angles, _TEMPLATES_AT_ONCE)
    series, power, angles, exists = (
        leaf.reshape(chunks, count, *leaf.shape[1:])
        for leaf in (series, power, angles, exists)
    )
    views = angles[..., :2]
    return _Templates(views, exists, series.swapaxes(1, 3), power.swapaxes(1, 2))


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


class _Found(eqx.Module):
    """What is found of each particle among the templates of a chunk.

    Attributes
    ----------
    score, pull, angles, shift
        Of the best pose: its logarithm of the posterior, the correlation over the norm
        of the template, Euler angles and shift.
    logs
        Logarithms of the sums of the posterior over the poses of each direction.
    turn, move
        Its means for each direction: of the cosine and the sine of the in-plane angle,
        and of the shift and its square.
    """

    score: Float[Array, "*chunks particles"]
    pull: Float[Array, "*chunks particles"]
    angles: Float[Array, "*chunks particles 3"]
    shift: Float[Array, "*chunks particles 2"]
    logs: Float[Array, "*chunks particles c"]
    turn: Float[Array, "*chunks particles c 2"]
    move: Float[Array, "*chunks particles c 3"]


@eqx.filter_jit
def _best(
    images: Images,
    ctf: CTF | None,
    templates: _Templates,
    points: Float[Array, "r h 2"],
    tried: _Tried,
    pixel_size_in_angstroms: float,
    aberrations: Aberrations | None,
    group: Int[Array, "particles"],
    precision: Float[Array, "particles r"],
) -> tuple[Array, ...]:
    """Return rotations, shifts and all else that `Match` holds of each particle."""
    m = images.shape[-1]
    physical = points.reshape(-1, 2) / (m * pixel_size_in_angstroms)
    aberrations = Aberrations() if aberrations is None else aberrations
    # The rings are frequencies of the map, which are not mapped once more.
    on_rings = Aberrations(aberrations.odd, aberrations.even)
    tables = (on_rings.phase(physical), on_rings.gamma(physical))
    phases, gamma, magnification = jax.tree.map(
        lambda table: table[group], (*tables, aberrations.magnification)
    )
    spectra, moves = _read(images, points, tried.shifts, magnification)
    if phases is not None:
        spectra = spectra * jnp.conj(phases).reshape(spectra.shape)
    count, rings, _ = spectra.shape
    # The area of a ring, over the power of the noise.
    radii = jnp.arange(1, rings + 1, dtype=images.dtype)
    weights = 2 * math.pi * radii[None] * precision
    transfer = jnp.ones_like(spectra.real)
    if ctf is not None:
        values = jax.vmap(lambda optics, gamma: optics(physical, gamma))(ctf, gamma)
        transfer = values.reshape(spectra.shape)
    energy = jnp.sum(weights * _ring_power(spectra), axis=-1)
    gain = weights * jnp.mean(transfer**2, axis=-1)
    pull = (weights[..., None] * transfer).astype(spectra.dtype) * spectra
    half_turn, shifts = tried.half_turn, tried.shifts
    series = jnp.conj(_series(pull[:, None] * moves, half_turn))
    series = jnp.moveaxis(series, -1, 0).reshape(half_turn + 1, -1, rings)
    if spectra.shape[-1] > half_turn:
        # The last angular frequency and its conjugate fall on one of the transform.
        series = series.at[-1].multiply(2.0)
    everyone = jnp.arange(count)
    psi = (math.pi / half_turn) * jnp.arange(2 * half_turn, dtype=images.dtype)
    trigonometric = jnp.stack([jnp.ones_like(psi), jnp.cos(psi), jnp.sin(psi)])

    def look(chunk):
        product = jnp.matmul(series, chunk.series, precision=_HIGHEST)
        correlation = jnp.fft.irfft(product, 2 * half_turn, axis=0, norm="forward")
        correlation = correlation.reshape(2 * half_turn, count, len(shifts), -1)
        norm = jnp.matmul(gain, chunk.power, precision=_HIGHEST)
        # In units of its standard deviation without a particle.
        pull = correlation * _inverse_root(norm)[None, :, None]
        best = jnp.max(pull, axis=0)
        gains = jnp.maximum(best, 0) ** 2 / 2
        likelihood = jnp.exp(jnp.maximum(pull, 0) ** 2 / 2 - gains[None])
        sums = jnp.tensordot(trigonometric, likelihood, 1, precision=_HIGHEST)
        prior = tried.log_prior[None, :, None]
        prior = jnp.where(chunk.exists[None, None], prior, -jnp.inf)
        score = (gains + prior).reshape(count, -1)
        place = jnp.argmax(score, axis=1)
        turns = pull.reshape(2 * half_turn, count, -1)[:, everyone, place]
        shift, view = jnp.divmod(place, len(chunk.views))
        angles = jnp.concatenate(
            [chunk.views[view], psi[jnp.argmax(turns, axis=0)][:, None]], axis=1
        )
        by_shift = gains + jnp.log(sums[0]) + prior
        logs = jax.nn.logsumexp(by_shift, axis=1)
        share = jnp.exp(by_shift - jnp.where(jnp.isfinite(logs), logs, 0.0)[:, None])
        turn = jnp.sum(share[None] * sums[1:] / sums[0][None], axis=2)
        squares = jnp.sum(shifts**2, axis=1, keepdims=True)
        table = jnp.concatenate([shifts, squares], axis=1)
        move = jnp.einsum("ptc,ti->pci", share, table, precision=_HIGHEST)
        return _Found(
            score[everyone, place],
            best.reshape(count, -1)[everyone, place],
            angles,
            shifts[shift],
            logs,
            jnp.moveaxis(turn, 0, -1),
            move,
        )

    found = jax.lax.map(look, templates)
    chosen = jnp.argmax(found.score, axis=0)
    pull, angles, shift = (
        leaf[chosen, everyone] for leaf in (found.pull, found.angles, found.shift)
    )
    rotations = euler_to_matrix(angles)
    logs, turn, move = (
        jnp.moveaxis(leaf, 0, 1).reshape(count, -1, *leaf.shape[3:])
        for leaf in (found.logs, found.turn, found.move)
    )
    total = jax.nn.logsumexp(logs, axis=1)
    posterior = jnp.exp(logs - total[:, None])
    count_of_views = jnp.sum(templates.exists.astype(images.dtype))
    orientations = 2 * half_turn * count_of_views
    by_angle = _square_angles(rotations, templates.views.reshape(-1, 2), turn, tried)
    by_shift = move[..., 2] - 2 * jnp.einsum(
        "pci,pi->pc", move[..., :2], shift, precision=_HIGHEST
    )
    by_shift = by_shift + jnp.sum(shift**2, axis=1)[:, None]
    variances = [
        jnp.sum(posterior * jnp.maximum(squares, 0), axis=1) + cell
        for squares, cell in zip(
            (by_angle, by_shift), tried.cell_variances, strict=True
        )
    ]
    return (
        rotations,
        shift,
        pull * _inverse_root(energy),
        total - jnp.log(orientations),
        *map(jnp.sqrt, variances),
    )


def _square_angles(
    rotations: Float[Array, "particles 3 3"],
    views: Float[Array, "c 2"],
    turn: Float[Array, "particles c 2"],
    tried: _Tried,
) -> Float[Array, "particles c"]:
    """Return the mean squares of the angles from poses to those of each direction.

    Parameters
    ----------
    rotations
        The poses.
    views
        Directions ``(rot, tilt)``, radians.
    turn
        Mean cosine and sine of the in-plane angle of each.
    tried
        Gives the symmetry.
    """
    # A rotation is linear in the cosine and the sine of its last angle.
    quarters = 0.5 * math.pi * jnp.arange(3, dtype=views.dtype)
    angles = jnp.concatenate(
        [
            jnp.repeat(views[:, None], 3, axis=1),
            jnp.broadcast_to(quarters[:, None], (len(views), 3, 1)),
        ],
        axis=-1,
    )
    none, quarter, half = jnp.moveaxis(euler_to_matrix(angles), 1, 0)
    constant = (none + half) / 2
    parts = jnp.stack([none - constant, quarter - constant, constant])

    def of_particle(rotation, turn):
        copies = jnp.einsum(
            "ij,sjk->sik", rotation, tried.operators, precision=_HIGHEST
        )
        traces = jnp.einsum("acij,sij->sac", parts, copies, precision=_HIGHEST)
        trace = jnp.einsum("sac,ca->sc", traces[:, :2], turn, precision=_HIGHEST)
        # This is the squared angle to fourth order.
        return 3 - jnp.max(trace + traces[:, 2], axis=0)

    return jax.lax.map(lambda row: of_particle(*row), (rotations, turn))
