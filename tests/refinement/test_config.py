"""Settings of the refinement: what follows from them, and which are refused."""

import dataclasses

import numpy as np
import pytest

from jaxrefine.errors import InputError
from jaxrefine.refinement.config import RefineConfig

POSITIVE = ("angle_spread", "shift_spread")
COUNTS = (
    "iterations",
    "first_r_max",
    "search_r_max",
    "hypotheses",
    "candidates",
    "admm_iterations",
    "batch_size",
)


def test_a_small_particle_is_searched_in_larger_cells():
    """As often as a large one whose pattern turns as fast: cycles per diameter."""
    cells = [
        RefineConfig(particle_diameter=d, first_r_max=r).search_cell(r)
        for d, r in ((0.6, 6), (0.3, 12))
    ]
    assert cells[0] == pytest.approx(cells[1])
    assert RefineConfig().search_cell(7) == pytest.approx(1 / 7)


@pytest.mark.parametrize("name", POSITIVE)
@pytest.mark.parametrize("value", [0.0, -1.0, np.nan])
def test_settings_that_must_be_positive(name, value):
    with pytest.raises(InputError, match=f"^{name} must be positive, got {value}$"):
        dataclasses.replace(RefineConfig(), **{name: float(value)})


@pytest.mark.parametrize("name", ["max_angle", "max_shift"])
@pytest.mark.parametrize("value", [-1.0, np.nan])
def test_limits_that_are_none(name, value):
    with pytest.raises(InputError, match=f"^{name} must be at least 0, got"):
        RefineConfig(**{name: value})


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"symmetry": "X3"}, "^symmetry .* C1 .*'X3'$"),
        ({"particle_diameter": 1.5}, "^particle_diameter must be .*, got 1.5$"),
        ({"particle_diameter": 0.0}, "^particle_diameter must be .*, got 0.0$"),
        ({"max_r_max": 6}, "^max_r_max must be at least first_r_max, 7, got 6$"),
    ],
)
def test_settings_that_contradict(settings, words):
    with pytest.raises(InputError, match=words):
        RefineConfig(**settings)


@pytest.mark.parametrize("name", COUNTS)
@pytest.mark.parametrize("value", [0, -3])
def test_settings_that_must_be_at_least_one(name, value):
    words = f"^{name} must be at least 1, got {value}$"
    with pytest.raises(InputError, match=words):
        RefineConfig(**{name: value})


@pytest.mark.parametrize("tau", [0.0, -0.5, np.nan])
def test_a_tau_that_is_none(tau):
    with pytest.raises(InputError, match=f"^tau must be positive, got {tau}$"):
        RefineConfig(tau=float(tau))
