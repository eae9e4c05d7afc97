"""Declarations: what is said of an option is so."""

import dataclasses
import inspect
import math
from pathlib import Path

import pytest

from jaxrefine.cli.commands import COMMANDS, demo, match, reconstruct, refine
from jaxrefine.paper.presets import paper_preset, released_preset
from jaxrefine.poses.matching import MatchConfig
from jaxrefine.refinement.config import RefineConfig
from jaxrefine.runs import options
from jaxrefine.runs.fingerprint import fingerprint

# Where files are written or looked for, and how much is computed at once. An option
# that joins these must not change the results.
NO_INFLUENCE = {"out", "json", "png", "datadir", "batch_size", "devices", "memory"}
NO_INFLUENCE |= {"coordinator", "processes", "process"}

EVERY = [
    pytest.param(command, option, id=f"{command.name} {option.flag}")
    for command in COMMANDS
    for option in options.declared(command.settings)
]


def declared(settings_class):
    return {each.name: each for each in options.declared(settings_class)}


def some_settings(command, folder):
    """Settings with every option that must be given; files exist, and differ."""
    values = {}
    for option in options.declared(command.settings):
        if option.required and option.kind is Path:
            values[option.name] = folder / option.name
            values[option.name].write_text(option.name)
        elif option.required:
            values[option.name] = option.kind(7)
    if command.name == "simulate":
        values |= {"sigma": 1.0, "particles": 7}
    if command.name == "postprocess":  # without it the detector's pixel is refused
        values["mtf"] = folder / "mtf"
        values["mtf"].write_text("mtf")
    return values


def another_value(option, value, folder):
    """A valid value that is not this one."""
    if option.kind is bool:
        return not value
    if option.choices:
        return next(choice for choice in option.choices if choice != value)
    if option.kind is str:
        return "D7"
    if option.kind is Path:
        path = folder / f"another {option.name}"
        path.write_text("other content")
        return path
    return option.kind(31 if value != 31 else 32) if option.most != 1 else 0.5


@pytest.mark.parametrize(("command", "option"), EVERY)
def test_results_depend_on_what_is_in_the_fingerprint(command, option, tmp_path):
    """No option can be left out of it but those that are known not to matter."""
    values = some_settings(command, tmp_path)
    if command.name == "simulate" and option.name == "draw_poses":
        values |= {"particles": None, "like": values["map"]}
    settings = options.settings_from(command.settings, values)
    first = fingerprint(settings)
    other = another_value(option, option.value(settings), tmp_path)
    changed = values | {option.name: other}
    replaced = {"snr_db": "sigma", "like": "particles"}
    if command.name == "simulate" and option.name in replaced:
        changed[replaced[option.name]] = None
    changed = options.settings_from(command.settings, changed)
    assert (fingerprint(changed) != first) == (option.name not in NO_INFLUENCE)
    assert option.affects_results == (option.name not in NO_INFLUENCE)


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.name)
def test_input_files_count_by_their_content(command, tmp_path):
    values = some_settings(command, tmp_path)
    settings = options.settings_from(command.settings, values)
    first, inputs = fingerprint(settings), 0
    for name, value in values.items():
        if isinstance(value, Path) and name != "out":
            inputs += 1
            value.write_text("changed")
            assert fingerprint(settings) != first, name
            value.write_text(name)
            assert fingerprint(settings) == first
    assert inputs or command.name == "demo"


@pytest.mark.parametrize(("command", "option"), EVERY)
def test_declarations_fit_each_other(command, option):
    """Other options that are named exist, and defaults are in their ranges."""
    names = {each.name for each in options.declared(command.settings)}
    assert set(option.excludes) <= names
    if option.presets:
        assert set(option.presets) <= set(declared(command.settings)["preset"].choices)
    if not option.required:
        option.check(option.default)
    assert option.help[0].islower() or option.help[0].isdigit()
    assert not option.help.endswith(".")


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.name)
def test_every_command_can_be_described(command):
    assert command.description.endswith(".") and not command.summary.endswith(".")
    table = options.markdown_table(command.settings)
    count = len(options.declared(command.settings))
    assert len(table.splitlines()) == count + 2


def test_the_defaults_that_are_told_are_those_of_the_library():
    told, engine = declared(refine.RefineSettings), RefineConfig()
    paper, released = (
        inspect.signature(preset).parameters
        for preset in (paper_preset, released_preset)
    )
    assert told["iterations"].default_text == (
        f"{engine.iterations}, paper {paper['iterations'].default}, released "
        f"{released['iterations'].default}"
    )
    assert told["max_angle"].default_text == f"{math.degrees(engine.max_angle):g}"
    assert told["max_shift"].default_text == f"{engine.max_shift:g}"
    spread = f"{math.degrees(engine.angle_spread):.1f}"
    assert told["angle_spread"].default_text == spread
    assert told["shift_spread"].default_text == f"{engine.shift_spread:g}"
    assert told["symmetry"].default == engine.symmetry and engine.tau is None
    batch = told["batch_size"].default_text
    assert batch.startswith(f"{engine.batch_size} ")
    assert batch.endswith(f" {paper['batch_size'].default}")
    assert engine.first_r_max == 7, "a seventh of the box"
    # That of a particle of two thirds of the box: 3/14 of its diameter.
    assert declared(reconstruct.ReconstructSettings)["batch_size"].default == (
        engine.batch_size
    )
    matching, diameter = declared(match.MatchSettings), "particle_diameter"
    assert getattr(MatchConfig(), diameter) == getattr(engine, diameter) == 2 / 3
    assert "two thirds for the search" in matching[diameter].default_text
    for name, value in dataclasses.asdict(MatchConfig()).items():
        option = matching.get(name)
        if option is not None and name != diameter:
            in_radians = option.unit == "degrees"
            default = math.radians(option.default) if in_radians else option.default
            assert default == value
    assert math.radians(declared(demo.DemoSettings)["max_angle_error"].default) == 0.7


def test_run_is_the_module_of_the_same_name():
    for command in COMMANDS:
        module = command.name.replace("-", "_")
        assert f"import {module}\n" in inspect.getsource(command.run)
