"""Sets of particles that are refined independently: all of them, or two half sets."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, final

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PRNGKeyArray, PyTree

from jaxrefine._arrays import on_device
from jaxrefine._types import Volume
from jaxrefine._watch import Watch, unwatched
from jaxrefine.data.particles import Particles
from jaxrefine.errors import InputError
from jaxrefine.geometry import Poses
from jaxrefine.maps.fsc import crossing
from jaxrefine.maps.mask import AutomaticMask, check_mask
from jaxrefine.operators.gridding import Insertion, default_insertion
from jaxrefine.poses.prior import Prior, priors_about
from jaxrefine.refinement.config import RefineConfig

FEWEST = 4
"""Least number of particles of a set: two for each fold."""

_UNIT = 1e-3  # how far R R^T may be from 1: rounding of files, and no more


@final
@dataclass(frozen=True)
class ParticleSet:
    """Particles that are refined independently of all others, and how.

    Attributes
    ----------
    indices
        Where the particles of this set are among all of the refinement.
    particles, prior
        The particles, and what is known of their poses.
    fold
        The fold of each particle, 0 or 1.
    config
        Parameters.
    mask
        What a map is multiplied by before the particles are compared with it, or a
        request to make it of each map; None if they are compared with all of it.
    watch
        Told how far each stage of a computation is.
    """

    indices: Int[np.ndarray, " particles"]
    particles: Particles
    prior: Prior
    fold: Int[np.ndarray, " particles"]
    config: RefineConfig
    mask: Volume | AutomaticMask | None = None
    watch: Watch = unwatched

    def masked(self, volume: Volume, fold_fsc: Float[Array, "shells"]) -> Volume:
        """Return the part of a map that the particles are compared with.

        Parameters
        ----------
        volume
            The map.
        fold_fsc
            Correlation of the folds' maps, whose fall to ``Tuning.supported_fsc`` is
            the resolution that an automatic mask is made for.
        """
        if self.mask is None:
            return volume
        if not isinstance(self.mask, AutomaticMask):
            return volume * self.mask
        shell = float(crossing(fold_fsc, self.config.tuning.supported_fsc))
        resolution = self.particles.box_in_angstroms / max(shell, 1.0)
        voxel = self.particles.pixel_size_in_angstroms
        return volume * self.mask.of(volume, voxel, resolution)

    def __len__(self) -> int:
        return len(self.particles)

    @property
    def last_shell(self) -> int:
        """The largest band limit, cycles per box."""
        return (self.particles.image_size - 1) // 2

    @property
    def insertion(self) -> Insertion:
        """How slices are inserted."""
        insertion = self.config.insertion
        return default_insertion() if insertion is None else insertion

    def of_fold(self, fold: int) -> Int[np.ndarray, " chosen"]:
        """Return where the particles of a fold are in this set."""
        return np.flatnonzero(self.fold == fold)


def make_particle_set(
    particles: Particles,
    poses: Poses,
    key: PRNGKeyArray,
    config: RefineConfig,
    mask: Volume | AutomaticMask | None = None,
    indices: Int[np.ndarray, " chosen"] | None = None,
    watch: Watch = unwatched,
) -> ParticleSet:
    """Deal particles into two folds, with priors about their poses.

    Parameters
    ----------
    particles, poses
        All particles, and their given poses. Those of a cluster (`Particles.cluster`)
        are dealt into one fold, unless the set `is_dominated` by one of them. Its
        particles are then dealt singly: folds only choose the regulariser's weight,
        and keep the noise of a particle out of the map that it is compared with.
    key
        Deals the particles of the set.
    config, mask, watch
        See `ParticleSet`.
    indices
        The particles of the set; None for all.
    """
    if indices is None:
        indices = np.arange(len(particles))
    particles = particles.take(indices)
    # Chosen on the host: JAX would compile programs for it.
    poses = jax.tree.map(lambda leaf: on_device(np.asarray(leaf)[indices]), poses)
    prior = priors_about(
        poses,
        config.angle_spread,
        config.shift_spread,
        config.max_angle,
        config.max_shift,
        config.copies,
    )
    cluster = None if is_dominated(particles.cluster) else particles.cluster
    fold = _dealt(len(particles), cluster, key)
    return ParticleSet(indices, particles, prior, fold, config, mask, watch)


def divide(
    particles: Particles,
    poses: Poses,
    config: RefineConfig,
    key: PRNGKeyArray,
    subsets: Int[np.ndarray, " particles"] | None,
    mask: Float[Array, "_ _ _"] | AutomaticMask | None = None,
    watch: Watch = unwatched,
) -> tuple[PRNGKeyArray, list[ParticleSet]]:
    """Deal the particles into sets and folds.

    Parameters
    ----------
    particles, poses
        All particles, and their given poses.
    config
        Parameters, which say whether there are half sets.
    key
        Deals the particles.
    subsets
        With half sets, the set of each particle, 1 or 2; dealt at random without it.
    mask
        From 0 in the solvent to 1, of the map's side ``n``, or a request to make masks.
    watch
        Told how far each stage of a computation is.

    Returns
    -------
    A key for the search, and the sets: one, or two half sets.

    Raises
    ------
    InputError
        If the mask is not of the map's side or not from 0 to 1, or if `halves` refuses
        the subsets.
    """
    dealing, fold, draw = jax.random.split(key, 3)
    if mask is not None and not isinstance(mask, AutomaticMask):
        mask = _checked_mask(mask, particles.image_size)
    indices_of_sets = [np.arange(len(particles))]
    if config.half_sets:
        indices_of_sets = halves(particles, dealing, subsets)
    particle_sets = [
        make_particle_set(particles, poses, fold, config, mask, indices, watch)
        for indices in indices_of_sets
    ]
    return draw, particle_sets


def deal(particles: Particles, key: PRNGKeyArray) -> Int[np.ndarray, " particles"]:
    """Deal particles into two halves, 1 and 2, at random; a cluster into one of them.

    The halves are as large as each other as far as clusters allow: those of a single
    cluster are all particles and none.
    """
    return 1 + _dealt(len(particles), particles.cluster, key)


def _dealt(
    count: int, cluster: Int[np.ndarray, " particles"] | None, key: PRNGKeyArray
) -> Int[np.ndarray, " particles"]:
    """Deal particles into two parts, 0 and 1, at random; a cluster into one of them.

    Larger clusters come first, those of about one size in a random order, and each goes
    into the part that has fewer particles. Without clusters the parts take turns.
    """
    member, sizes = np.arange(count), np.ones(count, int)
    if cluster is not None:
        _, first, member, sizes = np.unique(
            cluster, return_index=True, return_inverse=True, return_counts=True
        )
        # Clusters are numbered as they appear, so that repeated rows change nothing.
        appearance = np.argsort(first)
        member, sizes = np.argsort(appearance)[member], sizes[appearance]
    order = np.asarray(jax.random.permutation(key, len(sizes)))
    # Sizes from one power of two to the next count as one: if no two of them did, size
    # would decide alone, and every key would deal the same.
    _, magnitude = np.frexp(sizes[order])
    order = order[np.argsort(-magnitude, stable=True)]
    part, filled = np.empty(len(sizes), int), [0, 0]
    for i, size in zip(order.tolist(), sizes[order].tolist(), strict=True):
        part[i] = int(filled[1] < filled[0])
        filled[part[i]] += size
    return part[member]


def is_dominated(cluster: Int[np.ndarray, " particles"] | None) -> bool:
    """Return whether one cluster has more than two thirds of the particles.

    Two folds that keep it together would be too unequal.
    """
    if cluster is None:
        return False
    _, sizes = np.unique(cluster, return_counts=True)
    return bool(3 * sizes.max() > 2 * sizes.sum())


def divided(
    subsets: Int[np.ndarray, " particles"], cluster: Int[np.ndarray, " particles"]
) -> int:
    """Return how many clusters have particles in both halves.

    Parameters
    ----------
    subsets
        The half of each particle, 1 or 2.
    cluster
        The cluster of each particle.
    """
    of_both = [np.unique(cluster[subsets == half]) for half in (1, 2)]
    return len(np.intersect1d(*of_both, assume_unique=True))


def in_order(parts: Sequence[PyTree], places: Sequence[Int[np.ndarray, " _"]]) -> Any:
    """Return what is known of the parts of a set, brought into the order of the whole.

    Parameters
    ----------
    parts
        Of each part a pytree of arrays, whose rows are its particles.
    places
        Where the particles of each part are in the whole; together they are all.
    """
    back = np.argsort(np.concatenate(places))
    return jax.tree.map(lambda *leaves: np.concatenate(leaves)[back], *parts)


def halves(
    particles: Particles,
    key: PRNGKeyArray,
    subsets: Int[np.ndarray, " particles"] | None,
) -> list[Int[np.ndarray, " _"]]:
    """Return the indices of the particles of either half: as given, or at random.

    Parameters
    ----------
    particles
        The particles.
    key
        Deals them, if they are not given.
    subsets
        The half of each particle, 1 or 2, or None. Halves that are given are kept,
        even if they divide clusters; see `divided`.

    Raises
    ------
    InputError
        If there is not a 1 or a 2 for each particle, or if one half has fewer than 4,
        as halves that are dealt may have if most particles are of one cluster.
    """
    count, cause = len(particles), ""
    if subsets is None:
        subsets = deal(particles, key)
        if particles.cluster is not None:
            cause = ", as the particles of a cluster are kept together"
    elif subsets.shape != (count,) or set(np.unique(subsets)) != {1, 2}:
        raise InputError(
            f"subsets must be 1 or 2 for each of {count} particles, and not all the "
            f"same, got {sorted(set(subsets.tolist()))[:5]} for {len(subsets)}"
        )
    first, second = np.flatnonzero(subsets == 1), np.flatnonzero(subsets == 2)
    if min(len(first), len(second)) < FEWEST:
        raise InputError(
            f"each half set must have at least {FEWEST} particles, got {len(first)} "
            f"and {len(second)}{cause}"
        )
    return [first, second]


def checked(particles: Particles, poses: Poses, volume: Volume) -> tuple[Poses, Volume]:
    """Return poses and map in single precision; refuse what does not fit.

    Parameters
    ----------
    particles, poses
        Images of side ``n``, 16 or more, and as many poses, radians and pixels.
    volume
        The map, of shape ``(n, n, n)``.

    Raises
    ------
    InputError
        If there are fewer than 4 particles, images are too small, or images, poses and
        map do not fit each other, poses or map are not finite, shifts are of more than
        half of the image, or rotations are not rotation matrices.
    """
    count, n = len(particles), particles.image_size
    if count < FEWEST:
        raise InputError(f"there must be at least {FEWEST} particles, got {count}")
    if n < 16:
        raise InputError(f"images must have a side of at least 16 pixels, got {n}")
    if poses.rotations.shape != (count, 3, 3) or poses.shifts.shape != (count, 2):
        raise InputError(
            f"poses of {count} images must have rotations of shape ({count}, 3, 3) and "
            f"shifts of shape ({count}, 2), got {poses.rotations.shape} and "
            f"{poses.shifts.shape}"
        )
    if volume.shape != (n, n, n):
        raise InputError(
            f"the map of images of side {n} must have the shape {(n,) * 3}, got "
            f"{volume.shape}"
        )
    for name, array in (
        ("rotations", poses.rotations),
        ("shifts", poses.shifts),
        ("the map's values", volume),
    ):
        bad = int(np.sum(~np.isfinite(np.asarray(array))))
        if bad:
            raise InputError(f"{name} must be finite, got {bad} that are not")
    offset = np.abs(np.asarray(poses.shifts)).max(axis=1)
    if (offset > n / 2).any():
        raise InputError(
            f"shifts must be at most {n / 2:g} pixels along x and y, within the "
            f"image, got {(offset > n / 2).sum()} that are not, the first "
            f"{offset[offset > n / 2][0]:g} for particle {np.argmax(offset > n / 2)} "
            "(from 0)"
        )
    rotations = np.asarray(poses.rotations, np.float64)
    gram = rotations @ rotations.swapaxes(1, 2)
    improper = (np.abs(gram - np.eye(3)).max(axis=(1, 2)) > _UNIT) | (
        np.linalg.det(rotations) < 0
    )
    if improper.any():
        raise InputError(
            "rotations must be orthogonal matrices of determinant 1, got "
            f"{improper.sum()} that are not, the first for particle "
            f"{np.argmax(improper)} (from 0)"
        )
    poses = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), poses)
    return poses, jnp.asarray(volume, jnp.float32)


def _checked_mask(mask: Float[Array, "_ _ _"], n: int) -> Volume:
    """Return a mask in single precision; refuse what does not fit."""
    if mask.shape != (n, n, n):
        raise InputError(
            f"the mask of images of side {n} must have the shape {(n,) * 3}, got "
            f"{mask.shape}"
        )
    check_mask(mask)
    return jnp.asarray(mask, jnp.float32)
