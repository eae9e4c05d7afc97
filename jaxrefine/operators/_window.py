"""The interpolation window of the gridding: weights of the nearest grid samples.

Windows are piecewise polynomials, designed by least squares in double precision. The
min-max interpolators of Fessler and Sutton (IEEE Trans. Signal Process. 51, 2003) solve
a least-squares problem for every frequency separately; here polynomials in the position
between the samples are fitted to all frequencies at once. The design starts from a
Kaiser-Bessel window (Beatty, Nishimura and Pauly, IEEE Trans. Med. Imaging 24, 2005).
"""

import functools
import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float
from numpy.polynomial.legendre import leggauss


@functools.lru_cache(maxsize=64)
def coefficients(width: int, ratio: float) -> np.ndarray:
    """Design a window: the piecewise polynomial with the smallest mean square error.

    The sample ``j`` of the grid has the weight ``w_j(f)``, where ``f`` in [-1/2, 1/2)
    is the position of the frequency between the samples. The contribution of a voxel
    ``x`` steps from the middle of the box then has the relative error

        E(x, f) = d(x) sum_j w_j(f) exp(-2 pi i (j - (width - 1) / 2 - f) x / N) - 1,

    for a grid of N samples. The polynomials and the correction ``d`` are optimised
    alternately to minimise its mean square over ``f`` and over the voxels of a ball
    that fills the box. The polynomials join continuously.

    Parameters
    ----------
    width
        Number of samples along an axis.
    ratio
        Size of the grid over the size of the box.

    Returns
    -------
    Coefficients of ``w_j`` by increasing powers, of shape ``(width, width + 2)``.
    """
    degree = width + 1
    positions, position_weights = _positions(width)
    nodes, node_weights = leggauss(16)
    reach = (1 + nodes) / 2
    waves = _waves(width, reach / (2 * ratio), positions)
    powers = (2 * positions[:, None]) ** np.arange(degree + 1)
    basis = _joining_polynomials(width, degree)
    responses = np.einsum("xfj,fd->xfjd", waves, powers)
    responses = responses.reshape(len(nodes), len(positions), -1) @ basis
    # The cross-section of a ball as a function of the coordinate along an axis.
    density = node_weights * (1 - reach**2)
    root = np.sqrt(density[:, None] * position_weights)
    target = np.concatenate([root.ravel(), 0 * root.ravel()])
    # The initial correction is that of a Kaiser-Bessel window with the shape parameter
    # of Beatty et al. (2005).
    shape = np.pi * math.sqrt(max((width / ratio * (ratio - 0.5)) ** 2 - 0.8, 0.5))
    argument = shape**2 - (np.pi * width * reach / (2 * ratio)) ** 2
    correction = 1 / np.sinc(1j * np.sqrt(argument + 0j) / np.pi).real
    solution = np.zeros(basis.shape[1])
    for _ in range(10):
        weighted = (root * correction[:, None])[..., None] * responses
        weighted = weighted.reshape(root.size, -1)
        matrix = np.concatenate([weighted.real, weighted.imag])
        solution = np.linalg.lstsq(matrix, target, rcond=None)[0]
        correction = _best_correction(responses @ solution, position_weights)
    return (basis @ solution).reshape(width, -1) * 2.0 ** np.arange(degree + 1)


def _positions(width: int) -> tuple[np.ndarray, np.ndarray]:
    """Return quadrature nodes and weights on [-1/2, 1/2]."""
    nodes, weights = leggauss(width + 4)
    return nodes / 2, weights / 2


def _waves(width: int, steps: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """Return ``exp(-2 pi i (j - (width - 1) / 2 - f) x)``, indexed ``[x, f, j]``."""
    offsets = np.arange(width) - (width - 1) / 2 - positions[:, None]
    return np.exp(-2j * np.pi * steps[:, None, None] * offsets)


def _best_correction(response, position_weights: np.ndarray) -> np.ndarray:
    """Return the ``d(x)`` that minimise the mean of ``|d(x) response - 1|**2``."""
    return (response.real @ position_weights) / (abs(response) ** 2 @ position_weights)


def _joining_polynomials(width: int, degree: int) -> np.ndarray:
    """Return a basis of symmetric, continuous piecewise polynomials in ``2f``."""
    from scipy.linalg import null_space  # slow to import

    sign = (-1.0) ** np.arange(degree + 1)
    # w_j(1/2) = w_{j-1}(-1/2), and zero at the end; w_{last-j}(f) = w_j(-f).
    left, right = np.eye(width), np.eye(width, k=-1)
    join = np.kron(left, np.ones(degree + 1)) - np.kron(right, sign)
    mirror = np.kron(left, np.eye(degree + 1)) - np.kron(left[::-1], np.diag(sign))
    return null_space(np.concatenate([join, mirror]))


def correction(width: int, size: int, box: int) -> np.ndarray:
    """Return the corrections ``d(x)`` of the voxels along an axis of the box."""
    positions, position_weights = _positions(width)
    weights = (
        positions[:, None] ** np.arange(width + 2) @ coefficients(width, size / box).T
    )
    steps = (np.arange(box) - box // 2) / size
    response = (_waves(width, steps, positions) * weights).sum(axis=-1)
    return _best_correction(response, position_weights)


def weights(
    width: int, ratio: float, position: Float[Array, "..."]
) -> list[Float[Array, "..."]]:
    """Return the weights of the samples around a position ``f`` in [-1/2, 1/2)."""
    return _symmetric(coefficients(width, ratio), position, 1)


def slopes(
    width: int, ratio: float, position: Float[Array, "..."]
) -> list[Float[Array, "..."]]:
    """Return the derivatives of the weights with respect to the position."""
    powers = np.arange(1, width + 2)
    return _symmetric(coefficients(width, ratio)[:, 1:] * powers, position, -1)


def _symmetric(coefficients: np.ndarray, position: Float[Array, "..."], parity: int):
    """Evaluate polynomials with ``w_{last-j}(f) = parity w_j(-f)`` in pairs."""
    width = len(coefficients)
    squared = position**2
    values = [position] * width
    for j in range((width + 1) // 2):
        even = _horner(coefficients[j, 0::2], squared)
        odd = position * _horner(coefficients[j, 1::2], squared)
        if 2 * j == width - 1:
            values[j] = even if parity == 1 else odd
        else:
            values[j] = even + odd
            values[-1 - j] = even - odd if parity == 1 else odd - even
    return values


def _horner(coefficients: np.ndarray, x: Float[Array, "..."]) -> Float[Array, "..."]:
    total = jnp.full_like(x, float(coefficients[-1]))
    for coefficient in coefficients[-2::-1]:
        total = total * x + float(coefficient)
    return total
