r"""The Kaiser-Bessel window function (KBWF), the basis of the density map.

The map is :math:`V(x) = \sum_k c[k]\,\varphi(x - k)`, eq. (2), with the isotropic,
compactly supported window :math:`\varphi` of eq. (3). Its X-ray transform does not
depend on the direction and is known in closed form, so that projections are
differentiable with respect to the poses. All functions below are smooth in the
*squared* radius, so values and derivatives are finite at the centre and at the edge of
the support.

Sources: the paper's eqs. (3), (23), (24); R. M. Lewitt, "Multidimensional digital
image representations using generalized Kaiser-Bessel window functions", JOSA A 7
(1990), for the Fourier transform.
"""

import math

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxrefine._types import Points2, Points3, Volume
from jaxrefine.errors import InputError
from jaxrefine.operators import _bessel


class KBWF(eqx.Module):
    """Parameters of the window: support radius, taper and order.

    The defaults are the paper's (section IV-C). The parameters are static: a basis is
    chosen once, and tables are built from it.

    Parameters
    ----------
    radius
        Support radius ``a`` in voxels, positive and finite.
    taper
        Window taper ``alpha``, from 5 (with a smaller one the window has a visible
        edge) to 80 (with a larger one single precision overflows).
    order
        Order ``m`` of the Bessel function, from 1 to 6.

    Raises
    ------
    InputError
        If a parameter is out of range.
    """

    radius: float = eqx.field(static=True, default=4.0)
    taper: float = eqx.field(static=True, default=19.0)
    order: int = eqx.field(static=True, default=2)

    def __check_init__(self):
        valid_order = isinstance(self.order, int) and 1 <= self.order <= 6
        if not (0 < self.radius < math.inf and 5 <= self.taper <= 80 and valid_order):
            raise InputError(
                "a Kaiser-Bessel window must have a positive radius, a taper from 5 to "
                "80 and a whole order from 1 to 6, got "
                f"radius={self.radius}, taper={self.taper}, order={self.order}"
            )

    @property
    def _peak(self) -> float:
        """``I_m(alpha)``, the normalisation of eq. (3)."""
        from scipy.special import iv  # slow to import

        return float(iv(self.order, self.taper))


SIMULATION_BASIS = KBWF(radius=2.0, taper=10.8)
"""A narrower window for simulating data, so that no experiment reconstructs in the
basis of its images. The radius is that of the authors' code, the taper that of ref.
[13]."""


def _height(basis: KBWF, squared_radius: Float[Array, "..."]) -> Float[Array, "..."]:
    """Return ``beta_a(r)**2 = 1 - (r/a)**2``, negative outside the support."""
    return 1.0 - squared_radius / basis.radius**2


def _half_power(height: Float[Array, "..."], n: int) -> Float[Array, "..."]:
    """Return ``height ** (n + 1/2)``, zero for negative heights, smooth at zero."""
    inside = height > 0
    return jnp.where(inside, height**n * jnp.sqrt(jnp.where(inside, height, 1.0)), 0.0)


@eqx.filter_jit
def window(basis: KBWF, points: Points3) -> Float[Array, "*batch"]:
    r"""Evaluate the window, eq. (3).

    .. math:: \varphi(x) = \beta_a(\|x\|)^m\, I_m(\alpha\beta_a(\|x\|)) / I_m(\alpha),
       \quad \beta_a(r) = \sqrt{1 - (r/a)^2}

    inside the ball of radius ``a``, zero outside.

    Parameters
    ----------
    basis
        The window's parameters.
    points
        Points ``(x, y, z)`` in voxels, of shape ``(*batch, 3)``.
    """
    height = _height(basis, jnp.sum(points**2, axis=-1))
    clipped = jnp.maximum(height, 0.0)
    bessel = _bessel.integer(basis.order, basis.taper**2 * clipped)
    return (basis.taper * clipped) ** basis.order * bessel / basis._peak


@eqx.filter_jit
def xray_transform(basis: KBWF, points: Points2) -> Float[Array, "*batch"]:
    r"""Evaluate the window's X-ray transform, eq. (23).

    .. math:: P(\varphi)(y) = a A\, \beta_a(\|y\|)^{m+1/2}
       I_{m+1/2}(\alpha\beta_a(\|y\|)), \quad A = \sqrt{2\pi/\alpha} / I_m(\alpha)

    It is the same for every direction. ``points`` are ``(x, y)`` in pixels, of shape
    ``(*batch, 2)``.
    """
    m, alpha = basis.order, basis.taper
    height = _height(basis, jnp.sum(points**2, axis=-1))
    scale = basis.radius * math.sqrt(2 * math.pi) * alpha**m / basis._peak
    bessel = _bessel.half_integer(m, alpha**2 * jnp.maximum(height, 0.0))
    return scale * _half_power(height, m) * bessel


@eqx.filter_jit
def xray_transform_gradient(basis: KBWF, points: Points2) -> Points2:
    r"""Evaluate the gradient of the window's X-ray transform, eq. (24).

    .. math:: \partial_v P(\varphi)(y) = -\frac{\alpha A}{a}\, y_v\,
       \beta_a(\|y\|)^{m-1/2} I_{m-1/2}(\alpha\beta_a(\|y\|))

    ``points`` are ``(x, y)`` in pixels; the gradient is per pixel.
    """
    m, alpha = basis.order, basis.taper
    height = _height(basis, jnp.sum(points**2, axis=-1))
    scale = -math.sqrt(2 * math.pi) * alpha**m / (basis.radius * basis._peak)
    bessel = _bessel.half_integer(m - 1, alpha**2 * jnp.maximum(height, 0.0))
    return points * (scale * _half_power(height, m - 1) * bessel)[..., None]


@eqx.filter_jit
def fourier_transform(
    basis: KBWF, frequencies: Float[Array, "*batch"]
) -> Float[Array, "*batch"]:
    r"""Evaluate the window's 3-D Fourier transform, which is radial.

    .. math:: \hat\varphi(\omega) = \frac{(2\pi)^{3/2} a^3 \alpha^m}{I_m(\alpha)}
       \frac{I_{m+3/2}(z)}{z^{m+3/2}}, \quad z = \sqrt{\alpha^2 - (a\omega)^2}

    (Lewitt 1990). By the central-slice theorem it is also the 2-D Fourier transform
    of eq. (23). ``frequencies`` are radial, in radians per voxel, and the convention
    is :math:`\hat f(\omega) = \int f(x) e^{-i\omega\cdot x} dx`.
    """
    m, a, alpha = basis.order, basis.radius, basis.taper
    scale = (2 * math.pi) ** 1.5 * a**3 * alpha**m / basis._peak
    return scale * _bessel.half_integer(m + 1, alpha**2 - (a * frequencies) ** 2)


def _sampled_transfer(basis: KBWF, size: int, dtype) -> Float[Array, "f f h"]:
    """Return the DFT on a periodic grid of the window sampled at the integers."""
    reach = math.ceil(basis.radius)
    offsets = jnp.arange(-reach, reach + 1)
    points = jnp.stack(jnp.meshgrid(offsets, offsets, offsets, indexing="ij"), axis=-1)
    samples = window(basis, points.astype(dtype))
    grid = jnp.zeros((size, size, size), dtype)
    index = offsets % size
    grid = grid.at[jnp.ix_(index, index, index)].set(samples)
    return jnp.fft.rfftn(grid).real


@eqx.filter_jit
def evaluate(basis: KBWF, coefficients: Volume) -> Volume:
    """Sample the map on the voxel grid: ``V[j] = sum_k c[k] phi(j - k)``, eq. (2).

    The sum is exact, computed by one zero-padded FFT convolution. Coefficients of shape
    ``(n, n, n)`` give a map of the same shape.
    """
    n = coefficients.shape[0]
    size = n + math.ceil(basis.radius)
    transfer = _sampled_transfer(basis, size, coefficients.dtype)
    spectrum = jnp.fft.rfftn(coefficients, s=(size,) * 3)
    return jnp.fft.irfftn(transfer.astype(spectrum.dtype) * spectrum, s=(size,) * 3)[
        :n, :n, :n
    ]


@eqx.filter_jit
def expand(basis: KBWF, volume: Volume, regularisation: float = 1e-4) -> Volume:
    """Return coefficients whose map has the given voxel values, the inverse of (2).

    This is a Tikhonov-regularised deconvolution of ``volume`` by the sampled window, on
    a grid padded by its radius. At a frequency where the window's response, relative to
    that at frequency zero, is ``h``, a fraction ``1 / (1 + h**2 / regularisation)`` of
    the map is lost. For the paper's window and the default weight, that is 1e-4 at
    frequency zero, 4 % at Nyquist along an axis, and all of it in the corners of the
    Fourier cube.

    Parameters
    ----------
    basis
        The window's parameters.
    volume
        Voxel values, of shape ``(n, n, n)``.
    regularisation
        Tikhonov weight, relative to the squared response at frequency zero.
    """
    n = volume.shape[0]
    size = n + 2 * math.ceil(basis.radius)
    transfer = _sampled_transfer(basis, size, volume.dtype)
    inverse = transfer / (transfer**2 + regularisation * transfer[0, 0, 0] ** 2)
    spectrum = jnp.fft.rfftn(volume, s=(size,) * 3)
    return jnp.fft.irfftn(inverse.astype(spectrum.dtype) * spectrum, s=(size,) * 3)[
        :n, :n, :n
    ]
