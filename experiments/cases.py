"""The simulated data sets that the studies start from."""

import sys
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import relion
from comparison import Case

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

KEYS = (
    "title",
    "seed",
    "size",
    "particles",
    "snr_db",
    "max_angle_error",
    "max_shift",
    "initial_blur",
    "voxel_size_in_angstroms",
    "batch_size",
)
"""What a configuration must say of its data set."""


def init1(config: dict[str, Any], volume: Path | None, out: Path) -> Case:
    """Simulate a data set with the start Init-1, section IV-B.

    The initial map is the truth, blurred, where the paper has one that RELION made
    ab initio.
    """
    del out
    truth, dataset = _simulate(config, volume, config["max_angle_error"])
    initial_map = simulate.blur(truth, config["initial_blur"])
    return Case(truth, dataset, initial_map, config["voxel_size_in_angstroms"])


_BY_RELION = "map and poses by RELION, ab initio"


def start(config: dict[str, Any]) -> str:
    """Say how `init2` can find map and poses on this machine, as ``start`` wants it."""
    if relion.available():
        return _BY_RELION
    return (
        "poses by projection matching with the truth blurred by "
        f"{config['initial_blur']:g} voxels (RELION is not installed)"
    )


def init2(config: dict[str, Any], volume: Path | None, out: Path) -> Case:
    """Simulate a data set with the start Init-2: map and poses made ab initio.

    By RELION, if ``start`` of the configuration says so; otherwise the map is the
    truth, blurred, and the poses are found by projection matching with it. A map made
    ab initio has a place and a hand of its own: map and poses are brought to the
    truth's, all together, so that curves can be compared. Then the shifts are set to
    zero.
    """
    truth, dataset = _simulate(config, volume, 0.0)
    voxel = config["voxel_size_in_angstroms"]
    images = np.asarray(dataset.images, np.float32)
    if config["start"] == _BY_RELION:
        folder = out / "work" / "ab_initio"
        folder.mkdir(parents=True, exist_ok=True)
        blank = jax.tree.map(jnp.zeros_like, dataset.truth)
        with Bars() as bars:
            found = relion.ab_initio(
                folder,
                relion.write_particles(folder, images, blank, voxel),
                diameter_in_angstroms=0.9 * len(truth) * voxel,
                seed=config["seed"],
                limit_s=60 * config["ab_initio_limit_min"],
                iterations=tuple(config["ab_initio_iterations"]),
                resolutions=tuple(config["ab_initio_resolutions"]),
                most_poses=config["relion_most_poses"] or None,
                callback=_progress(bars, sum(config["ab_initio_iterations"])),
            )
        if not found.finished:
            raise InputError(
                f"RELION's ab-initio reconstruction wants more than "
                f"{config['ab_initio_limit_min']} minutes; the same command with "
                "--set ab_initio_limit_min=MORE carries it on."
            )
        poses = found.poses
        initial_map, rotations = _in_the_frame_of(
            truth, dataset.truth, found.volume, poses
        )
        initial = Poses(rotations, jnp.zeros_like(poses.shifts))
        start = (
            f"map and poses of {found.iterations} iterations of RELION ab initio, "
            f"{found.wall_s / 60:.0f} minutes, ending at "
            f"{config['ab_initio_resolutions'][-1]:g} Å"
        )
        if config["relion_most_poses"]:
            start += f", --maxsig {config['relion_most_poses']}"
    else:
        print(
            "RELION is not installed: Init-2 by projection matching.", file=sys.stderr
        )
        initial_map = simulate.blur(truth, config["initial_blur"])
        settings = MatchConfig(max_shift=config["max_shift"] + 1)
        initial = match(Particles(images), initial_map, settings).poses
        initial = Poses(initial.rotations, jnp.zeros_like(initial.shifts))
        start = ""
    dataset = eqx.tree_at(lambda d: d.initial, dataset, initial)
    return Case(truth, dataset, initial_map, voxel, start)


def _simulate(
    config: dict[str, Any], volume: Path | None, max_angle_error: float
) -> tuple[Volume, simulate.Dataset]:
    map_key, data_key = jax.random.split(jax.random.key(config["seed"]))
    if volume is None:
        truth = simulate.phantom(map_key, config["size"])
    else:
        truth = jnp.asarray(io.read_mrc(volume)[0])
    dataset = simulate.make_dataset(
        data_key,
        truth,
        config["particles"],
        max_shift=config["max_shift"],
        max_angle_error=max_angle_error,
        snr_db=config["snr_db"],
        batch_size=config["batch_size"],
    )
    return truth, dataset


def _progress(bars: Bars, iterations: int) -> relion.Callback:
    """Return what shows how far RELION's ab-initio run is; it tells now and then."""
    advance = bars.next("RELION, ab initio", iterations)
    return lambda now: advance(None, {"iteration": now.iterations, **now.report})


def _in_the_frame_of(
    truth: Volume, true_poses: Poses, volume: np.ndarray, poses: Poses
) -> tuple[Volume, Rotations]:
    """Move a map and its poses as a whole to the truth's place; also their hand.

    True poses say how they are turned, which is then polished, and the true map where
    they are.
    """
    rotations = poses.rotations
    rotation, mirrored = align_rotations_and_hand(rotations, true_poses.rotations)
    found = jnp.asarray(volume)
    if mirrored:
        found, rotations = _mirrored(found), mirror(rotations)
    turned = move_map(found, rotation, jnp.zeros(3, found.dtype))
    polish, translation = align_maps(turned, truth.astype(found.dtype), _PLACED_BY)
    rotation = jnp.matmul(rotation, polish, precision=_HIGHEST)
    moved = move_map(found, rotation, translation)
    return moved, jnp.matmul(rotations, rotation, precision=_HIGHEST)


def _mirrored(volume: Volume) -> Volume:
    """Return a map's mirror image in the plane ``z = 0``, as `geometry.mirror` does."""
    return volume[::-1] if len(volume) % 2 else jnp.roll(volume[::-1], 1, axis=0)
