"""Masks that a refinement makes of its own maps."""

import dataclasses
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import COARSE

from jaxrefine import simulate
from jaxrefine.data.particles import Particles
from jaxrefine.io import load_checkpoint, save_checkpoint
from jaxrefine.maps.fsc import fsc, mean_fsc
from jaxrefine.maps.mask import AutomaticMask
from jaxrefine.refinement import loop, map_step, pose_step
from jaxrefine.refinement.sets import make_particle_set

N, P, PIXEL, SNR_DB = 46, 200, 4.0, -5.0
SINGLE, KEY = jnp.float32, jax.random.key(3)
CONFIG = dataclasses.replace(
    COARSE,
    angle_spread=0.2,
    shift_spread=0.8,
    max_shift=3.0,
    iterations=3,
    half_sets=True,
)
# Density at the envelope of a map of height 1.
SURFACE = 0.05


class Scene:
    """A phantom, its images, and a start."""

    def __init__(self):
        self.truth = simulate.phantom(jax.random.key(0), N)
        data = simulate.make_dataset(
            jax.random.key(1),
            self.truth,
            P,
            max_shift=1.0,
            max_angle_error=0.25,
            snr_db=SNR_DB,
        )
        self.particles = Particles(np.asarray(data.images), None, PIXEL)
        self.given = data.initial
        self.map = simulate.blur(self.truth, 2.0)

    def refine(self, config=CONFIG, mask=None, **options):
        return loop.refine(
            self.particles,
            self.given,
            self.map,
            config,
            key=KEY,
            mask=mask,
            **options,
        )

    def fsc(self, result):
        return float(mean_fsc(fsc(jnp.asarray(result.volume), self.truth)))


@cache
def scene():
    return Scene()


@pytest.mark.slow
def test_a_mask_at_the_end_covers_the_envelope_and_costs_nothing():
    here = scene()
    plain, masked = here.refine(), here.refine(mask=AutomaticMask())
    assert here.fsc(masked) > here.fsc(plain) - 0.003
    particle = np.asarray(here.truth) > SURFACE
    for half in masked.state.set_states:
        for fold in half.maps:
            mask = np.asarray(AutomaticMask().of(fold.coefficients, PIXEL, 3 * PIXEL))
            assert np.mean(mask[particle] > 0.99) > 0.99
            assert np.mean(mask > 0.5) < 0.5


@pytest.mark.slow
def test_each_map_is_masked_once_and_an_interrupted_run_ends_in_the_same_bits(
    tmp_path, monkeypatch
):
    config = dataclasses.replace(
        CONFIG, iterations=2, half_sets=False, contrast_spread=0.2
    )
    here, states, auto, made = scene(), [], AutomaticMask(), []
    make = AutomaticMask.of

    def of(*arguments):
        made.append(arguments)
        return make(*arguments)

    monkeypatch.setattr(AutomaticMask, "of", of)
    whole = here.refine(config, auto, callback=lambda state, _: states.append(state))
    # One of the first map. Then in each iteration, for each of two folds, one of the
    # map that poses and contrasts are found in, and one of the map that is made; and
    # at the end one of the map that contrasts and error bars are found in.
    assert len(made) == 1 + 2 * (2 + 2) + 2
    template = loop.init(
        here.particles, here.given, here.map, config, key=KEY, mask=auto
    )
    save_checkpoint(tmp_path / "state", states[0], {})
    state, _ = load_checkpoint(tmp_path / "state", template)
    again = here.refine(config, auto, state=state)
    np.testing.assert_array_equal(again.volume, whole.volume)
    np.testing.assert_array_equal(again.poses.rotations, whole.poses.rotations)


@pytest.mark.slow
def test_a_mask_is_made_of_the_map_that_is_masked_alone():
    """Not of the other fold's, which is made from the images that are compared."""
    here = scene()
    whole = make_particle_set(here.particles, here.given, KEY, CONFIG, AutomaticMask())
    state = map_step.start(whole, here.map)
    moved = jnp.roll(state.maps[1].coefficients, 9, axis=0)
    other = dataclasses.replace(
        state,
        maps=(state.maps[0], dataclasses.replace(state.maps[1], coefficients=moved)),
    )
    one, same = (pose_step.reference_maps(whole, each)[0] for each in (state, other))
    np.testing.assert_array_equal(one, same)
    masked = whole.masked(state.maps[0].coefficients, state.fold_fsc)
    assert float(jnp.mean(masked == 0)) > 0.3
