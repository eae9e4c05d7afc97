r"""Post-processing of half maps: solvent mask, corrected resolution, sharpening.

The rules are those of RELION's ``relion_postprocess``, so that results are comparable:

- the Fourier shell correlation of the masked half maps is corrected for the mask by
  that of half maps with random phases (Chen et al., Ultramicroscopy 135, 2013);
- the mean map is divided by the modulation transfer function of the detector, if that
  is given, weighted by :math:`\sqrt{2\,\mathrm{FSC} / (1 + \mathrm{FSC})}`,
  sharpened by a B factor, which is given or fitted to the Guinier plot, and low-pass
  filtered. Weight, fit and the threshold of 0.143 are those of Rosenthal and Henderson
  (J. Mol. Biol. 333, 2003).
"""

import math
from dataclasses import dataclass
from typing import Any, final

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

from jaxrefine._types import Volume
from jaxrefine.errors import InputError
from jaxrefine.maps.detector import ModulationTransfer
from jaxrefine.maps.filters import check_positive, cosine_edge, filtered
from jaxrefine.maps.fsc import Resolution, fsc, resolution
from jaxrefine.maps.mask import check_mask, soft_mask
from jaxrefine.maps.scale import at_unit_scale, hot_voxel
from jaxrefine.operators.fourier import radii

# Phases are randomised from where the unmasked correlation falls below this: RELION's
# default (--randomize_at_fsc).
_RANDOMISE_BELOW = 0.8

# Shells from there on in which the masked correlation is not yet corrected: RELION's
# rule.
_TRUSTED_SHELLS = 2

# Fewest shells of a Guinier fit: a straight line through two has no residual.
_LEAST_SHELLS = 3

# Largest exponent of a B factor's gain: e**88 is the limit of single precision.
_LARGEST_EXPONENT = 80

# Sizes that differ by less, relatively, are the same: they are rounded in files.
_SAME_SIZE = 0.01

Curve = Float[np.ndarray, " shells"]
"""A Fourier shell correlation at the shells 0, ..., n // 2."""


@final
@dataclass(frozen=True)
class GuinierFit:
    """A request to fit the B factor to the Guinier plot.

    Attributes
    ----------
    from_in_angstroms
        Lowest resolution of the fit, which extends to the resolution of the map.
    """

    from_in_angstroms: float = 10.0


@final
@dataclass(frozen=True)
class Postprocessed:
    """A post-processed map, and its resolution.

    Attributes
    ----------
    volume, masked_volume
        The mean of the half maps, weighted, sharpened and low-pass filtered, without
        and with the mask.
    mask
        The mask, as it was given or made.
    fsc_unmasked, fsc_masked, fsc_randomised, fsc_true
        Fourier shell correlations of the half maps: as they are, masked, masked after
        their phases were randomised, and corrected for the mask.
    randomised_from
        First shell with random phases; n // 2 + 1 if there is none.
    resolution
        That of ``fsc_true`` at 0.143.
    b_factor_in_square_angstroms
        B factor of the sharpening, negative if amplitudes were raised, as in RELION;
        None if the map was not sharpened.
    not_sharpened_because
        The reason, as a sentence, if the B factor could not be fitted.
    """

    volume: Volume
    masked_volume: Volume
    mask: Volume
    fsc_unmasked: Curve
    fsc_masked: Curve
    fsc_randomised: Curve
    fsc_true: Curve
    randomised_from: int
    resolution: Resolution
    b_factor_in_square_angstroms: float | None
    not_sharpened_because: str | None

    def row(self) -> dict[str, Any]:
        """Return the figures and the curves by name, as JSON can hold them."""
        curves = ("fsc_true", "fsc_masked", "fsc_randomised", "fsc_unmasked")
        return {
            "resolution_in_angstroms": self.resolution.in_angstroms,
            "resolution_is_a_bound": self.resolution.is_a_bound,
            "b_factor_in_square_angstroms": self.b_factor_in_square_angstroms,
            "not_sharpened_because": self.not_sharpened_because,
            "randomised_from_shell": self.randomised_from,
            **{name: getattr(self, name).tolist() for name in curves},
        }


def postprocess(
    half1: Volume,
    half2: Float[Array, "_ _ _"],
    mask: Float[Array, "_ _ _"] | None,
    voxel_size_in_angstroms: float,
    *,
    key: PRNGKeyArray,
    b_factor_in_square_angstroms: float | GuinierFit | None = None,
    low_pass_in_angstroms: float | None = None,
    mtf: ModulationTransfer | None = None,
) -> Postprocessed:
    r"""Measure the resolution of two half maps; weight, sharpen and filter their mean.

    Let :math:`F_m` be the correlation of the masked maps, and :math:`F_r` that of the
    masked maps whose phases are random from shell s on, the first shell with an
    unmasked correlation below 0.8. The correlation is corrected to

    .. math:: F(r) = \frac{F_m(r) - F_r(r)}{1 - F_r(r)}, \quad r \ge s + 2;
       \qquad F(r) = F_m(r), \quad r < s + 2.

    The mean map's spectrum at frequency k (in cycles per box), of shell r, is
    multiplied by

    .. math:: \sqrt{\frac{2 F(r)}{1 + F(r)}}\; e^{-B |k|^2 / 4 (n p)^2}\; L(|k|),

    where p is the voxel size, and divided by the transfer function of the detector
    at :math:`|k| / (n p)`, if :math:`|k| < n / 2`: RELION leaves the Nyquist frequency
    and what is beyond undivided. The weight of shell 0 is 1; weights are 0 from the
    first shell on in which F is not positive. L falls from 1 to 0 as a cosine, from one
    shell before the cut-off to one shell after it.

    Parameters
    ----------
    half1, half2
        Maps of two independent halves of the particles, of shape ``(n, n, n)``, neither
        filtered nor masked.
    mask
        Mask with values from 0 in the solvent to 1 in the particle and a soft edge.
        None for the one that `mask.soft_mask` makes of the mean of the half maps.
    voxel_size_in_angstroms
        Edge of a voxel.
    key
        Random key for the phases.
    b_factor_in_square_angstroms
        The B factor itself, negative to sharpen; or a `GuinierFit`, by which it is 4
        times the slope of the logarithm of the shells' mean amplitudes, after
        weighting and the division, against :math:`(r / n p)^2`; or None to leave the
        amplitudes as they are.
    low_pass_in_angstroms
        Cut-off of L; the resolution by default.
    mtf
        The modulation transfer function of the detector, which the half maps have in
        them; None to leave it there. Correlations and the mask do not depend on it.

    Raises
    ------
    InputError
        If shapes differ, values are not finite, the half maps are equal, zero within
        the mask or a few hot voxels, the mask has values beyond 0 and 1 or is empty,
        none can be made, or a number is out of range: a pixel of the detector is at
        most twice a voxel, as with super-resolution.
    """
    _check(half1, half2)
    check_positive("the voxel size", voxel_size_in_angstroms)
    mean = (half1 + half2) / 2
    if mask is None:
        mask = soft_mask(at_unit_scale(mean), voxel_size_in_angstroms)
    _check_mask(mask, half1, half2)
    if low_pass_in_angstroms is not None:
        check_positive("the low-pass resolution", low_pass_in_angstroms)
    if mtf is not None:
        _check_detector(mtf.pixel_size_in_angstroms, voxel_size_in_angstroms)
    n, mask = half1.shape[0], mask.astype(half1.dtype)
    box = n * voxel_size_in_angstroms
    shells = np.arange(n // 2 + 1)

    unmasked = np.asarray(fsc(half1, half2))
    masked = np.asarray(fsc(half1, half2, mask))
    is_below = np.append(unmasked[1:] < _RANDOMISE_BELOW, True)
    first = 1 + int(np.argmax(is_below))
    keys = jax.random.split(key)
    random1 = _with_random_phases(keys[0], half1, first)
    random2 = _with_random_phases(keys[1], half2, first)
    randomised = np.asarray(fsc(random1, random2, mask))
    corrected = (masked - randomised) / np.maximum(1 - randomised, 1e-6)
    true = np.where(shells < first + _TRUSTED_SHELLS, masked, corrected)
    resolved = resolution(true, n, voxel_size_in_angstroms)
    radius = box / resolved.in_angstroms

    division = np.ones_like(radii(n))
    if mtf is not None:
        division = np.where(radii(n) < n / 2, 1 / mtf(radii(n) / box), 1.0)
    weight = _weights(true)
    b_factor, reason = b_factor_in_square_angstroms, None
    if isinstance(b_factor, GuinierFit):
        b_factor, reason = _fit(mean, division, weight, box, b_factor, radius)
    cut_off = radius if low_pass_in_angstroms is None else box / low_pass_in_angstroms
    transfer = _transfer(division, weight, b_factor or 0.0, cut_off, box)
    volume = filtered(mean, transfer)
    return Postprocessed(
        volume,
        volume * mask,
        mask,
        unmasked,
        masked,
        randomised,
        true,
        first,
        resolved,
        b_factor,
        reason,
    )


def _check(half1: Array, half2: Array) -> None:
    """Refuse half maps that are not those of two sets of particles."""
    _check_size("the second half map", half2, half1)
    if not (jnp.isfinite(half1).all() and jnp.isfinite(half2).all()):
        raise InputError("the half maps must be finite, got NaN or infinite values")
    if jnp.array_equal(half1, half2):
        raise InputError(
            "the half maps must be made from two sets of particles, got the same map "
            "twice"
        )
    for name, half in (("first", half1), ("second", half2)):
        hot = hot_voxel(np.asarray(half))
        if hot is not None:
            raise InputError(
                f"the {name} half map must be that of a particle, got one with most of "
                f"its power in a few hot voxels of up to {hot:g}"
            )


def _check_mask(mask: Array, half1: Array, half2: Array) -> None:
    """Refuse a mask that is none, or that leaves nothing of a half map."""
    _check_size("the mask", mask, half1)
    check_mask(mask)
    for name, half in (("first", half1), ("second", half2)):
        if not jnp.any(half * mask):
            raise InputError(
                f"the {name} half map must not be zero within the mask, got zeros only"
            )


def _check_size(name: str, other: Array, half1: Array) -> None:
    if other.shape != half1.shape:
        sizes = [" x ".join(map(str, a.shape)) for a in (other, half1)]
        raise InputError(
            f"{name} must have the size of the first half map, {sizes[1]}, got "
            f"{sizes[0]}"
        )


def _check_detector(pixel_size: float, voxel_size: float) -> None:
    """Refuse pixels of a detector that the images cannot be from."""
    check_positive("the detector's pixel size", pixel_size)
    if pixel_size > 2 * voxel_size * (1 + _SAME_SIZE):
        raise InputError(
            "the detector's pixel size must be at most twice the voxel size of "
            f"{voxel_size:g} A, since images have no pixels finer than half of the "
            f"detector's (super-resolution), got {pixel_size:g} A"
        )


def _transfer(
    division: np.ndarray,
    weight: np.ndarray,
    b_factor: float,
    cut_off: float,
    box: float,
) -> np.ndarray:
    """Return the factors of the mean map's spectrum; the cut-off is in shells.

    They include `division`, and are 0 where the weight or the low-pass filter is.
    """
    frequency = radii(len(division))
    shell = np.minimum(np.rint(frequency), len(weight)).astype(int)
    transfer = np.append(weight, 0)[shell] * cosine_edge(frequency, cut_off)
    passed, decay = transfer > 0, b_factor / 4 / box**2
    highest, most = frequency[passed].max(), np.log(division[passed].max())
    if not (math.isfinite(decay) and most - decay * highest**2 < _LARGEST_EXPONENT):
        raise InputError(
            "the B factor must be finite and raise amplitudes by less than "
            f"e^{_LARGEST_EXPONENT}, got {b_factor:g} A^2"
        )
    return transfer * division * np.exp(-decay * np.minimum(frequency, highest) ** 2)


def _with_random_phases(key: PRNGKeyArray, volume: Volume, first: int) -> Volume:
    """Replace the phases from shell `first` on by those of white noise."""
    noise = jnp.fft.rfftn(jax.random.normal(key, volume.shape, volume.dtype))
    spectrum = jnp.fft.rfftn(volume)
    random = noise * (jnp.abs(spectrum) / jnp.abs(noise)).astype(noise.dtype)
    is_kept = jnp.asarray(radii(volume.shape[0]) < first)
    return jnp.fft.irfftn(jnp.where(is_kept, spectrum, random), s=volume.shape)


def _weights(curve: np.ndarray) -> np.ndarray:
    """Return the weight of each shell from the correlation; 1 in shell 0."""
    positive = np.cumprod(curve[1:] > 0)
    ratio = np.where(positive, curve[1:], 0)
    return np.append(1, np.sqrt(2 * ratio / (1 + ratio)))


def _fit(
    mean: Volume,
    division: np.ndarray,
    weight: np.ndarray,
    box: float,
    fit: GuinierFit,
    radius: float,
) -> tuple[float | None, str | None]:
    """Return the B factor of the Guinier plot up to a radius, or why there is none."""
    shells = np.arange(len(weight))
    used = (shells >= box / fit.from_in_angstroms) & (shells <= radius) & (weight > 0)
    if used.sum() < _LEAST_SHELLS:
        return None, (
            f"There must be at least {_LEAST_SHELLS} shells to fit a B factor to, got "
            f"{used.sum()} from {fit.from_in_angstroms:g} A to the resolution of "
            f"{box / radius:.2f} A."
        )
    shell = np.rint(radii(mean.shape[0])).astype(int).ravel()
    amplitude = (np.abs(np.asarray(jnp.fft.rfftn(mean))) * division).ravel()
    averages = np.bincount(shell, amplitude) / np.bincount(shell)
    logarithm = np.log(weight[used] * averages[: len(weight)][used])
    slope, _ = np.polyfit((shells[used] / box) ** 2, logarithm, 1)
    return 4 * float(slope), None
