r"""The slice projector: images by the central-slice theorem, for production.

.. math:: \hat g_p(\omega) = h_p(\omega)\, \hat\varphi(\omega)\,
   \hat c(R_p^T (\omega, 0))\, e^{-2\pi i\, \omega\cdot t_p / m}

Images are held by their Fourier coefficients on a :class:`Disc` of the half plane:
frequencies ``omega = (x, y)`` in cycles per box of side ``m``, ``|omega| <= r_max``,
counted from the image's origin ``m // 2``. The volume has the side of the images. What
the images and the spatial projector know beyond ``r_max`` or Nyquist is absent here,
and a particle pushed over the image's edge comes back on the other side.

The interpolated spectrum's derivatives are exact, hence so are the gradients here.
Functions of one particle take its data, rotation and shift; use
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
from jaxrefine.errors import InputError
from jaxrefine.geometry import Poses
from jaxrefine.operators import kbwf
from jaxrefine.operators._complex import scaled
from jaxrefine.operators.gridding import Frequencies, Insertion, Spectrum

_HIGHEST = jax.lax.Precision.HIGHEST


class Disc(eqx.Module):
    """The frequencies of the half plane up to a radius; made by :func:`disc`.

    Attributes
    ----------
    frequencies
        ``(x, y)`` in cycles per box; one of each pair ``omega``, ``-omega``.
    multiplicity
        How many frequencies of the plane each stands for: 2, or 1 at the origin.
    envelope
        Fourier transform of the volume's basis function there; 1 for voxels.
    rows, columns
        Where they are in the result of ``rfft2``.
    shells
        Radii rounded to whole cycles per box.
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


def disc(image_size: int, r_max: int, basis: kbwf.KBWF | None = None) -> Disc:
    """List the frequencies of the half plane up to a radius.

    Parameters
    ----------
    image_size
        Side ``m`` of the images in pixels.
    r_max
        Largest frequency in cycles per box, below Nyquist, ``m / 2``.
    basis
        Basis of the volume's coefficients; without one they are voxel values.

    Raises
    ------
    InputError
        If the radius is not between 1 and the last below Nyquist.
    """
    last = (image_size - 1) // 2
    if not 1 <= r_max <= last:
        raise InputError(
            f"images of side {image_size} want r_max from 1 to {last} cycles per box, "
            f"not {r_max}"
        )
    y, x = np.mgrid[-r_max : r_max + 1, 0 : r_max + 1]
    once = (x > 0) | (y >= 0)
    inside = (x**2 + y**2 <= r_max**2) & once
    x, y = x[inside], y[inside]
    radius = np.hypot(x, y)
    envelope = jnp.ones(len(x))
    if basis is not None:
        envelope = kbwf.fourier_transform(
            basis, jnp.asarray(2 * math.pi / image_size * radius, envelope.dtype)
        )
    return Disc(
        frequencies=jnp.asarray(np.stack([x, y], axis=-1), envelope.dtype),
        multiplicity=jnp.asarray(np.where(radius > 0, 2, 1), envelope.dtype),
        envelope=envelope,
        rows=jnp.asarray(y % image_size, jnp.int32),
        columns=jnp.asarray(x, jnp.int32),
        shells=jnp.asarray(np.rint(radius), jnp.int32),
        image_size=image_size,
        r_max=r_max,
    )


def bucket(r_max: int, image_size: int) -> int:
    """Round a radius down to one of fourteen, so that few programs need compiling.

    The largest is the last below Nyquist; each is about 0.8 of the next. A radius below
    all of them stays as it is.
    """
    last = (image_size - 1) // 2
    radii = [math.ceil(last * 0.8**step) for step in range(14)]
    return max([radius for radius in radii if radius <= r_max], default=r_max)


def image_spectra(images: Images, disc: Disc) -> Complex[Array, "particles k"]:
    r"""Return the images' Fourier coefficients on the disc.

    .. math:: \hat g(\omega) = \sum_j g[j]\, e^{-2\pi i\, \omega\cdot j / m},

    ``j`` counted from the origin ``m // 2``.

    Raises
    ------
    InputError
        If the images are not of the disc's side.
    """
    if images.shape[-1] != disc.image_size:
        raise InputError(
            f"this disc wants images of side {disc.image_size}, not {images.shape[-1]}"
        )
    centred = jnp.fft.ifftshift(images, axes=(-2, -1))
    return jnp.fft.rfft2(centred)[:, disc.rows, disc.columns]


def to_images(spectra: Complex[Array, "particles k"], disc: Disc) -> Images:
    """Return the images that have these coefficients, and none beyond the disc."""
    m = disc.image_size
    plane = jnp.zeros((len(spectra), m, m // 2 + 1), spectra.dtype)
    plane = plane.at[:, disc.rows, disc.columns].set(spectra)
    # The column x = 0 holds both of a pair.
    edge = plane[:, :, 0]
    mirror = jnp.conj(jnp.roll(edge[:, ::-1], 1, axis=1))
    plane = plane.at[:, :, 0].set(jnp.where(np.arange(m) > m // 2, mirror, edge))
    images = jnp.fft.irfft2(plane, s=(m, m))
    return jnp.fft.fftshift(images, axes=(-2, -1))


def disc_axes(disc: Disc, dtype) -> tuple[Float[Array, "k"], Float[Array, "k"]]:
    """Return the disc's frequencies, x and y."""
    return disc.frequencies[:, 0].astype(dtype), disc.frequencies[:, 1].astype(dtype)


def on_plane(
    disc: Disc, rotation: Float[Array, "3 3"]
) -> tuple[Frequencies, Frequencies, Frequencies]:
    r"""Place the disc in the volume's spectrum, :math:`R^T (\omega, 0)`.

    Also returns the plane's normal :math:`R^T (0, 0, 1)`, and the derivative of the
    points as the particle turns about the beam, :math:`R^T (\omega_y, -\omega_x, 0)`.
    """
    x, y = disc_axes(disc, rotation.dtype)
    right, down, beam = rotation
    points = tuple(right[i] * x + down[i] * y for i in range(3))
    normal = tuple(jnp.full_like(x, 1) * beam[i] for i in range(3))
    turning = tuple(right[i] * y - down[i] * x for i in range(3))
    return points, normal, turning  # pyright: ignore[reportReturnType]


def phases(disc: Disc, shift: Float[Array, "2"]) -> Complex[Array, "k"]:
    r"""Return :math:`e^{-2\pi i\, \omega\cdot t / m}`: it moves an image by ``t``."""
    x, y = disc_axes(disc, shift.dtype)
    angle = (-2 * math.pi / disc.image_size) * (x * shift[0] + y * shift[1])
    return jax.lax.complex(jnp.cos(angle), jnp.sin(angle))


def check_spectrum(disc: Disc, spectrum: Spectrum) -> None:
    """Refuse the spectrum of a volume that images on a disc cannot be compared with."""
    if spectrum.box != disc.image_size or spectrum.r_max < disc.r_max:
        raise InputError(
            f"images of side {disc.image_size} up to {disc.r_max} cycles per box want "
            "the spectrum of a volume of that side up to that frequency, not of side "
            f"{spectrum.box} up to {spectrum.r_max}"
        )


@eqx.filter_jit
def project(
    spectrum: Spectrum,
    disc: Disc,
    poses: Poses,
    transfer: Float[Array, "particles k"] | None = None,
    batch_size: int = 1024,
) -> Complex[Array, "particles k"]:
    """Project a map: the spectra of ``H(Theta, T) c`` on the disc.

    Parameters
    ----------
    spectrum
        Spectrum of the coefficients ``c``.
    disc, poses
        Frequencies of the images, and where the particles are.
    transfer
        Contrast transfer function of every particle on the disc; without it, 1.
    batch_size
        Particles at a time.

    Raises
    ------
    InputError
        If the spectrum is not that of a volume of the images' side up to the disc's
        radius, or there is no particle.
    """
    check_spectrum(disc, spectrum)

    def project_one(particle):
        rotation, shift, transfer = particle
        values = spectrum(*on_plane(disc, rotation)[0])
        gain = slice_gain(disc, transfer, values.real.dtype)
        return scaled(gain, values * phases(disc, shift))

    particles = (poses.rotations, poses.shifts, transfer)
    return map_over_particles(project_one, particles, batch_size)


def slice_gain(disc: Disc, transfer: Float[Array, "k"] | None, dtype):
    """Return what a slice is multiplied by: the transfer function and the basis'."""
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
) -> Volume:
    r"""Back-project images given by their spectra: ``H(Theta, T)^T g``.

    The adjoint of :func:`project` for the images' inner product (see
    :attr:`Disc.quadrature`), so that it agrees with the spatial projector's.

    Parameters
    ----------
    insertion
        The way to insert slices, such as `gridding.default_insertion()`.
    spectra, disc, poses
        Spectra of the images, their frequencies, and where the particles are.
    weights
        Real factors of the spectra: the transfer function, for the adjoint of a
        projection with one; divided by the noise's variance, for a weighted cost.
    batch_size
        Particles at a time.

    Raises
    ------
    InputError
        If there are not as many poses as images, or none of them.
    """
    if len(spectra) != len(poses):
        raise InputError(f"{len(spectra)} images want as many poses, not {len(poses)}")
    dtype = spectra.real.dtype

    def slice_of(particle):
        rotation, shift, spectrum, weights = particle
        factor = slice_gain(disc, weights, dtype) * disc.quadrature.astype(dtype)
        values = scaled(factor, spectrum * jnp.conj(phases(disc, shift)))
        return on_plane(disc, rotation)[0], values

    particles = (poses.rotations, poses.shifts, spectra, weights)
    return _insert(
        insertion, slice_of, particles, (disc.image_size, disc.r_max), batch_size
    )


@eqx.filter_jit
def normal_kernel(
    insertion: Insertion,
    disc: Disc,
    poses: Poses,
    weights: Float[Array, "particles k"] | None = None,
    batch_size: int = 512,
) -> Float[Array, "side side side"]:
    r"""Return the convolution kernel of the normal operator, as `normal.kernel` does.

    .. math:: w[j] = \sum_{p,k} q_k\, a_{pk}\, \hat\varphi_k^2
       \cos(2\pi\, \xi_{pk}\cdot j / m)

    with the disc's quadrature ``q`` and the weights ``a``. It is exact: the adjoint of
    a projection, times the weights, times the projection. (`normal.transfer` makes the
    transfer that `normal.apply_normal` takes, and the preconditioner is made of the
    kernel, too.)

    The weights are squared transfer functions, or these over the noise's variance; the
    other parameters are those of :func:`backproject`. The kernel is on
    ``[-(m-1), m-1]**3``, indexed ``[z, y, x]``, zero at the middle.
    """
    dtype = poses.rotations.dtype

    def slice_of(particle):
        rotation, weights = particle
        envelope = disc.envelope.astype(dtype)
        density = slice_gain(disc, weights, dtype) * envelope
        density = density * disc.quadrature.astype(dtype)
        x, y, z = on_plane(disc, rotation)[0]
        return (2 * x, 2 * y, 2 * z), jax.lax.complex(density, jnp.zeros_like(density))

    size = (2 * disc.image_size, 2 * disc.r_max)
    particles = (poses.rotations, weights)
    return _insert(insertion, slice_of, particles, size, batch_size)[1:, 1:, 1:]


def _insert(
    insertion: Insertion,
    slice_of: Callable[[Any], tuple[Frequencies, Complex[Array, "k"]]],
    particles: Any,
    size: tuple[int, int],
    batch_size: int,
) -> Volume:
    """Insert the particles' slices into a volume of some side and ``r_max``."""

    def insert_batch(some, new):
        points, values = jax.vmap(slice_of)(some)
        values = scaled(new[:, None].astype(values.real.dtype), values)
        x, y, z = (axis.reshape(-1) for axis in points)
        return insertion.adjoint((x, y, z), values.reshape(-1), *size)

    return sum_over_batches(insert_batch, particles, batch_size)
