r"""Modified Bessel functions, scaled so that they are entire.

All functions that a Kaiser-Bessel window needs are values of

.. math:: \Lambda_\nu(s) = z^{-\nu} I_\nu(z), \qquad s = z^2,

which, unlike :math:`I_\nu`, is an entire function of ``s``: it has no branch point
at ``s = 0``, it turns into :math:`|z|^{-\nu} J_\nu(|z|)` for negative ``s``, and
its derivative is again one of the family,

.. math:: \Lambda_\nu'(s) = \tfrac12 \Lambda_{\nu+1}(s).

So values and derivatives of any order are safe everywhere. Source: DLMF 10.29,
10.25.2 (series), 10.49 (half-integer orders in closed form).
"""

import math
from functools import partial

import jax
import jax.numpy as jnp
from jax.scipy.special import i0e, i1e
from jaxtyping import Array, Float

# With 20 terms the power series is exact to double precision for |s| <= 16, where the
# recurrences would lose accuracy by cancellation.
_SERIES_BELOW = 16.0
_SERIES_TERMS = 20


def _series(order: float, s: Float[Array, "..."]) -> Float[Array, "..."]:
    """Sum the power series of Lambda_order, accurate for ``|s| <= 16``."""
    total = jnp.zeros_like(s)
    for k in reversed(range(_SERIES_TERMS)):
        coefficient = 0.5**order * 0.25**k / math.gamma(k + 1)
        total = total * s + coefficient / math.gamma(order + k + 1)
    return total


def _climb(below, value, value_order: float, order: float, s):
    """Recur Lambda_{v+1} = (Lambda_{v-1} - 2 v Lambda_v) / s up to ``order``.

    Source: DLMF 10.29.1. ``below`` and ``value`` have the orders ``value_order - 1``
    and ``value_order``.
    """
    current = value_order
    while current < order:
        below, value = value, (below - 2.0 * current * value) / s
        current += 1.0
    return value


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def half_integer(n: int, s: Float[Array, "..."]) -> Float[Array, "..."]:
    r"""Return :math:`\Lambda_{n+1/2}(s)` in closed form, for any real ``s``.

    Parameters
    ----------
    n
        At least -1. ``n = 0`` is :math:`\sqrt{2/\pi}\,\sinh(z)/z`.
    s
        Squared argument ``z**2``; negative values give the oscillating Bessel function
        J.
    """
    near_zero = jnp.abs(s) < _SERIES_BELOW
    safe = jnp.where(near_zero, _SERIES_BELOW, s)
    z = jnp.sqrt(jnp.abs(safe))
    positive = safe > 0
    # The operand of cosh is 0 where s < 0: there z may be large enough to overflow.
    z_positive = jnp.where(positive, z, 0.0)
    scale = math.sqrt(2.0 / math.pi)
    even = scale * jnp.where(positive, jnp.cosh(z_positive), jnp.cos(z))
    odd = scale * jnp.where(positive, jnp.sinh(z_positive), jnp.sin(z)) / z
    if n == -1:
        closed = even
    else:
        closed = _climb(even, odd, 0.5, n + 0.5, safe)
    return jnp.where(near_zero, _series(n + 0.5, s), closed)


@half_integer.defjvp
def _half_integer_jvp(n, primals, tangents):
    (s,), (s_dot,) = primals, tangents
    return half_integer(n, s), 0.5 * half_integer(n + 1, s) * s_dot


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def integer(n: int, s: Float[Array, "..."]) -> Float[Array, "..."]:
    r"""Return :math:`\Lambda_n(s)` for ``n >= 0`` and ``s >= 0``.

    Orders 0 and 1 come from JAX, higher ones from the recurrence. Near zero the power
    series is used.
    """
    near_zero = s < _SERIES_BELOW
    safe = jnp.where(near_zero, _SERIES_BELOW, s)
    z = jnp.sqrt(safe)
    zeroth, first = jnp.exp(z) * i0e(z), jnp.exp(z) * i1e(z) / z
    closed = zeroth if n == 0 else _climb(zeroth, first, 1.0, float(n), safe)
    return jnp.where(near_zero, _series(float(n), s), closed)


@integer.defjvp
def _integer_jvp(n, primals, tangents):
    (s,), (s_dot,) = primals, tangents
    return integer(n, s), 0.5 * integer(n + 1, s) * s_dot
