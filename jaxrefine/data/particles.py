"""Particle images with their optics, wherever the images are kept.

A run visits particles in batches. Images may be an array in memory, a memory-mapped
file, or anything else that can be asked for some of its images; nothing here reads more
than it was asked for.
"""

import math
from dataclasses import dataclass, replace
from typing import Any, Protocol, final, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float32, Int

from jaxrefine._types import Images
from jaxrefine.ctf import CTF
from jaxrefine.errors import InputError


@runtime_checkable
class ImageSource(Protocol):
    """What images may come from: NumPy and JAX arrays, memory maps, stacks of files."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Numbers of particles, rows and columns: ``(P, m, m)``."""
        ...

    def __getitem__(self, indices: Any, /) -> Any:
        """Return the images of an array of indices, as an array ``(len, m, m)``."""
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
        Their optics, with a leading axis ``P``; None if there is nothing to correct.
    pixel_size_in_angstroms
        One for all of them.
    group
        The group of each particle, counted from 0, such as its optics group: the noise
        has one power spectrum in each. None if all are in one.

    Raises
    ------
    InputError
        If there are no images, if they are not square, if the optics or the groups
        are not those of ``P`` particles.
    """

    images: ImageSource
    ctf: CTF | None = None
    pixel_size_in_angstroms: float = 1.0
    group: Int[np.ndarray, " P"] | None = None

    def __post_init__(self):
        shape = tuple(self.images.shape)
        if len(shape) != 3 or shape[1] != shape[2] or not shape[1]:
            text = " x ".join(map(str, shape))
            raise InputError(
                f"The images are an array of {text}; particles x m x m is wanted."
            )
        if not shape[0]:
            raise InputError("There are no particles.")
        if not 0 < self.pixel_size_in_angstroms < math.inf:
            raise InputError(
                f"The pixel size is {self.pixel_size_in_angstroms} A; a positive "
                "number is wanted."
            )
        if self.ctf is not None and self.ctf.defocus_u.shape != shape[:1]:
            raise InputError(
                f"The optics have the shape {self.ctf.defocus_u.shape} for "
                f"{shape[0]} images; one set for each image is wanted."
            )
        group = self.group
        if group is not None and (group.shape != shape[:1] or group.min() < 0):
            raise InputError(
                f"The groups have the shape {group.shape} and count from "
                f"{group.min(initial=0)} for {shape[0]} images; one for each image is "
                "wanted, from 0."
            )

    def __len__(self) -> int:
        return self.images.shape[0]

    @property
    def image_size(self) -> int:
        """Side of the images, in pixels."""
        return self.images.shape[1]

    @property
    def noise_share(self) -> float:
        """Share of the noise's power that is left in the spectra of the images.

        It is 1 unless the images come from a source that masks them with a circle and
        says so by an attribute of this name, as `preprocess.Masked` does. The noise of
        masked images is taken for what it is within the circle: its power in their
        spectra over this share.
        """
        return getattr(self.images, "noise_share", 1.0)

    @property
    def groups(self) -> int:
        """Number of groups, of which some may be empty."""
        return 1 if self.group is None else int(self.group.max()) + 1

    @property
    def box_in_angstroms(self) -> float:
        """Side of the images, in angstroms."""
        return self.image_size * self.pixel_size_in_angstroms

    def group_of(
        self, indices: Int[np.ndarray | jax.Array, " chosen"]
    ) -> Int[np.ndarray, " chosen"]:
        """Return the groups of some of the particles."""
        if self.group is None:
            return np.zeros(len(indices), int)
        return self.group[np.asarray(indices)]

    def take(self, indices: Int[np.ndarray | jax.Array, " chosen"]) -> "Particles":
        """Return some of the particles, in this order; no image is read.

        Raises
        ------
        InputError
            If no index is given, or one is not from 0 to ``P - 1``.
        """
        chosen = self._checked(indices)
        if isinstance(self.images, _Chosen):
            images = _Chosen(self.images.source, self.images.indices[chosen])
        else:
            images = _Chosen(self.images, chosen)
        group = None if self.group is None else self.group[chosen]
        return replace(self, images=images, ctf=self._optics(chosen), group=group)

    def batch(
        self, indices: Int[np.ndarray | jax.Array, " chosen"]
    ) -> tuple[Images, CTF | None]:
        """Read some of the images, and their optics, in single precision.

        Returns
        -------
        images
            Images of shape ``(len(indices), m, m)``, of type float32.
        ctf
            Their optics, of type float32; None if the particles have none.

        Raises
        ------
        InputError
            If an index is not from 0 to ``P - 1``, or an image is not finite; the
            message counts images from 0, in the data set that they were taken from.
        """
        chosen = self._checked(indices)
        values = np.asarray(self.images[chosen], np.float32)
        finite = np.isfinite(values).all(axis=(1, 2))
        if not finite.all():
            bad = int(chosen[np.argmin(finite)])
            if isinstance(self.images, _Chosen):
                bad = int(self.images.indices[bad])
            raise InputError(f"Image {bad} (from 0) holds a value that is not finite.")
        optics = jax.tree.map(lambda x: x.astype(jnp.float32), self._optics(chosen))
        return jnp.asarray(values), optics

    def _checked(self, indices) -> Int[np.ndarray, " chosen"]:
        chosen = np.asarray(indices)
        if chosen.size and not 0 <= chosen.min() <= chosen.max() < len(self):
            raise InputError(
                f"Particles {chosen.min()} to {chosen.max()} were asked for; there are "
                f"0 to {len(self) - 1}."
            )
        return chosen

    def _optics(self, chosen: Int[np.ndarray, " chosen"]) -> CTF | None:
        return jax.tree.map(lambda leaf: leaf[chosen], self.ctf)


@dataclass(frozen=True)
class _Chosen:
    """Some images of a source, which is asked for them when they are."""

    source: ImageSource
    indices: Int[np.ndarray, " chosen"]

    @property
    def shape(self) -> tuple[int, ...]:
        return (len(self.indices), *self.source.shape[1:])

    @property
    def noise_share(self) -> float:
        return getattr(self.source, "noise_share", 1.0)

    def __getitem__(
        self, indices: Int[np.ndarray, " some"]
    ) -> Float32[np.ndarray, "some m m"]:
        return np.asarray(self.source[self.indices[indices]], np.float32)
