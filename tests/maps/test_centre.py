"""The origin moves to a centre of mass: maps are moved exactly, projections stay."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_close, blobs, draw, draw_poses, gaussian

from jaxrefine import simulate, symmetry
from jaxrefine.errors import InputError
from jaxrefine.maps import centre
from jaxrefine.maps.mask import soft_mask

N = 24
PLACE = np.array([1.3, -0.8, 2.4])  # (x, y, z)


@pytest.mark.parametrize("n", [N, N + 1])
def test_the_centre_of_a_gaussian_is_where_it_is(n):
    found = centre.centre_of_mass(gaussian(n, PLACE, 1.5))
    np.testing.assert_allclose(found, PLACE, atol=1e-6)


@pytest.mark.parametrize("mass", [0.0, -1.0, np.nan])
def test_what_has_no_centre(mass):
    with pytest.raises(InputError, match="must have a positive sum .*, got"):
        centre.centre_of_mass(np.full((4, 4, 4), mass))


@pytest.mark.parametrize("n", [N, N + 1])
def test_whole_voxels_are_moved_without_an_error(n):
    """Whatever the map is: noise has power at the Nyquist frequency, too."""
    noise = draw(n, n, n)
    moved = centre.translated(noise, jnp.array([2.0, -5.0, 11.0]))
    np.testing.assert_allclose(
        moved, np.roll(noise, (11, -5, 2), (0, 1, 2)), atol=1e-12
    )


@pytest.mark.parametrize("n", [N, N + 1])
def test_parts_of_voxels_are_moved_as_smooth_maps_are_known_to(n):
    moved = centre.translated(gaussian(n, (0.2, 0, -1), 1.8), jnp.asarray(PLACE))
    expected = gaussian(n, PLACE + (0.2, 0, -1), 1.8)
    np.testing.assert_allclose(moved, expected, atol=1e-6)


@pytest.mark.parametrize("magnification", [None, [[1.04, 0.02], [0.01, 0.97]]])
def test_projections_stay_as_they_are(magnification):
    """Of maps and poses that have moved, also where the microscope distorts them."""
    volume, poses = blobs(N), draw_poses(20)
    matrix = None if magnification is None else np.array([magnification])
    each = None if matrix is None else np.broadcast_to(matrix[0], (20, 2, 2))
    moved = centre.translated(volume, jnp.asarray(-PLACE))
    following = centre.following(poses, PLACE, each)
    before = simulate.slice_projector(volume, magnification=matrix)(poses)
    after = simulate.slice_projector(moved, magnification=matrix)(following)
    assert_close(after, before, 2e-4)
    # Without the shifts they are far apart.
    apart = simulate.slice_projector(moved, magnification=matrix)(poses)
    assert np.abs(apart - before).max() > 0.3 * np.abs(before).max()
    np.testing.assert_array_equal(following.rotations, poses.rotations)
    assert following.shifts.dtype == poses.shifts.dtype


def test_the_centre_is_that_of_the_mask_or_of_the_particle():
    """In noise it is found by the automatic mask; the mask says it exactly."""
    particle = gaussian(N, PLACE, 2.0, dtype=jnp.float32)
    noise = 0.02 * jax.random.normal(jax.random.key(0), (N,) * 3, jnp.float32)
    identity = symmetry.operators("C1")
    found = centre.particle_centre(particle + noise, 2.0, None, identity)
    np.testing.assert_allclose(found, PLACE, atol=0.2)
    mask = gaussian(N, (3, 0, 0), 1.5, dtype=jnp.float32)
    found = centre.particle_centre(particle + noise, 2.0, mask, identity)
    np.testing.assert_allclose(found, (3, 0, 0), atol=1e-5)


@pytest.mark.parametrize(
    ("group", "kept"), [("C3", (0, 0, 1)), ("D1", (1, 0, 0)), ("D4", (0, 0, 0))]
)
def test_the_centre_stays_on_the_axes_of_the_symmetry(group, kept):
    mask = gaussian(N, PLACE, 1.5)
    operators = symmetry.operators(group)
    found = centre.particle_centre(mask, 2.0, mask, operators)
    np.testing.assert_allclose(found, PLACE * kept, atol=1e-6)
    np.testing.assert_allclose(operators @ found - found, 0, atol=1e-12)


def test_a_mask_that_has_moved_is_a_mask():
    mask = (gaussian(N, PLACE, 2.0) > 0.5).astype(jnp.float32)
    place = centre.centre_of_mass(mask)
    moved = centre.translated_mask(mask, -place)
    assert moved.min() >= 0 and moved.max() <= 1 and moved.max() > 0.99
    np.testing.assert_allclose(centre.centre_of_mass(moved), 0, atol=1e-5)


@pytest.mark.parametrize("axis", range(3))
@pytest.mark.parametrize("sign", [-1, 1])
def test_a_particle_may_be_moved_up_to_the_sides_of_the_box(axis, sign):
    """A block of densities, on either side; the voxel beyond would come in again."""
    volume = np.zeros((N, N, N), np.float32)
    volume[9:15, 9:15, 9:15] = 1.0  # smooth at its borders, as the mask sees it
    particle = np.asarray(
        soft_mask(jnp.asarray(volume), 8.0, extend=0.0, edge=0.0)
    ).astype(bool)
    x = np.argwhere(particle)[:, 2 - axis]
    room = x.min() if sign < 0 else N - 1 - x.max()
    motion = np.zeros(3)
    motion[axis] = sign * (room + 0.4)
    centre.check_stays_inside(jnp.asarray(volume), 8.0, motion)
    motion[axis] = sign * (room + 0.6)
    words = "the particle must stay within the box .*, got .* of it beyond"
    with pytest.raises(InputError, match=words):
        centre.check_stays_inside(jnp.asarray(volume), 8.0, motion)
