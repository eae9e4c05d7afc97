"""Fourier shell correlation, and the resolution derived from it."""

from typing import NamedTuple, final

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxrefine._types import Scalar, Volume
from jaxrefine.maps.scale import at_unit_scale
from jaxrefine.operators.fourier import multiplicity, radii

HALF_MAP_THRESHOLD = 0.143
"""Correlation of half maps at their resolution (Rosenthal and Henderson, 2003)."""


@eqx.filter_jit
def fsc(a: Volume, b: Volume, mask: Volume | None = None) -> Float[Array, " shells"]:
    r"""Fourier shell correlation of two volumes.

    .. math:: \mathrm{FSC}(r) = \frac{\mathrm{Re} \sum_{k \in S_r} \hat a_k \hat b_k^*}
              {\sqrt{\sum_{k \in S_r} |\hat a_k|^2 \sum_{k \in S_r} |\hat b_k|^2}}

    with :math:`S_r` the integer frequencies whose radius rounds to r. This is eq. (25)
    with a square root in the denominator, which the printed formula lacks.

    Parameters
    ----------
    a, b
        Volumes of the same shape ``(n, n, n)`` and type.
    mask
        Optional mask, by which both volumes are multiplied first.

    Returns
    -------
    curve
        The correlation at r = 0, ..., n // 2; zero where a volume has no power.
    """
    if mask is not None:
        a, b = a * mask, b * mask
    a, b = at_unit_scale(a), at_unit_scale(b)
    n = a.shape[0]
    shell, weight = _half_space(n)

    def shell_sum(values: Float[Array, "n n half"]) -> Float[Array, " shells"]:
        weighted = values * jnp.asarray(weight, values.dtype)
        return jax.ops.segment_sum(weighted.ravel(), shell, num_segments=n // 2 + 1)

    a_hat, b_hat = jnp.fft.rfftn(a, norm="ortho"), jnp.fft.rfftn(b, norm="ortho")
    a_power = shell_sum(a_hat.real**2 + a_hat.imag**2)
    b_power = shell_sum(b_hat.real**2 + b_hat.imag**2)
    cross = shell_sum(a_hat.real * b_hat.real + a_hat.imag * b_hat.imag)
    positive = (a_power > 0) & (b_power > 0)
    a_norm = jnp.sqrt(jnp.where(positive, a_power, 1))
    b_norm = jnp.sqrt(jnp.where(positive, b_power, 1))
    return jnp.where(positive, cross / a_norm / b_norm, 0)


def mean_fsc(curve: Float[Array, " shells"]) -> Scalar:
    """Return the mean of a Fourier shell correlation over the shells 1, ..., n // 2."""
    return jnp.mean(curve[1:])


@eqx.filter_jit
def crossing(curve: Float[Array, " shells"], threshold: float | Scalar) -> Scalar:
    """Return the radius where a Fourier shell correlation falls below a threshold.

    The curve is interpolated linearly between shells. Shell 0 is ignored: a curve that
    is below the threshold at shell 1 crosses it there.

    Parameters
    ----------
    curve
        The correlation at r = 0, ..., n // 2.
    threshold
        Usually 0.5 against the true map, and 0.143 between half maps (Rosenthal and
        Henderson, J. Mol. Biol. 333, 2003).

    Returns
    -------
    radius
        Radius of the first crossing in shells, that is in cycles per box; n // 2 if the
        curve never falls below the threshold.
    """
    tail = curve[1:]
    below = ~(tail >= threshold)
    first = jnp.argmax(below)
    previous = tail[jnp.maximum(first - 1, 0)]
    drop = jnp.where(first > 0, previous - tail[first], 1)
    step = jnp.where(first > 0, (previous - threshold) / drop, 1)
    return jnp.where(jnp.any(below), first.astype(curve.dtype) + step, tail.size)


def resolution_in_angstroms(
    radius: float | Scalar, n: int, voxel_size_in_angstroms: float
) -> float | Scalar:
    """Return the period in angstroms of a Fourier shell of a box of n voxels.

    Parameters
    ----------
    radius
        Radius of the shell in cycles per box.
    n
        Side of the box in voxels.
    voxel_size_in_angstroms
        Edge of a voxel.
    """
    return n * voxel_size_in_angstroms / radius


@final
class Resolution(NamedTuple):
    """The resolution that a Fourier shell correlation tells of.

    Attributes
    ----------
    in_angstroms
        Period at which the correlation falls below the threshold, or that of the last
        complete shell if it does not up to there.
    is_a_bound
        Whether it does not, so that the resolution may be better.
    is_none
        Whether it is below the threshold in the first shell already, so that there is
        no resolution; `in_angstroms` is then that of this shell.
    """

    in_angstroms: float
    is_a_bound: bool
    is_none: bool

    def text(self, unit: str = "A") -> str:
        """Return "none", "3.52 A" or "3.52 A or better", in the unit's words."""
        if self.is_none:
            return "none"
        better = " or better" if self.is_a_bound else ""
        return f"{self.in_angstroms:.2f} {unit}{better}"


def resolution(
    curve: Float[Array | np.ndarray, " shells"],
    n: int,
    voxel_size_in_angstroms: float,
    threshold: float = HALF_MAP_THRESHOLD,
) -> Resolution:
    """Return the resolution at which a correlation falls below a threshold.

    The last shell that is read is ``(n - 1) // 2``, since a box with an even side has
    shell n // 2 in part only.

    Parameters
    ----------
    curve
        The correlation at r = 0, ..., n // 2.
    n, voxel_size_in_angstroms
        Side of the box in voxels, and edge of a voxel.
    threshold
        The threshold.
    """
    last = max((n - 1) // 2, 1)
    complete = jnp.asarray(curve)[: last + 1]
    radius = float(crossing(complete, threshold))
    period = resolution_in_angstroms(radius, n, voxel_size_in_angstroms)
    agrees = np.asarray(complete[1:] >= threshold)
    return Resolution(float(period), bool(agrees.all()), not agrees[0])


def _half_space(n: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the shell and the multiplicity of each frequency that ``rfftn`` has.

    The shells are ravelled; the multiplicities are shaped to broadcast.
    """
    return np.rint(radii(n)).astype(np.int32).ravel(), multiplicity(n)[None, None]
