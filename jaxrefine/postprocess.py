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
from typing import Any, final

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray
from scipy import ndimage

from jaxrefine import metrics
from jaxrefine._fourier import radii
from jaxrefine._types import Volume
from jaxrefine.errors import InputError

_RANDOMISE_BELOW = 0.8  # correlation of the half maps, not masked
_TRUSTED_SHELLS = 2  # from where phases are random; RELION's rule
_RESOLUTION_AT = 0.143
_LEAST_SHELLS = 3  # for a straight line with a residual
_LARGEST_EXPONENT = 80  # single precision ends at 88
_BINS = 256  # of the histogram of densities

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
    _check_number("The pixel size", pixel_size_in_angstroms)
    if low_pass_in_angstroms is not None:
        _check_number("The low-pass", low_pass_in_angstroms)
    n, mask = half1.shape[0], mask.astype(half1.dtype)
    box = n * pixel_size_in_angstroms
    shells = np.arange(n // 2 + 1)

    unmasked = np.asarray(metrics.fsc(half1, half2))
    masked = np.asarray(metrics.fsc(half1, half2, mask))
    low = np.append(unmasked[1:] < _RANDOMISE_BELOW, True)
    first = 1 + int(np.argmax(low))
    keys = jax.random.split(key)
    random1 = _with_random_phases(keys[0], half1, first)
    random2 = _with_random_phases(keys[1], half2, first)
    randomised = np.asarray(metrics.fsc(random1, random2, mask))
    corrected = (masked - randomised) / np.maximum(1 - randomised, 1e-6)
    true = np.where(shells < first + _TRUSTED_SHELLS, masked, corrected)
    radius = float(metrics.crossing(jnp.asarray(true), _RESOLUTION_AT))

    mean, weight = (half1 + half2) / 2, _weights(true)
    b_factor, reason = b_factor_in_square_angstroms, None
    if isinstance(b_factor, GuinierFit):
        b_factor, reason = _fit(mean, weight, box, b_factor, radius)
    cut_off = radius if low_pass_in_angstroms is None else box / low_pass_in_angstroms
    volume = _filtered(mean, _transfer(n, weight, b_factor or 0.0, cut_off, box))
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


def low_pass(
    volume: Volume, pixel_size_in_angstroms: float, resolution_in_angstroms: float
) -> Volume:
    """Take away what lies beyond a resolution, as `postprocess` does.

    Parameters
    ----------
    volume
        The map.
    pixel_size_in_angstroms, resolution_in_angstroms
        Edge of a voxel, and where the filter falls, as a cosine from a shell before
        to a shell after.

    Raises
    ------
    InputError
        If a number is not positive and finite.
    """
    _check_number("The pixel size", pixel_size_in_angstroms)
    _check_number("The low-pass", resolution_in_angstroms)
    n = volume.shape[0]
    cut_off = n * pixel_size_in_angstroms / resolution_in_angstroms
    return _filtered(volume, _low_pass(radii(n), cut_off))


def soft_mask(
    volume: Volume,
    pixel_size_in_angstroms: float,
    *,
    threshold: float | None = None,
    low_pass_in_angstroms: float = 15.0,
    extend: float = 3.0,
    edge: float = 6.0,
) -> Volume:
    """Separate the particle from the solvent, with a soft edge.

    The map is low-pass filtered and cut at a threshold; its largest connected part is
    grown, and surrounded by an edge that falls from 1 to 0 as a cosine.

    Parameters
    ----------
    volume
        The mean of the half maps. Protein is positive.
    pixel_size_in_angstroms
        Edge of a voxel.
    threshold
        Density of the filtered map at the surface. By default that of the triangle
        method (Zack, Rogers and Latt, J. Histochem. Cytochem. 25, 1977): where the
        histogram is farthest below the line from its peak, the solvent, to its end.
    low_pass_in_angstroms
        Cut-off of the filter, that of `postprocess`.
    extend, edge
        Width in voxels of what is added, and of the edge around it.

    Returns
    -------
    mask
        Values from 0 to 1, of the map's type.

    Raises
    ------
    InputError
        If the map is flat or not finite, no voxel is above the threshold, or a number
        is out of range.
    """
    if min(extend, edge) < 0:
        raise InputError(
            f"The mask is to grow by {extend:g} and an edge of {edge:g} voxels; "
            "0 or more is wanted."
        )
    if not (jnp.isfinite(volume).all() and jnp.ptp(volume) > 0):
        raise InputError("A flat map or one that is not finite cannot make a mask.")
    smooth = np.asarray(
        low_pass(volume, pixel_size_in_angstroms, low_pass_in_angstroms)
    )
    level = _triangle_threshold(smooth) if threshold is None else threshold
    labelled: Any = ndimage.label(smooth > level)
    parts, count = labelled
    if not count:
        raise InputError(
            f"No voxel of the filtered map is above {level:g}; its largest is "
            f"{smooth.max():g}."
        )
    largest = 1 + np.argmax(np.bincount(parts.ravel())[1:])
    distance = np.asarray(ndimage.distance_transform_edt(parts != largest))
    place = np.clip((distance - extend) / max(edge, 1e-6), 0, 1)
    return jnp.asarray(0.5 + 0.5 * np.cos(np.pi * place), volume.dtype)


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


def check_mask(mask: Array | np.ndarray, name: object = "The mask") -> None:
    """Refuse what is not from 0 to 1, or nowhere more than 0.

    Raises
    ------
    InputError
        If it is so, naming it.
    """
    # NumPy's, which are NaN if a value is.
    low, high = np.asarray(mask).min(), np.asarray(mask).max()
    if not (-1e-6 <= low and 0 < high <= 1 + 1e-6):
        raise InputError(
            f"{name} runs from {low:g} to {high:g}; 0 in the solvent to 1 is wanted."
        )


def _check_number(name: str, value: float) -> None:
    if not 0 < value < math.inf:
        raise InputError(f"{name} is {value:g} A; a positive number is wanted.")


def _low_pass(frequency: np.ndarray, cut_off: float) -> np.ndarray:
    """Return a cosine from 1 at a shell before the cut-off to 0 at a shell after it."""
    return 0.5 + 0.5 * np.cos(np.pi * np.clip((frequency - cut_off + 1) / 2, 0, 1))


def _transfer(
    n: int, weight: np.ndarray, b_factor: float, cut_off: float, box: float
) -> np.ndarray:
    """Return what the spectrum is multiplied by; the cut-off is a shell."""
    frequency = radii(n)
    shell = np.minimum(np.rint(frequency), len(weight)).astype(int)
    transfer = np.append(weight, 0)[shell] * _low_pass(frequency, cut_off)
    highest, decay = frequency[transfer > 0].max(), b_factor / 4 / box**2
    if not (math.isfinite(decay) and -decay * highest**2 < _LARGEST_EXPONENT):
        raise InputError(
            f"A B factor of {b_factor:g} A^2 would raise amplitudes by more than "
            f"e^{_LARGEST_EXPONENT}; a finite number nearer to 0 is wanted."
        )
    return transfer * np.exp(-decay * np.minimum(frequency, highest) ** 2)


def _filtered(volume: Volume, transfer: np.ndarray) -> Volume:
    spectrum = jnp.fft.rfftn(volume)
    spectrum = spectrum * jnp.asarray(transfer, spectrum.dtype)
    return jnp.fft.irfftn(spectrum, s=volume.shape)


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


def _triangle_threshold(values: np.ndarray) -> float:
    """Return where the histogram is farthest below the line from peak to end."""
    count, edges = np.histogram(values, _BINS)
    peak = int(np.argmax(count))
    line = np.linspace(count[peak], count[-1], _BINS - peak)
    return float(edges[peak + np.argmax(line - count[peak:]) + 1])
