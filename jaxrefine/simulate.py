"""Synthetic data of section IV: a phantom, noisy images, initial poses and maps."""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import final

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Int, PRNGKeyArray

from jaxrefine._types import Images, Scalar, Volume
from jaxrefine.aberrations import Aberrations, magnified
from jaxrefine.ctf import IsotropicPSF
from jaxrefine.errors import InputError
from jaxrefine.euler import euler_to_matrix, matrix_to_euler
from jaxrefine.geometry import Poses
from jaxrefine.operators import kbwf, slices, spatial
from jaxrefine.operators.gridding import Gridding

# Dimensions of the phantom. The unit is about 65 angstroms, so that the helix is that
# of B-DNA, with a radius of 10 angstroms and 10.5 base pairs of 3.4 angstroms in a
# turn. A domain has a centre and a radius.
_DOMAINS = (
    ((0.06, 0.00, -0.05), 0.34),
    ((0.62, 0.30, 0.52), 0.30),
    ((-0.70, 0.42, -0.30), 0.24),
    ((-0.10, -0.88, 0.20), 0.18),
)
_RESIDUES_PER_VOLUME, _CHAIN_STEP = 1200, 0.13
_HELIX_RADIUS, _GROOVE_ANGLE = 0.155, 2.4
_BASE_PAIRS, _BASE_PAIRS_PER_TURN = 78, 10.5
_PAIR_WEIGHTS = (2.4, 1.0, 1.0, 1.0, 2.4)  # A residue has the weight 1.

_ATOMS_WITHIN, _BLOB_WIDTH = 0.34, 0.015  # in box sides
_SMALLEST_BLOB_WIDTH = 0.7  # in voxels

# The slices of simulated images: their errors are far below any noise, and not those of
# the refinement's interpolation.
_ACCURATE = Gridding(6, 2.0)


@final
class Dataset(eqx.Module):
    """A simulated data set.

    Attributes
    ----------
    images
        Noisy images of shape ``(P, m, m)``.
    truth, initial
        The poses that made the images, and the poses to start from.
    sigma
        Standard deviation of the noise.
    """

    images: Images
    truth: Poses
    initial: Poses
    sigma: Scalar


def make_dataset(
    key: PRNGKeyArray,
    volume: Float[Array, "z y x"],
    count: int,
    *,
    max_shift: float,
    max_angle_error: float,
    sigma: float | Scalar | None = None,
    snr_db: float | None = None,
    project: Callable[[Poses], Images] | None = None,
) -> Dataset:
    """Simulate a data set as in section IV-A, with the initial poses of section IV-B.

    Viewing directions are equidistributed, in-plane angles and shifts uniform, the
    noise white and Gaussian, and the initial poses those of `init1_poses`.

    Parameters
    ----------
    key
        Random key of the in-plane angles, the shifts, the noise and the initial errors.
    volume
        The true map, of shape ``(n, n, n)``.
    count
        Number of particles ``P``.
    max_shift, max_angle_error
        Largest shift along x or y in pixels, and largest initial error of each Euler
        angle in radians.
    sigma, snr_db
        Standard deviation of the noise, or signal-to-noise ratio per pixel in decibels
        (see `noise_std`). Exactly one of the two must be given.
    project
        What makes clean images of the map at given poses, such as `slice_projector`
        returns; by default it is `clean_images`.

    Raises
    ------
    InputError
        If the map is not a cube, a parameter is out of range, or not exactly one of
        ``sigma`` and ``snr_db`` is given.
    """
    if len(set(volume.shape)) != 1:
        shape = " x ".join(map(str, volume.shape))
        raise InputError(f"the map to simulate from must be a cube, got {shape}")
    if count < 1:
        raise InputError(f"count must be at least 1, got {count}")
    if max_angle_error < 0:
        raise InputError(f"max_angle_error must be at least 0, got {max_angle_error}")
    if (sigma is None) == (snr_db is None):
        received = "neither" if sigma is None else "both"
        raise InputError(
            f"exactly one of sigma and snr_db must be given, got {received}"
        )

    angle_key, shift_key, noise_key, error_key = jax.random.split(key, 4)
    truth = Poses(
        equidistributed_rotations(angle_key, count, volume.dtype),
        random_shifts(shift_key, count, max_shift, volume.dtype),
    )
    clean = clean_images(volume, truth) if project is None else project(truth)
    level = sigma if snr_db is None else noise_std(clean, snr_db)
    level = jnp.asarray(level, volume.dtype)
    noisy = add_noise(noise_key, clean, level)
    return Dataset(noisy, truth, init1_poses(error_key, truth, max_angle_error), level)


@eqx.filter_jit
def phantom(
    key: PRNGKeyArray, n: int, dtype: jax.typing.DTypeLike = jnp.float32
) -> Volume:
    r"""Build a map with the character of a nucleoprotein complex.

    A double helix (two strands and their rungs) winds around four globular domains,
    each of which is a random chain confined to a ball. With pseudo-atoms :math:`a` of
    weight :math:`w_a` at :math:`x_a`,

    .. math:: V[k] \propto \sum_a w_a \exp(-\|k - x_a\|^2 / 2 s^2), \quad
       \max_k V[k] = 1, \quad s = \max(0.015\,n,\, 0.7).

    Apart from sampling, the map depends on ``n`` only in its sharpness. It is
    non-negative, vanishes outside a ball of radius about ``0.38 n``, and has its centre
    of mass at the origin ``n // 2``. Its arrangement is fixed and has no symmetry; the
    chains are random.

    Parameters
    ----------
    key
        Random key of the chains, which are the same for every ``n`` and ``dtype``.
    n
        Side of the box in voxels, at least 16.
    dtype
        Type of the map.

    Raises
    ------
    InputError
        If ``n`` is less than 16.
    """
    if n < 16:
        raise InputError(f"n must be at least 16 voxels for a phantom, got {n}")
    points, weights = _pseudo_atoms(key)
    width = max(_BLOB_WIDTH * n, _SMALLEST_BLOB_WIDTH)
    axis = jnp.arange(n, dtype=jnp.float32) - n // 2
    offsets = axis[None, None, :] - n * points[..., None]
    profile = jnp.exp(-0.5 * (offsets / width) ** 2)
    x, y, z = (profile[:, i] for i in range(3))
    precision = jax.lax.Precision.HIGHEST
    volume = jnp.einsum("a,az,ay,ax->zyx", weights, z, y, x, precision=precision)
    return (volume / volume.max()).astype(dtype)


@eqx.filter_jit
def equidistributed_rotations(
    key: PRNGKeyArray, count: int, dtype: jax.typing.DTypeLike = float
) -> Float[Array, "count 3 3"]:
    """Return rotations whose viewing directions are equidistributed (Sec. IV-A).

    The directions ``(rot, tilt)`` form a Fibonacci lattice: ``cos(tilt)`` decreases in
    equal steps from pole to pole, while ``rot`` advances by a turn divided by the
    golden ratio. ``psi`` is drawn uniformly from ``[0, 2 pi)``.
    """
    index = jnp.arange(count, dtype=jnp.uint32)
    # Multiplying by 2^32 / golden ratio wraps around exactly in 32-bit integers.
    turns = (index * jnp.uint32(2654435769)).astype(dtype) * 2.0**-32
    height = (index.astype(dtype) + 0.5) / count
    tilt = 2 * jnp.arctan2(jnp.sqrt(height), jnp.sqrt(height[::-1]))
    psi = jax.random.uniform(key, (count,), dtype, maxval=2 * math.pi)
    angles = jnp.stack([2 * math.pi * turns, tilt, psi], axis=-1)
    return euler_to_matrix(angles)


def random_shifts(
    key: PRNGKeyArray,
    count: int,
    max_shift: float,
    dtype: jax.typing.DTypeLike = float,
) -> Float[Array, "count 2"]:
    """Draw shifts ``(x, y)`` uniformly from ``[-max_shift, max_shift)^2`` pixels.

    Raises `InputError` if ``max_shift`` is negative.
    """
    if max_shift < 0:
        raise InputError(f"max_shift must be at least 0 pixels, got {max_shift}")
    return jax.random.uniform(key, (count, 2), dtype, -max_shift, max_shift)


def init1_poses(
    key: PRNGKeyArray, poses: Poses, max_angle_error: float | Scalar
) -> Poses:
    r"""Return the initial poses "Init-1" of section IV-B.

    .. math:: \theta^{init}_{p,j} = \theta^{true}_{p,j} + \varepsilon_{p,j}, \quad
       \varepsilon_{p,j} \sim \mathrm{Unif}(-e, e), \qquad t^{init}_p = 0

    with ``e = max_angle_error`` in radians, for each of the three Euler angles.
    """
    angles = matrix_to_euler(poses.rotations)
    error = jax.random.uniform(
        key, angles.shape, angles.dtype, -max_angle_error, max_angle_error
    )
    return Poses(euler_to_matrix(angles + error), jnp.zeros_like(poses.shifts))


def clean_images(
    volume: Volume,
    poses: Poses,
    *,
    basis: kbwf.KBWF = kbwf.SIMULATION_BASIS,
    psf: IsotropicPSF | None = None,
    batch_size: int = 8,
) -> Images:
    r"""Project a map without noise: :math:`g'_p = H(\theta_p, t_p)\,c`, eq. (4).

    The coefficients ``c`` are those of `kbwf.expand`. The default basis is not that of
    the reconstruction, so that no experiment commits an inverse crime.

    Parameters
    ----------
    volume
        Voxel values of the map, of shape ``(n, n, n)``; the images have its side.
    poses
        Poses of the particles.
    basis, psf
        The window in which the map is expanded, and an optional point-spread function.
    batch_size
        Number of particles that are processed at a time, see `spatial.project`.

    Returns
    -------
    Images of shape ``(P, n, n)``.
    """
    footprint = spatial.footprint(basis, psf)
    coefficients = kbwf.expand(basis, volume)
    return spatial.project(footprint, coefficients, poses, volume.shape[0], batch_size)


def slice_projector(
    volume: Volume,
    basis: kbwf.KBWF = kbwf.SIMULATION_BASIS,
    magnification: Float[np.ndarray | Array, "groups 2 2"] | None = None,
) -> Callable[..., Images]:
    """Return a function of poses that makes images of a map without noise.

    The images are those of `clean_images` up to the last frequency below Nyquist, and
    zero beyond, by slices of the map's spectrum, which is much faster. A particle that
    is shifted over the image's edge reappears on the other side.

    Parameters
    ----------
    volume
        Voxel values of the map, of shape ``(n, n, n)``; the images have its side.
    basis
        The window in which the map is expanded.
    magnification
        Matrix of each optics group by which the images' frequencies are mapped to those
        of the slices, see :mod:`jaxrefine.aberrations`; frequencies that any of them
        may map beyond Nyquist are zero. By default all are the identity.

    Returns
    -------
    A function of ``P`` poses, and of the group of each, from 0 (by default all are in
    the first), that returns images of shape ``(P, n, n)``. Its memory grows with ``P``:
    some hundreds are enough at a time.
    """
    n = volume.shape[0]
    last = (n - 1) // 2
    spectrum = _ACCURATE.spectrum(kbwf.expand(basis, volume), last)
    if magnification is None:
        disc = slices.disc(n, last, basis)
        return lambda poses, group=None: slices.to_images(
            slices.project(spectrum, disc, poses), disc
        )
    matrices = jnp.asarray(magnification)
    # Of what the engine compares nothing is left out, see `observation.View`.
    disc, stretch = slices.disc(n, last), Aberrations(magnification=matrices).stretch
    inside = jnp.sum(disc.frequencies**2, axis=-1) * stretch**2 <= last**2
    frequencies = jnp.where(inside[:, None], disc.frequencies, 0.0)
    disc = replace(disc, frequencies=frequencies)
    shape = (len(matrices), *disc.frequencies.shape)
    points = jnp.broadcast_to(disc.frequencies, shape)
    mapped = jnp.linalg.norm(magnified(matrices, points), axis=-1)
    envelopes = kbwf.fourier_transform(basis, 2 * math.pi / n * mapped)
    envelopes = jnp.where(inside, envelopes, 0.0)

    def project(
        poses: Poses, group: Int[np.ndarray | Array, " particles"] | None = None
    ) -> Images:
        dtype = poses.rotations.dtype
        of_each = jnp.zeros(len(poses), int) if group is None else jnp.asarray(group)
        spectra = slices.project(
            spectrum,
            disc,
            poses,
            transfer=envelopes[of_each].astype(dtype),
            magnification=matrices[of_each].astype(dtype),
        )
        return slices.to_images(spectra, disc)

    return project


def noise_std(images: Images, snr_db: float | Scalar) -> Scalar:
    r"""Return the noise level that gives clean images a signal-to-noise ratio.

    .. math:: \mathrm{SNR} = 10 \log_{10} \frac{1}{P m^2 \sigma^2}
       \sum_{p=1}^P \|g'_p\|_2^2

    The power is *per pixel*. ``SNR_data`` as printed in section IV-A lacks the division
    by the ``m^2`` pixels of an image; but only with the power per pixel does its
    -14.2 dB describe the visible noise of the paper's images.
    """
    return noise_std_of_power(jnp.mean(images**2), snr_db)


def noise_std_of_power(power: Scalar, snr_db: float | Scalar) -> Scalar:
    """Return the noise level of `noise_std` from the mean power of the clean pixels."""
    return jnp.sqrt(power) * 10 ** (-snr_db / 20)


def add_noise(key: PRNGKeyArray, images: Images, sigma: float | Scalar) -> Images:
    """Add white Gaussian noise of standard deviation ``sigma``."""
    return images + sigma * jax.random.normal(key, images.shape, images.dtype)


@eqx.filter_jit
def blur(volume: Volume, width: float) -> Volume:
    r"""Blur a map by a Gaussian, :math:`\hat V(\omega)\, e^{-s^2 |\omega|^2 / 2}`.

    The authors' released code starts from the true map blurred by ``s = 4`` voxels.

    ``width`` is the standard deviation ``s`` in voxels. The map is regarded as zero
    outside its box, which is padded by ``4 s``; the Gaussian is neglected beyond.
    Raises `InputError` if ``width`` is negative.
    """
    if width < 0:
        raise InputError(f"width must be at least 0 voxels, got {width}")
    n = volume.shape[0]
    size = n + math.ceil(4 * width)

    def response(frequencies):
        return jnp.exp(-2 * (math.pi * width * frequencies.astype(volume.dtype)) ** 2)

    full, half = response(jnp.fft.fftfreq(size)), response(jnp.fft.rfftfreq(size))
    spectrum = jnp.fft.rfftn(volume, s=(size,) * 3)
    transfer = full[:, None, None] * full[None, :, None] * half[None, None]
    spectrum = spectrum * transfer.astype(spectrum.dtype)
    return jnp.fft.irfftn(spectrum, s=(size,) * 3)[:n, :n, :n]


def _pseudo_atoms(
    key: PRNGKeyArray,
) -> tuple[Float32[Array, "atoms 3"], Float32[Array, " atoms"]]:
    """Return the phantom's atoms ``(x, y, z)`` in box sides, centred, and weights."""
    positions = jnp.linspace(0, 1, _BASE_PAIRS, dtype=jnp.float32)
    keys = jax.random.split(key, len(_DOMAINS))
    chains = [
        _confined_chain(chain_key, radius) + jnp.array([centre], jnp.float32)
        for chain_key, (centre, radius) in zip(keys, _DOMAINS, strict=True)
    ]
    points = jnp.concatenate([jax.vmap(_base_pair)(positions).reshape(-1, 3), *chains])
    pairs = jnp.tile(jnp.array(_PAIR_WEIGHTS, jnp.float32), _BASE_PAIRS)
    residues = jnp.ones(len(points) - len(pairs), jnp.float32)
    weights = jnp.concatenate([pairs, residues])
    points = points - jnp.average(points, axis=0, weights=weights, keepdims=True)
    return points * (_ATOMS_WITHIN / jnp.linalg.norm(points, axis=1).max()), weights


def _base_pair(position: Float32[Array, ""]) -> Float32[Array, "5 3"]:
    """Return the atoms across the helix at a position in [0, 1] along its axis."""

    def centre_line(u):
        angle, radius = -5.8 * u, 0.48 + 0.28 * u
        height = -0.45 + 0.6 * u + 0.2 * jnp.sin(5 * u)
        return jnp.stack([radius * jnp.cos(angle), radius * jnp.sin(angle), height])

    centre, tangent = jax.jvp(centre_line, (position,), (jnp.ones_like(position),))
    tangent = tangent / jnp.linalg.norm(tangent)
    across = jnp.cross(tangent, centre)
    across = across / jnp.linalg.norm(across)
    outwards = jnp.cross(across, tangent)

    def strand(phase):
        side = jnp.cos(phase) * outwards + jnp.sin(phase) * across
        return centre + _HELIX_RADIUS * side

    turn = 2 * math.pi * _BASE_PAIRS / _BASE_PAIRS_PER_TURN * position
    return jnp.linspace(strand(turn), strand(turn + _GROOVE_ANGLE), len(_PAIR_WEIGHTS))


def _confined_chain(key: PRNGKeyArray, radius: float) -> Float32[Array, "residues 3"]:
    """Return a random walk in a ball around 0; steps out of it are reflected."""
    count = round(_RESIDUES_PER_VOLUME * 4 / 3 * math.pi * radius**3)
    steps = jax.random.normal(key, (count, 3), jnp.float32)
    steps = steps * (_CHAIN_STEP / jnp.linalg.norm(steps, axis=1, keepdims=True))

    def walk(point, step):
        point = point + step
        distance = jnp.linalg.norm(point)
        point = point * jnp.where(distance > radius, 2 * radius / distance - 1, 1)
        return point, point

    return jax.lax.scan(walk, jnp.zeros(3, jnp.float32), steps)[1]
