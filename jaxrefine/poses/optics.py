r"""The contrast and the defocus of a particle at a known pose.

With the contrast ``a`` and the offset :math:`\delta` of the defocus, the model of an
image is :math:`a\, c_k(\delta)\, m_k`, where ``m`` is the slice of the map at the pose,
and ``c`` the contrast-transfer function. With normal priors about 1 and 0, the negative
logarithm of the posterior is, up to a constant,

.. math:: J(a, \delta) = \tfrac12 \sum_k w_k |a\, c_k(\delta)\, m_k - y_k|^2
   + \frac{(a - 1)^2}{2 s_a^2} + \frac{\delta^2}{2 s_\delta^2}.

The transfer function is real, so that slice and image enter by two numbers for each
frequency, :math:`P = w |m|^2` and :math:`C = w\, \Re(\bar m y)`. The contrast enters
linearly; for each offset its optimum is

.. math:: a(\delta) = \frac{s_a^{-2} + \sum_k c_k C_k}{s_a^{-2} + \sum_k c_k^2 P_k}.

What is left is a function of the offset alone, whose derivative is that of J by
:math:`\delta`. It is minimised by Levenberg-Marquardt, from the best of offsets on a
grid. All functions are for one particle; use ``jax.vmap`` for many.
"""

from typing import final

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from jaxrefine._types import Scalar
from jaxrefine.ctf import CTF
from jaxrefine.data.observation import Observation
from jaxrefine.operators.complex import power, product, scaled
from jaxrefine.operators.gridding import Spectrum
from jaxrefine.operators.slices import check_spectrum, on_plane, phases
from jaxrefine.poses.solvers import next_damping

# Spreads beyond which neither contrast nor defocus goes, and the least contrast.
_REACH, _LEAST = 3.0, 0.1
_NEAR = 1e-4  # What is as near to a limit, of contrast and as a share, is at it.
# Offsets on the grid. The cost oscillates with the offset. At 2 angstroms and 300 kV,
# steps of 56 angstroms (a spread of 300) change the phase of the transfer function by
# 0.9 radians: one of them is in the valley of the minimum.
_TRIED = 33
_STEPS, _DAMPING = 6, 1e-2  # Of Levenberg-Marquardt: steps, and the first damping.


@final
class Optics(eqx.Module):
    """The contrast and the defocus of particles, relative to those that were given.

    Attributes
    ----------
    contrast
        Factor of the given contrast-transfer function.
    defocus
        What is added to the given defocus along both axes, angstroms.
    """

    contrast: Float[Array | np.ndarray, "*particles"]
    defocus: Float[Array | np.ndarray, "*particles"]

    def applied(self, ctf: CTF) -> CTF:
        """Return given contrast-transfer functions with this contrast and defocus."""
        return eqx.tree_at(
            lambda c: (c.scale, c.defocus_u, c.defocus_v),
            ctf,
            (
                ctf.scale * self.contrast,
                ctf.defocus_u + self.defocus,
                ctf.defocus_v + self.defocus,
            ),
        )


@final
class AtLimit(eqx.Module):
    """Whose contrast and defocus are at the limit of what is allowed.

    They are not measured there: the truth may be beyond, or the pose is wrong.
    """

    contrast: Bool[Array | np.ndarray, "*particles"]
    defocus: Bool[Array | np.ndarray, "*particles"]


@final
class OpticsPrior(eqx.Module):
    """How well contrast and defocus are known.

    Attributes
    ----------
    contrast_spread
        Standard deviation ``s_a`` of the contrast about 1; with 0 it is 1. It is cut
        off at three spreads, and at a contrast of 0.1, before any division by a mean.
    defocus_spread
        Standard deviation of the defocus about the given one, angstroms, cut off at
        three spreads; with 0 it is as given.
    """

    contrast_spread: float = eqx.field(static=True)
    defocus_spread: float = eqx.field(static=True)

    @property
    def contrast_limits(self) -> tuple[float, float]:
        """The least and the largest contrast."""
        reach = _REACH * self.contrast_spread
        return max(1 - reach, _LEAST), 1 + reach

    @property
    def defocus_limit(self) -> float:
        """The largest offset of the defocus to either side, angstroms."""
        return _REACH * self.defocus_spread


@final
class Comparison(eqx.Module):
    """What an image and the slice of a map at its pose have in common.

    Attributes
    ----------
    power, overlap
        ``P`` and ``C`` of each frequency, without the transfer function.
    frequencies, gamma
        Frequencies at which the transfer function is evaluated, in cycles per angstrom,
        and its offset there (`CTF`), None for 0.
    """

    power: Float[Array, "k"]
    overlap: Float[Array, "k"]
    frequencies: Float[Array, "k 2"]
    gamma: Float[Array, "k"] | None


@final
class OpticsEstimate(eqx.Module):
    """A particle's contrast and defocus, and how well they are determined.

    Attributes
    ----------
    optics
        Where the posterior is largest.
    errors
        Their standard deviations at the given pose, from the Gauss-Newton information
        of both and their priors; those of the priors for what is at a limit, 0 for what
        is not estimated.
    at_limit
        Whether they are at their limits.
    """

    optics: Optics
    errors: Optics
    at_limit: AtLimit


def compare(
    reference: Spectrum,
    observation: Observation,
    rotation: Float[Array, "3 3"],
    shift: Float[Array, "2"],
    frequencies: Float[Array, "k 2"],
    gamma: Float[Array, "k"] | None = None,
) -> Comparison:
    """Compare an image with the slice at its pose, whatever its transfer function.

    Parameters
    ----------
    reference, rotation, shift
        As for `likelihood.cost`.
    observation
        The image. Its transfer function is only what its spectrum was multiplied by
        (`View.factor`), None for 1.
    frequencies, gamma
        See `Comparison`.
    """
    disc, weights = observation.disc, observation.weights
    check_spectrum(disc, reference)
    points, _, _ = on_plane(disc, rotation, observation.magnification)
    gain = disc.envelope.astype(weights.dtype)
    if observation.transfer is not None:
        gain = gain * observation.transfer
    slices = scaled(gain, reference(*points))
    centred = observation.spectrum * jnp.conj(phases(disc, shift))
    return Comparison(
        weights * power(slices), weights * product(slices, centred), frequencies, gamma
    )


def objective(
    prior: OpticsPrior, ctf: CTF, seen: Comparison, defocus: Scalar
) -> tuple[Scalar, Scalar, Scalar, Float[Array, "2 2"]]:
    r"""Return the cost at an offset of the defocus and the best contrast there.

    Parameters
    ----------
    prior, ctf, seen
        What is known, the given optics, and the image with its slice.
    defocus
        The offset, angstroms.

    Returns
    -------
    cost
        :math:`J(a(\delta), \delta)`, less the cost of an empty map.
    contrast
        :math:`a(\delta)`.
    slope
        The derivative of the cost by the offset. It is that at a fixed contrast, as the
        cost does not change with the contrast to first order.
    information
        :math:`J^T W J` of contrast and offset, and the inverse variances of their
        priors.
    """
    moved = Optics(jnp.ones_like(defocus), defocus).applied(ctf)
    value, change = moved.value_and_slope(seen.frequencies, seen.gamma)

    energy, pull = jnp.sum(value**2 * seen.power), jnp.sum(value * seen.overlap)
    across, steep = (jnp.sum(each * change * seen.power) for each in (value, change))
    turn = jnp.sum(change * seen.overlap)
    known, wanted = map(_inverse_square, (prior.contrast_spread, prior.defocus_spread))
    contrast = jnp.ones_like(defocus)
    if prior.contrast_spread:
        contrast = (known + pull) / (known + energy)
        contrast = jnp.clip(contrast, *prior.contrast_limits)
    cost = contrast**2 * energy / 2 - contrast * pull
    cost = cost + known * (contrast - 1) ** 2 / 2 + wanted * defocus**2 / 2
    slope = contrast * (contrast * across - turn) + wanted * defocus
    information = jnp.stack(
        [
            jnp.stack([energy + known, contrast * across]),
            jnp.stack([contrast * across, contrast**2 * steep + wanted]),
        ]
    )
    return cost, contrast, slope, information


def estimate(prior: OpticsPrior, ctf: CTF, seen: Comparison) -> OpticsEstimate:
    """Find the contrast and the defocus of one particle.

    Parameters
    ----------
    prior
        What is known of them; what has a spread of 0 is not estimated.
    ctf
        The optics as they were given.
    seen
        The image and the slice of the map at its pose, from `compare`.
    """
    dtype = seen.power.dtype

    def at(defocus):
        return objective(prior, ctf, seen, defocus)

    defocus = jnp.zeros((), dtype)
    if prior.defocus_spread:
        most = prior.defocus_limit
        offsets = jnp.asarray(np.linspace(-most, most, _TRIED), dtype)
        costs = jax.lax.map(lambda offset: at(offset)[0], offsets)
        defocus = offsets[jnp.argmin(costs)]

        def iterate(carry, _):
            defocus, values, damping = carry
            _, _, slope, information = values
            curvature = _schur(prior, information)
            tried = defocus - slope / (curvature * (1 + damping))
            tried = jnp.clip(tried, -most, most)
            new = at(tried)
            better = new[0] < values[0]
            defocus, values = jax.tree.map(
                lambda a, b: jnp.where(better, a, b), (tried, new), (defocus, values)
            )
            return (defocus, values, next_damping(damping, better)), None

        start = (defocus, at(defocus), jnp.asarray(_DAMPING, dtype))
        (defocus, *_), _ = jax.lax.scan(iterate, start, None, _STEPS)
    _, contrast, _, information = at(defocus)
    (of_contrast, across), (_, of_defocus) = information
    errors, at_limit = [jnp.zeros((), dtype)] * 2, [jnp.zeros((), bool)] * 2
    if prior.contrast_spread:
        low, high = prior.contrast_limits
        at_limit[0] = (contrast <= low + _NEAR) | (contrast >= high - _NEAR)
        rest = across**2 / of_defocus if prior.defocus_spread else 0.0
        found = 1 / jnp.sqrt(of_contrast - rest)
        errors[0] = jnp.where(at_limit[0], prior.contrast_spread, found)
    if prior.defocus_spread:
        at_limit[1] = jnp.abs(defocus) >= (1 - _NEAR) * prior.defocus_limit
        found = 1 / jnp.sqrt(_schur(prior, information))
        errors[1] = jnp.where(at_limit[1], prior.defocus_spread, found)
    return OpticsEstimate(
        Optics(contrast, defocus), Optics(*errors), AtLimit(*at_limit)
    )


def _schur(prior: OpticsPrior, information: Float[Array, "2 2"]) -> Scalar:
    """Return the information on the offset where the contrast follows it."""
    (of_contrast, across), (_, of_defocus) = information
    if not prior.contrast_spread:
        return of_defocus
    return of_defocus - across**2 / of_contrast


def _inverse_square(spread: float) -> float:
    """Return the inverse variance of what is estimated; 0 for what is fixed."""
    return 1 / spread**2 if spread else 0.0
