r"""Post-processing of half maps: solvent mask, corrected resolution, sharpening.

The rules are those of RELION's ``relion_postprocess``, so that figures compare:

- the Fourier shell correlation of the masked half maps is corrected for the mask by
  that of half maps with random phases (Chen et al., Ultramicroscopy 135, 2013);
- the mean map is weighted by :math:`\sqrt{2\,\mathrm{FSC} / (1 + \mathrm{FSC})}`,
  sharpened by a B factor, given or fitted to the Guinier plot (Rosenthal and Henderson,
  J. Mol. Biol. 333, 2003), and low-pass filtered.
"""

import math
from dataclasses import dataclass
from typing import final

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

from jaxrefine._types import Volume
from jaxrefine.errors import InputError
from jaxrefine.maps.filters import check_positive, cosine_edge, filtered
from jaxrefine.maps.fsc import crossing, fsc
from jaxrefine.maps.mask import check_mask
from jaxrefine.operators._fourier import radii

_RANDOMISE_BELOW = 0.8  # correlation of the half maps, not masked

_TRUSTED_SHELLS = 2  # from where phases are random; RELION's rule

_RESOLUTION_AT = 0.143

_LEAST_SHELLS = 3  # for a straight line with a residual

_LARGEST_EXPONENT = 80  # single precision ends at 88


Curve = Float[np.ndarray, " shells"]
"""A Fourier shell correlation at the shells 0, ..., n // 2."""


@final
@dataclass(frozen=True)
class GuinierFit:
    """Ask for a B factor from the Guinier plot, from here to the resolution."""

    from_in_angstroms: float = 10.0


@final
@dataclass(frozen=True)
class Postprocessed:
    """A map ready to be looked at, and how good it is.

    Attributes
    ----------
    volume, masked_volume
        The mean of the half maps, weighted, sharpened and low-pass filtered.
    fsc_unmasked, fsc_masked, fsc_randomised, fsc_true
        Correlations of the half maps: as they are, masked, masked after their phases
        were made random, and corrected for the mask.
    randomised_from
        First shell of random phases; n // 2 + 1 if there is none.
    resolution_in_angstroms
        Where ``fsc_true`` falls below 0.143; two voxels if it never does.
    b_factor_in_square_angstroms
        What the map was sharpened by, negative as RELION writes it; None if it was not.
    not_sharpened_because
        A sentence if a B factor was to be fitted and could not be.
    """

    volume: Volume
    masked_volume: Volume
    fsc_unmasked: Curve
    fsc_masked: Curve
    fsc_randomised: Curve
    fsc_true: Curve
    randomised_from: int
    resolution_in_angstroms: float
    b_factor_in_square_angstroms: float | None
    not_sharpened_because: str | None


def postprocess(
    half1: Volume,
    half2: Float[Array, "_ _ _"],
    mask: Float[Array, "_ _ _"],
    pixel_size_in_angstroms: float,
    *,
    key: PRNGKeyArray,
    b_factor_in_square_angstroms: float | GuinierFit | None = None,
    low_pass_in_angstroms: float | None = None,
) -> Postprocessed:
    r"""Measure the resolution of two half maps; weight, sharpen and filter their mean.

    With the correlation :math:`F_m` of the masked maps and :math:`F_r` of those whose
    phases are random from shell s on, the first of an unmasked correlation below 0.8,

    .. math:: F(r) = \frac{F_m(r) - F_r(r)}{1 - F_r(r)}, \quad r \ge s + 2;
       \qquad F(r) = F_m(r), \quad r < s + 2.

    The mean map's spectrum at frequency k (in 1/box), of shell r, is multiplied by

    .. math:: \sqrt{\frac{2 F(r)}{1 + F(r)}}\; e^{-B |k|^2 / 4 (n p)^2}\; L(|k|),

    p being the pixel size. The weight of shell 0 is 1, and 0 from where F first is not
    positive. L falls from 1 to 0 as a cosine, from a shell before the cut-off to a
    shell after it.

    Parameters
    ----------
    half1, half2
        Maps of two independent halves of the particles, neither filtered nor masked.
    mask
        From 0 in the solvent to 1, with a soft edge; see `soft_mask`.
    pixel_size_in_angstroms
        Edge of a voxel.
    key
        Draws the random phases.
    b_factor_in_square_angstroms
        B itself, negative to sharpen; a `GuinierFit` to find it: 4 times the slope of
        the logarithm of the shells' mean amplitudes, after weighting, against
        :math:`(r / n p)^2`; None to leave amplitudes as they are.
    low_pass_in_angstroms
        Cut-off of L; the resolution by default.

    Raises
    ------
    InputError
        If sizes differ, values are not finite, the half maps are the same, the mask
        leaves 0 to 1 or is empty, or a number is out of range.
    """
    _check(half1, half2, mask)
    check_positive("The pixel size", pixel_size_in_angstroms)
    if low_pass_in_angstroms is not None:
        check_positive("The low-pass", low_pass_in_angstroms)
    n, mask = half1.shape[0], mask.astype(half1.dtype)
    box = n * pixel_size_in_angstroms
    shells = np.arange(n // 2 + 1)

    unmasked = np.asarray(fsc(half1, half2))
    masked = np.asarray(fsc(half1, half2, mask))
    low = np.append(unmasked[1:] < _RANDOMISE_BELOW, True)
    first = 1 + int(np.argmax(low))
    keys = jax.random.split(key)
    random1 = _with_random_phases(keys[0], half1, first)
    random2 = _with_random_phases(keys[1], half2, first)
    randomised = np.asarray(fsc(random1, random2, mask))
    corrected = (masked - randomised) / np.maximum(1 - randomised, 1e-6)
    true = np.where(shells < first + _TRUSTED_SHELLS, masked, corrected)
    radius = float(crossing(jnp.asarray(true), _RESOLUTION_AT))

    mean, weight = (half1 + half2) / 2, _weights(true)
    b_factor, reason = b_factor_in_square_angstroms, None
    if isinstance(b_factor, GuinierFit):
        b_factor, reason = _fit(mean, weight, box, b_factor, radius)
    cut_off = radius if low_pass_in_angstroms is None else box / low_pass_in_angstroms
    volume = filtered(mean, _transfer(n, weight, b_factor or 0.0, cut_off, box))
    return Postprocessed(
        volume,
        volume * mask,
        unmasked,
        masked,
        randomised,
        true,
        first,
        box / radius,
        b_factor,
        reason,
    )


def _check(half1: Array, half2: Array, mask: Array) -> None:
    for name, other in (("The second half map", half2), ("The mask", mask)):
        if other.shape != half1.shape:
            sizes = [" x ".join(map(str, a.shape)) for a in (other, half1)]
            raise InputError(
                f"{name} is {sizes[0]}; {sizes[1]} as the first half map is wanted."
            )
    if not (jnp.isfinite(half1).all() and jnp.isfinite(half2).all()):
        raise InputError("A half map holds values that are NaN or infinite.")
    if jnp.array_equal(half1, half2):
        raise InputError(
            "The half maps are the same; those of two sets of particles are wanted."
        )
    check_mask(mask)
    for name, half in (("first", half1), ("second", half2)):
        if not jnp.any(half * mask):
            raise InputError(f"The {name} half map is zero within the mask.")


def _transfer(
    n: int, weight: np.ndarray, b_factor: float, cut_off: float, box: float
) -> np.ndarray:
    """Return what the spectrum is multiplied by; the cut-off is a shell."""
    frequency = radii(n)
    shell = np.minimum(np.rint(frequency), len(weight)).astype(int)
    transfer = np.append(weight, 0)[shell] * cosine_edge(frequency, cut_off)
    highest, decay = frequency[transfer > 0].max(), b_factor / 4 / box**2
    if not (math.isfinite(decay) and -decay * highest**2 < _LARGEST_EXPONENT):
        raise InputError(
            f"A B factor of {b_factor:g} A^2 would raise amplitudes by more than "
            f"e^{_LARGEST_EXPONENT}; a finite number nearer to 0 is wanted."
        )
    return transfer * np.exp(-decay * np.minimum(frequency, highest) ** 2)


def _with_random_phases(key: PRNGKeyArray, volume: Volume, first: int) -> Volume:
    """Keep the amplitudes; from a frequency on, take white noise's phases."""
    noise = jnp.fft.rfftn(jax.random.normal(key, volume.shape, volume.dtype))
    spectrum = jnp.fft.rfftn(volume)
    random = noise * (jnp.abs(spectrum) / jnp.abs(noise)).astype(noise.dtype)
    keeps = jnp.asarray(radii(volume.shape[0]) < first)
    return jnp.fft.irfftn(jnp.where(keeps, spectrum, random), s=volume.shape)


def _weights(curve: np.ndarray) -> np.ndarray:
    """Return the weights of a correlation's shells; 1 at the origin."""
    positive = np.cumprod(curve[1:] > 0)
    ratio = np.where(positive, curve[1:], 0)
    return np.append(1, np.sqrt(2 * ratio / (1 + ratio)))


def _fit(
    mean: Volume, weight: np.ndarray, box: float, fit: GuinierFit, radius: float
) -> tuple[float | None, str | None]:
    """Return the B factor of the Guinier plot up to a radius, or why there is none."""
    shells = np.arange(len(weight))
    used = (shells >= box / fit.from_in_angstroms) & (shells <= radius) & (weight > 0)
    if used.sum() < _LEAST_SHELLS:
        return None, (
            f"From {fit.from_in_angstroms:g} A to the resolution of {box / radius:.2f} "
            f"A there are {used.sum()} shells; a B factor wants {_LEAST_SHELLS}."
        )
    shell = np.rint(radii(mean.shape[0])).astype(int).ravel()
    amplitude = np.abs(np.asarray(jnp.fft.rfftn(mean))).ravel()
    averages = np.bincount(shell, amplitude) / np.bincount(shell)
    logarithm = np.log(weight[used] * averages[: len(weight)][used])
    slope, _ = np.polyfit((shells[used] / box) ** 2, logarithm, 1)
    return 4 * float(slope), None
