"""Maps of any scale, and maps that cannot be those of a particle."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import draw

from jaxrefine.maps.fsc import fsc
from jaxrefine.maps.scale import (
    at_unit_scale,
    has_no_particle,
    hot_voxel,
    is_negative,
    offset,
)
from jaxrefine.operators.ball import in_ball

N = 16
AXIS = np.arange(N) - N // 2
RADIUS = AXIS[:, None, None] ** 2 + AXIS[:, None] ** 2 + AXIS**2
BLOB = np.exp(-RADIUS / 8)


@pytest.mark.parametrize("exponent", [-110, -66, -1, 0, 1, 66, 120])
def test_a_power_of_two_changes_no_bit(exponent):
    volume = draw(N, N, N, dtype=jnp.float32)
    scaled = volume * np.float32(2.0**exponent)
    expected = np.asarray(at_unit_scale(volume))
    assert 0.5 <= np.abs(expected).max() < 1
    factor = 2 ** np.frexp(np.abs(volume).max())[1]
    np.testing.assert_array_equal(factor * expected, volume)
    for function in (at_unit_scale, jax.jit(at_unit_scale)):
        np.testing.assert_array_equal(function(scaled), expected)


def test_an_empty_map_stays_empty():
    assert not np.any(at_unit_scale(jnp.zeros((4, 4, 4))))


@pytest.mark.parametrize("scales", [(-66, 66), (66, 66), (-66, -66), (120, -110)])
def test_a_correlation_does_not_depend_on_scales(scales):
    """In single precision squares of 1e20 overflow, and those of 1e-20 vanish."""
    a, b = (draw(N, N, N, seed=i, dtype=jnp.float32) for i in (1, 2))
    b = a + b
    mask = jnp.asarray(RADIUS < 36, jnp.float32)
    for given in (None, mask):
        first, second = (
            x * np.float32(2.0**e) for x, e in zip((a, b), scales, strict=True)
        )
        np.testing.assert_array_equal(fsc(first, second, given), fsc(a, b, given))


@pytest.mark.parametrize("scale", [1e-20, 1.0, 1e20])
def test_implausible_maps_are_told_at_any_scale(scale):
    volume = scale * BLOB
    assert hot_voxel(volume) is None and offset(volume) is None
    assert not is_negative(volume) and is_negative(-volume)
    hot = volume.copy()
    hot[3, 4, 5] = -1e3 * scale
    assert hot_voxel(hot) == -1e3 * scale
    for sign in (1, -1):
        assert offset(volume + sign * 0.2 * scale) is None
        raised = offset(sign * (volume + 0.3 * scale))
        assert raised == pytest.approx(sign * 0.3 * scale, rel=0.02)


def test_the_narrowest_particle_is_no_hot_voxel():
    assert hot_voxel(np.exp(-RADIUS / 2)) is None
    assert hot_voxel((RADIUS == 0).astype(float)) == 1


@pytest.mark.parametrize(
    "places",
    [
        np.s_[7:9, 7:9, 7:9],
        np.s_[8, 8, 4:12],
        ([3, 9], [4, 9], [5, 2]),
        (
            [3, 9, 1, 5, 7, 12, 8, 2],
            [4, 9, 8, 8, 3, 6, 12, 5],
            [5, 2, 8, 3, 9, 7, 4, 1],
        ),
    ],
)
def test_a_few_hot_voxels_are_told_wherever_they_are(places):
    hot = BLOB.copy()
    hot[places] = 100.0
    assert hot_voxel(hot) == 100
    assert hot_voxel(BLOB) is None


@pytest.mark.parametrize("scale", [1e-20, 1.0, 1e20])
def test_a_particle_stands_out_from_noise_and_not_in_noise_or_a_ramp(scale):
    noise = np.random.default_rng(0).normal(size=(32, 32, 32))
    axis = np.arange(32) - 16
    square = axis**2
    radius = square[:, None, None] + square[:, None] + square
    blob = np.exp(-radius / 50)
    assert has_no_particle(scale * noise)
    for direction in (axis, axis + axis[:, None], axis[:, None, None] - axis):
        assert has_no_particle(scale * (blob + 3 * direction / 16))
    # Ten times as much noise as signal, which a low-pass takes away.
    loud = blob + np.sqrt(10) * blob.std() * noise
    assert not has_no_particle(scale * blob) and not has_no_particle(scale * loud)
    # As half maps are.
    inside = np.asarray(in_ball(32))
    assert has_no_particle(scale * noise * inside)
    for volume in (blob, loud):
        assert not has_no_particle(scale * volume * inside)


def test_noise_of_any_spectrum_is_negative_by_chance_only():
    """By the standard error of its third moment, which 200 maps of noise show."""
    rng = np.random.default_rng(1)
    filtered = [
        np.fft.ifftn(np.fft.fftn(rng.normal(size=BLOB.shape)) * spectrum).real
        for spectrum in (np.fft.fftn(np.exp(-RADIUS / 4)), 1.0)
        for _ in range(100)
    ]
    for errors, share in ((1.0, 0.16), (2.0, 0.02)):
        found = np.mean([is_negative(noise, errors) for noise in filtered])
        assert share / 3 < found < 1.7 * share + 0.02
    assert not any(is_negative(sign * x, 5.0) for x in filtered for sign in (1, -1))
    assert not is_negative(BLOB, 4.0) and is_negative(-BLOB, 4.0)
    assert not is_negative(np.zeros_like(BLOB), 4.0)


def test_solvent_does_not_say_which_sign_a_particle_has():
    for background in (-5.0, 0.0, 5.0):
        assert not is_negative(BLOB + background) and is_negative(background - BLOB)
