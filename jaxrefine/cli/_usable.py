"""Which particles of a table are used: all images are looked at first."""

import json
import sys
from dataclasses import dataclass, replace
from typing import Any, TypeVar, final

import jax
import numpy as np
from jaxtyping import Bool, Int

from jaxrefine import io
from jaxrefine._processes import text_of_first
from jaxrefine.cli._particles import check_sizes, circle_in_pixels, outside_images
from jaxrefine.cli.commands.shared import ImageSettings
from jaxrefine.data import outliers
from jaxrefine.data.particles import Particles
from jaxrefine.data.preprocess import cleaned, outside, unprepared
from jaxrefine.errors import InputError, some
from jaxrefine.geometry import Poses
from jaxrefine.runs.folder import NoFolder, RunFolder
from jaxrefine.runs.progress import Bars

_TOLD = 3  # images that are left out for one reason, and are named
_SMALLEST = 16  # pixels a side, of images that are compared with each other
# Standard deviations of images whose squares and sums single precision holds: results
# agree to four digits from 1e-10 to 1e10.
_SCALES = 1e-9, 1e9
_KEPT_AS = "images"  # what was found in them, in the report of a run

_Data = TypeVar("_Data", Particles, Poses)


@final
@dataclass(frozen=True)
class Usable:
    """Which particles of a table are used.

    Attributes
    ----------
    count
        Number of particles in the table.
    indices
        Where those that are used are in the table.
    hot
        Where those are whose image has hot pixels.
    hot_limit
        See `preprocess.Cleaned`.
    """

    count: int
    indices: Int[np.ndarray, " chosen"]
    hot: Int[np.ndarray, " hot"]
    hot_limit: float

    @property
    def left_out(self) -> Bool[np.ndarray, " particles"]:
        """Whether each particle of the table is left out."""
        return ~np.isin(np.arange(self.count), self.indices)

    def particles(self, given: Particles) -> Particles:
        """Return the particles that are used, without hot pixels."""
        if len(self.hot):
            hot = np.isin(np.arange(self.count), self.hot)
            given = replace(given, images=cleaned(given.images, hot, self.hot_limit))
        return self._of(given)

    def given(self, poses: Poses) -> Poses:
        """Return the poses that are used, of those of the table."""
        return self._of(poses)

    def _of(self, data: _Data) -> _Data:
        return data if len(self.indices) == self.count else data.take(self.indices)

    def of_table(self, values: Any, elsewhere: Any) -> np.ndarray:
        """Return values of the particles that are used, among those of all others.

        Parameters
        ----------
        values
            A value for each particle that is used.
        elsewhere
            The value of all others, or a value for each particle of the table.
        """
        values, elsewhere = np.asarray(values), np.asarray(elsewhere)
        shape = (self.count, *values.shape[1:])
        kind = np.result_type(values, elsewhere)
        everywhere = np.array(np.broadcast_to(elsewhere, shape), kind)
        everywhere[self.indices] = values
        return everywhere

    def poses(self, given: Poses, found: Poses) -> Poses:
        """Return poses that were found, among those given of what is left out."""
        if not self.left_out.any():
            return found
        rotations = self.of_table(found.rotations, given.rotations)
        return Poses(rotations, self.of_table(found.shifts, given.shifts))


@final
@dataclass(frozen=True)
class Findings:
    """What was found in the images of a table.

    Attributes
    ----------
    bad, unlike
        Why images cannot be used, and how others are unlike all others, by their place
        in the table.
    hot, hot_limit
        Which images have hot pixels, and how far from the median these are.
    """

    bad: dict[int, str]
    unlike: dict[int, str]
    hot: list[int]
    hot_limit: float

    def as_json(self) -> dict[str, Any]:
        """Return them as JSON can hold them."""
        words = {
            name: {str(place): reason for place, reason in reasons.items()}
            for name, reasons in (("bad", self.bad), ("unlike", self.unlike))
        }
        return {**words, "hot": self.hot, "hot_limit": self.hot_limit}

    @classmethod
    def of_json(cls, content: Any, count: int) -> "Findings | None":
        """Return findings in so many images from JSON; None if it holds something else.

        Parameters
        ----------
        content
            What `as_json` returned, or anything else.
        count
            Number of images.
        """
        try:
            bad, unlike = (
                {int(place): str(reason) for place, reason in content[name].items()}
                for name in ("bad", "unlike")
            )
            hot, limit = [int(each) for each in content["hot"]], content["hot_limit"]
            found = cls(bad, unlike, hot, float(limit))
        except (AttributeError, KeyError, TypeError, ValueError):
            return None
        places = [*bad, *unlike, *hot]
        return found if all(0 <= place < count for place in places) else None


def usable(
    source: io.ParticleFile,
    settings: ImageSettings,
    *,
    with_poses: bool,
    subsets: Int[np.ndarray, " particles"] | None = None,
    folder: RunFolder | NoFolder | None = None,
) -> Usable:
    """Look at all images; tell of those that are left out, and of hot pixels.

    Left out are images that are constant or not finite, or unlike all others (see
    `outliers.unlike_others`), and, where poses are used, particles whose given position
    is outside of their image.

    Parameters
    ----------
    source
        The particles, whose images are prepared.
    settings
        How they are prepared, and whether they are trusted to be like each other.
    with_poses
        Whether the poses of the particles are used.
    subsets
        The half set of each particle, if there are half sets.
    folder
        Of the run, which remembers what was found, so that a run that carries on does
        not read all images again.

    Raises
    ------
    InputError
        If images are not normalised, none can be used, or fewer than 4 of a half set.
    """
    count = len(source)
    # Process 0 looks at the images, and tells the others what it has found.
    words = ""
    if jax.process_index() == 0:
        found = None
        if folder is not None:
            found = Findings.of_json(folder.kept(_KEPT_AS), count)
        if found is None:
            found = _examine(source, settings)
            if folder is not None:
                folder.keep(_KEPT_AS, found.as_json())
        words = json.dumps(found.as_json())
    found = Findings.of_json(json.loads(text_of_first(words)), count)
    assert found is not None
    beyond, limit = outside_images(source)
    beyond &= with_poses
    left_out = beyond | np.isin(np.arange(count), [*found.bad, *found.unlike])
    sentences = []
    if found.bad:
        reasons = list(found.bad.values())
        told = some(reasons, 1 if left_out.all() else _TOLD, "; ")
        sentences.append(f"{len(reasons)} of {count} images cannot be used: {told}")
    if found.unlike:
        reasons = [f"{place + 1} {reason}" for place, reason in found.unlike.items()]
        sentences.append(
            f"{len(reasons)} of {count} images are unlike the others: number "
            f"{some(reasons, _TOLD, '; ')} (--trust-contrast keeps them)"
        )
    if beyond.any():
        sentences.append(
            f"{beyond.sum()} of {count} particles are outside of their images: they "
            f"{limit}"
        )
    if left_out.all():
        raise InputError(f"{source.path}: {sentences[0]}")
    for sentence in sentences:
        print(
            f"{source.path}: {sentence}; these particles are left out", file=sys.stderr
        )
    if found.hot:
        print(
            f"{source.path}: {len(found.hot)} of {count} images have hot pixels, the "
            f"first number {found.hot[0] + 1}; they are replaced by the median of "
            "their neighbours",
            file=sys.stderr,
        )
    if subsets is not None:
        check_sizes(source, subsets[~left_out], " that can be used")
    hot = np.array(found.hot, int)
    return Usable(count, np.flatnonzero(~left_out), hot, found.hot_limit)


def _examine(source: io.ParticleFile, settings: ImageSettings) -> Findings:
    """Read all images, and compare them with each other.

    Raises
    ------
    InputError
        If they are not normalised, or of a scale that single precision does not hold.
    """
    particles = source.particles
    raw, m = unprepared(particles.images), particles.image_size
    background = outside(m, circle_in_pixels(particles, settings))
    seen = outliers.Look.empty(len(particles))

    def visit(indices: np.ndarray, images: np.ndarray) -> None:
        if raw is not particles.images:
            images = raw[indices]
        seen.put(indices, outliers.look(images, background))

    with Bars() as bars:
        bad = particles.unusable(bars.watch, visit if m >= _SMALLEST else None)
    good = np.setdiff1d(np.arange(len(particles)), list(bad))
    found = Findings(bad, {}, [], np.inf)
    if m < _SMALLEST or not len(good):
        return found
    grey_scale = not (settings.normalise or settings.invert)
    scale = float(np.median(seen.spread[good]))
    if grey_scale and not _SCALES[0] <= scale <= _SCALES[1]:
        raise InputError(
            f"{source.path}: images must have a standard deviation from {_SCALES[0]:g} "
            f"to {_SCALES[1]:g}, got {scale:.2g}; --normalise makes it 1"
        )
    if settings.trust_contrast:
        return found
    limit = outliers.hot_limit(seen.take(good))
    hot = good[seen.peak[good] > limit]
    for index in hot:
        images = outliers.without_hot_pixels(raw[np.array([index])], limit)
        seen.put(np.array([index]), outliers.look(images, background))
    seen, group = seen.take(good), particles.group_of(good)
    reason = outliers.not_normalised(seen, group) if grey_scale else None
    if reason is not None:
        raise InputError(
            f"{source.path}: images must be normalised, but {reason}: --normalise, or "
            "--trust-contrast to take them as they are"
        )
    unlike = outliers.unlike_others(seen, group, grey_scale=grey_scale)
    reasons = {int(good[place]): words for place, words in unlike.items()}
    kept = [int(index) for index in hot if int(index) not in reasons]
    return Findings(bad, reasons, kept, limit)
