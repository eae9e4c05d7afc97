r"""The likelihood of a pose: cost, gradient and normal equations of one particle.

With the noise's inverse power as weights, the negative log-likelihood of a pose is

.. math:: \tfrac12 \sum_k w_k |S_k(R, t) - y_k|^2,

where ``S`` is the slice of the map's spectrum at the pose, times the transfer function,
and ``y`` the spectrum of the image (:mod:`jaxrefine.operators.slices`). The derivatives
of the interpolated spectrum are exact, and so are the gradients here. All functions are
for one particle; ``jax.vmap`` makes it many.
"""

import math

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Complex, Float

from jaxrefine._types import Scalar
from jaxrefine.operators._complex import crossed, product, scaled
from jaxrefine.operators.gridding import Spectrum
from jaxrefine.operators.slices import (
    Disc,
    _axes,
    _check,
    _gain,
    _on_plane,
    _phases,
)

_HIGHEST = jax.lax.Precision.HIGHEST


class _Residual(eqx.Module):
    """What a particle's cost is made of, everything shifted to the image's origin.

    Moving both the data and the model by ``-t`` changes no inner product, and spares
    the model and each of its derivatives the phases.
    """

    slices: tuple[Complex[Array, "k"], ...]
    gain: Float[Array, "k"]
    pull: Complex[Array, "k"]
    cost: Scalar


def _residual(
    spectrum: Spectrum,
    disc: Disc,
    data: Complex[Array, "k"],
    rotation: Float[Array, "3 3"],
    shift: Float[Array, "2"],
    transfer: Float[Array, "k"] | None,
    weights: Float[Array, "k"],
    sloping: bool = False,
) -> _Residual:
    """Return the residual ``S - y``, its pull ``w h (S - y)``, and the cost."""
    _check(disc, spectrum)
    points, *directions = _on_plane(disc, rotation)
    along = tuple(directions) if sloping else ()
    slices = spectrum.value_and_slopes(points, along)
    gain = _gain(disc, transfer, weights.dtype)
    difference = scaled(gain, slices[0]) - data * jnp.conj(_phases(disc, shift))
    square = difference.real**2 + difference.imag**2
    pull = scaled(weights * gain, difference)
    return _Residual(slices, gain, pull, jnp.sum(weights * square) / 2)


def cost(
    spectrum: Spectrum,
    disc: Disc,
    data: Complex[Array, "k"],
    rotation: Float[Array, "3 3"],
    shift: Float[Array, "2"],
    transfer: Float[Array, "k"] | None,
    weights: Float[Array, "k"],
) -> Scalar:
    r"""Return one particle's cost, :math:`\frac12 \sum_k w_k |S_k - y_k|^2`.

    Parameters
    ----------
    spectrum
        Spectrum of the coefficients.
    disc
        Frequencies of the images.
    data
        Spectrum ``y`` of the particle's image.
    rotation, shift
        Its pose.
    transfer
        Its contrast transfer function, or None for 1.
    weights
        Weights ``w``; `Disc.quadrature` makes it the paper's cost of the band-limited
        image, over the noise's variance the negative log-likelihood.

    Raises
    ------
    InputError
        If the spectrum is not that of a volume of the images' side up to the disc's
        radius.
    """
    return _residual(spectrum, disc, data, rotation, shift, transfer, weights).cost


def cost_and_gradient(
    spectrum: Spectrum,
    disc: Disc,
    data: Complex[Array, "k"],
    rotation: Float[Array, "3 3"],
    shift: Float[Array, "2"],
    transfer: Float[Array, "k"] | None,
    weights: Float[Array, "k"],
) -> tuple[Scalar, Float[Array, "5"]]:
    r"""Return the cost and its gradient by ``(wx, wy, wz, tx, ty)``.

    The rotation moves as :math:`R \leftarrow e^{\hat w} R`, at ``w = 0``, so that

    .. math:: \frac{\partial}{\partial w}\, R^T (\omega, 0) = R^T
       \left((\omega, 0) \times \frac{\partial w}{\partial w}\right):

    with the slice's derivatives ``dn`` along the plane's normal and ``da`` about the
    beam, the model's are ``-omega_y dn``, ``omega_x dn``, ``da``, and by the shift
    ``-2 pi i omega / m`` times itself. Parameters and errors as for :func:`cost`.
    """
    now = _residual(spectrum, disc, data, rotation, shift, transfer, weights)
    points, normal, turning = _on_plane(disc, rotation)
    out, about = spectrum.slopes_along(now.pull, points, (normal, turning))
    through = crossed(now.pull, now.slices[0]) * (2 * math.pi / disc.image_size)
    first, _ = _moments(disc, out.dtype)
    tilt, move = _dot(out, first), _dot(through, first)
    return now.cost, jnp.stack([-tilt[1], tilt[0], jnp.sum(about), move[0], move[1]])


def normal_equations(
    spectrum: Spectrum,
    disc: Disc,
    data: Complex[Array, "k"],
    rotation: Float[Array, "3 3"],
    shift: Float[Array, "2"],
    transfer: Float[Array, "k"] | None,
    weights: Float[Array, "k"],
) -> tuple[Scalar, Float[Array, "5"], Float[Array, "5 5"]]:
    r"""Return the cost, its gradient :math:`J^T W r` and :math:`J^T W J`.

    ``J`` are the derivatives of the residual ``r = S - y`` listed in
    :func:`cost_and_gradient`. They are three slices times monomials of ``omega``, and
    so are their inner products sums of ten images times monomials. Parameters and
    errors as for :func:`cost`.
    """
    now = _residual(spectrum, disc, data, rotation, shift, transfer, weights, True)
    still, out, about = now.slices
    step = 2 * math.pi / disc.image_size
    first, second = _moments(disc, weights.dtype)
    power = weights * now.gain**2

    tilt = _dot(product(now.pull, out), first)
    turn = jnp.sum(product(now.pull, about))
    move = _dot(crossed(now.pull, still), first) * step
    gradient = jnp.stack([-tilt[1], tilt[0], turn, move[0], move[1]])

    tilt_tilt = _dot(power * product(out, out), second)
    tilt_turn = _dot(power * product(out, about), first)
    tilt_move = _dot(power * crossed(out, still), second) * step
    turn_turn = jnp.sum(power * product(about, about))
    turn_move = _dot(power * crossed(about, still), first) * step
    move_move = _dot(power * product(still, still), second) * step**2
    upper = [
        [tilt_tilt[2], -tilt_tilt[1], -tilt_turn[1], -tilt_move[1], -tilt_move[2]],
        [tilt_tilt[0], tilt_turn[0], tilt_move[0], tilt_move[1]],
        [turn_turn, turn_move[0], turn_move[1]],
        [move_move[0], move_move[1]],
        [move_move[2]],
    ]
    rows = [[upper[min(i, j)][abs(i - j)] for j in range(5)] for i in range(5)]
    return now.cost, gradient, jnp.stack([jnp.stack(row) for row in rows])


def _moments(disc: Disc, dtype) -> tuple[Float[Array, "k 2"], Float[Array, "k 3"]]:
    """Return the monomials ``x, y`` and ``x**2, x y, y**2`` of the frequencies."""
    x, y = _axes(disc, dtype)
    return jnp.stack([x, y], axis=-1), jnp.stack([x * x, x * y, y * y], axis=-1)


def _dot(values: Float[Array, "k"], monomials: Float[Array, "k j"]):
    return jnp.dot(values, monomials, precision=_HIGHEST)
