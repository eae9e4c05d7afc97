r"""The slice projector: images by the central-slice theorem, for production use.

.. math:: \hat g_p(\omega) = h_p(\omega)\, \hat\varphi(\omega)\,
   \hat c(R_p^T (M_p \omega, 0))\, e^{-2\pi i\, \omega\cdot t_p / m}

Images are represented by their Fourier coefficients on a :class:`Disc` of the half
plane: frequencies ``omega = (x, y)`` in cycles per box of side ``m``, with
``|omega| <= r_max``. Phases are relative to the image's origin, the pixel ``m // 2``.
The volume has the side of the images. Unlike in images and in the spatial projector,
there are no frequencies beyond ``r_max`` or Nyquist, and a particle that is shifted
over the image's edge reappears on the other side. The matrix ``M`` is the image's
magnification, where that depends on the direction (:mod:`jaxrefine.aberrations`), and
otherwise the identity.

The derivatives of the interpolated spectrum are exact, and therefore the gradients
here. Functions of one particle take its data, rotation and shift; use
:func:`jaxrefine._batching.map_over_particles` for many, about a hundred at a time.
"""

import math
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Complex, Float, Int

from jaxrefine._batching import map_over_particles, sum_over_batches
from jaxrefine._types import Images, Volume
from jaxrefine.aberrations import magnified
from jaxrefine.errors import InputError
from jaxrefine.geometry import Poses
from jaxrefine.operators import kbwf
from jaxrefine.operators.complex import scaled
from jaxrefine.operators.gridding import Frequencies, Insertion, Spectrum


class Disc(eqx.Module):
    """The frequencies of the half plane up to a radius; made by :func:`disc`.

    Attributes
    ----------
    frequencies
        ``(x, y)`` in cycles per box, in the order of their radii; one of each pair
        ``omega``, ``-omega``.
    multiplicity
        Number of frequencies of the plane that each one stands for: 2, or 1 at the
        origin, or 0 for one that only fills up the disc.
    envelope
        Fourier transform of the volume's basis function at each frequency; 1 for
        voxels.
    rows, columns
        Indices of the frequencies in the result of ``rfft2``.
    shells
        Radii rounded to whole cycles per box.
    image_size
        Side ``m`` of the images in pixels.
    r_max
        Radius of the disc in cycles per box.
    """

    frequencies: Float[Array, "k 2"]
    multiplicity: Float[Array, "k"]
    envelope: Float[Array, "k"]
    rows: Int[Array, "k"]
    columns: Int[Array, "k"]
    shells: Int[Array, "k"]
    image_size: int = eqx.field(static=True)
    r_max: int = eqx.field(static=True)

    @property
    def quadrature(self) -> Float[Array, "k"]:
        r"""Weights with which the spectra have the inner product of the images.

        :math:`\sum_k w_k \Re(\bar a_k b_k)` is the sum over the pixels of the product
        of the band-limited images: the multiplicity over ``m**2``.
        """
        return self.multiplicity / self.image_size**2


def disc(
    image_size: int, r_max: int, basis: kbwf.KBWF | None = None, multiple: int = 1
) -> Disc:
    """List the frequencies of the half plane up to a radius, in the order of radii.

    Parameters
    ----------
    image_size
        Side ``m`` of the images in pixels.
    r_max
        Largest frequency in cycles per box, below Nyquist, ``m / 2``.
    basis
        Basis of the volume's coefficients; without one, they are voxel values.
    multiple
        The number of frequencies is filled up to a multiple of this, by the origin with
        a multiplicity of 0.

    Raises
    ------
    InputError
        If ``r_max`` is not from 1 to the last frequency below Nyquist.
    """
    last = (image_size - 1) // 2
    if not 1 <= r_max <= last:
        raise InputError(
            f"r_max must be from 1 to {last} cycles per box for images of side "
            f"{image_size}, got {r_max}"
        )
    y, x = np.mgrid[-r_max : r_max + 1, 0 : r_max + 1]
    in_half_plane = (x > 0) | (y >= 0)
    inside = (x**2 + y**2 <= r_max**2) & in_half_plane
    x, y = x[inside], y[inside]
    order = np.argsort(x**2 + y**2, kind="stable")
    more = -len(order) % multiple
    x, y = (np.pad(axis[order], (0, more)) for axis in (x, y))
    radius = np.hypot(x, y)
    multiplicity = np.where(radius > 0, 2, 1)
    multiplicity[len(order) :] = 0
    real = jax.dtypes.canonicalize_dtype(np.float64)

    def on_device(values: np.ndarray, dtype: Any) -> Array:
        # Unlike `jnp.asarray`, this compiles nothing.
        return jax.device_put(values.astype(dtype))

    envelope = on_device(np.ones(len(x)), real)
    if basis is not None:
        envelope = kbwf.fourier_transform(
            basis, on_device(2 * math.pi / image_size * radius, real)
        )
    return Disc(
        frequencies=on_device(np.stack([x, y], axis=-1), real),
        multiplicity=on_device(multiplicity, real),
        envelope=envelope,
        rows=on_device(y % image_size, np.int32),
        columns=on_device(x, np.int32),
        shells=on_device(np.rint(radius), np.int32),
        image_size=image_size,
        r_max=r_max,
    )


def bucket(r_max: int, image_size: int) -> int:
    """Round a radius down to one of fourteen, so that few programs are compiled.

    The largest of these radii is the last frequency below Nyquist; each is about 0.8 of
    the next. A radius below all of them is returned unchanged.
    """
    last = (image_size - 1) // 2
    # A factor of 0.8 loses about a fifth of the supported band, at most, and 14 radii
    # reach down to 0.055 of it. Both are conventions that no benchmark has set.
    radii = [math.ceil(last * 0.8**step) for step in range(14)]
    return max([radius for radius in radii if radius <= r_max], default=r_max)


@eqx.filter_jit
def image_spectra(images: Images, disc: Disc) -> Complex[Array, "particles k"]:
    r"""Return the images' Fourier coefficients on the disc.

    .. math:: \hat g(\omega) = \sum_j g[j]\, e^{-2\pi i\, \omega\cdot j / m},

    with ``j`` counted from the origin ``m // 2``. Images have the shape ``(P, m, m)``.

    Raises
    ------
    InputError
        If the images do not have the side of the disc.
    """
    if images.shape[-1] != disc.image_size:
        raise InputError(
            f"images must have the disc's side of {disc.image_size} pixels, got "
            f"{images.shape[-1]}"
        )
    centred = jnp.fft.ifftshift(images, axes=(-2, -1))
    return jnp.fft.rfft2(centred)[:, disc.rows, disc.columns]


@eqx.filter_jit
def to_images(spectra: Complex[Array, "particles k"], disc: Disc) -> Images:
    """Return the images that have these coefficients on the disc, and 0 beyond it."""
    m = disc.image_size
    plane = jnp.zeros((len(spectra), m, m // 2 + 1), spectra.dtype)
    plane = plane.at[:, disc.rows, disc.columns].set(spectra)
    # The column x = 0 holds both frequencies of each conjugate pair.
    edge = plane[:, :, 0]
    mirror = jnp.conj(jnp.roll(edge[:, ::-1], 1, axis=1))
    plane = plane.at[:, :, 0].set(jnp.where(np.arange(m) > m // 2, mirror, edge))
    images = jnp.fft.irfft2(plane, s=(m, m))
    return jnp.fft.fftshift(images, axes=(-2, -1))


def disc_axes(
    disc: Disc, dtype, magnification: Float[Array, "2 2"] | None = None
) -> tuple[Float[Array, "k"], Float[Array, "k"]]:
    r"""Return the coordinates of the disc's frequencies :math:`M \omega`."""
    frequencies = magnified(magnification, disc.frequencies)
    return frequencies[:, 0].astype(dtype), frequencies[:, 1].astype(dtype)


def on_plane(
    disc: Disc,
    rotation: Float[Array, "3 3"],
    magnification: Float[Array, "2 2"] | None = None,
) -> tuple[Frequencies, Frequencies, Frequencies]:
    r"""Return the disc's points in the volume's spectrum, :math:`R^T (\omega, 0)`.

    Also return the plane's normal :math:`R^T (0, 0, 1)`, and the derivative of the
    points with respect to an in-plane rotation of the particle,
    :math:`R^T (\omega_y, -\omega_x, 0)`. With a magnification ``M``, the frequencies
    are :math:`M \omega`.
    """
    x, y = disc_axes(disc, rotation.dtype, magnification)
    right, down, beam = rotation
    points = tuple(right[i] * x + down[i] * y for i in range(3))
    normal = tuple(jnp.full_like(x, 1) * beam[i] for i in range(3))
    tangent = tuple(right[i] * y - down[i] * x for i in range(3))
    return points, normal, tangent  # pyright: ignore[reportReturnType]


def phases(disc: Disc, shift: Float[Array, "2"]) -> Complex[Array, "k"]:
    r"""Return :math:`e^{-2\pi i\, \omega\cdot t / m}`, the phases of a shift ``t``."""
    x, y = disc_axes(disc, shift.dtype)
    angle = (-2 * math.pi / disc.image_size) * (x * shift[0] + y * shift[1])
    return jax.lax.complex(jnp.cos(angle), jnp.sin(angle))


def check_spectrum(disc: Disc, spectrum: Spectrum) -> None:
    """Check that a volume's spectrum covers the disc of the images.

    Raises
    ------
    InputError
        If the volume does not have the side of the images, or its spectrum does not
        extend to the radius of the disc.
    """
    if spectrum.box != disc.image_size or spectrum.r_max < disc.r_max:
        raise InputError(
            f"the spectrum must be that of a volume of side {disc.image_size} up to at "
            f"least {disc.r_max} cycles per box, got side {spectrum.box} up to "
            f"{spectrum.r_max}"
        )


@eqx.filter_jit
def project(
    spectrum: Spectrum,
    disc: Disc,
    poses: Poses,
    transfer: Float[Array, "particles k"] | None = None,
    batch_size: int = 1024,
    magnification: Float[Array, "particles 2 2"] | None = None,
) -> Complex[Array, "particles k"]:
    r"""Project a map: the spectra of ``H(Theta, T) c`` on the disc.

    Parameters
    ----------
    spectrum
        Spectrum of the coefficients ``c``.
    disc, poses
        Frequencies of the images, and poses of the particles.
    transfer
        Contrast-transfer function of every particle on the disc; 1 if not given.
    batch_size
        Number of particles that are processed at a time.
    magnification
        The matrix ``M`` of every particle; the identity if not given. The spectrum must
        extend to all :math:`M \omega`, and the disc's envelope be that there.

    Raises
    ------
    InputError
        If the volume does not have the side of the images, if its spectrum does not
        extend to the radius of the disc, or if there are no particles.
    """
    check_spectrum(disc, spectrum)

    def project_particle(particle):
        return project_one(spectrum, disc, *particle)

    particles = (poses.rotations, poses.shifts, transfer, magnification)
    return map_over_particles(project_particle, particles, batch_size)


def project_one(
    spectrum: Spectrum,
    disc: Disc,
    rotation: Float[Array, "3 3"],
    shift: Float[Array, "2"],
    transfer: Float[Array, "k"] | None,
    magnification: Float[Array, "2 2"] | None = None,
) -> Complex[Array, "k"]:
    """Project a map at one pose, shift in pixels; see `project`."""
    values = spectrum(*on_plane(disc, rotation, magnification)[0])
    gain = slice_gain(disc, transfer, values.real.dtype)
    return scaled(gain, values * phases(disc, shift))


def slice_gain(disc: Disc, transfer: Float[Array, "k"] | None, dtype):
    """Return the factors of a slice: transfer function times the basis' envelope."""
    envelope = disc.envelope.astype(dtype)
    return envelope if transfer is None else transfer * envelope


@eqx.filter_jit
def backproject(
    insertion: Insertion,
    spectra: Complex[Array, "particles k"],
    disc: Disc,
    poses: Poses,
    weights: Float[Array, "particles k"] | None = None,
    batch_size: int = 512,
    side: int | None = None,
    magnification: Float[Array, "particles 2 2"] | None = None,
) -> Volume:
    r"""Back-project images given by their spectra: ``H(Theta, T)^T g``.

    This is the adjoint of :func:`project` for the inner product of the images (see
    :attr:`Disc.quadrature`), so that it agrees with that of the spatial projector.

    Parameters
    ----------
    insertion
        The method of inserting slices, such as `gridding.default_insertion()`.
    spectra, disc, poses
        Spectra of the images, their frequencies, and poses of the particles.
    weights
        Real factors of the spectra: the transfer function for the adjoint of a
        projection with one, divided by the variance of the noise for a weighted cost.
    batch_size
        Number of particles that are processed at a time.
    side
        Side of the volume, by default that of the images. A volume of fewer voxels,
        in a box of the same length, holds the frequencies up to half its side.
    magnification
        The matrix ``M`` of every particle, as for :func:`project`. No :math:`M \omega`
        that has a weight may be beyond the radius of the disc.

    Returns
    -------
    The volume.

    Raises
    ------
    InputError
        If there is not one pose for each image, if there are no images, or if the side
        is less than twice the radius of the disc.
    """
    if len(spectra) != len(poses):
        raise InputError(
            f"there must be one pose for each of {len(spectra)} images, got "
            f"{len(poses)}"
        )
    dtype = spectra.real.dtype

    def slice_of(particle):
        rotation, shift, spectrum, weights, magnification = particle
        factor = slice_gain(disc, weights, dtype) * disc.quadrature.astype(dtype)
        values = scaled(factor, spectrum * jnp.conj(phases(disc, shift)))
        return on_plane(disc, rotation, magnification)[0], values

    particles = (poses.rotations, poses.shifts, spectra, weights, magnification)
    size = (_volume_side(disc, side), disc.r_max)
    return _insert(insertion, slice_of, particles, size, batch_size)


def _volume_side(disc: Disc, side: int | None) -> int:
    """Return the side of the volume that images are inserted into, after a check."""
    if side is None:
        return disc.image_size
    if side < 2 * disc.r_max:
        raise InputError(
            "the side of a volume must be at least twice the radius of the disc, "
            f"{2 * disc.r_max}, got {side}"
        )
    return side


@eqx.filter_jit
def normal_kernel(
    insertion: Insertion,
    disc: Disc,
    poses: Poses,
    weights: Float[Array, "particles k"] | None = None,
    batch_size: int = 512,
    side: int | None = None,
    magnification: Float[Array, "particles 2 2"] | None = None,
) -> Float[Array, "side side side"]:
    r"""Return the convolution kernel of the normal operator, like `normal.kernel`.

    .. math:: w[j] = \sum_{p,k} q_k\, a_{pk}\, \hat\varphi_k^2
       \cos(2\pi\, \xi_{pk}\cdot j / m)

    with the quadrature ``q`` of the disc and the weights ``a``. The convolution is
    exactly the projection, followed by the weights and the adjoint of the projection.
    (`normal.transfer` makes the transfer for `normal.apply_normal` from the kernel, and
    `normal.circulant_eigenvalues` the preconditioner.)

    Parameters
    ----------
    insertion, disc, poses, batch_size, side, magnification
        As for :func:`backproject`, which also tells the errors raised.
    weights
        Squared transfer functions, divided by the variance of the noise for a weighted
        cost.

    Returns
    -------
    The kernel on ``[-(m-1), m-1]**3`` of a volume of side ``m``, indexed ``[z, y, x]``;
    the displacement 0 is at the middle.
    """
    dtype = poses.rotations.dtype

    def slice_of(particle):
        rotation, weights, magnification = particle
        envelope = disc.envelope.astype(dtype)
        density = slice_gain(disc, weights, dtype) * envelope
        density = density * disc.quadrature.astype(dtype)
        x, y, z = on_plane(disc, rotation, magnification)[0]
        return (2 * x, 2 * y, 2 * z), jax.lax.complex(density, jnp.zeros_like(density))

    size = (2 * _volume_side(disc, side), 2 * disc.r_max)
    particles = (poses.rotations, weights, magnification)
    return _insert(insertion, slice_of, particles, size, batch_size)[1:, 1:, 1:]


def _insert(
    insertion: Insertion,
    slice_of: Callable[[Any], tuple[Frequencies, Complex[Array, "k"]]],
    particles: Any,
    size: tuple[int, int],
    batch_size: int,
) -> Volume:
    """Insert the slices of particles into a volume of the given side and ``r_max``."""

    def insert_batch(batch, is_new):
        points, values = jax.vmap(slice_of)(batch)
        values = scaled(is_new[:, None].astype(values.real.dtype), values)
        x, y, z = (axis.reshape(-1) for axis in points)
        return insertion.adjoint((x, y, z), values.reshape(-1), *size)

    return sum_over_batches(insert_batch, particles, batch_size)
