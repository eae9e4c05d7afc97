"""Poses that are known up to the operators of a group that the map does not have."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import COARSE, gaussian
from scipy.spatial.transform import Rotation

from jaxrefine import evaluation, simulate, symmetry
from jaxrefine.data.particles import Particles
from jaxrefine.errors import InputError
from jaxrefine.geometry import Poses
from jaxrefine.maps import align
from jaxrefine.refinement import loop, pose_step
from jaxrefine.refinement.config import RefineConfig

N, P, SNR_DB = 32, 300, -5.0
GROUP, OTHER = "C4", math.radians(30)  # poses in another copy are 90 degrees away
KEY = jax.random.key(3)
SINGLE = jnp.float32
CONFIG = dataclasses.replace(
    COARSE,
    symmetry_relax=GROUP,
    angle_spread=math.radians(4),
    max_angle=math.radians(15),
    shift_spread=1.0,
    max_shift=4.0,
    iterations=6,
)


def nearly_symmetric(n):
    """A phantom that is made symmetric, and one domain on one of its sides only."""
    zero = jnp.zeros(3, SINGLE)
    volume = simulate.phantom(jax.random.key(0), n)
    operators = jnp.asarray(symmetry.operators(GROUP), SINGLE)
    copies = [align.move_map(volume, operator, zero) for operator in operators]
    whole = sum(copies, jnp.zeros_like(volume)) / len(copies)
    domain = gaussian(n, (0.2 * n, 0.05 * n, 0.1 * n), 0.07 * n, dtype=SINGLE)
    return whole + 0.7 * whole.max() * domain


class Scene:
    """Images of a nearly symmetric map, and poses turned by any operator."""

    def __init__(self):
        rng = np.random.default_rng(0)
        self.truth = nearly_symmetric(N)
        data = simulate.make_dataset(
            jax.random.key(1),
            self.truth,
            P,
            max_shift=1.5,
            max_angle_error=0.0,
            snr_db=SNR_DB,
        )
        self.poses, self.images = data.truth, np.asarray(data.images)
        self.copy = rng.integers(0, 4, P)
        operators = symmetry.operators(GROUP)[self.copy]
        errors = Rotation.from_rotvec(np.deg2rad(3) * rng.normal(size=(P, 3)))
        turned = errors.as_matrix() @ np.asarray(self.poses.rotations) @ operators
        given = np.asarray(self.poses.shifts) + 0.5 * rng.normal(size=(P, 2))
        self.given = Poses(jnp.asarray(turned, SINGLE), jnp.asarray(given, SINGLE))
        self.map = simulate.blur(self.truth, 2.0)

    def refine(self, config, volume=None):
        start = self.map if volume is None else volume
        return loop.refine(Particles(self.images), self.given, start, config, key=KEY)

    def right(self, poses):
        """The fraction of poses in the right copy, up to a motion of the map."""
        errors = evaluation.pose_errors(poses, self.poses)
        return float(np.mean(np.deg2rad(errors.angle_in_degrees) < OTHER))


@pytest.fixture(scope="module")
def scene():
    return Scene()


@pytest.fixture(scope="module")
def relaxed(scene):
    return scene.refine(CONFIG)


@pytest.mark.slow
def test_every_particle_finds_its_copy(scene, relaxed):
    """And not without the copies, as poses then stay near the ones given."""
    alone = scene.refine(dataclasses.replace(CONFIG, symmetry_relax="C1"))
    found, kept = scene.right(relaxed.poses), scene.right(alone.poses)
    assert found >= 0.95
    assert kept < 0.5


@pytest.mark.slow
def test_limits_are_those_from_the_nearest_copy(scene, relaxed):
    """Particles leave the given copy, but no copy by more than the largest angle."""
    operators = symmetry.operators(GROUP)
    copies = np.asarray(scene.given.rotations)[:, None] @ operators
    traces = np.einsum("pkij,pij->pk", copies, np.asarray(relaxed.poses.rotations))
    angles = np.arccos(np.clip((traces - 1) / 2, -1, 1))
    assert angles.min(axis=1).max() <= CONFIG.max_angle + 1e-3
    assert np.mean(angles[:, 0] > OTHER) > 0.5
    assert not relaxed.undetermined.any()


@pytest.mark.parametrize(
    ("group", "map_group", "copies"),
    [("C1", "C1", 1), ("D2", "C2", 2), ("I", "C1", 60)],
)
def test_there_is_a_place_for_every_copy(group, map_group, copies):
    config = RefineConfig(symmetry_relax=group, symmetry=map_group)
    assert len(config.copies) == copies
    assert config.places == config.hypotheses + copies - 1
    wide = pose_step.wide_search(config, N)
    assert wide.keep == config.places and wide.centres == copies
    one = pose_step.wide_search(dataclasses.replace(config, symmetry_relax="C1"), N)
    assert wide.count == one.count and wide.most >= copies * one.count
    local = pose_step.local_search(config, N, 11, 0.1, 2 * config.places)
    assert local.count == config.candidates // 2 and local.most == wide.most


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"symmetry": "C3"}, "operators of C3, .* got C4"),
        ({"max_angle": 0.0}, "symmetry_relax must be C1 if angles are fixed, got C4"),
        ({"symmetry_relax": "S4"}, "^symmetry_relax must be C1 .* got 'S4'"),
        ({"symmetry": "S4"}, "^symmetry must be C1 .* got 'S4'"),
        ({"symmetry": "C4"}, "symmetry_relax must have .* has not, got C4 for both"),
        (
            {"symmetry": "I", "symmetry_relax": "I2"},
            "symmetry_relax must have operators that .* has not, got I and I2",
        ),
    ],
)
def test_groups_that_do_not_fit(changes, words):
    with pytest.raises(InputError, match=words):
        dataclasses.replace(CONFIG, **changes)
