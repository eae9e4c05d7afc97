r"""Total variation: the regulariser ``R(L c)`` of eq. (10), with ``L`` the gradient.

A regulariser is any object with ``value(field)`` and ``prox(field, threshold)``. The
two here are the isotropic TV of the paper and the anisotropic TV of the authors'
released code.
"""

from typing import Protocol, runtime_checkable

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxrefine._types import Scalar, VectorField, Volume


@eqx.filter_jit
def gradient(volume: Volume) -> VectorField:
    """Apply ``L``: forward differences along x, y and z, zero at the last plane.

    A volume of shape ``(n, n, n)``, indexed ``[z, y, x]``, gives a field of shape
    ``(3, n, n, n)``.
    """
    return jnp.stack(
        [jnp.diff(volume, axis=axis, append=_last(volume, axis)) for axis in (2, 1, 0)]
    )


def _last(volume: Volume, axis: int):
    return volume.take(jnp.array([volume.shape[axis] - 1]), axis=axis)


@eqx.filter_jit
def gradient_adjoint(field: VectorField) -> Volume:
    """Apply ``L^T``, minus the backward divergence: the exact adjoint of `gradient`."""
    total = jnp.zeros_like(field[0])
    for component, axis in zip(field, (2, 1, 0), strict=True):
        planes = jnp.moveaxis(component, axis, 0)
        inner, edge = planes[:-1], jnp.zeros_like(planes[:1])
        difference = jnp.concatenate([edge, inner]) - jnp.concatenate([inner, edge])
        total = total + jnp.moveaxis(difference, 0, axis)
    return total


@runtime_checkable
class Regulariser(Protocol):
    """A prior on the map's gradient, as :mod:`jaxrefine.maps.admm` needs it."""

    def value(self, field: VectorField) -> Scalar:
        """Return ``R(field)``."""
        ...

    def prox(self, field: VectorField, threshold: Float[Array, ""]) -> VectorField:
        """Return ``argmin_s 1/2 ||s - field||^2 + threshold R(s)``."""
        ...


def _squared_lengths(field: VectorField) -> Volume:
    """Return the vectors' squared lengths, without a reduction, which is slow on a CPU.

    (XLA evaluates a reduction in a loop that is not vectorised.)
    """
    x, y, z = field
    return x**2 + y**2 + z**2


class IsotropicTV(eqx.Module):
    r"""The mixed norm :math:`\|u\|_{2,1} = \sum_k \|u[k]\|_2`."""

    def value(self, field: VectorField) -> Scalar:
        """Return the sum of the vectors' lengths; its derivative at zero is zero."""
        squared = _squared_lengths(field)
        positive = squared > 0
        length = jnp.sqrt(jnp.where(positive, squared, 1.0))
        return jnp.sum(jnp.where(positive, length, 0.0))

    def prox(self, field: VectorField, threshold: Scalar) -> VectorField:
        """Shorten every gradient vector by the threshold, at most to zero."""
        squared = _squared_lengths(field)
        large = squared > threshold**2
        length = jnp.sqrt(jnp.where(large, squared, 1.0))
        return field * jnp.where(large, 1.0 - threshold / length, 0.0)[None]


class AnisotropicTV(eqx.Module):
    r"""The norm :math:`\|u\|_1`, the sum of the absolute values of all components."""

    def value(self, field: VectorField) -> Scalar:
        """Return the sum of the absolute values of all differences."""
        return jnp.sum(jnp.abs(field))

    def prox(self, field: VectorField, threshold: Scalar) -> VectorField:
        """Reduce the absolute value of every difference by the threshold."""
        return jnp.sign(field) * jnp.maximum(jnp.abs(field) - threshold, 0.0)
