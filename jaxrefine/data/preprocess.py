"""Images as they come: pixels, contrast, background, what lies beyond the particle.

Micrographs differ in thickness and dose, so particles are brought to one scale by their
background, the pixels outside of a circle, as RELION's preprocessing does. Protein is
to be bright.
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import Any, final

import numpy as np
from jaxtyping import Bool, Float, Float32

from jaxrefine.data.particles import ImageSource
from jaxrefine.errors import InputError
from jaxrefine.operators.resample import interpolation_matrix

_FEWEST = 16  # pixels that a background is measured from
_EDGE = 5.0  # pixels, as wide as RELION's
# Up to which particles of 3/4 of the box show once when resampled; and rounding.
LARGEST_STEP = 1.25 * (1 + 1e-9)


@final
@dataclass(frozen=True)
class Resampled:
    """Images of one side but several pixel sizes on the largest of these, when read.

    An image is the trigonometric polynomial through its pixels, without frequencies
    beyond the new Nyquist frequency, and goes on periodically where the new image sees
    beyond the old one: background there is as noisy as elsewhere, but repeats. Values
    are multiplied by the step, so that white noise keeps its variance: images that were
    normalised stay so. The origin stays the pixel ``m // 2``.

    Parameters
    ----------
    source
        Images of shape ``(P, m, m)``.
    step
        The new edge of a pixel over that of each image's own, 1 to 1.25. Images of
        step 1 stay as they are.

    Raises
    ------
    InputError
        If the steps are out of range, or not as many as the images.
    """

    source: ImageSource
    step: Float[np.ndarray, " P"]

    def __post_init__(self):
        count, least, most = len(self.step), self.step.min(), self.step.max()
        if count != self.shape[0]:
            raise InputError(
                f"{count} pixel sizes came with {self.shape[0]} images; one for each "
                "is wanted."
            )
        if not 1 <= least <= most <= LARGEST_STEP:
            raise InputError(
                f"Pixels were to grow by factors of {least:g} to {most:g}; 1 to "
                f"{LARGEST_STEP:g} is wanted."
            )

    @property
    def shape(self) -> tuple[int, ...]:
        """Numbers of particles, rows and columns."""
        return tuple(self.source.shape)

    @property
    def noise_share(self) -> float:
        """Share of the noise's power that the source's masks have left."""
        return getattr(self.source, "noise_share", 1.0)

    def __getitem__(self, indices: Any, /) -> Float32[np.ndarray, "some m m"]:
        images = np.array(self.source[indices], np.float32)
        steps, m = self.step[indices], self.shape[-1]
        for step in np.unique(steps[steps != 1]):
            along = _interpolation(m, float(step))
            chosen = steps == step
            images[chosen] = step * (along @ images[chosen] @ along.T)
        return images


@final
@dataclass(frozen=True)
class Normalised:
    """Images brought to a background of mean 0 and standard deviation 1, when read.

    An image source like any other, see `particles.ImageSource`; nothing is kept.

    Parameters
    ----------
    source
        Images of shape ``(P, m, m)``.
    diameter
        Of the circle around the image's origin ``m // 2``, pixels, outside of which
        there is background.
    invert
        Whether protein is dark in the images.

    Raises
    ------
    InputError
        If the circle leaves too few pixels; on reading, if an image is constant there.
    """

    source: ImageSource
    diameter: float
    invert: bool = False

    def __post_init__(self):
        m = self.shape[-1]
        left = int(np.sum(outside(m, self.diameter)))
        if not self.diameter > 0 or left < _FEWEST:
            raise InputError(
                f"A circle of {self.diameter:g} pixels leaves {left} pixels of images "
                f"of {m} x {m} as background; at least {_FEWEST} are wanted."
            )

    @property
    def shape(self) -> tuple[int, ...]:
        """Numbers of particles, rows and columns."""
        return tuple(self.source.shape)

    @property
    def noise_share(self) -> float:
        """Share of the noise's power that the source's masks have left."""
        return getattr(self.source, "noise_share", 1.0)

    def __getitem__(self, indices: Any, /) -> Float32[np.ndarray, "some m m"]:
        images = np.asarray(self.source[indices], np.float64)
        around = images[:, outside(self.shape[-1], self.diameter)]
        spread = around.std(axis=1)
        flat = np.flatnonzero(spread == 0)
        if len(flat):
            number = np.arange(self.shape[0])[indices][flat[0]]
            raise InputError(
                f"Image {number} (from 0) is constant outside of the particle; it has "
                "no background to be normalised by."
            )
        sign = -1.0 if self.invert else 1.0
        mean = around.mean(axis=1)[:, None, None]
        return ((images - mean) * (sign / spread)[:, None, None]).astype(np.float32)


@final
@dataclass(frozen=True)
class Masked:
    """Images that fall to 0 outside of a circle about the particle, when read.

    A pixel is multiplied by 1 within the circle, by a cosine that falls to 0 over the
    next 5 pixels, and by 0 beyond: RELION's ``--zero_mask``. The background wants to be
    0 on average before, see `Normalised`, or the circle's edge shows.

    The noise is no longer the same everywhere. Its power in the spectrum falls to
    `noise_share`, but its frequencies are correlated: the images tell as much about
    what lies within the circle as before, and no more. That is what a sum over
    independent frequencies says too, if it takes the noise for what it is within the
    circle, see `particles.Particles`.

    Parameters
    ----------
    source
        Images of shape ``(P, m, m)``.
    diameter
        Of the circle, pixels.
    centres
        Its centre in each image, (x, y) in pixels from the image's origin ``m // 2``.

    Raises
    ------
    InputError
        If the diameter is not positive, or the centres are not as many as the images.
    """

    source: ImageSource
    diameter: float
    centres: Float[np.ndarray, "_ 2"]

    def __post_init__(self):
        if not self.diameter > 0:
            raise InputError(
                f"A circle of {self.diameter:g} pixels was to be kept of the images; "
                "a positive diameter is wanted."
            )
        if len(self.centres) != self.shape[0]:
            raise InputError(
                f"{len(self.centres)} centres came with {self.shape[0]} images; one "
                "for each is wanted."
            )

    @property
    def shape(self) -> tuple[int, ...]:
        """Numbers of particles, rows and columns."""
        return tuple(self.source.shape)

    @property
    def noise_share(self) -> float:
        """Share of white noise's power that is left by a circle in the middle."""
        return float(np.mean(self._circle(np.zeros((1, 2))) ** 2))

    def __getitem__(self, indices: Any, /) -> Float32[np.ndarray, "some m m"]:
        images = np.asarray(self.source[indices], np.float32)
        return images * self._circle(self.centres[indices]).astype(np.float32)

    def _circle(
        self, centres: Float[np.ndarray, "some 2"]
    ) -> Float[np.ndarray, "some m m"]:
        axis = np.arange(self.shape[-1]) - self.shape[-1] // 2
        x, y = (axis - centres[:, [i]] for i in range(2))
        radius = np.hypot(x[:, None], y[:, :, None])
        place = np.clip((radius - self.diameter / 2) / _EDGE, 0, 1)
        return 0.5 + 0.5 * np.cos(np.pi * place)


@lru_cache(64)
def _interpolation(m: int, step: float) -> Float32[np.ndarray, "m m"]:
    return interpolation_matrix(m, m, step).astype(np.float32)


def outside(m: int, diameter: float) -> Bool[np.ndarray, "m m"]:
    """Return the pixels outside of a circle around the origin ``m // 2``.

    Parameters
    ----------
    m
        Side of the images.
    diameter
        Of the circle, pixels; those on it are not outside.
    """
    axis = np.arange(m) - m // 2
    return axis[:, None] ** 2 + axis**2 > (diameter / 2) ** 2
