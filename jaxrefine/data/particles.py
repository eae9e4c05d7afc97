"""Particle images with their optics, wherever the images are kept.

A run visits particles in batches. Images may be an array in memory, a memory-mapped
file, or any other object from which a subset of images can be read; nothing here reads
more images than were requested.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Protocol, final, runtime_checkable

import jax
import numpy as np
from jaxtyping import Float32, Int

from jaxrefine._arrays import on_device
from jaxrefine._types import Images
from jaxrefine._watch import Stage, Watch, unwatched
from jaxrefine.aberrations import Aberrations
from jaxrefine.ctf import CTF
from jaxrefine.errors import InputError, UnusableImage

_AT_ONCE = 64  # images in memory while all are looked at


@runtime_checkable
class ImageSource(Protocol):
    """A source of images: NumPy and JAX arrays, memory maps, stacks of files.

    It may be read from two threads at the same time.
    """

    @property
    def shape(self) -> tuple[int, ...]:
        """Number of particles, rows and columns: ``(P, m, m)``."""
        ...

    def __getitem__(self, indices: Any, /) -> Any:
        """Return the images at an array of indices, ``(len(indices), m, m)``.

        May raise `UnusableImage` for one of them, which can then be left out.
        """
        ...


@final
@dataclass(frozen=True)
class Particles:
    """Square images of particles, each with its contrast-transfer function.

    Parameters
    ----------
    images
        Images of shape ``(P, m, m)``, indexed ``[particle, y, x]``.
    ctf
        Optics of the particles, with a leading axis ``P``; None if there is no CTF to
        correct for.
    pixel_size_in_angstroms
        Edge of a pixel, the same for all images. It must be given with a ``ctf``; by
        default it is 1, so that angstroms are pixels.
    group
        Group of each particle, such as its optics group, counted from 0. The noise has
        one power spectrum in each group. None puts all particles into one group.
    cluster
        A whole number for each particle, the same for particles that are not
        independent of each other, such as copies of one image and overlapping segments
        of one helical tube. They are dealt together into one half set and one fold:
        noise that two maps share would be taken for their agreement. None if each
        particle is independent of all others.
    aberrations
        The aberrations of each ``group``; None if there are none.

    Raises
    ------
    InputError
        If there are no images, if they are not square, if the pixel size is not
        positive, or not given though there is a CTF or an aberration, or if the optics,
        the groups or the clusters do not belong to ``P`` particles, or if a group has
        no aberrations where others have.
    """

    images: ImageSource
    ctf: CTF | None = None
    pixel_size_in_angstroms: float = None  # pyright: ignore[reportAssignmentType]
    group: Int[np.ndarray, " P"] | None = None
    cluster: Int[np.ndarray, " P"] | None = None
    aberrations: Aberrations | None = None

    def __post_init__(self):
        shape = tuple(self.images.shape)
        if len(shape) != 3 or shape[1] != shape[2] or not shape[1]:
            text = " x ".join(map(str, shape))
            raise InputError(
                f"images must be an array of particles x m x m, got {text}"
            )
        if not shape[0]:
            raise InputError("images must hold at least one particle, got none")
        if self.pixel_size_in_angstroms is None:
            for optics, words in (
                (self.ctf, "a ctf"),
                (self.aberrations, "aberrations"),
            ):
                if optics is not None:
                    raise InputError(
                        f"pixel_size_in_angstroms must be given with {words}, got none"
                    )
            # Nothing but a CTF depends on it: it is a number from here on.
            object.__setattr__(self, "pixel_size_in_angstroms", 1.0)
        if not 0 < self.pixel_size_in_angstroms < math.inf:
            raise InputError(
                "pixel_size_in_angstroms must be positive, got "
                f"{self.pixel_size_in_angstroms}"
            )
        if self.ctf is not None and self.ctf.defocus_u.shape != shape[:1]:
            raise InputError(
                f"ctf must hold one value for each of {shape[0]} images, got the shape "
                f"{self.ctf.defocus_u.shape}"
            )
        group = self.group
        if group is not None and (group.shape != shape[:1] or group.min() < 0):
            raise InputError(
                f"group must hold a number from 0 for each of {shape[0]} images, got "
                f"the shape {group.shape} and a minimum of {group.min(initial=0)}"
            )
        if self.aberrations is not None and self.aberrations.groups < self.groups:
            raise InputError(
                f"aberrations must be those of {self.groups} groups, got those of "
                f"{self.aberrations.groups}"
            )
        if self.cluster is not None and self.cluster.shape != shape[:1]:
            raise InputError(
                f"cluster must hold a number for each of {shape[0]} images, got the "
                f"shape {self.cluster.shape}"
            )

    def __len__(self) -> int:
        return self.images.shape[0]

    @property
    def image_size(self) -> int:
        """Side of the images, in pixels."""
        return self.images.shape[1]

    @property
    def noise_share(self) -> float:
        """Fraction of the noise's power that remains in the spectra of the images.

        It is 1 unless the source of the images masks them with a circle and has an
        attribute of this name, as `preprocess.Masked` has. The noise power within the
        circle is the power in the spectra of the masked images divided by this
        fraction.
        """
        return getattr(self.images, "noise_share", 1.0)

    @property
    def groups(self) -> int:
        """Number of groups, some of which may be empty."""
        return 1 if self.group is None else int(self.group.max()) + 1

    @property
    def box_in_angstroms(self) -> float:
        """Side of the images, in angstroms."""
        return self.image_size * self.pixel_size_in_angstroms

    def group_of(
        self, indices: Int[np.ndarray | jax.Array, " chosen"]
    ) -> Int[np.ndarray, " chosen"]:
        """Return the groups of the particles at the given indices."""
        if self.group is None:
            return np.zeros(len(indices), int)
        return self.group[np.asarray(indices)]

    def take(self, indices: Int[np.ndarray | jax.Array, " chosen"]) -> "Particles":
        """Return the particles at the given indices, in their order, without reading.

        Raises
        ------
        InputError
            If `indices` is empty, or an index is not from 0 to ``P - 1``.
        """
        chosen = self._checked(indices)
        if isinstance(self.images, _Chosen):
            images = _Chosen(self.images.source, self.images.indices[chosen])
        else:
            images = _Chosen(self.images, chosen)
        group = None if self.group is None else self.group[chosen]
        cluster = None if self.cluster is None else self.cluster[chosen]
        return replace(
            self,
            images=images,
            ctf=self._optics(chosen),
            group=group,
            cluster=cluster,
        )

    def batch(
        self, indices: Int[np.ndarray | jax.Array, " chosen"]
    ) -> tuple[Images, CTF | None]:
        """Read the images at the given indices, and their optics, in single precision.

        Returns
        -------
        images
            Images of shape ``(len(indices), m, m)``, of type float32.
        ctf
            Their optics, of type float32; None if the particles have none.

        Raises
        ------
        InputError
            If an index is not from 0 to ``P - 1``, or an image is not finite. The
            message gives the index of the image in the original data set.
        """
        chosen = self._checked(indices)
        values = self._read(chosen)
        optics = jax.tree.map(
            lambda x: on_device(x.astype(np.float32)), self._optics(chosen)
        )
        return on_device(values), optics

    def unusable(
        self,
        watch: Watch = unwatched,
        visit: Callable[[np.ndarray, np.ndarray], None] | None = None,
    ) -> dict[int, str]:
        """Read all images; return which of them cannot be used, and why.

        Parameters
        ----------
        watch
            Told how many images have been read.
        visit
            Given the indices of images that can be used, and these images, in turn.

        Returns
        -------
        For the index of each image that `batch` refuses, or its source, the sentence
        with which it does. `take` leaves such images out.

        Raises
        ------
        InputError
            If the images cannot be read, which says nothing of the images.
        """
        reasons: dict[int, str] = {}
        stage = Stage(watch, "images", len(self))
        for chosen in np.array_split(
            np.arange(len(self)), math.ceil(len(self) / _AT_ONCE)
        ):
            good = chosen
            try:
                images = self._read(chosen)
            except UnusableImage:
                for index in chosen.tolist():
                    try:
                        self._read(np.array([index]))
                    except UnusableImage as error:
                        reasons[index] = str(error)
                good = np.array([i for i in chosen.tolist() if i not in reasons], int)
                images = self._read(good) if len(good) else None
            if visit is not None and images is not None:
                visit(good, images)
            stage.advance(len(chosen))
        return reasons

    def _read(self, chosen: Int[np.ndarray, " chosen"]) -> Float32[np.ndarray, "_ m m"]:
        """Read images; raise if one is not finite."""
        values = np.asarray(self.images[chosen], np.float32)
        finite = np.isfinite(values).all(axis=(1, 2))
        if not finite.all():
            bad = int(chosen[np.argmin(finite)])
            if isinstance(self.images, _Chosen):
                bad = int(self.images.indices[bad])
            raise UnusableImage(
                f"image {bad} (from 0) must be finite, got a value that is not"
            )
        return values

    def _checked(self, indices) -> Int[np.ndarray, " chosen"]:
        chosen = np.asarray(indices)
        if chosen.size and not 0 <= chosen.min() <= chosen.max() < len(self):
            raise InputError(
                f"indices must be from 0 to {len(self) - 1}, got {chosen.min()} to "
                f"{chosen.max()}"
            )
        return chosen

    def _optics(self, chosen: Int[np.ndarray, " chosen"]) -> CTF | None:
        # Chosen on the host: JAX would compile programs for each number of them.
        return jax.tree.map(lambda leaf: np.asarray(leaf)[chosen], self.ctf)


@dataclass(frozen=True)
class _Chosen:
    """A selection of a source's images, which are read on demand."""

    source: ImageSource
    indices: Int[np.ndarray, " chosen"]

    @property
    def shape(self) -> tuple[int, ...]:
        return (len(self.indices), *self.source.shape[1:])

    @property
    def noise_share(self) -> float:
        return getattr(self.source, "noise_share", 1.0)

    def __getitem__(
        self, indices: Int[np.ndarray, " batch"]
    ) -> Float32[np.ndarray, "batch m m"]:
        return np.asarray(self.source[self.indices[indices]], np.float32)


def evenly_spaced(count: int, most: int) -> Int[np.ndarray, " chosen"]:
    """Return which of so many particles to look at: all, or ``most``, evenly spaced."""
    return np.linspace(0, count - 1, min(count, most)).astype(int)
