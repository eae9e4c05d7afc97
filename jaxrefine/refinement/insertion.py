r"""The sums over images that maps are made from, on all devices.

The hypotheses of each fold wait in a queue, which is cut into eight lanes. A lane is
summed up batch by batch, and the lanes in their order. Therefore the sums have the same
bits on 1, 2, 4, 8 or 16 devices: they take the lanes of both folds.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import zip_longest
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from jaxrefine._batching import side_by_side
from jaxrefine._types import Images
from jaxrefine._watch import Stage
from jaxrefine.ctf import CTF
from jaxrefine.data import observation
from jaxrefine.data.observation import View
from jaxrefine.geometry import Poses
from jaxrefine.maps.folds import FOLDS
from jaxrefine.maps.sums import Sums, insert
from jaxrefine.operators.gridding import Insertion
from jaxrefine.poses.hypotheses import Hypotheses
from jaxrefine.refinement.sets import ParticleSet

_HIGHEST = jax.lax.Precision.HIGHEST
# Batches are multiples of this, so that few programs are compiled.
_ROUND = 512
_LANES = 8

_Queue = tuple[Int[np.ndarray, "_"], Int[np.ndarray, "_"]]
"""The owners of hypotheses that are to be inserted, and their places among its."""
_NOTHING: _Queue = (np.zeros(0, int), np.zeros(0, int))


@eqx.filter_jit
def _insert(
    mesh: Mesh,
    totals: Sums,
    insertion: Insertion,
    view: View,
    batch: tuple[Images, CTF | None, Array, Array, Array, Array],
    operators: Float[Array, "order 3 3"],
    side: int,
) -> Sums:
    """Add images to a sum of each device, at all poses that symmetry makes equivalent.

    The sums of the devices follow each other on the first axis.
    """

    def on_device(totals, view, operators, batch):
        images, ctf, group, rotations, shifts, weights = batch
        turned = jnp.einsum("pij,sjk->psik", rotations, operators, precision=_HIGHEST)
        (spectra, transfer, magnification), shifts, weights = jax.tree.map(
            lambda leaf: jnp.repeat(leaf, len(operators), axis=0),
            (view.seen(images, ctf, group), shifts, weights),
        )
        sums = insert(
            insertion,
            view.disc,
            spectra,
            Poses(turned.reshape(-1, 3, 3), shifts),
            transfer,
            weights[:, None] * view.inverse_noise[None],
            side,
            magnification,
        )
        return totals + sums

    apart, everywhere = PartitionSpec("devices"), PartitionSpec()
    return jax.shard_map(
        on_device,
        mesh=mesh,
        in_specs=(apart, everywhere, everywhere, apart),
        out_specs=apart,
        check_vma=False,
    )(totals, view, operators, batch)


def sum_up(
    particle_set: ParticleSet,
    hypotheses: Hypotheses,
    noise: Float[Array, "*groups shells"],
    included: Bool[np.ndarray, " particles"],
    side: int | None = None,
) -> list[Sums]:
    """Return weighted sums over the images of each fold, at all their hypotheses.

    A hypothesis is inserted once for each operator of the symmetry.

    Parameters
    ----------
    particle_set, hypotheses
        The particles, and their poses with weights.
    noise
        Power of the noise by shell, of each group or one for all.
    included
        Which particles to sum up.
    side
        Side of the maps to be made: by default that of the images; a smaller one leaves
        out the frequencies of half this side and more.

    Returns
    -------
    The sums of each fold's own images.
    """
    particles, config = particle_set.particles, particle_set.config
    n = particles.image_size if side is None else side
    view = observation.view(particles, (n - 1) // 2, noise)
    weights = np.asarray(hypotheses.weights) * included[:, None]
    weights = np.where(weights > config.tuning.negligible, weights, 0.0)
    queues = []
    for fold in range(FOLDS):
        members = particle_set.of_fold(fold)
        rows, columns = np.nonzero(weights[members])
        queues.append((members[rows], columns))
    # Enough slices at a time to outweigh the FFT of the kernel's grid.
    size = max(_ROUND, n**3 * 2 // len(view.disc.shells))
    size = max(1, size // len(config.operators))
    longest = max(len(owners) for owners, _ in queues)
    size = min(max(1, -(-longest // _ROUND)) * _ROUND, size)
    insertion = _Insertion(
        particle_set,
        view,
        np.asarray(hypotheses.rotations),
        np.asarray(hypotheses.shifts),
        weights.astype(noise.dtype),
        size,
        n,
        Stage(particle_set.watch, "sums", sum(len(owners) for owners, _ in queues)),
    )
    devices = jax.devices()[: insertion_devices(jax.device_count())]
    if len(devices) >= FOLDS:
        return insertion.sums(queues, devices)
    # One device works on both folds, where two threads are faster than one.
    each = [partial(insertion.sums, [queue], devices) for queue in queues]
    return [sums for (sums,) in side_by_side(each)]


def insertion_devices(devices: int) -> int:
    """Return how many of the devices insert images: a power of two, at most 16."""
    return 2 ** int(math.log2(min(devices, FOLDS * _LANES)))


@dataclass(frozen=True)
class _Insertion:
    """What is inserted, and how.

    Attributes
    ----------
    particle_set, view
        The particles, and how they are seen.
    rotations, shifts, weights
        The hypotheses of every particle.
    size
        Number of images that a device inserts at a time.
    side
        Side of the maps.
    stage
        Told how many hypotheses have been inserted.
    """

    particle_set: ParticleSet
    view: View
    rotations: Float[np.ndarray, "particles h 3 3"]
    shifts: Float[np.ndarray, "particles h 2"]
    weights: Float[np.ndarray, "particles h"]
    size: int
    side: int
    stage: Stage

    def sums(self, queues: Sequence[_Queue], devices: Sequence[Any]) -> list[Sums]:
        """Return the sum of each queue of hypotheses.

        Each queue has as many devices. They take the next lanes of it at the same time,
        and these are added to its sum in their order.
        """
        mesh = jax.make_mesh((len(devices),), ("devices",), devices=devices)
        apart = NamedSharding(mesh, PartitionSpec("devices"))
        config = self.particle_set.config
        operators = jnp.asarray(config.operators, self.rotations.dtype)
        empty = Sums.zero(self.side, self.weights.dtype)
        blank = jax.tree.map(lambda leaf: np.tile(leaf, (len(devices), 1, 1)), empty)
        per_queue = len(devices) // len(queues)
        lanes = [_lanes(queue, self.size) for queue in queues]
        results: list[Sums | None] = [None] * len(queues)
        for first in range(0, _LANES, per_queue):
            next_lanes = [
                lane for each in lanes for lane in each[first : first + per_queue]
            ]
            totals = None
            for taken in zip_longest(*next_lanes, fillvalue=_NOTHING):
                if totals is None:
                    totals = jax.device_put(blank, apart)
                arrays = jax.device_put(self._read(taken), apart)
                # A batch is read while the one before is computed.
                jax.block_until_ready(totals)
                totals = _insert(
                    mesh,
                    totals,
                    self.particle_set.insertion,
                    self.view,
                    arrays,
                    operators,
                    self.side,
                )
                self.stage.advance(sum(len(owners) for owners, _ in taken))
            if totals is None:
                break
            for place, total in enumerate(_apart(totals)):
                queue = place // per_queue
                before = results[queue]
                results[queue] = total if before is None else before + total
        return [empty if result is None else result for result in results]

    def _read(self, taken: Sequence[_Queue]) -> tuple[Any, ...]:
        """Return what devices insert next, filled up to the same number for each.

        What only fills up has no weight, and is not read.
        """
        particles, size = self.particle_set.particles, self.size
        owners = np.concatenate([owners for owners, _ in taken])
        columns = np.concatenate([columns for _, columns in taken])
        counts = np.array([len(owners) for owners, _ in taken])
        places = np.cumsum(counts) - counts
        inside = np.arange(size) < counts[:, None]
        # Each device repeats an image of its own, whatever the others insert: what
        # has no weight still decides in which order finufft adds up the rest.
        first = np.where(counts > 0, places, 0)
        rows = np.where(inside, places[:, None] + np.arange(size), first[:, None])
        rows, inside = rows.ravel(), inside.ravel()
        images, ctf = jax.tree.map(np.asarray, particles.batch(owners))
        weights = np.where(inside, self.weights[owners, columns][rows], 0)
        return (
            *jax.tree.map(lambda leaf: leaf[rows], (images, ctf)),
            np.asarray(particles.group_of(owners), np.int32)[rows],
            self.rotations[owners, columns][rows],
            self.shifts[owners, columns][rows],
            weights.astype(self.weights.dtype),
        )


def _lanes(queue: _Queue, size: int) -> list[list[_Queue]]:
    """Return the batches of each lane of a queue, of so many hypotheses at most."""
    owners, columns = queue
    starts = range(0, len(owners), size)
    batches = [(owners[at : at + size], columns[at : at + size]) for at in starts]
    length = -(-len(batches) // _LANES)
    return [batches[length * lane : length * (lane + 1)] for lane in range(_LANES)]


def _apart(totals: Sums) -> list[Sums]:
    """Return the sums of each device, in their order, free to go to any device.

    They are brought to the host, because what is computed of arrays that are bound to a
    device is compiled once more.
    """
    parts = [
        [
            jax.device_put(np.asarray(shard.data))
            for shard in sorted(leaf.addressable_shards, key=lambda s: s.index[0].start)
        ]
        for leaf in jax.tree.leaves(totals)
    ]
    return [Sums(*leaves) for leaves in zip(*parts, strict=True)]
