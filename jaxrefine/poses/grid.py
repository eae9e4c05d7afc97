"""The grid of poses that matching tries, and how many poses it has."""

import math
from dataclasses import dataclass
from functools import cached_property
from typing import final

import numpy as np
from jaxtyping import Float

from jaxrefine.errors import InputError

# From the pole through no axis of any group, so that no operator leaves it where it is.
_INSIDE = np.array([0.16, 0.05, 1.0]) / math.hypot(0.16, 0.05, 1.0)
# Points up to which a grid is made in order to count it, in about a second. Without
# symmetry a search of more directions, or shifts, takes minutes for each image.
_COUNTED = 1e6
FARTHEST = 0.75
"""No direction of the sphere is farther from the nearest one of the grid, in steps."""


@final
@dataclass(frozen=True)
class PoseGrid:
    """Orientations and shifts at regular steps.

    Attributes
    ----------
    angle_step
        Between neighbouring directions, radians, from more than 0 to ``pi / 2``.
    half_turn
        In-plane angles in half a turn.
    max_shift, shift_step
        Radius of the circle of shifts and their spacing, pixels.
    shift_spread
        Standard deviation of the prior on the shift along x and y, pixels.
    operators
        Rotations that leave the map unchanged, the identity first.

    Raises
    ------
    InputError
        If the angular step is out of range.
    """

    angle_step: float
    half_turn: int
    max_shift: float
    shift_step: float
    shift_spread: float
    operators: Float[np.ndarray, "order 3 3"]

    def __post_init__(self):
        check_angle_step(self.angle_step)

    @property
    def in_plane_step(self) -> float:
        """The in-plane step, radians."""
        return math.pi / self.half_turn

    @cached_property
    def direction_count(self) -> float:
        """How many directions there are.

        Of more than a million on the whole sphere it is about how many, from the area
        that each stands for.
        """
        about = 4 * math.pi / self.angle_step**2
        if about > _COUNTED:
            return about / len(self.operators)
        return float(len(self.directions()))

    @property
    def orientation_count(self) -> float:
        """How many orientations there are, as far as `direction_count` says it."""
        return self.direction_count * 2 * self.half_turn

    @cached_property
    def shift_count(self) -> float:
        """How many shifts there are; of more than a million, about how many."""
        about = math.pi * (self.max_shift / self.shift_step) ** 2
        return about if about > _COUNTED else float(len(self.shifts()))

    def directions(self) -> Float[np.ndarray, "d 2"]:
        """Return viewing directions ``(rot, tilt)``, radians, up to symmetry.

        They are those of :func:`directions` that are nearer to a fixed one than any of
        their copies are, and what lies within 0.75 steps of these.
        """
        return asymmetric(directions(self.angle_step), self.operators, self.angle_step)

    def shifts(self) -> Float[np.ndarray, "t 2"]:
        """Return the points of a square grid within a circle, its centre among them."""
        reach = int(self.max_shift / self.shift_step + 1e-9)
        y, x = self.shift_step * np.mgrid[-reach : reach + 1, -reach : reach + 1]
        inside = x**2 + y**2 <= self.max_shift**2 * (1 + 1e-9)
        return np.stack([x[inside], y[inside]], axis=-1)

    def shift_log_prior(self) -> Float[np.ndarray, " t"]:
        """Return the logarithms of the prior probabilities of the shifts."""
        squares = np.sum(self.shifts() ** 2, axis=-1)
        values = -squares / (2 * self.shift_spread**2)
        return values - np.log(np.sum(np.exp(values)))

    def cell_variances(self) -> tuple[float, float]:
        """Return the mean squares of what poses are off that lie between the grid's.

        Of the rotation vector, radians, and of the shift, pixels, each summed over its
        components, which are taken to be distributed uniformly in a cell of the grid.
        Where the largest shift is 0, there is nothing between: shifts are known.
        """
        angle = (2 * self.angle_step**2 + self.in_plane_step**2) / 12
        return angle, self.shift_step**2 / 6 if self.max_shift > 0 else 0.0


def check_angle_step(step: float) -> None:
    """Check that an angular step, in radians, is one of a grid.

    Raises
    ------
    InputError
        If it is not more than 0 and at most ``pi / 2``.
    """
    if not 0 < step <= math.pi / 2:
        raise InputError(
            "the angular step must be more than 0 and at most pi / 2 radians, got "
            f"{step}"
        )


def steps(length: float, step: float) -> int:
    """Return how many equal parts of a length are no longer than a step."""
    return math.ceil(length / step - 1e-9)


def directions(step: float) -> Float[np.ndarray, "d 2"]:
    """Return near-uniform viewing directions ``(rot, tilt)``, in radians.

    They lie on parallels of latitude from pole to pole, at most a step apart, and on
    each at most a step apart. No direction of the sphere is further than about 0.75
    steps from one of them.

    Parameters
    ----------
    step
        Angular step, radians.
    """
    parallels = []
    for tilt in np.linspace(0, math.pi, steps(math.pi, step) + 1):
        count = max(steps(2 * math.pi * math.sin(tilt), step), 1)
        rot = 2 * math.pi / count * np.arange(count)
        parallels.append(np.stack([rot, np.full(count, tilt)], axis=-1))
    return np.concatenate(parallels)


def asymmetric(
    views: Float[np.ndarray, "d 2"],
    operators: Float[np.ndarray, "order 3 3"],
    step: float,
) -> Float[np.ndarray, "_ 2"]:
    r"""Return the viewing directions that no others stand for.

    The poses ``R`` and ``R S`` are the same for an operator ``S`` of the group. Those
    directions :math:`v` are kept for which

    .. math:: v \cdot p \ge (S v) \cdot p - \sin(0.75\,s)\,|p - S^T p|

    for all ``S``, with a fixed direction ``p``: the part of the sphere that is nearer
    to ``p`` than to its copies, and what lies within 0.75 steps ``s`` of its borders.

    Parameters
    ----------
    views
        Directions ``(rot, tilt)``, radians.
    operators
        The group, the identity first.
    step
        Angular step of the directions, radians.
    """
    rot, tilt = views.T
    points = np.stack(
        [np.cos(rot) * np.sin(tilt), np.sin(rot) * np.sin(tilt), np.cos(tilt)], axis=-1
    )
    margin, kept = math.sin(FARTHEST * step), np.ones(len(views), bool)
    for across in _INSIDE - operators[1:].swapaxes(1, 2) @ _INSIDE:
        kept &= points @ across >= -margin * np.linalg.norm(across)
    return views[kept]
