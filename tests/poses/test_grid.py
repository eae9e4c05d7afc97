"""The grid of poses: how densely it covers the sphere, with and without symmetry."""

import math
from dataclasses import replace

import numpy as np
import pytest

from jaxrefine import symmetry
from jaxrefine.errors import InputError
from jaxrefine.poses import grid
from jaxrefine.poses.grid import PoseGrid

GROUPS = ["C1", "C2", "C7", "D1", "D7", "T", "O", "I", "I1", "I2", "I3", "I4"]


def grid_of(step=0.2, group="C1", **changes):
    operators = symmetry.operators(group)
    half_turn = grid.steps(math.pi, step)
    return PoseGrid(step, half_turn, 3.0, 1.0, 1.5, operators, **changes)


def points_of(views):
    rot, tilt = views.T
    return np.stack(
        [np.sin(tilt) * np.cos(rot), np.sin(tilt) * np.sin(rot), np.cos(tilt)], axis=1
    )


def probes(count=2000):
    values = np.random.default_rng(1).normal(size=(count, 3))
    return values / np.linalg.norm(values, axis=1, keepdims=True)


def degrees(cosines):
    return np.rad2deg(np.arccos(np.clip(cosines, -1, 1)))


@pytest.mark.parametrize("step", [6.0, 7.0, 15.0, 40.0, 90.0])
def test_directions_cover_the_sphere(step):
    """None is further than 0.75 steps; neighbours are a step apart, more or less."""
    points = points_of(grid.directions(np.deg2rad(step)))
    assert degrees((probes() @ points.T).max(axis=1)).max() <= 0.75 * step
    gaps = degrees((points @ points.T - 2 * np.eye(len(points))).max(axis=1))
    assert gaps.max() <= step * (1 + 1e-9)
    assert gaps.min() > 0.7 * step
    assert len(points) == pytest.approx(4 * np.pi / np.deg2rad(step) ** 2, rel=0.5)


@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("step", [0.05, 0.3])
def test_directions_cover_the_sphere_up_to_symmetry(group, step):
    """With few directions more than there must be."""
    made = grid_of(step, group)
    points = points_of(made.directions())
    copies = np.einsum("sij,pj->spi", made.operators, probes(500))
    nearest = degrees((copies @ points.T).max(axis=(0, 2)))
    assert nearest.max() <= 0.75 * np.rad2deg(step) * (1 + 1e-6)
    if step == 0.05:
        # Twice the border of a part of the sphere is at most what it is for I.
        least = 4 * np.pi / step**2 / len(made.operators)
        assert len(points) < least * (1.1 + 0.03 * len(made.operators))
        assert len(points) > 0.9 * least


@pytest.mark.parametrize("group", ["C1", "D2", "I"])
def test_what_can_be_made_is_counted(group):
    made = replace(grid_of(math.radians(7.5), group), max_shift=12.3)
    assert made.direction_count == len(made.directions())
    assert made.shift_count == len(made.shifts())
    assert made.orientation_count == made.direction_count * 2 * made.half_turn


def test_what_cannot_be_made_is_estimated():
    """At once, and without a jump where counting begins."""
    hopeless = replace(grid_of(math.radians(0.01)), max_shift=1e6)
    assert hopeless.direction_count == pytest.approx(4.1e8, rel=0.01)
    assert hopeless.shift_count == pytest.approx(np.pi * 1e12)
    step, radius = math.sqrt(4 * math.pi / 1e6), math.sqrt(1e6 / math.pi)
    finer, coarser = (
        replace(grid_of(step * change), max_shift=radius / change)
        for change in (0.999, 1.001)
    )
    for name in ("direction_count", "shift_count"):
        assert getattr(finer, name) == pytest.approx(getattr(coarser, name), rel=0.01)


def test_the_prior_on_shifts_is_a_gaussian_that_sums_up_to_one():
    made = replace(grid_of(), max_shift=4.0, shift_step=0.5, shift_spread=1.25)
    values, shifts = made.shift_log_prior(), made.shifts()
    assert np.exp(values).sum() == pytest.approx(1, abs=1e-12)
    at = {tuple(shift): value for shift, value in zip(shifts, values, strict=True)}
    fall = at[0.0, 0.0] - at[-3.0, 1.5]
    assert fall == pytest.approx((9 + 2.25) / (2 * 1.25**2), abs=1e-12)


def test_what_poses_between_are_off():
    """Drawn uniformly in a cell, of a flat neighbourhood."""
    made = replace(grid_of(0.1), shift_step=0.7)
    rng = np.random.default_rng(0)
    sides = [made.angle_step, made.angle_step, made.in_plane_step]
    turns = np.array(sides) * rng.uniform(-0.5, 0.5, (100000, 3))
    moves = made.shift_step * rng.uniform(-0.5, 0.5, (100000, 2))
    expected = [np.mean(np.sum(x**2, axis=1)) for x in (turns, moves)]
    np.testing.assert_allclose(made.cell_variances(), expected, rtol=0.02)
    centred = replace(made, max_shift=0.0).cell_variances()
    assert centred == (made.cell_variances()[0], 0.0)


@pytest.mark.parametrize("step", [0.0, -1.0, 7.5, math.nan])
def test_steps_out_of_range_are_refused(step):
    with pytest.raises(InputError, match=f"angular step must be .*, got {step}$"):
        replace(grid_of(), angle_step=step)
