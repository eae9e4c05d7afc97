"""The optics: point-spread functions (PSF) and contrast-transfer functions (CTF).

The PSF ``h`` of eq. (1) enters the spatial projector only through its radial transfer
function. The CTF, which is anisotropic and different for every particle, multiplies the
Fourier transform of an image; the slice projector and the simulation use it.
"""

import math
from collections.abc import Callable
from typing import final

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Bool, Float, Int

from jaxrefine._types import Images, Scalar
from jaxrefine.aberrations import Aberrations, magnified
from jaxrefine.errors import InputError


class IsotropicPSF(eqx.Module):
    """An isotropic PSF, given in the Fourier domain.

    Parameters
    ----------
    transfer
        The 2-D Fourier transform of ``h``, as a NumPy function of the radial frequency
        in radians per pixel, with real values.
    radius
        Radius in pixels beyond which ``h`` is negligible.
    """

    transfer: Callable[[np.ndarray], np.ndarray] = eqx.field(static=True)
    radius: float = eqx.field(static=True)


def gaussian_psf(width: float) -> IsotropicPSF:
    """Return a Gaussian PSF of unit mass.

    Parameters
    ----------
    width
        Standard deviation in pixels, positive. The PSF is truncated at six standard
        deviations.

    Raises
    ------
    InputError
        If the width is not positive.
    """
    if not width > 0:
        raise InputError(f"width must be positive, got {width}")
    return IsotropicPSF(lambda omega: np.exp(-0.5 * (width * omega) ** 2), 6.0 * width)


@final
class CTF(eqx.Module):
    r"""The contrast-transfer function (CTF) of one particle, or of many.

    It has RELION's formula and sign, positive at low frequencies, so that protein is
    bright:

    .. math:: \mathrm{CTF}(u) = s\, e^{-B |u|^2 / 4} \sin\bigl(
       \pi \lambda\, \delta(u) |u|^2 - \tfrac\pi2 C_s \lambda^3 |u|^4 + \phi
       + \arctan\tfrac{A}{\sqrt{1 - A^2}} - \gamma(u)\bigr),

    with the defocus :math:`\delta(u) = \tfrac12 (\delta_U + \delta_V)
    + \tfrac12 (\delta_U - \delta_V) \cos 2(\angle u - \alpha)` and the wavelength
    :math:`\lambda` of the electrons. The offset :math:`\gamma` of an optics group, beam
    tilt and anisotropic magnification are in :mod:`jaxrefine.aberrations`. (Source:
    RELION 3.1, ``ctf.h`` and ``ctf.cpp``.)

    Every attribute is a scalar, for one particle, or has one leading axis of particles.
    A scalar that is given with arrays is repeated for all particles.

    Attributes
    ----------
    defocus_u, defocus_v
        Largest and smallest defocus in angstroms; positive means underfocus.
    defocus_angle
        Angle from the x axis to the direction of ``defocus_u``, in radians.
    voltage
        Acceleration voltage in kilovolts.
    spherical_aberration
        Spherical aberration ``C_s`` in millimetres.
    amplitude_contrast
        Amplitude contrast ``A``, from 0 to 1.
    phase_shift
        Phase shift :math:`\phi` of a phase plate, in radians.
    b_factor
        B factor ``B`` of the envelope, in square angstroms.
    scale
        Factor ``s``.
    """

    defocus_u: Float[Array, "*batch"]
    defocus_v: Float[Array, "*batch"]
    defocus_angle: Float[Array, "*batch"]
    voltage: Float[Array, "*batch"]
    spherical_aberration: Float[Array, "*batch"]
    amplitude_contrast: Float[Array, "*batch"]
    phase_shift: Float[Array, "*batch"]
    b_factor: Float[Array, "*batch"]
    scale: Float[Array, "*batch"]

    def __init__(
        self,
        defocus_u: ArrayLike,
        defocus_v: ArrayLike,
        defocus_angle: ArrayLike = 0.0,
        *,
        voltage: ArrayLike = 300.0,
        spherical_aberration: ArrayLike = 2.7,
        amplitude_contrast: ArrayLike = 0.1,
        phase_shift: ArrayLike = 0.0,
        b_factor: ArrayLike = 0.0,
        scale: ArrayLike = 1.0,
    ):
        dtype = None if hasattr(defocus_u, "dtype") else float
        self.defocus_u = like = jnp.asarray(defocus_u, dtype)

        def repeated(value) -> Array:
            return jnp.broadcast_to(jnp.asarray(value, like.dtype), like.shape)

        self.defocus_v = repeated(defocus_v)
        self.defocus_angle = repeated(defocus_angle)
        self.voltage = repeated(voltage)
        self.spherical_aberration = repeated(spherical_aberration)
        self.amplitude_contrast = repeated(amplitude_contrast)
        self.phase_shift = repeated(phase_shift)
        self.b_factor = repeated(b_factor)
        self.scale = repeated(scale)

    @eqx.filter_jit
    def __call__(
        self,
        frequencies: Float[Array, "frequencies 2"],
        gamma: Float[Array, " frequencies"] | None = None,
    ) -> Float[Array, " frequencies"]:
        """Evaluate the CTF of one particle; use ``vmap`` for many.

        ``frequencies`` are ``(x, y)`` in cycles per angstrom, and ``gamma`` is the
        offset there in radians (`Aberrations.gamma`), 0 by default.
        """
        phase, envelope = self._phase_and_envelope(frequencies, gamma)
        return envelope * jnp.sin(phase)

    def value_and_slope(
        self,
        frequencies: Float[Array, "frequencies 2"],
        gamma: Float[Array, " frequencies"] | None = None,
    ) -> tuple[Float[Array, " frequencies"], Float[Array, " frequencies"]]:
        r"""Return the CTF of one particle and its derivative by the defocus.

        Both `defocus_u` and `defocus_v` change, so that the derivative is
        :math:`\pi \lambda |u|^2\, s\, e^{-B |u|^2 / 4} \cos(\ldots)`, per angstrom.
        Parameters as for a call.
        """
        phase, envelope = self._phase_and_envelope(frequencies, gamma)
        squared = jnp.sum(frequencies**2, axis=-1)
        rate = math.pi * electron_wavelength(self.voltage) * squared
        return envelope * jnp.sin(phase), rate * envelope * jnp.cos(phase)

    def _phase_and_envelope(
        self,
        frequencies: Float[Array, "frequencies 2"],
        gamma: Float[Array, " frequencies"] | None,
    ) -> tuple[Float[Array, " frequencies"], Float[Array, " frequencies"]]:
        """Return the argument of the sine, and the factor before it."""
        x, y = frequencies[:, 0], frequencies[:, 1]
        squared = x**2 + y**2
        # |u|^2 cos 2(angle(u) - alpha), which needs no angle at u = 0.
        double_angle = 2 * self.defocus_angle
        cosine, sine = jnp.cos(double_angle), jnp.sin(double_angle)
        twofold = (x**2 - y**2) * cosine + 2 * x * y * sine
        mean = (self.defocus_u + self.defocus_v) / 2
        half_difference = (self.defocus_u - self.defocus_v) / 2
        wavelength = electron_wavelength(self.voltage)
        phase = (
            math.pi * wavelength * (mean * squared + half_difference * twofold)
            - math.pi / 2 * 1e7 * self.spherical_aberration * wavelength**3 * squared**2
            + self.phase_shift
            + jnp.arcsin(self.amplitude_contrast)
        )
        if gamma is not None:
            phase = phase - gamma
        return phase, self.scale * jnp.exp(-self.b_factor / 4 * squared)


def transparent(count: int) -> CTF:
    """Return contrast-transfer functions of value 1, of so many particles.

    Without defocus and aberration, all contrast is amplitude contrast.
    """
    zero = np.zeros(count)
    return CTF(zero, zero, spherical_aberration=0.0, amplitude_contrast=1.0)


def electron_wavelength(voltage: Scalar) -> Scalar:
    """Return the relativistic wavelength of electrons in angstroms.

    ``voltage`` is in kilovolts. (Source: RELION 3.1, ``ctf.cpp``.)
    """
    return 12.2643247 / jnp.sqrt(1e3 * voltage * (1 + 0.978466e-3 * voltage))


@jax.jit
def is_finite(
    ctf: CTF, pixel_size_in_angstroms: float | Scalar
) -> Bool[Array, " particles"]:
    """Return whether each particle's CTF is finite up to the corners of its spectrum.

    It is evaluated in single precision, in which it is used and in which a defocus of
    1e39, for example, overflows.
    """
    single = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), ctf)
    nyquist = jnp.asarray(0.5 / pixel_size_in_angstroms, jnp.float32)
    corners = jnp.asarray([[0, 0], [1, 0], [0, 1], [1, 1]], jnp.float32) * nyquist
    values = jax.vmap(lambda particle: particle(corners))(single)
    return jnp.isfinite(values).all(axis=-1)


@eqx.filter_jit
def apply_ctf(
    ctf: CTF,
    images: Images,
    pixel_size_in_angstroms: float,
    aberrations: Aberrations | None = None,
    group: Int[Array, " particles"] | None = None,
) -> Images:
    """Multiply the Fourier transform of each image by its CTF and its aberrations.

    Images are treated as periodic, as in RELION: the CTF spreads the signal over an
    edge to the opposite one.

    Parameters
    ----------
    ctf
        The CTF of each particle.
    images
        Images of shape ``(P, m, m)``. Those of a group with a magnification must have
        it: it is applied to the frequencies of the CTF and the aberrations alone.
    pixel_size_in_angstroms
        Edge of a pixel.
    aberrations
        Those of optics groups, if any.
    group
        Group of each particle, from 0; by default all are in the first.
    """
    m = images.shape[-1]
    step = 1 / pixel_size_in_angstroms
    x = jnp.fft.rfftfreq(m, dtype=images.dtype) * step
    y = jnp.fft.fftfreq(m, dtype=images.dtype) * step
    shape = (m, m // 2 + 1)
    frequencies = jnp.stack(jnp.meshgrid(x, y), axis=-1).reshape(-1, 2)
    if group is None:
        group = jnp.zeros(len(images), jnp.int32)
    aberrations = Aberrations() if aberrations is None else aberrations
    of_groups = (
        aberrations.phase(frequencies),
        aberrations.gamma(frequencies),
        aberrations.magnification,
    )
    phase, gamma, magnification = jax.tree.map(lambda table: table[group], of_groups)

    def apply_to_image(ctf, image, phase, gamma, magnification):
        spectrum = jnp.fft.rfft2(image)
        factor = ctf(magnified(magnification, frequencies), gamma)
        factor = factor.astype(spectrum.dtype)
        if phase is not None:
            factor = factor * phase
        return jnp.fft.irfft2(spectrum * factor.reshape(shape), s=(m, m))

    return jax.vmap(apply_to_image)(ctf, images, phase, gamma, magnification)
