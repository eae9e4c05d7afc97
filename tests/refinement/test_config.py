"""Settings of the refinement: what follows from them, and which are refused."""

import dataclasses

import numpy as np
import pytest

from jaxrefine.errors import InputError
from jaxrefine.refinement.config import RefineConfig, Tuning

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


@pytest.mark.parametrize("value", [0.0, -1.0, np.nan])
def test_settings_that_must_be_positive(value):
    with pytest.raises(InputError, match=f"^shift_spread must be .*, got {value}$"):
        RefineConfig(shift_spread=float(value))


@pytest.mark.parametrize("value", [-1.0, np.nan])
def test_limits_that_are_none(value):
    with pytest.raises(InputError, match=f"^max_shift must be .* 0, got {value}$"):
        RefineConfig(max_shift=float(value))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_angle", 180.0),
        ("max_angle", -1.0),
        ("max_angle", np.nan),
        ("angle_spread", 26.0),
        ("angle_spread", 0.0),
        ("angle_spread", np.nan),
    ],
)
def test_angles_are_radians(name, value):
    words = f"^{name} must be .* at most pi radians, got {value}$"
    with pytest.raises(InputError, match=words):
        dataclasses.replace(RefineConfig(), **{name: float(value)})
    largest = dataclasses.replace(RefineConfig(), **{name: np.pi})
    assert getattr(largest, name) == np.pi


@pytest.mark.parametrize(
    ("name", "value", "range_"),
    [
        ("supported_fsc", 2.0, "more than 0 and at most 1"),
        ("supported_fsc", 0.0, "more than 0 and at most 1"),
        ("settled", -0.1, "at least 0"),
        ("progress", 0.0, "positive"),
        ("stalled", np.nan, "at least 0"),
        ("sample", 0, "at least 2"),
        ("least_per_group", 1, "at least 2"),
        ("shifts_per_period", 0, "at least 1"),
        ("local_shift_steps", -1, "at least 0"),
        ("decided", 1.5, "more than 0 and at most 1"),
        ("negligible", 1.0, "at least 0 and less than 1"),
        ("final_rounds", 0, "at least 1"),
    ],
)
def test_tuning_out_of_range_is_refused(name, value, range_):
    with pytest.raises(InputError, match=f"^{name} must be {range_}, got {value}$"):
        dataclasses.replace(Tuning(), **{name: value})


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
