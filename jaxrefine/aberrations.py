r"""What a microscope does to images besides its contrast-transfer function.

Antisymmetric aberrations, such as coma by a tilt of the beam, turn the phases of an
image's spectrum; symmetric ones add to the phase within the CTF; and a magnification
that depends on the direction maps frequencies linearly. Each is the same for all images
of an optics group, and all follow RELION 3.1: at the frequency :math:`\omega` of an
image, a slice of the map's spectrum :math:`\hat c`, the CTF with its offset
:math:`\gamma` and the phase :math:`\chi` are those at :math:`M \omega`,

.. math:: \hat g(\omega) = e^{i \chi(M\omega)}\, \mathrm{CTF}(M\omega; \gamma)\,
   \hat c(R^T (M\omega, 0))\, e^{-2\pi i\, \omega\cdot t}.

(Source: RELION 3.1, ``obs_model.cpp``, ``ctf.h``, ``Zernike.cpp``, ``tilt_helper.cpp``.
Zivanov, Nakane and Scheres, IUCrJ 7, 2020, describe them.)
"""

import math
from typing import final

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Complex, Float


@final
class Aberrations(eqx.Module):
    r"""The aberrations of optics groups.

    Attributes
    ----------
    odd
        Coefficients of the Zernike polynomials in the phase :math:`\chi` of each group,
        radians, in RELION's order (``rlnOddZernike``): :math:`Z_1^{-1}, Z_1^1,
        Z_3^{-3}, Z_3^{-1}, Z_3^1, Z_3^3, Z_5^{-5}, \dots` None if there is no phase.
    even
        Those in the offset :math:`\gamma` of each group (``rlnEvenZernike``):
        :math:`Z_0^0, Z_2^{-2}, Z_2^0, Z_2^2, Z_4^{-4}, \dots` None if there is none.
    magnification
        The matrix :math:`M` of each group, which acts on ``(x, y)``
        (``rlnMagMat00``, ...). None if all are the identity.

    The argument of the polynomials is the frequency in cycles per angstrom, so that
    their unit disc ends at 1 angstrom.
    """

    odd: Float[Array, "groups odd"] | None = None
    even: Float[Array, "groups even"] | None = None
    magnification: Float[Array, "groups 2 2"] | None = None

    @property
    def groups(self) -> int:
        """Number of groups; 0 if there are no aberrations."""
        leaves = jax.tree.leaves(self)
        return len(leaves[0]) if leaves else 0

    @property
    def stretch(self) -> float:
        r"""Largest :math:`|M \omega| / |\omega|` of all groups, but at least 1."""
        if self.magnification is None:
            return 1.0
        largest = np.linalg.norm(np.asarray(self.magnification), 2, axis=(1, 2)).max()
        return max(1.0, float(largest))

    def phase(
        self, frequencies: Float[Array, "k 2"]
    ) -> Complex[Array, "groups k"] | None:
        r"""Return the factor :math:`e^{i \chi}` of each group; None for 1.

        ``frequencies`` are those of the image, in cycles per angstrom.
        """
        if self.odd is None:
            return None
        angle = self._sum(self.odd, _odd_index, frequencies)
        return jax.lax.complex(jnp.cos(angle), jnp.sin(angle))

    def gamma(
        self, frequencies: Float[Array, "k 2"]
    ) -> Float[Array, "groups k"] | None:
        r"""Return the offset :math:`\gamma` of each group, radians; None for 0.

        ``frequencies`` are those of the image, in cycles per angstrom.
        """
        if self.even is None:
            return None
        return self._sum(self.even, _even_index, frequencies)

    def _sum(self, coefficients, index, frequencies) -> Float[Array, "groups k"]:
        """Return the sums of polynomials of each group."""
        coefficients = coefficients.astype(frequencies.dtype)
        points = jnp.broadcast_to(frequencies, (len(coefficients), *frequencies.shape))
        points = magnified(self.magnification, points)
        total = jnp.zeros(points.shape[:-1], points.dtype)
        for i in range(coefficients.shape[1]):
            n, m = index(i)
            total = total + coefficients[:, i, None] * zernike(n, m, points)
        return total


def magnified(
    magnification: Float[Array, "*batch 2 2"] | None,
    points: Float[Array, "*batch k 2"],
) -> Float[Array, "*batch k 2"]:
    r"""Return :math:`M \omega` of points :math:`\omega`, which is ``points`` for None.

    There is one matrix for each batch of points.
    """
    if magnification is None:
        return points
    matrix = magnification.astype(points.dtype)
    x, y = points[..., 0], points[..., 1]
    rows = [matrix[..., i, 0, None] * x + matrix[..., i, 1, None] * y for i in (0, 1)]
    return jnp.stack(rows, axis=-1)


def zernike(
    n: int, m: int, points: Float[Array, "*points 2"]
) -> Float[Array, "*points"]:
    r"""Return the Zernike polynomial :math:`Z_n^m` at points ``(x, y)``.

    .. math:: Z_n^m = R_n^{|m|}(\rho) \cos m\phi \;\; (m \ge 0), \quad
       R_n^{|m|}(\rho) \sin |m|\phi \;\; (m < 0),

    .. math:: R_n^m(\rho) = \sum_{k=0}^{(n-m)/2} (-1)^k
       \frac{(n-k)!}{k! \, (\frac{n+m}2 - k)! \, (\frac{n-m}2 - k)!}\, \rho^{n-2k}.

    It has no norm. ``n - |m|`` must be even, and ``|m|`` at most ``n``.
    """
    x, y = points[..., 0], points[..., 1]
    # (x + iy)^|m| = rho^|m| e^{i |m| phi}, which needs no angle at the origin.
    order, real, imaginary = abs(m), jnp.ones_like(x), jnp.zeros_like(x)
    for _ in range(order):
        real, imaginary = real * x - imaginary * y, real * y + imaginary * x
    squared, radial = x**2 + y**2, jnp.zeros_like(x)
    for k in range((n - order) // 2 + 1):
        factor = (-1) ** k * math.comb(n - k, k)
        factor *= math.comb(n - 2 * k, (n - order) // 2 - k)
        radial = radial * squared + factor
    return radial * (real if m >= 0 else imaginary)


def _odd_index(i: int) -> tuple[int, int]:
    """Return ``n`` and ``m`` of an antisymmetric polynomial in RELION's order."""
    k = (math.isqrt(4 * i + 1) - 1) // 2
    n = 2 * k + 1
    return n, 2 * (i - k * k - k) - n


def _even_index(i: int) -> tuple[int, int]:
    """Return ``n`` and ``m`` of a symmetric polynomial in RELION's order."""
    k = math.isqrt(i)
    return 2 * k, 2 * (i - k * k - k)


def with_beam_tilt(
    odd: Float[np.ndarray, "groups odd"],
    tilt_in_milliradians: Float[np.ndarray, "groups 2"],
    spherical_aberration: Float[np.ndarray, " groups"],
    wavelength: Float[np.ndarray, " groups"],
) -> Float[np.ndarray, "groups _"]:
    r"""Return antisymmetric coefficients with the coma of a tilted beam.

    A tilt :math:`\tau` (radians) has the phase :math:`-2\pi C_s \lambda^2 |\omega|^2
    \omega\cdot\tau`. As in RELION, it *replaces* the two terms of coma,
    :math:`Z_3^{\mp 1}`, and adds to those of a shift, :math:`Z_1^{\mp 1}`.

    Parameters
    ----------
    odd
        Coefficients as in `Aberrations`, any number of them.
    tilt_in_milliradians
        Tilt of the beam along x and y (``rlnBeamTiltX``, ``rlnBeamTiltY``).
    spherical_aberration, wavelength
        In millimetres and in angstroms.
    """
    odd = np.pad(odd, ((0, 0), (0, max(0, 5 - odd.shape[1]))))
    strength = 2e4 * math.pi * spherical_aberration * wavelength**2
    # rho^2 x = (Z_3^1 + 2 Z_1^1) / 3
    coma = -strength[:, None] / 3 * tilt_in_milliradians
    odd[:, [1, 0]] += 2 * coma
    odd[:, [4, 3]] = coma
    return odd
