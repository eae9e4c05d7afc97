"""Preprocessing of images as they are read: resampled, cleaned, normalised, masked.

Micrographs differ in thickness and dose, so particles are brought to a common scale by
their background, the pixels outside a circle, as in RELION's preprocessing. Protein is
bright afterwards.
"""

from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, final

import numpy as np
from jaxtyping import Bool, Float, Float32

from jaxrefine.data.outliers import without_hot_pixels
from jaxrefine.data.particles import ImageSource
from jaxrefine.errors import InputError, UnusableImage
from jaxrefine.operators.resample import interpolation_matrix

# Fewest background pixels: their standard deviation is then known to about 18 %.
_FEWEST = 16
# Width of a mask's soft edge in pixels: RELION's default (--maskedge 5).
_EDGE = 5.0
# Largest factor between pixel sizes, with room for rounding. The resampled image then
# sees 5/4 of the periodically continued original, so that a particle as wide as 3/4 of
# the box is not repeated in it.
LARGEST_STEP = 1.25 * (1 + 1e-9)


class _Derived:
    """An image source that computes its images from those of another source."""

    source: ImageSource

    @property
    def shape(self) -> tuple[int, ...]:
        """Number of particles, rows and columns."""
        return tuple(self.source.shape)


@final
@dataclass(frozen=True)
class Resampled(_Derived):
    """Images with different pixel sizes, resampled to the largest when they are read.

    An image is interpolated by the trigonometric polynomial through its pixels, without
    frequencies beyond the new Nyquist frequency. Where the new image extends beyond the
    old one, the polynomial continues periodically: the background there is as noisy as
    elsewhere, but a repetition. Values are multiplied by the step, so that white noise
    keeps its variance and normalised images stay normalised. The origin stays the pixel
    ``m // 2``.

    Parameters
    ----------
    source
        Images of shape ``(P, m, m)``.
    step
        New pixel size over the pixel size of each image, 1 to 1.25. Images with a step
        of 1 are not changed.

    Raises
    ------
    InputError
        If a step is out of range, or if there is not one step for each image.
    """

    source: ImageSource
    step: Float[np.ndarray, " P"]

    def __post_init__(self):
        count, smallest, largest = len(self.step), self.step.min(), self.step.max()
        if count != self.shape[0]:
            raise InputError(
                f"step must hold one value for each of {self.shape[0]} images, got "
                f"{count}"
            )
        if not 1 <= smallest <= largest <= LARGEST_STEP:
            raise InputError(
                f"step must be from 1 to {LARGEST_STEP:g}, got {smallest:g} to "
                f"{largest:g}"
            )

    @property
    def noise_share(self) -> float:
        """Fraction of the noise's power that the source's masks leave."""
        return getattr(self.source, "noise_share", 1.0)

    def __getitem__(self, indices: Any, /) -> Float32[np.ndarray, "batch m m"]:
        images = np.array(self.source[indices], np.float32)
        steps, m = self.step[indices], self.shape[-1]
        for step in np.unique(steps[steps != 1]):
            matrix = _interpolation(m, float(step))
            chosen = steps == step
            images[chosen] = step * (matrix @ images[chosen] @ matrix.T)
        return images


@final
@dataclass(frozen=True)
class Cleaned(_Derived):
    """Images without hot pixels, which are replaced when they are read.

    Parameters
    ----------
    source
        Images of shape ``(P, m, m)``.
    hot
        Which images have hot pixels. The others are not changed.
    limit
        How far from the median a pixel is hot, see `outliers.without_hot_pixels`.
    """

    source: ImageSource
    hot: Bool[np.ndarray, " P"]
    limit: float

    @property
    def noise_share(self) -> float:
        """Fraction of the noise's power that the source's masks leave."""
        return getattr(self.source, "noise_share", 1.0)

    def __getitem__(self, indices: Any, /) -> Float32[np.ndarray, "batch m m"]:
        images, hot = np.asarray(self.source[indices], np.float32), self.hot[indices]
        if hot.any():
            images = images.copy()
            images[hot] = without_hot_pixels(images[hot], self.limit)
        return images


@final
@dataclass(frozen=True)
class Normalised(_Derived):
    """Images normalised to a background of mean 0 and standard deviation 1 when read.

    Parameters
    ----------
    source
        Images of shape ``(P, m, m)``.
    diameter
        Diameter in pixels of a circle around the image's origin ``m // 2``. The pixels
        outside it are background.
    invert
        Whether protein is dark in the images of the source.

    Raises
    ------
    InputError
        If there are too few pixels outside the circle. On reading, if an image is
        constant there.
    """

    source: ImageSource
    diameter: float
    invert: bool = False

    def __post_init__(self):
        m = self.shape[-1]
        count = int(np.sum(outside(m, self.diameter)))
        if not self.diameter > 0 or count < _FEWEST:
            raise InputError(
                f"diameter must be positive and leave at least {_FEWEST} pixels of "
                f"background in images of {m} x {m}, got {self.diameter:g} pixels, "
                f"which leave {count}"
            )

    @property
    def noise_share(self) -> float:
        """Fraction of the noise's power that the source's masks leave."""
        return getattr(self.source, "noise_share", 1.0)

    def __getitem__(self, indices: Any, /) -> Float32[np.ndarray, "batch m m"]:
        images = np.asarray(self.source[indices], np.float64)
        background = images[:, outside(self.shape[-1], self.diameter)]
        deviation = background.std(axis=1)
        constant = np.flatnonzero(deviation == 0)
        if len(constant):
            number = np.arange(self.shape[0])[indices][constant[0]]
            raise UnusableImage(
                f"image {number} (from 0) must vary outside the particle to be "
                "normalised by its background, got a constant one"
            )
        sign = -1.0 if self.invert else 1.0
        mean = background.mean(axis=1)[:, None, None]
        return ((images - mean) * (sign / deviation)[:, None, None]).astype(np.float32)


@final
@dataclass(frozen=True)
class Masked(_Derived):
    """Images that are set to 0 outside a circle around the particle when read.

    A pixel is multiplied by 1 within the circle, by a cosine that falls to 0 over the
    next 5 pixels, and by 0 beyond, as RELION's ``--zero_mask`` does. The background
    should have mean 0 before, see `Normalised`, or the circle leaves a visible edge.

    The mask reduces the noise's power in the spectrum to the fraction `noise_share`,
    and correlates its frequencies: the images hold as much information as before about
    what lies within the circle, and no more. A sum over frequencies that are treated as
    independent has the same amount of information if it uses the noise power within the
    circle, see `particles.Particles.noise_share`.

    Parameters
    ----------
    source
        Images of shape ``(P, m, m)``.
    diameter
        Diameter of the circle in pixels.
    centres
        Its centre in each image, (x, y) in pixels from the image's origin ``m // 2``.

    Raises
    ------
    InputError
        If the diameter is not positive, or if there is not one centre for each image.
    """

    source: ImageSource
    diameter: float
    centres: Float[np.ndarray, "_ 2"]

    def __post_init__(self):
        if not self.diameter > 0:
            raise InputError(f"diameter must be positive, got {self.diameter:g} pixels")
        if len(self.centres) != self.shape[0]:
            raise InputError(
                f"centres must hold one point for each of {self.shape[0]} images, got "
                f"{len(self.centres)}"
            )

    @property
    def noise_share(self) -> float:
        """Fraction of white noise's power that a circle at the origin leaves."""
        return float(np.mean(self._circle(np.zeros((1, 2))) ** 2))

    def __getitem__(self, indices: Any, /) -> Float32[np.ndarray, "batch m m"]:
        images = np.asarray(self.source[indices], np.float32)
        return images * self._circle(self.centres[indices]).astype(np.float32)

    def _circle(
        self, centres: Float[np.ndarray, "batch 2"]
    ) -> Float[np.ndarray, "batch m m"]:
        axis = np.arange(self.shape[-1]) - self.shape[-1] // 2
        x, y = (axis - centres[:, [i]] for i in range(2))
        radius = np.hypot(x[:, None], y[:, :, None])
        position_in_edge = np.clip((radius - self.diameter / 2) / _EDGE, 0, 1)
        return 0.5 + 0.5 * np.cos(np.pi * position_in_edge)


def unprepared(images: ImageSource) -> ImageSource:
    """Return the images before they are normalised and masked."""
    while isinstance(images, Normalised | Masked):
        images = images.source
    return images


def cleaned(
    images: ImageSource, hot: Bool[np.ndarray, " P"], limit: float
) -> ImageSource:
    """Return images whose hot pixels are replaced before anything else is done.

    Parameters
    ----------
    images
        Images, which may be normalised and masked.
    hot, limit
        See `Cleaned`.
    """
    if isinstance(images, Normalised | Masked):
        return replace(images, source=cleaned(images.source, hot, limit))
    return Cleaned(images, hot, limit)


@lru_cache(64)
def _interpolation(m: int, step: float) -> Float32[np.ndarray, "m m"]:
    return interpolation_matrix(m, m, step).astype(np.float32)


def outside(m: int, diameter: float) -> Bool[np.ndarray, "m m"]:
    """Return which pixels lie outside a circle around the origin ``m // 2``.

    Parameters
    ----------
    m
        Side of the images in pixels.
    diameter
        Diameter of the circle in pixels. A pixel on the circle is not outside.
    """
    axis = np.arange(m) - m // 2
    return axis[:, None] ** 2 + axis**2 > (diameter / 2) ** 2
