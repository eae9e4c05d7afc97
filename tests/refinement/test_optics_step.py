"""Contrast and defocus of each particle, refined with its pose and the map."""

import dataclasses
import math
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import there
from scipy.spatial.transform import Rotation

from jaxrefine import evaluation, simulate
from jaxrefine.ctf import CTF, apply_ctf
from jaxrefine.data.particles import Particles
from jaxrefine.errors import InputError
from jaxrefine.geometry import Poses
from jaxrefine.io import load_checkpoint, save_checkpoint
from jaxrefine.maps.fsc import fsc, mean_fsc
from jaxrefine.poses.optics import Optics
from jaxrefine.refinement import loop
from jaxrefine.refinement.config import RefineConfig

N, P, PIXEL, SNR_DB = 32, 400, 2.5, 0.0
SINGLE, KEY = jnp.float32, jax.random.key(3)
CONFIG = RefineConfig(
    angle_spread=math.radians(3),
    max_angle=math.radians(15),
    shift_spread=0.7,
    max_shift=3.0,
    iterations=6,
    first_r_max=9,
)
SPREADS = {"contrast_spread": 0.2, "defocus_spread": 300.0}


class Scene:
    """Images of particles whose contrast and defocus vary, or whose do not."""

    def __init__(self, contrast=0.0, defocus=0.0, with_ctf=True):
        rng = np.random.default_rng(0)
        self.truth = simulate.phantom(jax.random.key(0), N)
        data = simulate.make_dataset(
            jax.random.key(1),
            self.truth,
            P,
            max_shift=1.0,
            max_angle_error=0.0,
            sigma=0.0,
        )
        u = jnp.asarray(rng.uniform(8e3, 1.6e4, P), SINGLE)
        self.ctf = CTF(u, u - 300) if with_ctf else None
        self.optics = Optics(
            1 + contrast * rng.normal(size=P), defocus * rng.normal(size=P)
        )
        clean = data.images
        if self.ctf is None:
            clean = jnp.asarray(self.optics.contrast, SINGLE)[:, None, None] * clean
        else:
            single = jax.tree.map(lambda x: jnp.asarray(x, SINGLE), self.optics)
            clean = apply_ctf(single.applied(self.ctf), clean, PIXEL)
        sigma = simulate.noise_std(clean, SNR_DB)
        self.images = np.asarray(simulate.add_noise(jax.random.key(2), clean, sigma))
        self.poses = data.truth
        turns = Rotation.from_rotvec(np.deg2rad(3) * rng.normal(size=(P, 3)))
        near = turns.as_matrix() @ np.asarray(self.poses.rotations)
        shifts = np.asarray(self.poses.shifts) + 0.5 * rng.normal(size=(P, 2))
        self.given = Poses(jnp.asarray(near, SINGLE), jnp.asarray(shifts, SINGLE))
        self.map = simulate.blur(self.truth, 1.5)
        self.particles = Particles(self.images, self.ctf, PIXEL)

    def refine(self, config, **options):
        return loop.refine(
            self.particles, self.given, self.map, config, key=KEY, **options
        )

    def fsc(self, result):
        return float(mean_fsc(fsc(jnp.asarray(result.volume), self.truth)))

    def angle(self, result):
        errors = evaluation.pose_errors(result.poses, self.poses)
        return float(np.median(errors.angle_in_degrees))


@cache
def scene(contrast=0.0, defocus=0.0, with_ctf=True):
    return Scene(contrast, defocus, with_ctf)


@cache
def run(contrast=0.0, defocus=0.0, with_ctf=True, **spreads):
    config = dataclasses.replace(CONFIG, **spreads)
    return scene(contrast, defocus, with_ctf).refine(config)


@pytest.mark.slow
def test_contrast_and_defocus_are_recovered():
    """To within 1.2 times the error bars, which are the bound at the poses found.

    That they are the bound at the true poses and in the true map too is tested with
    :mod:`jaxrefine.poses.optics`.
    """
    varied = (0.2, 300.0)
    result, plain = run(*varied, **SPREADS), run(*varied)
    here = scene(*varied)
    assert here.fsc(result) >= here.fsc(plain)
    found, bars = (
        there(result.estimated_optics).optics,
        there(result.estimated_optics).errors,
    )
    contrast = here.optics.contrast / here.optics.contrast.mean()
    # One of them has a fifth of the contrast, and does not show that it is there.
    shown = ~result.undetermined
    assert np.mean(shown) > 0.99
    for name, truth in (("contrast", contrast), ("defocus", here.optics.defocus)):
        error = (getattr(found, name) - truth)[shown]
        rms = np.sqrt(np.mean(error**2))
        bar = np.sqrt(np.mean(getattr(bars, name)[shown] ** 2))
        assert bar < 0.7 * SPREADS[f"{name}_spread"]
        assert rms < 1.2 * bar
    # Poses do not move by more than their error bars.
    moved = evaluation.pose_errors(result.poses, plain.poses)
    bars = np.sqrt(np.diagonal(result.covariances, axis1=1, axis2=2)[:, :3].sum(axis=1))
    assert np.median(np.deg2rad(moved.angle_in_degrees) / bars) < 1
    assert here.angle(result) < here.angle(plain)


@pytest.mark.slow
@pytest.mark.parametrize("with_ctf", [True, False])
def test_nothing_is_lost_where_all_are_equal(with_ctf):
    spreads = SPREADS if with_ctf else {"contrast_spread": 0.2}
    here = scene(with_ctf=with_ctf)
    plain = here.fsc(run(with_ctf=with_ctf))
    result = run(with_ctf=with_ctf, **spreads)
    assert here.fsc(result) > plain - 0.003
    assert np.std(there(result.estimated_optics).optics.contrast) < 0.1


@pytest.mark.slow
def test_an_interrupted_run_ends_in_the_same_bits(tmp_path):
    config = dataclasses.replace(CONFIG, iterations=2, **SPREADS)
    here, states = scene(), []
    whole = here.refine(config, callback=lambda state, _: states.append(state))
    template = loop.init(here.particles, here.given, here.map, config, key=KEY)
    save_checkpoint(tmp_path / "state", states[0], {})
    state, _ = load_checkpoint(tmp_path / "state", template)
    again = here.refine(config, state=state)
    np.testing.assert_array_equal(again.volume, whole.volume)
    np.testing.assert_array_equal(
        there(again.estimated_optics).optics.contrast,
        there(whole.estimated_optics).optics.contrast,
    )
    np.testing.assert_array_equal(
        there(again.estimated_optics).optics.defocus,
        there(whole.estimated_optics).optics.defocus,
    )


@pytest.mark.slow
def test_without_a_spread_there_are_no_optics():
    here = scene()
    state = loop.init(here.particles, here.given, here.map, CONFIG, key=KEY)
    assert state.set_states[0].optics is None


@pytest.mark.parametrize("name", SPREADS)
def test_spreads_that_are_none(name):
    with pytest.raises(InputError, match=f"{name} must be at least 0, got -1"):
        dataclasses.replace(CONFIG, **{name: -1.0})


@pytest.mark.slow
def test_images_of_noise_do_not_move_the_mean():
    """That of the particles is 1, also where many images show none.

    The mean of all would be lower: that of noise is at the least contrast, 0.4.
    """
    count = 100
    here = scene()
    rng = np.random.default_rng(5)
    images = here.images[: 2 * count].copy()
    images[count:] = images.std() * rng.normal(size=(count, N, N))
    ctf = jax.tree.map(lambda leaf: leaf[: 2 * count], here.ctf)
    particles = Particles(images, ctf, PIXEL)
    given = jax.tree.map(lambda leaf: leaf[: 2 * count], here.given)
    config = dataclasses.replace(CONFIG, iterations=1, contrast_spread=0.2)
    result = loop.refine(particles, given, here.map, config, key=KEY)
    noise = np.arange(2 * count) >= count
    assert np.mean(result.undetermined == noise) > 0.9
    shown = ~result.undetermined
    assert np.mean(
        there(result.estimated_optics).optics.contrast[shown]
    ) == pytest.approx(1, abs=1e-5)
    # In the last state those that show none have the contrast that was found.
    (state,) = result.state.set_states
    of_all = np.asarray(there(state.optics).contrast)
    assert np.mean(of_all[shown]) == pytest.approx(1, abs=1e-5)
    assert np.mean(of_all[~shown]) < 0.85
    np.testing.assert_array_equal(
        there(result.estimated_optics).optics.contrast[~shown], 1
    )
