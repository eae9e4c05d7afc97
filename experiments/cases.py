"""The simulated data sets that the studies start from."""

import sys
from functools import partial
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import relion
from comparison import Case, Start
from settings import DatasetSettings, Init1Start, Init2Start

from jaxrefine import io, simulate
from jaxrefine._types import Volume
from jaxrefine.data.particles import Particles
from jaxrefine.errors import InputError
from jaxrefine.geometry import (
    Poses,
    Rotations,
    align_rotations_and_hand,
    mirror,
)
from jaxrefine.maps.align import align_maps, move_map
from jaxrefine.poses.matching import MatchConfig, match
from jaxrefine.runs.progress import Bars

_PLACED_BY = 4  # cycles per box: where the map is, to some voxels
_HIGHEST = jax.lax.Precision.HIGHEST


def init1(settings: Init1Start, start: str, out: Path) -> Case:
    """Simulate a data set with the start Init-1, section IV-B.

    The initial map is the truth, blurred, where the paper has one that RELION made
    ab initio.
    """
    del start, out
    truth, dataset = _simulate(settings, settings.max_angle_error_in_radians)
    initial_map = simulate.blur(truth, settings.initial_blur)
    return Case(truth, dataset, initial_map, settings.voxel_size_in_angstroms)


_BY_RELION = "map and poses by RELION, ab initio"


def describe_init2(settings: Init2Start) -> str:
    """Say how `init2` can find map and poses on this machine."""
    if relion.available():
        return _BY_RELION
    return (
        "poses by projection matching with the truth blurred by "
        f"{settings.initial_blur:g} voxels (RELION is not installed)"
    )


def init2(settings: Init2Start, start: str, out: Path) -> Case:
    """Simulate a data set with the start Init-2: map and poses made ab initio.

    By RELION, if ``start``, from `describe_init2`, says so; otherwise the map is the
    truth, blurred, and the poses are found by projection matching with it. A map made
    ab initio has a place and a hand of its own: map and poses are brought to the
    truth's, all together, so that curves can be compared. Then the shifts are set to
    zero.
    """
    truth, dataset = _simulate(settings, 0.0)
    if start == _BY_RELION:
        initial_map, rotations, remark = _ab_initio(settings, truth, dataset, out)
    else:
        print(
            "RELION is not installed: Init-2 by projection matching.", file=sys.stderr
        )
        initial_map = simulate.blur(truth, settings.initial_blur)
        images = np.asarray(dataset.images, np.float32)
        config = MatchConfig(max_shift=settings.max_shift + 1)
        matched = match(Particles(images), initial_map, config)
        rotations, remark = matched.poses.rotations, ""
    initial = Poses(rotations, jnp.zeros_like(dataset.truth.shifts))
    dataset = eqx.tree_at(lambda d: d.initial, dataset, initial)
    voxel = settings.voxel_size_in_angstroms
    return Case(truth, dataset, initial_map, voxel, remark)


INIT1 = Start(lambda settings: settings.start, init1)
INIT2 = Start(describe_init2, init2)


def _ab_initio(
    settings: Init2Start, truth: Volume, dataset: simulate.Dataset, out: Path
) -> tuple[Volume, Rotations, str]:
    """Return RELION's map and rotations in the frame of the truth, and a remark."""
    voxel, folder = settings.voxel_size_in_angstroms, out / "work" / "ab_initio"
    folder.mkdir(parents=True, exist_ok=True)
    images = np.asarray(dataset.images, np.float32)
    true_poses = dataset.truth
    same = jnp.broadcast_to(jnp.eye(3), true_poses.rotations.shape)
    unknown = Poses(same, jnp.zeros_like(true_poses.shifts))
    with Bars() as bars:
        reached = relion.ab_initio(
            folder,
            relion.write_particles(folder, images, unknown, voxel),
            diameter_in_angstroms=0.9 * len(truth) * voxel,
            seed=settings.seed,
            limit_s=60 * settings.ab_initio_limit_min,
            iterations=settings.ab_initio_iterations,
            resolutions=settings.ab_initio_resolutions,
            most_poses=settings.relion_most_poses or None,
            callback=_progress(bars, sum(settings.ab_initio_iterations)),
        )
    if not reached.finished:
        raise InputError(
            "RELION's ab-initio reconstruction takes more than "
            f"{settings.ab_initio_limit_min:g} minutes; the same command with --set "
            "ab_initio_limit_min=MORE carries it on."
        )
    volume, rotations = in_the_frame_of(
        truth, true_poses, reached.volume, reached.poses.rotations
    )
    remark = (
        f"map and poses of {reached.iterations} iterations of RELION ab initio, "
        f"{reached.wall_s / 60:.0f} minutes, ending at "
        f"{settings.ab_initio_resolutions[-1]:g} Å"
    )
    if settings.relion_most_poses:
        remark += f", --maxsig {settings.relion_most_poses}"
    return volume, rotations, remark


def _simulate(
    settings: DatasetSettings, max_angle_error: float
) -> tuple[Volume, simulate.Dataset]:
    map_key, data_key = jax.random.split(jax.random.key(settings.seed))
    if settings.volume is None:
        truth = simulate.phantom(map_key, settings.size)
    else:
        truth = jnp.asarray(io.read_mrc(settings.volume)[0])
    dataset = simulate.make_dataset(
        data_key,
        truth,
        settings.particles,
        max_shift=settings.max_shift,
        max_angle_error=max_angle_error,
        snr_db=settings.snr_db,
        project=partial(simulate.clean_images, truth, batch_size=settings.batch_size),
    )
    return truth, dataset


def _progress(bars: Bars, iterations: int) -> relion.Callback:
    """Return a callback that shows how far RELION's ab-initio run is."""
    advance = bars.next("RELION, ab initio", iterations)
    return lambda now: advance(None, {"iteration": now.iterations, **now.report})


def in_the_frame_of(
    truth: Volume, true_poses: Poses, volume: np.ndarray, rotations: Rotations
) -> tuple[Volume, Rotations]:
    """Bring a map and its poses to the place, orientation and hand of the truth.

    The true poses tell the orientation, which is then polished, and the true map the
    place.
    """
    rotation, is_mirrored = align_rotations_and_hand(rotations, true_poses.rotations)
    given = jnp.asarray(volume)
    if is_mirrored:
        given, rotations = mirror_map(given), mirror(rotations)
    turned = move_map(given, rotation, jnp.zeros(3, given.dtype))
    polish, translation = align_maps(turned, truth.astype(given.dtype), _PLACED_BY)
    rotation = jnp.matmul(rotation, polish, precision=_HIGHEST)
    moved = move_map(given, rotation, translation)
    return moved, jnp.matmul(rotations, rotation, precision=_HIGHEST)


def mirror_map(volume: Volume) -> Volume:
    """Return a map's mirror image in the plane ``z = 0``, as `geometry.mirror` does."""
    return volume[::-1] if len(volume) % 2 else jnp.roll(volume[::-1], 1, axis=0)
