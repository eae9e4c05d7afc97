r"""The likelihood of a pose: cost, gradient and normal equations of one particle.

With the noise's inverse power as weights, the negative log-likelihood of a pose is

.. math:: \tfrac12 \sum_k w_k |S_k(R, t) - y_k|^2,

where ``S`` is the slice of the map's spectrum at the pose, times the transfer function,
and ``y`` the spectrum of the image (:mod:`jaxrefine.operators.slices`). The derivatives
of the interpolated spectrum are exact, and so are the gradients here. All functions are
for one particle; use ``jax.vmap`` for many.
"""

import math

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Complex, Float

from jaxrefine._types import Scalar
from jaxrefine.data.observation import Observation
from jaxrefine.operators.complex import crossed, power, product, scaled
from jaxrefine.operators.gridding import Spectrum
from jaxrefine.operators.slices import (
    Disc,
    check_spectrum,
    disc_axes,
    on_plane,
    phases,
    slice_gain,
)

_HIGHEST = jax.lax.Precision.HIGHEST


class _Residual(eqx.Module):
    """The residual of a particle and the terms of its cost, in the particle's frame.

    Moving both the data and the model by ``-t`` changes no inner product, and makes the
    phase factors of the model and its derivatives unnecessary.
    """

    slices: tuple[Complex[Array, "k"], ...]
    gain: Float[Array, "k"]
    pull: Complex[Array, "k"]
    cost: Scalar


def _residual(
    reference: Spectrum,
    observation: Observation,
    rotation: Float[Array, "3 3"],
    shift: Float[Array, "2"],
    sloping: bool = False,
) -> _Residual:
    """Return the residual ``S - y``, its pull ``w h (S - y)``, and the cost."""
    disc, weights = observation.disc, observation.weights
    check_spectrum(disc, reference)
    points, *directions = on_plane(disc, rotation, observation.magnification)
    along = tuple(directions) if sloping else ()
    slices = reference.value_and_slopes(points, along)
    gain = slice_gain(disc, observation.transfer, weights.dtype)
    centred = observation.spectrum * jnp.conj(phases(disc, shift))
    difference = scaled(gain, slices[0]) - centred
    pull = scaled(weights * gain, difference)
    return _Residual(slices, gain, pull, jnp.sum(weights * power(difference)) / 2)


def cost(
    reference: Spectrum,
    observation: Observation,
    rotation: Float[Array, "3 3"],
    shift: Float[Array, "2"],
) -> Scalar:
    r"""Return one particle's cost, :math:`\frac12 \sum_k w_k |S_k - y_k|^2`.

    Parameters
    ----------
    reference
        Spectrum of the map's coefficients.
    observation
        The particle's image, with its weights ``w`` and its transfer function.
    rotation, shift
        The pose, shift in pixels.

    Raises
    ------
    InputError
        If the reference is not that of a volume of the image's side up to the disc's
        radius.
    """
    return _residual(reference, observation, rotation, shift).cost


def cost_and_gradient(
    reference: Spectrum,
    observation: Observation,
    rotation: Float[Array, "3 3"],
    shift: Float[Array, "2"],
) -> tuple[Scalar, Float[Array, "5"]]:
    r"""Return the cost and its gradient by ``(wx, wy, wz, tx, ty)``.

    The rotation moves as :math:`R \leftarrow e^{\hat w} R`, at ``w = 0``, so that

    .. math:: \frac{\partial}{\partial w}\, R^T (\omega, 0) = R^T
       \left((\omega, 0) \times \frac{\partial w}{\partial w}\right):

    with the slice's derivatives ``dn`` along the plane's normal and ``da`` about the
    beam, the model's are ``-omega_y dn``, ``omega_x dn``, ``da``, and by the shift
    ``-2 pi i omega / m`` times itself. Parameters and errors as for :func:`cost`.

    With a magnification ``M``, all of this is so at :math:`M \omega` in the place of
    ``omega``, with the shift :math:`M^{-T} t`, as :math:`\omega\cdot t = M\omega \cdot
    M^{-T} t`.
    """
    residual = _residual(reference, observation, rotation, shift)
    disc = observation.disc
    magnification = observation.magnification
    points, normal, turning = on_plane(disc, rotation, magnification)
    out, about = reference.slopes_along(residual.pull, points, (normal, turning))
    through = crossed(residual.pull, residual.slices[0]) * (
        2 * math.pi / disc.image_size
    )
    first, _ = _moments(disc, out.dtype, magnification)
    tilt, move = _dot(out, first), _dot(through, first)
    gradient = jnp.stack([-tilt[1], tilt[0], jnp.sum(about), move[0], move[1]])
    if magnification is not None:
        gradient = _dot(_moved(magnification), gradient)
    return residual.cost, gradient


def normal_equations(
    reference: Spectrum,
    observation: Observation,
    rotation: Float[Array, "3 3"],
    shift: Float[Array, "2"],
) -> tuple[Scalar, Float[Array, "5"], Float[Array, "5 5"]]:
    r"""Return the cost, its gradient :math:`J^T W r` and :math:`J^T W J`.

    ``J`` holds the derivatives of the residual ``r = S - y`` listed in
    :func:`cost_and_gradient`. They are three slices times monomials of ``omega``, so
    their inner products are sums of ten images times monomials. Parameters and errors
    as for :func:`cost`.
    """

    def equations(part: Observation):
        return _normal_equations(reference, part, rotation, shift)

    return observation.sum_over_parts(equations)


def _normal_equations(
    reference: Spectrum,
    observation: Observation,
    rotation: Float[Array, "3 3"],
    shift: Float[Array, "2"],
) -> tuple[Scalar, Float[Array, "5"], Float[Array, "5 5"]]:
    """Return `normal_equations` of all frequencies at once."""
    residual = _residual(reference, observation, rotation, shift, sloping=True)
    disc, weights = observation.disc, observation.weights
    still, out, about = residual.slices
    pull = residual.pull
    step = 2 * math.pi / disc.image_size
    first, second = _moments(disc, weights.dtype, observation.magnification)
    weight = weights * residual.gain**2
    moments = jnp.concatenate([jnp.ones_like(first[:, :1]), first, second], axis=1)
    # One product of matrices makes all sums, most of which are of use.
    products = [
        product(pull, out),
        product(pull, about),
        crossed(pull, still) * step,
        weight * product(out, out),
        weight * product(out, about),
        weight * crossed(out, still) * step,
        weight * product(about, about),
        weight * crossed(about, still) * step,
        weight * product(still, still) * step**2,
    ]
    sums = jnp.matmul(jnp.stack(products), moments, precision=_HIGHEST)
    tilt, turn, move = sums[0, 1:3], sums[1, 0], sums[2, 1:3]
    gradient = jnp.stack([-tilt[1], tilt[0], turn, move[0], move[1]])

    tilt_tilt, tilt_turn, tilt_move = sums[3, 3:], sums[4, 1:3], sums[5, 3:]
    turn_turn, turn_move, move_move = sums[6, 0], sums[7, 1:3], sums[8, 3:]
    upper = [
        [tilt_tilt[2], -tilt_tilt[1], -tilt_turn[1], -tilt_move[1], -tilt_move[2]],
        [tilt_tilt[0], tilt_turn[0], tilt_move[0], tilt_move[1]],
        [turn_turn, turn_move[0], turn_move[1]],
        [move_move[0], move_move[1]],
        [move_move[2]],
    ]
    rows = [[upper[min(i, j)][abs(i - j)] for j in range(5)] for i in range(5)]
    information = jnp.stack([jnp.stack(row) for row in rows])
    if observation.magnification is not None:
        moved = _moved(observation.magnification)
        gradient = _dot(moved, gradient)
        information = _dot(_dot(moved, information), moved.T)
    return residual.cost, gradient, information


def _moved(magnification: Float[Array, "2 2"]) -> Float[Array, "5 5"]:
    """Return what takes derivatives by the shift ``M^{-T} t`` to those by ``t``."""
    (a, b), (c, d) = magnification
    inverse = jnp.stack([jnp.stack([d, -b]), jnp.stack([-c, a])]) / (a * d - b * c)
    return jnp.eye(5, dtype=inverse.dtype).at[3:, 3:].set(inverse)


def _moments(
    disc: Disc, dtype, magnification: Float[Array, "2 2"] | None
) -> tuple[Float[Array, "k 2"], Float[Array, "k 3"]]:
    """Return the monomials ``x, y`` and ``x**2, x y, y**2`` of the frequencies."""
    x, y = disc_axes(disc, dtype, magnification)
    return jnp.stack([x, y], axis=-1), jnp.stack([x * x, x * y, y * y], axis=-1)


def _dot(first: Float[Array, "*i k"], second: Float[Array, "k *j"]):
    return jnp.dot(first, second, precision=_HIGHEST)
