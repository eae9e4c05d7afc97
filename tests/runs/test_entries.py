"""Values in the types of JSON: nothing of them is lost."""

import json
from dataclasses import asdict, fields
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from jaxrefine import paper
from jaxrefine.maps.tv import AnisotropicTV
from jaxrefine.operators.gridding import Finufft, Gridding
from jaxrefine.poses.solvers import LevenbergMarquardt
from jaxrefine.refinement.config import RefineConfig, Tuning
from jaxrefine.runs.entries import as_json


def stored(value, declared=None):
    """What a reader of the file gets."""
    return json.loads(json.dumps(as_json(value, declared), allow_nan=False))


def test_a_group_of_constants_is_an_object_of_its_fields():
    tuning = Tuning(settled=0.2, sample=17)
    kept = stored(RefineConfig(tuning=tuning), RefineConfig)["tuning"]
    assert kept == asdict(tuning)
    assert Tuning(**kept) == tuning


def test_parameters_can_be_made_again_of_what_is_stored():
    config = RefineConfig(
        max_angle=0.3,
        multi_start=(0, 1, 4),
        tau=0.7,
        update=LevenbergMarquardt(5, 0.1),
        regulariser=AnisotropicTV(),
        interpolation=Gridding(5, 1.5),
        insertion=Finufft(1e-5),
        tuning=Tuning(decided=0.9),
    )
    kept = stored(config, RefineConfig)
    assert kept.keys() == {each.name for each in fields(RefineConfig)}
    classes = {each.__name__: each for each in (LevenbergMarquardt, AnisotropicTV)}
    classes |= {"Finufft": Finufft}
    for name in ("update", "regulariser", "insertion"):
        kept[name] = classes[kept[name].pop("class")](**kept[name])
    for name in ("interpolation", "search_interpolation"):
        kept[name] = Gridding(**kept[name])
    kept["tuning"] = Tuning(**kept["tuning"])
    kept["multi_start"] = tuple(kept["multi_start"])
    assert RefineConfig(**kept) == config


def test_the_numbers_of_a_schedule_are_kept():
    config = paper.released_preset()
    kept = stored(config, paper.Algorithm1Config)
    steps = kept.pop("steps")
    assert steps.pop("class") == "GivenSteps"
    given = config.steps
    assert isinstance(given, paper.GivenSteps)
    schedules = {"lam": config.lam, "rho": config.rho}
    schedules |= {"angle": given.angle, "shift": given.shift}
    for name, schedule in schedules.items():
        assert (kept | steps)[name] == {
            "first": float(schedule.first),
            "last": float(schedule.last),
        }
    assert kept["regulariser"] == {"class": type(config.regulariser).__name__}


def test_plain_values():
    path, array = Path("a") / "b", jnp.arange(4.0).reshape(2, 2)
    assert stored(path) == str(path)
    assert stored(array) == [[0, 1], [2, 3]] and stored(np.float32(0.5)) == 0.5
    plain = [None, True, 3, "text", [path, (1, 2.5)]]
    assert stored(plain) == [None, True, 3, "text", [str(path), [1, 2.5]]]
