"""Products of complex numbers by their real and imaginary parts.

No type is promoted, and a real factor is not converted to a complex one first.
"""

import jax
from jaxtyping import Array, Complex, Float


def scaled(
    factor: Float[Array, "..."], values: Complex[Array, "..."]
) -> Complex[Array, "..."]:
    """Multiply complex numbers by real ones."""
    return jax.lax.complex(factor * values.real, factor * values.imag)


def product(a: Complex[Array, "*k"], b: Complex[Array, "*k"]) -> Float[Array, "*k"]:
    r"""Return :math:`\Re(\bar a b)`."""
    return a.real * b.real + a.imag * b.imag


def crossed(a: Complex[Array, "*k"], b: Complex[Array, "*k"]) -> Float[Array, "*k"]:
    r"""Return :math:`\Re(-i \bar a b) = \Im(\bar a b)`."""
    return a.real * b.imag - a.imag * b.real


def power(values: Complex[Array, "*k"]) -> Float[Array, "*k"]:
    """Return the squared magnitude."""
    return values.real**2 + values.imag**2
