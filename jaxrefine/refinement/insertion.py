r"""The sums over images that maps are made from, on all devices and in all processes.

The hypotheses of each fold wait in a queue, which is cut into four lanes. A lane is
summed up batch by batch, and the lanes in pairs: the first and the second, the third
and the fourth, then these two. Therefore the sums have the same bits on 1, 2, 4 or 8
devices, and in as many processes: they take the lanes of both folds.
"""

import math
from collections.abc import Iterable, Sequence
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
from jaxrefine._processes import of_process, part
from jaxrefine._watch import Stage
from jaxrefine.data import observation
from jaxrefine.data.observation import View
from jaxrefine.geometry import Poses
from jaxrefine.maps.folds import FOLDS
from jaxrefine.maps.sums import Sums, insert
from jaxrefine.poses.hypotheses import Hypotheses
from jaxrefine.refinement.sets import ParticleSet

_HIGHEST = jax.lax.Precision.HIGHEST
# Batches are multiples of this, so that few programs are compiled.
_ROUND = 512
LANES = 4
"""Parts that a fold's hypotheses are cut into."""

_Queue = tuple[Int[np.ndarray, "_"], Int[np.ndarray, "_"]]
"""The owners of hypotheses that are to be inserted, and their places among its."""
_NOTHING: _Queue = (np.zeros(0, int), np.zeros(0, int))
_Lane = list[_Queue]
"""A part of a queue, cut into batches."""


@eqx.filter_jit(donate="all-except-first")
def _insert(fixed: tuple[Any, ...], totals: Sums) -> Sums:
    """Add images to a sum of each device, at all poses that symmetry makes equivalent.

    Parameters
    ----------
    fixed
        The mesh of devices, the method of insertion, how images are seen, the operators
        of the symmetry, the side of the maps, and a batch of as many images for each
        device: the images, their optics, groups, rotations, shifts and weights.
    totals
        The sums of the devices, which follow each other on the first axis. Their memory
        is used again.
    """
    mesh, insertion, view, operators, side, batch = fixed

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
    longest = max(len(owners) for owners, _ in queues)
    size = images_at_once(n, len(view.disc.shells), len(config.operators), longest)
    lanes = [lane for queue in queues for lane in _lanes(queue, size)]
    processes = inserting(jax.process_count())
    own = [lanes[i] for i in part(len(lanes), processes, jax.process_index())]
    insertion = _Insertion(
        particle_set,
        view,
        np.asarray(hypotheses.rotations),
        np.asarray(hypotheses.shifts),
        weights.astype(noise.dtype),
        size,
        n,
        Stage(particle_set.watch, "sums", sum(map(_length, own))),
    )
    # One process makes the sums of both folds, several make parts of one fold each.
    sums = insertion.sums(own, max(1, FOLDS // processes))
    if processes == 1:
        return sums
    of_fold = [part(processes, FOLDS, fold) for fold in range(FOLDS)]
    return [
        pairwise_sum(of_process(sums[0], source) for source in sources)
        for sources in of_fold
    ]


def images_at_once(side: int, frequencies: int, operators: int, hypotheses: int) -> int:
    """Return how many images a device inserts at a time.

    Parameters
    ----------
    side, frequencies
        Side of the map, and number of frequencies of an image.
    operators
        Number of operators of the symmetry, by each of which an image is turned.
    hypotheses
        Those of the fold that has most.
    """
    # Enough slices at a time to outweigh the FFT of the kernel's grid.
    size = max(1, max(_ROUND, side**3 * 2 // frequencies) // operators)
    return min(max(1, -(-hypotheses // _ROUND)) * _ROUND, size)


def inserting(count: int) -> int:
    """Return how many devices, or processes, insert images: a power of two, up to 8."""
    return 2 ** int(math.log2(min(count, FOLDS * LANES)))


def pairwise_sum(sums: Iterable[Sums]) -> Sums:
    """Add up a power of two of sums: in pairs, then pairs of pairs, and so on.

    Whoever adds up a half of them, or a quarter, gets the same bits. They are taken one
    by one; no more are kept than there are levels.
    """
    waiting: list[Sums] = []
    count = 0
    for total in sums:
        count += 1
        number = count
        while number % 2 == 0:
            total, number = waiting.pop() + total, number // 2
        waiting.append(total)
        del total  # Until the next is there it would be held, as by `enumerate`.
    (whole,) = waiting
    return whole


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

    def sums(self, lanes: Sequence[_Lane], parts: int) -> list[Sums]:
        """Return the sums of equal parts of the lanes, on the devices of this process.

        There is a power of two of lanes, or none, whose sums are empty.
        """
        if not lanes:
            return [Sums.zero(self.side, self.weights.dtype)] * parts
        count = min(inserting(jax.local_device_count()), len(lanes))
        devices = jax.local_devices()[:count]
        if count < parts:
            # One device works on both parts, where two threads are faster than one.
            cut = [part(len(lanes), parts, index) for index in range(parts)]
            each = [[lanes[i] for i in places] for places in cut]
            todo = [partial(self._on_devices, own, devices) for own in each]
            return [sums for (sums,) in side_by_side(todo)]
        sums = self._on_devices(lanes, devices)
        places = [part(count, parts, index) for index in range(parts)]
        return [pairwise_sum(sums[i] for i in each) for each in places]

    def _on_devices(self, lanes: Sequence[_Lane], devices: Sequence[Any]) -> list[Sums]:
        """Return the sum of each device, which takes as many lanes in turn."""
        mesh = jax.make_mesh((len(devices),), ("devices",), devices=devices)
        turns = len(lanes) // len(devices)
        total = pairwise_sum(
            self._turn(lanes[turn::turns], mesh) for turn in range(turns)
        )
        return _apart(total)

    def _turn(self, lanes: Sequence[_Lane], mesh: Mesh) -> Sums:
        """Sum up a lane on each device; the sums follow each other on one axis."""
        apart = NamedSharding(mesh, PartitionSpec("devices"))
        operators = jnp.asarray(
            self.particle_set.config.operators, self.rotations.dtype
        )
        fixed = (mesh, self.particle_set.insertion, self.view, operators, self.side)
        blank = (
            np.zeros((mesh.size * side, side, side), self.weights.dtype)
            for side in Sums.sides(self.side)
        )
        totals = Sums(*(jax.device_put(each, apart) for each in blank))
        for taken in zip_longest(*lanes, fillvalue=_NOTHING):
            batch = jax.device_put(self._read(taken), apart)
            # A batch is read while the one before is computed.
            jax.block_until_ready(totals)
            totals = _insert((*fixed, batch), totals)
            self.stage.advance(_length(taken))
        return totals

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


def _lanes(queue: _Queue, size: int) -> list[_Lane]:
    """Return the batches of each lane of a queue, of so many hypotheses at most."""
    owners, columns = queue
    starts = range(0, len(owners), size)
    batches = [(owners[at : at + size], columns[at : at + size]) for at in starts]
    length = -(-len(batches) // LANES)
    return [batches[length * lane : length * (lane + 1)] for lane in range(LANES)]


def _length(batches: Iterable[_Queue]) -> int:
    """Return how many hypotheses there are in batches."""
    return sum(len(owners) for owners, _ in batches)


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
