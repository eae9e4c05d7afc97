"""Images that look unlike the others of their set, and hot pixels.

A few images with hot pixels, on carbon, cut off at the edge of a micrograph or of
another contrast spoil what is averaged over all of them: the noise, the scale and the
map. Each image is described by a few figures (`look`), and each figure is compared with
its median over the set (`unlike_others`). Medians are not moved by a few bad images;
and a figure that varies widely among all images, as all do where there is little noise,
tells nothing of a single one.
"""

from dataclasses import dataclass, fields
from typing import final

import numpy as np
from jaxtyping import Bool, Float, Int

# Fewest images whose medians are trusted.
_FEWEST = 16
# A pixel is hot if it is farther from its image's median than this many times the
# brightest pixel of the median image, in units of the image's 99th percentile: about 16
# standard deviations of white noise, which single pixels never reach.
_HOT = 4.0
_SAMPLE = 4096  # pixels of an image that percentiles are taken from, at least
_TILES = 4  # along each axis
_LEAST = 1e-4  # ratio of deviations that is as good as none
_TINY = float(np.finfo(np.float32).tiny)

# A figure is unlike the others if it is this many of their standard deviations from
# their median, and as far as the least distance below, at which an image does harm.
_SPREADS = 8.0
_DEVIATION_OF_MAD = 1.4826
_FACTOR = 3.0  # of ratios within an image
_SHARE = 0.05  # of its pixels

# RELION's limits of what is normalised (relion_refine 3.1): the background has a mean
# of at most 0.5 standard deviations, and a standard deviation from 1/2 to 2.
_NORMAL_MEAN, _NORMAL_FACTOR = 0.5, 2.0
# Share of images beyond each limit that is a property of the set, not of these images.
# The halos of an optics without noise reach beyond the mean's in some images.
_MOST, _MANY = 0.5, 0.1


@final
@dataclass(frozen=True)
class Look:
    """What images look like, an entry for each of them.

    Attributes
    ----------
    mean, deviation
        Of the background, the pixels outside of the particle.
    spread
        Standard deviation of all pixels about the background's mean.
    peak
        Largest distance of a pixel from the median, in units of the 99th percentile of
        such distances.
    unevenness
        Standard deviation of the means of tiles along the edge, in units of the median
        of the tiles' standard deviations.
    least, most
        Smallest and largest standard deviation of such a tile, in the same units.
    flat
        Share of pixels that are equal to their neighbour, or to the smallest or the
        largest one.
    """

    mean: Float[np.ndarray, " images"]
    deviation: Float[np.ndarray, " images"]
    spread: Float[np.ndarray, " images"]
    peak: Float[np.ndarray, " images"]
    unevenness: Float[np.ndarray, " images"]
    least: Float[np.ndarray, " images"]
    most: Float[np.ndarray, " images"]
    flat: Float[np.ndarray, " images"]

    def __len__(self) -> int:
        return len(self.mean)

    def put(self, indices: Int[np.ndarray, " chosen"], other: "Look") -> None:
        """Set the entries of the images at these indices."""
        for field in fields(self):
            getattr(self, field.name)[indices] = getattr(other, field.name)

    def take(self, indices: Int[np.ndarray, " chosen"]) -> "Look":
        """Return the entries of the images at these indices."""
        return Look(*(getattr(self, field.name)[indices] for field in fields(self)))

    @staticmethod
    def empty(count: int) -> "Look":
        """Return entries to be set."""
        return Look(*(np.zeros(count) for _ in fields(Look)))


def look(
    images: Float[np.ndarray, "batch m m"], background: Bool[np.ndarray, "m m"]
) -> Look:
    """Describe images, of at least 16 pixels a side.

    Parameters
    ----------
    images
        Images that are finite.
    background
        The pixels outside of the particle, see `preprocess.outside`.
    """
    # In units of the largest value squares neither overflow nor vanish.
    unit = np.abs(images).max(axis=(1, 2)).astype(np.float64)
    unit = np.where(unit > 0, unit, 1.0)
    values = (images / unit[:, None, None]).astype(np.float32)
    beside = values[:, background]
    mean = beside.mean(axis=1, dtype=np.float64)
    centred = values - mean[:, None, None].astype(np.float32)
    spread = np.sqrt(np.mean(centred**2, axis=(1, 2), dtype=np.float64))
    centre, percentile = _middle(values)
    distance = np.abs(values - centre).max(axis=(1, 2))
    peak = distance / np.maximum(percentile[:, 0, 0], _TINY)
    tile = values.shape[1] // _TILES
    cut = values[:, : _TILES * tile, : _TILES * tile]
    tiles = cut.reshape(-1, _TILES, tile, _TILES, tile)
    edge = np.ones((_TILES, _TILES), bool)
    edge[1:-1, 1:-1] = False
    means = tiles.mean(axis=(2, 4), dtype=np.float64)[:, edge]
    deviations = tiles.std(axis=(2, 4), dtype=np.float64)[:, edge]
    typical = np.maximum(np.median(deviations, axis=1), _TINY)
    low, high = (
        getattr(values, name)(axis=(1, 2), keepdims=True) for name in ("min", "max")
    )
    equal = [
        np.mean(each, axis=(1, 2))
        for each in (
            values[:, 1:] == values[:, :-1],
            values[:, :, 1:] == values[:, :, :-1],
            values == low,
            values == high,
        )
    ]
    return Look(
        mean * unit,
        beside.std(axis=1, dtype=np.float64) * unit,
        spread * unit,
        peak.astype(np.float64),
        means.std(axis=1) / typical,
        deviations.min(axis=1) / typical,
        deviations.max(axis=1) / typical,
        np.max(equal, axis=0),
    )


def hot_limit(seen: Look) -> float:
    """Return the largest `Look.peak` without hot pixels; infinite for few images.

    Parameters
    ----------
    seen
        What all images look like.
    """
    return _HOT * float(np.median(seen.peak)) if len(seen) >= _FEWEST else np.inf


def without_hot_pixels(
    images: Float[np.ndarray, "batch m m"], limit: float
) -> Float[np.ndarray, "batch m m"]:
    """Return images whose hot pixels are replaced by the median of their neighbours.

    Hot is a pixel whose distance from the image's median is more than `limit` times the
    99th percentile of such distances, and more than half of which is its distance from
    the median of its eight neighbours: the particle's brightest pixels have bright
    neighbours.

    Parameters
    ----------
    images
        Images.
    limit
        See `hot_limit`.
    """
    cleaned = np.array(images, np.float32)
    centre, percentile = _middle(cleaned)
    distance = np.abs(cleaned.astype(np.float64) - centre)
    around = np.pad(cleaned, ((0, 0), (1, 1), (1, 1)), mode="reflect")
    for i, y, x in np.argwhere(distance > limit * percentile):
        square = around[i, y : y + 3, x : x + 3].ravel()
        median = np.median(np.delete(square, 4))
        if abs(float(images[i, y, x]) - median) > 0.5 * distance[i, y, x]:
            cleaned[i, y, x] = median
    return cleaned


def _middle(
    images: Float[np.ndarray, "batch m m"],
) -> tuple[Float[np.ndarray, "batch 1 1"], Float[np.ndarray, "batch 1 1"]]:
    """Return the median, and the 99th percentile of distances from it."""
    stride = max(1, int(np.sqrt(images[0].size / _SAMPLE)))
    sample = images[:, ::stride, ::stride].reshape(len(images), -1)
    centre = np.median(sample, axis=1, keepdims=True)
    percentile = np.percentile(np.abs(sample - centre), 99, axis=1)
    return centre[:, :, None], percentile[:, None, None]


def unlike_others(
    seen: Look, group: Int[np.ndarray, " images"], *, grey_scale: bool = True
) -> dict[int, str]:
    """Return the images that look unlike the others of their group, and how.

    Parameters
    ----------
    seen
        What all images look like, without their hot pixels.
    group
        The group of each image, see `particles.Particles.group`. Groups of fewer than
        16 images have no images that are unlike the others.
    grey_scale
        Whether the images are used with the grey scale that they have: if they are
        normalised, mean and contrast may be any.

    Returns
    -------
    What is unlike the others, in words, by the indices of the images.
    """
    reasons: dict[int, str] = {}
    for number in np.unique(group):
        members = np.flatnonzero(group == number)
        if len(members) >= _FEWEST:
            for place, reason in _unlike(seen.take(members), grey_scale).items():
                reasons[int(members[place])] = reason
    return dict(sorted(reasons.items()))


def _unlike(seen: Look, grey_scale: bool) -> dict[int, str]:
    """Return the images of a group that are unlike the others."""
    unit = np.median(seen.spread)
    factor, contrast = np.log(_FACTOR), np.log(_NORMAL_FACTOR)
    mean = (seen.mean - np.median(seen.mean)) / np.maximum(unit, _TINY)
    figures = [
        (_logarithm(seen.unevenness), factor, +1, "is uneven along its edge"),
        (_logarithm(seen.least), factor, -1, "is empty in a part"),
        (_logarithm(seen.most), factor, +1, "is rougher in a part"),
        (seen.flat, _SHARE, +1, "repeats one value in many pixels"),
    ]
    if grey_scale:
        figures += [
            (_logarithm(seen.deviation), contrast, +1, "has too strong a background"),
            (_logarithm(seen.deviation), contrast, -1, "has too weak a background"),
            (_logarithm(seen.spread), contrast, +1, "has too much contrast"),
            (_logarithm(seen.spread), contrast, -1, "has too little contrast"),
            (mean, 1.0, +1, "has too bright a background"),
            (mean, 1.0, -1, "has too dark a background"),
        ]
    reasons: dict[int, str] = {}
    for values, least, sign, reason in figures:
        distance = sign * (values - np.median(values))
        deviation = _DEVIATION_OF_MAD * np.median(np.abs(distance))
        for place in np.flatnonzero(distance > max(_SPREADS * deviation, least)):
            reasons.setdefault(int(place), reason)
    return reasons


def _logarithm(values: Float[np.ndarray, " images"]) -> Float[np.ndarray, " images"]:
    """Return logarithms; those of values that are as good as zero are the same."""
    least = max(_LEAST * float(np.median(values)), _TINY)
    return np.log(np.maximum(values, least))


def not_normalised(seen: Look, group: Int[np.ndarray, " images"]) -> str | None:
    """Return in words why images are not normalised to their background.

    None is returned if they are, or if there are fewer than 16.

    The limits are RELION's, but what a standard deviation is compared with is the
    median of the image's group, since any common scale is as good as another. Standard
    deviations are those of the whole image, which the signal adds to, where there is
    more signal than noise. Single images beyond the limits are no reason.

    Parameters
    ----------
    seen
        What all images look like, without their hot pixels.
    group
        The group of each image.
    """
    if len(seen) < _FEWEST:
        return None
    shift = seen.mean / np.maximum(seen.spread, _TINY)
    if np.mean(np.abs(shift) > _NORMAL_MEAN) > _MOST:
        return (
            "their background has a mean of "
            f"{np.median(shift):.2g} standard deviations instead of 0"
        )
    factors = []
    for values in (seen.deviation, seen.spread):
        typical = np.zeros(len(seen))
        for number in np.unique(group):
            members = group == number
            typical[members] = np.median(values[members])
        factors.append(np.abs(_logarithm(values / np.maximum(typical, _TINY))))
    beyond = np.min(factors, axis=0) > np.log(_NORMAL_FACTOR)
    if np.mean(beyond) > _MANY:
        return (
            f"the standard deviation of the background of {beyond.sum()} is less than "
            "half or more than twice that of the median image"
        )
    return None
