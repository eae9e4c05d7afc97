"""Solvent masks: grown and softened as brute force says, and where the particle is.

The mask is the largest part of the filtered map; the automatic threshold finds it
whatever the noise and the scale.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import draw, fft_radii
from scipy.spatial import KDTree

from jaxrefine import simulate
from jaxrefine.errors import InputError
from jaxrefine.io import read_mrc
from jaxrefine.maps.mask import AutomaticMask, soft_mask
from jaxrefine.operators.ball import in_ball

N, VOXEL = 32, 2.5
ONES = jnp.ones((N, N, N))


@pytest.fixture(scope="module")
def phantom():
    return simulate.phantom(jax.random.key(0), N, jnp.float64)


def balls():
    """Two balls of density 1, the larger one off the centre."""
    z, y, x = np.indices((N, N, N))
    large = (z - 14) ** 2 + (y - 17) ** 2 + (x - 13) ** 2 < 5.5**2
    small = (z - 26) ** 2 + (y - 26) ** 2 + (x - 26) ** 2 < 3**2
    return large, small


@pytest.mark.parametrize(("extend", "edge"), [(3.0, 6.0), (0.0, 4.0), (2.0, 0.0)])
def test_a_mask_is_the_largest_part_grown(extend, edge):
    """Distances by brute force; the filter's cut-off is beyond all frequencies."""
    large, small = balls()
    volume = jnp.asarray((large | small).astype(float))
    mask = soft_mask(
        volume,
        VOXEL,
        threshold=0.5,
        low_pass_in_angstroms=0.5,
        extend=extend,
        edge=edge,
    )
    points = np.indices((N, N, N)).reshape(3, -1).T
    distance = KDTree(points[large.ravel()]).query(points)[0].reshape(N, N, N)
    expected = np.where(distance <= extend, 1.0, 0.0)
    if edge:
        inside = (distance > extend) & (distance < extend + edge)
        angle = np.pi * (distance[inside] - extend) / edge
        expected[inside] = (1 + np.cos(angle)) / 2
    np.testing.assert_allclose(mask, expected, atol=1e-12)


def test_a_mask_is_made_of_the_filtered_map():
    """A voxel of high density is noise, which the filter takes away."""
    large, _ = balls()
    spike = jnp.asarray(large.astype(float)).at[28, 28, 3].set(1.0)
    sharp, smooth = (
        soft_mask(spike, VOXEL, threshold=0.4, low_pass_in_angstroms=a, extend=0.0)
        for a in (0.5, 15.0)
    )
    assert sharp.max() == 1 and np.abs(sharp - smooth).max() > 0.1
    cut = fft_radii(N) - N * VOXEL / 15
    transfer = 0.5 + 0.5 * np.cos(np.pi * np.clip((cut + 1) / 2, 0, 1))
    seed = np.fft.ifftn(np.fft.fftn(spike) * transfer).real > 0.4
    np.testing.assert_array_equal(np.asarray(smooth) == 1, seed)


@pytest.mark.parametrize("noise", [0.0, 1.0, 4.0])
@pytest.mark.parametrize("scale", [1.0, -1e4])
def test_the_automatic_threshold_finds_the_particle(phantom, noise, scale):
    """Whatever the noise, and the scale and level of the map's densities."""
    volume = phantom + noise * float(phantom.std()) * draw(N, N, N, seed=3)
    mask = np.asarray(soft_mask(abs(scale) * volume + scale, 3.0))
    assert mask.min() == 0 and mask.max() == 1
    assert mask[np.asarray(phantom) > 0.2].min() == 1
    points = np.argwhere(np.asarray(phantom) > 0.02)
    distance = KDTree(points).query(np.indices((N, N, N)).reshape(3, -1).T)[0]
    far = distance.reshape(N, N, N) > 13  # 9 of extension and edge, 4 of the filter
    assert far.mean() > 0.05 and mask[far].max() < 0.2


@pytest.mark.parametrize("noise", [1.0, 4.0, 8.0])
def test_empty_corners_do_not_change_the_automatic_mask(phantom, noise):
    """Half maps have them, and a mask is no larger for it where noise is strong."""
    volume = phantom + noise * float(phantom.std()) * draw(N, N, N, seed=3)
    inside = np.asarray(in_ball(N))
    whole, cut = (
        np.asarray(soft_mask(v, 3.0)) for v in (volume, jnp.where(inside, volume, 0.0))
    )
    assert np.mean(np.abs(whole - cut)[inside]) < 0.02
    assert cut.mean() < 1.05 * whole.mean()


@pytest.mark.parametrize("name", ["hjc_90.mrc", "ptch1_84.mrc"])
def test_the_automatic_mask_of_a_real_map(data_dir, name):
    volume, voxel = read_mrc(data_dir / name)
    mask = np.asarray(soft_mask(jnp.asarray(volume), voxel))
    assert mask.dtype == np.float32
    assert volume[mask == 1].sum() > 0.999 * volume.sum()
    assert (mask > 0).mean() < 0.35


def test_a_mask_that_cannot_be_made(phantom):
    for changes, words in (
        ({"threshold": 9.0}, "below the largest density .* got 9"),
        ({"extend": -1.0}, "extend and edge must be at least 0, got -1 and 6"),
        ({"edge": -2.0}, "got 3 and -2"),
        (
            {"low_pass_in_angstroms": 0.0},
            "low-pass resolution must be positive, got 0 A",
        ),
    ):
        with pytest.raises(InputError, match=words):
            soft_mask(phantom, VOXEL, **changes)
    for volume in (ONES, ONES.at[3, 3, 3].set(jnp.nan)):
        with pytest.raises(InputError, match="must be finite and not constant"):
            soft_mask(volume, VOXEL)
    with pytest.raises(InputError, match="voxel size must be positive, got nan A"):
        soft_mask(phantom, float("nan"))


def test_a_mask_is_not_made_from_a_hot_voxel():
    """Its square is beyond single precision."""
    axis = np.arange(16) - 8
    squares = axis[:, None, None] ** 2 + axis[:, None] ** 2 + axis**2
    volume = np.exp(-squares / 8).astype(np.float32)
    volume[2, 3, 4] = 3e38
    with pytest.raises(InputError, match="hot voxels of up to 3e.38"):
        soft_mask(jnp.asarray(volume), 2.0)


# --- masks that are made of each map


def test_an_automatic_mask_is_tighter_the_sharper_the_map_is():
    """At 15 angstroms it is the mask of post-processing; before, it contains it."""
    volume = jnp.asarray(simulate.phantom(jax.random.key(0), 32))
    masks = [AutomaticMask().of(volume, 5.0, each) for each in (60.0, 30.0, 15.0, 4.0)]
    sizes = [float(jnp.sum(mask)) for mask in masks]
    assert sizes[0] > 1.1 * sizes[1] > 1.2 * sizes[2]
    for mask in masks[2:]:
        np.testing.assert_array_equal(mask, soft_mask(volume, 5.0))
    particle = np.asarray(volume) > 0.1
    for mask in masks:
        assert np.mean(np.asarray(mask)[particle] > 0.99) > 0.99


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_of_a_map_without_a_particle_there_is_no_mask(value):
    volume = jnp.full((16, 16, 16), value)
    np.testing.assert_array_equal(AutomaticMask().of(volume, 2.0, 8.0), 1)


def test_a_map_that_is_not_finite_is_not_taken_for_an_empty_one():
    volume = jnp.zeros((16, 16, 16)).at[3, 4, 5].set(jnp.nan)
    with pytest.raises(InputError, match="must be finite"):
        AutomaticMask().of(volume, 2.0, 8.0)
