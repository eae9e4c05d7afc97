r"""A map from RELION's sums over images, on its padded grid of frequencies.

RELION inserts every frequency of an image into the grid of ``f`` samples per axis, each
at the eight nearest samples, with the weights :math:`t` of trilinear interpolation. It
sums the images and their precision (Scheres, J. Struct. Biol. 180, 2012, eqs. 4-6):

.. math:: D[k] = \sum_j t_k(\xi_j)\, \mathrm{CTF}_j F_j / \sigma_j^2, \qquad
   W[k] = \sum_j t_k(\xi_j)\, \mathrm{CTF}_j^2 / \sigma_j^2,

with ``F`` the transforms of images, divided by their number of pixels, and
:math:`\sigma^2` the power of the noise in one of the two components of ``F``.

Interpolation by ``t`` multiplies a map by :math:`s(x) = \prod_i \mathrm{sinc}^2(x_i/f)`
in real space, so ``D / W`` is a noisy spectrum of :math:`u = s\,c`, whose inverse
transform RELION divides by ``s`` in the end. Here, too, ``u`` is solved for. In the
units of white noise, the data term of ``u`` is

.. math:: \frac{1}{4 n^4} \sum_k W[k]\, |n^2 D[k]/W[k] - \hat u[k]|^2

up to a constant: a circulant on the grid, and so a convolution of maps within the box,
by the inverse transform of ``W``. With it the back-projection, the inverse transform of
``D``, gives the `Sums` that all maps here are made from.

(Dividing kernel and back-projection by ``s`` instead would give those of ``c`` itself
but for the aliases of ``t``, as large as the kernel at the displacement ``f / 2``. The
operator is not positive semi-definite then, and ADMM diverges.)
"""

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Complex, Float

from jaxrefine._types import Scalar, Volume
from jaxrefine.maps import admm, tv
from jaxrefine.maps.sums import Sums, data_term, solve
from jaxrefine.operators.ball import squared_distances

_EDGE = 3.0  # voxels


@eqx.filter_jit
def sums_of_grid(
    data: Complex[Array, "f f h"], weight: Float[Array, "f f h"], box: int
) -> Sums:
    """Return the sums that RELION's grids hold, for the map times its `envelope`.

    Parameters
    ----------
    data, weight
        ``D`` and ``W`` on the lattice of ``rfftn`` of a cube of side ``f``, frequency 0
        first, the images' origin at their centre.
    box
        Side ``n`` of the map, at most ``f``. If ``f`` is less than ``2n - 1``, the
        kernel is continued periodically.
    """
    size = data.shape[0]
    # The inverse transforms that are meant are sums, without the factor 1 / f^3.
    scale = size**3 / (2 * box**4)
    kernel = scale * jnp.fft.irfftn(weight, s=(size,) * 3)
    backprojection = scale * box**2 * jnp.fft.irfftn(data, s=(size,) * 3)
    displacement = np.arange(1 - box, box) % size
    position = (np.arange(box) - box // 2) % size
    # Axis by axis: an array of all indices would be larger than the grids.
    for axis in range(3):
        kernel = jnp.take(kernel, displacement, axis=axis)
        backprojection = jnp.take(backprojection, position, axis=axis)
    return Sums(kernel, backprojection)


def envelope(box: int, size: int) -> Float[np.ndarray, "{box}"]:
    """Return the factor along each axis of a map with a linearly interpolated spectrum.

    Their product is ``s``.

    Parameters
    ----------
    box
        Side of the map.
    size
        Samples per axis of the grid of frequencies.
    """
    return np.sinc((np.arange(box) - box // 2) / size) ** 2


def _rounded(volume: Volume) -> Volume:
    """Let a map fall off in the corners of the box, where ``1 / s`` is largest.

    RELION does so, by a cosine over three voxels from the sphere in the box on.
    """
    box = volume.shape[0]
    radius = jnp.sqrt(squared_distances(box, volume.dtype))
    beyond = jnp.clip((radius - box / 2) / _EDGE, 0.0, 1.0)
    return volume * (0.5 + 0.5 * jnp.cos(jnp.pi * beyond))


@eqx.filter_jit
def reconstruct(
    data: Complex[Array, "f f h"],
    weight: Float[Array, "f f h"],
    box: int,
    tau: Scalar,
    regulariser: tv.Regulariser,
    iterations: int,
) -> tuple[Volume, Scalar]:
    r"""Make a regularised map by ADMM from RELION's sums.

    It minimises the data term of ``u`` plus :math:`\lambda R(L u)`, with
    :math:`\lambda = \tau\sqrt{w[0]}` as in `sums.solve`, from a map of zeros. The map
    is ``u`` divided by ``s``, without the corners of the box.

    Parameters
    ----------
    data, weight, box
        As for `sums_of_grid`.
    tau, regulariser, iterations
        As for `sums.solve`.

    Returns
    -------
    The map, of side ``box``, in the units of the images; zero without any weight. And
    :math:`\lambda`.
    """
    sums = sums_of_grid(data, weight, box)
    start = admm.init(jnp.zeros_like(sums.backprojection))
    state = solve(data_term(sums), sums.peak, start, tau, regulariser, iterations)
    volume = _rounded(state.coefficients)
    line = jnp.asarray(envelope(box, data.shape[0]), volume.dtype)
    # One factor after the other, so that no program holds a map of constants.
    volume = volume / line[:, None, None] / line[None, :, None] / line[None, None, :]
    return volume, tau * jnp.sqrt(sums.peak)
