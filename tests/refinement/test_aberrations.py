"""What neglecting aberrations loses at high resolution, the engine recovers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrefine import match, reconstruct, refine, simulate
from jaxrefine.aberrations import Aberrations, with_beam_tilt
from jaxrefine.ctf import CTF, apply_ctf, electron_wavelength
from jaxrefine.data.particles import Particles
from jaxrefine.geometry import Poses, geodesic_distance, rotvec_to_matrix
from jaxrefine.maps.fsc import fsc
from jaxrefine.poses.matching import MatchConfig
from jaxrefine.refinement.config import RefineConfig

N, COUNT, PIXEL = 32, 200, 1.1
SINGLE = jnp.float32
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def scene():
    """Images of two optics groups: tilted beams, an offset, and one magnification."""
    rng = np.random.default_rng(0)
    axis, made = np.arange(N) - N // 2, np.zeros((N,) * 3)
    for centre in rng.uniform(-6, 6, (60, 3)):
        x, y, z = (np.exp(-0.5 * (axis - at) ** 2) for at in centre)
        made += z[:, None, None] * y[:, None] * x
    volume = jnp.asarray(made, SINGLE)
    key = jax.random.key(3)
    poses = Poses(
        simulate.equidistributed_rotations(key, COUNT, SINGLE),
        simulate.random_shifts(key, COUNT, 1.5, SINGLE),
    )
    defocus = jnp.asarray(rng.uniform(8e3, 1.6e4, COUNT), SINGLE)
    ctf = CTF(defocus, defocus - 300)
    wave = np.full(2, electron_wavelength(jnp.asarray(300.0)))
    odd = with_beam_tilt(
        np.zeros((2, 0)), np.array([[1.0, -0.6], [-0.3, 0.8]]), np.full(2, 2.7), wave
    )
    even = np.array([[0.0] * 4 + [30.0, 0, 20, 0, 0], [0.0] * 9])
    matrix = np.array([[[1.03, 0.01], [0.0, 0.98]], np.eye(2)])
    aberrations = Aberrations(*(jnp.asarray(x, SINGLE) for x in (odd, even, matrix)))
    group = np.arange(COUNT) % 2
    project = simulate.slice_projector(volume, magnification=matrix)
    clean = project(poses, group)
    images = np.array(apply_ctf(ctf, clean, PIXEL, aberrations, jnp.asarray(group)))
    images += 0.1 * images.std() * rng.normal(size=images.shape).astype(np.float32)
    return volume, poses, Particles(images, ctf, PIXEL, group, None, aberrations)


def neglected(particles):
    return Particles(particles.images, particles.ctf, PIXEL, particles.group)


def fine_detail(found, volume):
    """Mean correlation of the shells from 0.55 to 0.85 of Nyquist."""
    curve = np.asarray(fsc(jnp.asarray(found), volume))
    return curve[int(0.55 * N / 2) : int(0.85 * N / 2) + 1].mean()


def test_a_map_has_the_detail_that_is_lost_without(scene):
    volume, poses, particles = scene
    key = jax.random.key(0)
    found = reconstruct(particles, poses, key=key)
    assert fine_detail(found.volume, volume) > 0.95
    lost = reconstruct(neglected(particles), poses, key=key)
    assert fine_detail(lost.volume, volume) < 0.7


def test_a_refinement_finds_better_poses_and_a_better_map(scene):
    """From poses that are off by two degrees."""
    volume, poses, particles = scene
    vectors = 0.02 * np.random.default_rng(1).normal(size=(COUNT, 3))
    turned = rotvec_to_matrix(jnp.asarray(vectors, SINGLE)) @ poses.rotations
    given = Poses(turned, poses.shifts)
    config = RefineConfig(iterations=3)
    detail, errors = [], []
    for data in (particles, neglected(particles)):
        result = refine(data, given, volume, config, key=jax.random.key(0))
        detail.append(fine_detail(result.volume, volume))
        angles = geodesic_distance(result.poses.rotations, poses.rotations)
        errors.append(float(jnp.median(angles)))
    assert detail[0] > 0.95 and detail[0] > detail[1] + 0.1
    assert errors[0] < 0.7 * errors[1], errors


def test_matching_scores_images_by_what_they_show(scene):
    """Noiseless correlation is near 1 where aberrations are known, on grid poses."""
    volume, _, particles = scene
    config = MatchConfig(0.25, max_shift=2.0, r_max=11)
    few = np.arange(40)
    known = match(particles.take(few), volume, config)
    lost = match(neglected(particles).take(few), volume, config)
    assert np.mean(known.scores) > np.mean(lost.scores) + 0.02
