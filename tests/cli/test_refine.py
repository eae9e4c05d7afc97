"""``jaxrefine refine``: files, resuming, and what is refused.

The refinement itself is mostly a stand-in, which moves every particle by as much in
every iteration; at the end come runs of the real ones.
"""

import errno
import json
import math
import os
import re
import shlex
import shutil
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import interrupted_after, there
from scipy.spatial.transform import Rotation

from jaxrefine import simulate, symmetry
from jaxrefine.cli import refine as cli_refine
from jaxrefine.cli.commands.postprocess import POSTPROCESS
from jaxrefine.cli.commands.refine import REFINE, RefineSettings
from jaxrefine.cli.engine import Engine
from jaxrefine.cli.refine import _changes
from jaxrefine.geometry import Poses
from jaxrefine.io import (
    read_mrc,
    read_particles,
    read_star,
    write_mrc,
    write_stack,
    write_star,
)
from jaxrefine.maps import centre
from jaxrefine.maps.mask import AutomaticMask
from jaxrefine.poses.optics import AtLimit, Optics, OpticsEstimate
from jaxrefine.refinement.config import RefineConfig
from jaxrefine.runs.options import declared

N, COUNT, PIXEL = 16, 8, 2.0  # of the data
STEP = 0.25
CONTRAST, DEFOCUS = np.linspace(0.7, 1.3, COUNT), np.linspace(-300.0, 400.0, COUNT)


class State(eqx.Module):
    iteration: jax.Array
    shifts: jax.Array


@pytest.fixture
def stand_in():
    """An engine that moves every particle; a record of its calls, and where to stop."""
    seen = SimpleNamespace(calls=[], stop_after=None, iterations=[], undetermined=[3])
    seen.discarded = None
    seen.at_limit = 0

    def refine(
        particles, poses, volume, config, *, key, subsets, mask, state, callback, watch
    ):
        seen.calls.append(SimpleNamespace(**locals()))
        if seen.stop_after == 0:
            raise KeyboardInterrupt
        if state is None:
            state = State(jnp.zeros((), jnp.int32), poses.shifts)
        while int(state.iteration) < config.iterations:
            state = State(state.iteration + 1, state.shifts + STEP)
            seen.iterations.append(int(state.iteration))
            row = {"iteration": int(state.iteration), "tau": [1.0, math.nan]}
            if seen.discarded == int(state.iteration):
                row["is_kept"] = False
            callback(state, SimpleNamespace(row=lambda row=row: row))
            if seen.stop_after == int(state.iteration):
                raise KeyboardInterrupt
        half_maps = (np.asarray(volume), np.asarray(volume)[::-1])
        covariance = np.diag([1e-4, 4e-4, 4e-4, 0.09, 0.16])
        return SimpleNamespace(
            poses=eqx.tree_at(lambda p: p.shifts, poses, state.shifts),
            covariances=np.broadcast_to(covariance, (len(particles), 5, 5)),
            log_likelihood=np.arange(len(particles)) - 0.5,
            undetermined=np.isin(np.arange(len(particles)), seen.undetermined),
            volume=2 * np.asarray(volume),
            half_maps=half_maps if config.half_sets else None,
            fsc=np.ones(N // 2 + 1) if config.half_sets else None,
            informed_up_to=7 if config.half_sets else None,
            state=SimpleNamespace(correlation=np.ones(N // 2 + 1)),
            tau=0.7,
            estimated_optics=OpticsEstimate(
                Optics(CONTRAST, DEFOCUS),
                Optics(np.full(COUNT, 0.1), np.full(COUNT, 50.0)),
                AtLimit(np.zeros(COUNT, bool), np.arange(COUNT) < seen.at_limit),
            ),
        )

    def init(particles, poses, *_, **__):
        return State(jnp.zeros((), jnp.int32), poses.shifts)

    seen.refine, seen.init = refine, init
    return seen


@pytest.fixture
def refine(run, stand_in):
    """Run the command with the stand-in."""
    engine = Engine(stand_in.init, stand_in.refine)
    implementation = partial(cli_refine.run, engine=engine)
    commands = [replace(REFINE, run=implementation), POSTPROCESS]
    return lambda *words: run(*words, commands=commands)


def command(data, *further, star="particles.star"):
    inputs = [data / star, "--map", data / "init.mrc"]
    return ["refine", *inputs, "--out", data / "out", *further]


def log(folder):
    return [json.loads(x) for x in (folder / "metrics.jsonl").read_text().splitlines()]


# --- what is written


def test_the_folder_of_a_finished_run(data, refine, stand_in):
    code, out, _ = refine(*command(data, "--iterations", 3))
    assert code == 0 and str(data / "out") in out and "half maps" not in out
    assert {path.name for path in (data / "out").iterdir()} == {
        *("particles.star", "map.mrc", "metrics.jsonl", "run.json", "state"),
        "report.html",
    }
    before = read_star(data / "particles.star")
    after = read_star(data / "out/particles.star")
    added = ["rlnLogLikeliContribution", "jaxrefineAngleStd", "jaxrefineShiftStd"]
    added += ["jaxrefineUndetermined", "jaxrefineAngleChange", "jaxrefineShiftChange"]
    assert list(after["particles"]) == [*before["particles"], *added]
    assert after["optics"] == before["optics"]
    given, refined = (read_particles(data / f"{x}particles.star") for x in ("", "out/"))
    expected = given.poses.shifts + 3 * STEP
    np.testing.assert_allclose(refined.poses.shifts, expected, atol=1e-5)
    moved = [float(x) for x in after["particles"]["jaxrefineShiftChange"]]
    np.testing.assert_allclose(moved, 3 * STEP * np.sqrt(2), atol=1e-5)
    turned = [float(x) for x in after["particles"]["jaxrefineAngleChange"]]
    np.testing.assert_allclose(turned, 0, atol=1e-4)
    np.testing.assert_allclose(
        refined.poses.rotations, given.poses.rotations, atol=1e-7
    )
    for at in (np.array([0]), np.array([COUNT - 1])):
        before_it, after_it = (file.particles.batch(at)[0] for file in (given, refined))
        np.testing.assert_array_equal(before_it, after_it)
    # Root mean squares of the angle and of the length of the shift.
    table = {name: np.array(after["particles"][name], float) for name in added}
    np.testing.assert_allclose(table[added[0]], np.arange(COUNT) - 0.5)
    np.testing.assert_allclose(table[added[1]], np.rad2deg(0.03), atol=1e-6)
    np.testing.assert_allclose(table[added[2]], 0.5)
    np.testing.assert_array_equal(table[added[3]], np.arange(COUNT) == 3)
    volume, voxel = read_mrc(data / "out/map.mrc")
    np.testing.assert_array_equal(volume, 2 * read_mrc(data / "init.mrc")[0])
    assert voxel == PIXEL
    rows = log(data / "out")
    assert rows == [{"iteration": i, "tau": [1.0, None]} for i in (1, 2, 3)]
    report = json.loads((data / "out/run.json").read_text())
    assert report["finished"] is True and report["undetermined"] == 1
    config = report["engine_config_in_radians_and_pixels"]
    assert config["iterations"] == 3 and report["settings"]["iterations"] == 3
    assert report["options"]["iterations"] == 3 and report["options"]["out"] == str(
        data / "out"
    )
    assert report["command"] == shlex.join(
        ["jaxrefine", *map(str, command(data, "--iterations", 3))]
    )
    (call,) = stand_in.calls
    assert config["multi_start"] == list(call.config.multi_start)
    assert config["tuning"] == asdict(call.config.tuning)
    assert report["wall_s"] > 0 and report["peak_rss_mib"] > 10
    affecting = {
        option.name for option in declared(RefineSettings) if option.affects_results
    }
    assert report["settings"].keys() == affecting | {"stacks"}
    assert {"jaxrefine", "jax"} <= report["versions"].keys() and report["device"]


def test_what_the_engine_is_given(data, refine, stand_in):
    options = ["--max-angle", 30, "--max-shift", 3, "--batch-size", 5, "--seed", 4]
    assert refine(*command(data, *options, "--iterations", 1)).code == 0
    (call,) = stand_in.calls
    config, default = call.config, RefineConfig()
    assert config.max_angle == pytest.approx(math.pi / 6) and config.max_shift == 3
    assert 0 < config.angle_spread < min(default.angle_spread, config.max_angle)
    assert 0 < config.shift_spread < 3 and config.batch_size == 5
    assert call.subsets is None and not config.half_sets
    assert call.particles.ctf is not None and len(call.particles) == COUNT
    assert jax.random.key_data(call.key)[-1] == 4
    np.testing.assert_array_equal(call.volume, read_mrc(data / "init.mrc")[0])
    shifts = read_particles(data / "particles.star").poses.shifts
    np.testing.assert_array_equal(call.poses.shifts, shifts)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (
            {},
            {
                "max_angle": 180,
                "angle_spread": 25.78,
                "max_shift": 6,
                "shift_spread": 2,
            },
        ),
        ({"max-angle": 30}, {"max_angle": 30, "angle_spread": 30 / math.sqrt(5)}),
        ({"max-angle": 150}, {"max_angle": 150, "angle_spread": 25.78}),
        ({"max-angle": 30, "angle-spread": 4}, {"max_angle": 30, "angle_spread": 4}),
        ({"max-shift": 5}, {"max_shift": 5, "shift_spread": 2.5}),
        ({"shift-spread": 1}, {"max_shift": 3, "shift_spread": 1}),
        ({"shift-spread": 7}, {"max_shift": 8, "shift_spread": 7}),
        ({"max-shift": 5, "shift-spread": 1}, {"max_shift": 5, "shift_spread": 1}),
        ({}, {"tau": None, "max_resolution": None, "initial_resolution": 32 / 7}),
        ({"tau": 0.5, "max-resolution": 8}, {"tau": 0.5, "max_resolution": 8}),
        (
            {"particle-diameter": 32, "iterations": 3},
            {"particle_diameter": 32, "initial_resolution": 32 / 5, "iterations": 3},
        ),
    ],
)
def test_what_options_imply_is_said_and_stored(data, refine, stand_in, given, expected):
    stand_in.stop_after = 1
    pairs = [word for name, value in given.items() for word in (f"--{name}", value)]
    result = refine(*command(data, *pairs))
    resolved = json.loads((data / "out/run.json").read_text())["resolved"]
    for name, value in expected.items():
        flag = f"--{name.replace('_', '-')}"
        (line,) = (x for x in result.err.splitlines() if x.startswith(f"{flag}: "))
        if value is None:
            assert resolved[name] is None
            assert line.endswith(("by cross-validation", "what the map supports"))
        else:
            assert resolved[name] == pytest.approx(value, rel=1e-3), name
            assert float(line.split()[1]) == pytest.approx(value, rel=1e-3)
    (call,) = stand_in.calls
    assert call.config.tau == expected.get("tau", call.config.tau)
    assert math.degrees(call.config.angle_spread) == resolved["angle_spread"]


def test_optics_groups_are_groups_of_noise(data, refine, stand_in):
    """Whatever their numbers, and whatever is done to the images."""
    path = data / "particles.star"
    blocks = read_star(path)
    blocks["optics"] = {name: 2 * text for name, text in blocks["optics"].items()}
    blocks["optics"]["rlnOpticsGroup"] = ["3", "7"]
    blocks["particles"]["rlnOpticsGroup"] = ["7", "3", "3", "7"] * 2
    write_star(path, blocks)
    assert refine(*command(data, "--normalise", "--iterations", 1)).code == 0
    (call,) = stand_in.calls
    np.testing.assert_array_equal(call.particles.group, [1, 0, 0, 1] * 2)
    written = read_particles(data / "out/particles.star")
    np.testing.assert_array_equal(written.optics_group, [7, 3, 3, 7] * 2)


@pytest.mark.parametrize("what", ["angles", "shifts"])
def test_what_is_fixed_is_written_as_it_stands(data, refine, stand_in, what):
    """Even digits that no number of ours would have."""
    blocks = read_star(data / "particles.star")
    table = blocks["particles"]
    for name in ("rlnAngleRot", "rlnOriginXAngst"):
        table[name] = [f"{value}00001" for value in table[name]]
    write_star(data / "particles.star", blocks)
    assert refine(*command(data, f"--fix-{what}", "--iterations", 1)).code == 0
    config, default = stand_in.calls[0].config, RefineConfig()
    angles = what == "angles"
    assert config.max_angle == (0 if angles else default.max_angle)
    assert config.max_shift == (default.max_shift if angles else 0)
    written = read_star(data / "out/particles.star")["particles"]
    for name, values in table.items():
        if name.startswith("rlnAngle" if angles else "rlnOrigin"):
            assert written[name] == values
    # The stand-in moves every particle.
    assert (written["rlnOriginYAngst"] == table["rlnOriginYAngst"]) == (not angles)


def test_options_of_what_is_fixed_are_not_said(data, refine):
    """There is no limit that they came to, and 0 is none that could be given."""
    words = command(data, "--fix-angles", "--fix-shifts", "--iterations", 1)
    err = refine(*words).err
    resolved = json.loads((data / "out/run.json").read_text())["resolved"]
    for what in ("angle", "shift"):
        assert not {f"max_{what}", f"{what}_spread"} & resolved.keys()
        assert f"--max-{what}" not in err and f"--{what}-spread" not in err


def test_the_report_shows_what_options_came_to(data, refine):
    assert refine(*command(data, "--iterations", 1, "--max-angle", 30)).code == 0
    page = (data / "out/report.html").read_text()
    rows = dict(re.findall(r"<th [^>]*>(--[^<]*)</th>\s*<td>([^<]*)</td>", page))
    assert rows["--max-angle"] == "30 degrees"
    assert rows["--particle-diameter"] == "21.33 angstroms"
    assert rows["--tau"] == "chosen by cross-validation"


@pytest.mark.slow
def test_band_limits_and_symmetry(data, refine, stand_in):
    """For images of 16 pixels of 2 A: shells from 32 A to 32 / 7 A."""
    for options, expected in (
        ([], ("C1", 7, 11, None, 2 / 3)),
        (["--symmetry", "d7"], ("D7", 7, 11, None, 2 / 3)),
        (["--particle-diameter", 32], ("C1", 5, 7, None, 1)),
        (["--particle-diameter", 16], ("C1", 7, 7, None, 0.5)),
        (["--max-resolution", 8], ("C1", 4, 11, 4, 2 / 3)),
        (
            ["--max-resolution", 5, "--initial-resolution", 11],
            ("C1", 2, 11, 6, 2 / 3),
        ),
    ):
        words = command(data, "--iterations", 1, *options)
        words[words.index(data / "out")] = data / f"out{len(stand_in.calls)}"
        assert refine(*words).code == 0
        config = stand_in.calls[-1].config
        found = config.symmetry, config.first_r_max, config.search_r_max
        assert (*found, config.max_r_max) == expected[:4]
        assert config.particle_diameter == pytest.approx(expected[4])


@pytest.mark.parametrize("half_sets", [False, True])
def test_masks_may_be_made_of_the_maps(data, refine, stand_in, half_sets):
    """The engine is told, and the mask of the final map is written."""
    write_mrc(data / "init.mrc", simulate.phantom(jax.random.key(0), N), PIXEL)
    words = command(data, "--mask", "auto", "--iterations", 1)
    assert refine(*words, *["--half-sets"] * half_sets).code == 0
    (call,) = stand_in.calls
    assert call.mask == AutomaticMask()
    mask, voxel = read_mrc(data / "out/mask.mrc")
    assert voxel == PIXEL and mask.min() >= 0 and mask.max() == 1
    report = json.loads((data / "out/run.json").read_text())
    assert report["settings"]["mask"] == report["options"]["mask"] == "auto"
    # A finished run is recognised; another mask is another run.
    assert "finished" in refine(*words, *["--half-sets"] * half_sets).out
    other = words[: words.index("--mask")] + ["--iterations", 1]
    refine(*other, *["--half-sets"] * half_sets).assert_refused("mask")


def test_a_file_that_is_named_like_automatic_masks_stays_a_file(
    data, refine, stand_in, monkeypatch
):
    write_mrc(data / "auto", np.ones((N, N, N)), PIXEL)
    monkeypatch.chdir(data)
    words = command(data, "--mask", "./auto", "--iterations", 1)
    assert refine(*words).code == 0
    assert not isinstance(stand_in.calls[0].mask, AutomaticMask)
    report = json.loads((data / "out/run.json").read_text())
    assert report["options"]["mask"] == str(data / "auto")
    given = shlex.split(report["command"])
    assert given[given.index("--mask") + 1] == str(data / "auto")
    assert "finished" in refine(*given[1:]).out


def test_a_mask_that_memory_runs_out_for_takes_no_table_away(data, refine, monkeypatch):
    def of(*_):
        raise MemoryError

    write_mrc(data / "init.mrc", simulate.phantom(jax.random.key(0), N), PIXEL)
    monkeypatch.setattr(AutomaticMask, "of", of)
    done = refine(*command(data, "--mask", "auto", "--iterations", 1))
    written = {path.name for path in (data / "out").iterdir()}
    assert done.code == 0 and {"particles.star", "map.mrc"} <= written
    assert "mask.mrc" not in written
    report = json.loads((data / "out/run.json").read_text())
    assert "the memory must hold some more maps" in report["no_mask_because"]
    assert report["no_mask_because"] in done.out


def test_a_map_that_no_mask_can_be_made_of_is_told_of(data, refine, monkeypatch):
    monkeypatch.setattr(AutomaticMask, "of", lambda _, volume, *__: 0 * volume + 1)
    write_mrc(data / "init.mrc", simulate.phantom(jax.random.key(0), N), PIXEL)
    done = refine(*command(data, "--mask", "auto", "--iterations", 1))
    report = json.loads((data / "out/run.json").read_text())
    reason = report["no_mask_because"]
    assert done.code == 0 and "refined without a mask" in reason
    assert reason in done.out and not (data / "out/mask.mrc").exists()


@pytest.mark.parametrize("star", ["particles.star", "plain.star"])
def test_contrast_and_defocus_are_in_the_columns(data, refine, stand_in, star):
    """RELION's, if there are transfer functions; also of a second run from there."""
    words = command(data, "--refine-scale", "--iterations", 1, star=star)
    if star == "plain.star":
        blamed = refine(*words, "--refine-defocus")
        blamed.assert_refused("--refine-defocus must be given with particles that have")
        assert refine(*words).code == 0
        table = read_star(data / "out/particles.star")["particles"]
        scale = [float(x) for x in table["jaxrefineScale"]]
        np.testing.assert_allclose(scale, CONTRAST, atol=1e-6)
        assert "rlnCtfScalefactor" not in table and "rlnDefocusU" not in table
        return
    assert refine(*words, "--refine-defocus").code == 0
    (call,) = stand_in.calls
    assert call.config.contrast_spread == 0.2 and call.config.defocus_spread == 300
    given, written = (
        there(read_particles(data / name).particles.ctf)
        for name in (star, "out/particles.star")
    )
    np.testing.assert_allclose(written.scale, given.scale * CONTRAST, rtol=1e-5)
    for name in ("defocus_u", "defocus_v"):
        change = np.asarray(getattr(written, name)) - np.asarray(getattr(given, name))
        np.testing.assert_allclose(change, DEFOCUS, atol=1e-2)
    np.testing.assert_array_equal(written.defocus_angle, given.defocus_angle)
    table = read_star(data / "out/particles.star")["particles"]
    for name, value in (("Scale", 0.1), ("Defocus", 50.0)):
        np.testing.assert_allclose(
            [float(x) for x in table[f"jaxrefine{name}Std"]], value, rtol=1e-6
        )
    again = command(
        data, "--refine-scale", "--iterations", 1, star="out/particles.star"
    )
    again[again.index(data / "out")] = data / "again"
    assert refine(*again).code == 0
    np.testing.assert_array_equal(
        there(stand_in.calls[1].particles.ctf).scale, written.scale
    )
    # The error bar is that of the factor in the table, whatever was given.
    table = read_star(data / "again/particles.star")["particles"]
    factor, error = (
        np.array([float(x) for x in table[name]])
        for name in ("rlnCtfScalefactor", "jaxrefineScaleStd")
    )
    np.testing.assert_allclose(factor, CONTRAST**2, rtol=1e-5)
    np.testing.assert_allclose(error, 0.1 * CONTRAST, rtol=1e-5)


def test_what_is_at_a_limit_is_counted(data, refine, stand_in):
    stand_in.at_limit = 3
    words = command(data, "--refine-scale", "--refine-defocus", "--iterations", 1)
    done = refine(*words)
    report = json.loads((data / "out/run.json").read_text())
    told = report["defocus_limits"]
    assert f"3 of {COUNT} particles have a defocus at the limit of 900 angs" in told
    assert report["defocus_at_limit"] == 3 and told in done.out
    assert "contrast_limits" not in report


def test_poses_that_are_known_up_to_a_group(data, refine, stand_in):
    """The engine is told; the table says which copy a pose is in, and how far off."""
    words = ["--symmetry-relax", "d2", "--symmetry", "c2", "--iterations", 1]
    assert refine(*command(data, *words)).code == 0
    (call,) = stand_in.calls
    assert (call.config.symmetry_relax, call.config.symmetry) == ("D2", "C2")
    table = read_star(data / "out/particles.star")["particles"]
    assert table["jaxrefineSymmetryCopy"] == ["1"] * COUNT
    turned = [float(x) for x in table["jaxrefineAngleChange"]]
    np.testing.assert_allclose(turned, 0, atol=1e-4)


def test_the_change_of_a_pose_is_that_from_the_nearest_copy():
    """The copy has the number of the row that `expand` would write."""
    operators = symmetry.operators("C4")
    rng = np.random.default_rng(0)
    given = Rotation.random(12, rng).as_matrix()
    turns = Rotation.from_rotvec(0.1 * rng.normal(size=(12, 3)))
    copy = rng.integers(0, 4, 12)
    refined = turns.as_matrix() @ given @ operators[copy]
    shifts = np.zeros((12, 2))
    settings = RefineSettings(
        particles=Path(), map=Path(), out=Path(), symmetry_relax="C4"
    )
    columns = _changes(settings, Poses(given, shifts), Poses(refined, shifts))
    np.testing.assert_array_equal(columns["jaxrefineSymmetryCopy"], copy + 1)
    np.testing.assert_allclose(
        columns["jaxrefineAngleChange"], np.rad2deg(turns.magnitude()), rtol=1e-6
    )


@pytest.mark.slow
def test_half_sets_are_the_files_or_dealt(data, refine, stand_in):
    code, out, _ = refine(*command(data, "--half-sets", "--iterations", 1))
    assert code == 0 and "resolution at FSC 0.143: " in out
    dealt = stand_in.calls[0].subsets
    assert sorted(dealt) == [1] * (COUNT // 2) + [2] * (COUNT // 2)
    result = data / "out/particles.star"
    np.testing.assert_array_equal(read_particles(result).random_subset, dealt)
    for i, sign in ((1, 1), (2, -1)):
        half, _ = read_mrc(data / f"out/half{i}.mrc")
        np.testing.assert_array_equal(half, read_mrc(data / "init.mrc")[0][::sign])
    report = json.loads((data / "out/run.json").read_text())
    assert report["half_set_fsc"] == [1.0] * (N // 2 + 1)
    # 16 pixels of 2 A: the seventh shell has the period 4.571 A.
    assert report["poses_informed_to_in_angstroms"] == 4.571
    assert report["limits"] in out and "--max-resolution" in report["limits"]
    # A file that says so decides.
    blocks = read_star(data / "particles.star")
    blocks["particles"]["rlnRandomSubset"] = ["1", "2"] * 4
    write_star(data / "particles.star", blocks)
    again = command(data, "--half-sets", "--iterations", 1)
    again[again.index(data / "out")] = data / "again"
    assert refine(*again).code == 0
    np.testing.assert_array_equal(stand_in.calls[1].subsets, [1, 2] * 4)
    table = read_star(data / "again/particles.star")["particles"]
    assert list(table)[-7:-5] == ["rlnRandomSubset", "rlnLogLikeliContribution"]


def processed_files(folder):
    """Names of the files that are made of half maps, and of the picture of these."""
    names = ("postprocess.mrc", "postprocess_masked.mrc", "mask.mrc")
    return [folder / name for name in names], folder / "fsc.png"


@pytest.mark.slow
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("moved", [False, True])
def test_half_sets_end_with_what_postprocess_does(
    simulated, tmp_path, refine, masked, moved
):
    """To the bit: files, figures and curves, with a mask of the user's or without.

    A mask that moves with the origin is the one that is written.
    """
    out, again, given = tmp_path / "out", tmp_path / "again", []
    if masked:
        z, y, x = np.mgrid[-8:8, -8:8, -8:8]
        ball = np.linalg.norm([z, y - 0.4, x + 0.3], axis=0) < 6
        write_mrc(tmp_path / "given.mrc", ball.astype(float), 4.0)
        given = ["--mask", tmp_path / "given.mrc"]
    words = [simulated / "particles.star", "--map", simulated / "init.mrc", *given]
    words += ["--half-sets", "--iterations", 1, "--seed", 3]
    done = refine("refine", *words, *["--recentre"] * moved, "--out", out)
    assert done.code == 0
    assert ("the origin has moved to (" in done.out) == moved
    if masked and moved:
        given = ["--mask", out / "mask.mrc"]
    words = [out / "half1.mrc", out / "half2.mrc", "--auto-b-factor", "--seed", 3]
    one_by_one = refine("postprocess", *words, *given, "--out", again)
    assert one_by_one.code == 0
    assert done.out.splitlines()[2 + moved :] == one_by_one.out.splitlines()
    (maps, picture), (expected, _) = processed_files(out), processed_files(again)
    for found, other in zip(maps, expected, strict=True):
        (volume, voxel), (same, same_voxel) = read_mrc(found), read_mrc(other)
        np.testing.assert_array_equal(volume, same)
        assert voxel == same_voxel == 4.0
    assert picture.read_bytes().startswith(b"\x89PNG")
    report = json.loads((out / "run.json").read_text())["postprocess"]
    alone = json.loads((again / "postprocess.json").read_text())
    assert report.pop("mask_moved_with_the_origin") == (masked and moved)
    assert report.items() <= alone.items() and "resolution_in_angstroms" in report
    assert (report["mask"] is not None) == masked
    page = (out / "report.html").read_text()
    mask = "the given mask" if masked else "an automatic mask"
    if masked and moved:
        mask += ", moved with the origin"
    assert f"Masked: within {mask}." in page and "Resolution without a mask" in page


def test_half_maps_that_cannot_be_processed_end_no_refinement(
    data, run, stand_in, refine
):
    """Poses and map are written, and a sentence says why there is no more."""
    engine = stand_in.refine

    def with_one_half(*words, **further):
        result = engine(*words, **further)
        result.half_maps = (result.half_maps[0],) * 2
        return result

    implementation = partial(
        cli_refine.run, engine=Engine(stand_in.init, with_one_half)
    )
    words = command(data, "--half-sets", "--iterations", 1)
    done = run(*words, commands=[replace(REFINE, run=implementation)])
    reason = "the half maps must be made from two sets of particles"
    assert done.code == 0
    assert f"the half maps were not post-processed: {reason}" in done.out
    # The stand-in's curve is 1 everywhere: to the last complete shell, 7 of 16 pixels.
    figure = f"{N * PIXEL / 7:.2f} A or better"
    assert f"resolution at FSC 0.143: {figure} (without a mask)" in done.out
    assert reason in (data / "out/report.html").read_text()
    report = json.loads((data / "out/run.json").read_text())
    assert report["finished"] and reason in report["not_postprocessed_because"]
    assert "postprocess" not in report
    maps, picture = processed_files(data / "out")
    assert not any(path.exists() for path in [*maps, picture])
    assert (data / "out/half2.mrc").exists() and (data / "out/report.html").exists()


class OutOfDeviceMemory(jax.errors.JaxRuntimeError):
    """What JAX raises then."""

    def __init__(self):
        super().__init__("RESOURCE_EXHAUSTED: out of memory")


@pytest.mark.parametrize("error", [MemoryError, OutOfDeviceMemory])
@pytest.mark.parametrize(
    ("options", "step", "told", "key"),
    [
        (
            ["--recentre"],
            "centre.translated",
            "the origin was not moved",
            "not_recentred_because",
        ),
        (
            ["--half-sets"],
            "postprocess",
            "the half maps were not post-processed",
            "not_postprocessed_because",
        ),
    ],
)
def test_memory_that_runs_out_at_the_end_ends_no_refinement(
    data, refine, monkeypatch, options, step, told, key, error
):
    """Poses and map are results without what there is no memory for."""

    def fail(*words, **further):
        raise error

    z, y, x = np.mgrid[-8:8, -8:8, -8:8]
    write_mrc(data / "init.mrc", np.exp(-(x**2 + y**2 + (z - 1) ** 2) / 4), PIXEL)
    monkeypatch.setattr(f"jaxrefine.cli._ending.{step}", fail)
    options = [*options, "--iterations", 1, "--trust-contrast"]
    done = refine(*command(data, *options))
    reason = "the memory must hold some more maps at the end, got too little"
    assert done.code == 0 and f"{told}: {reason}" in done.out
    report = json.loads((data / "out/run.json").read_text())
    assert report["finished"] and report[key] == reason
    assert "recentred_by_in_voxels" not in report and "postprocess" not in report
    assert f"{told}: {reason}" in (data / "out/report.html").read_text()
    given, written = (read_particles(data / f"{x}particles.star") for x in ("", "out/"))
    expected = given.poses.shifts + STEP
    np.testing.assert_allclose(written.poses.shifts, expected, atol=1e-5)


def test_another_error_at_the_end_is_not_hidden(data, refine, monkeypatch):
    def fail(*words, **further):
        raise jax.errors.JaxRuntimeError("INTERNAL: a bug")

    monkeypatch.setattr("jaxrefine.cli._ending.postprocess", fail)
    with pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL"):
        refine(*command(data, "--half-sets", "--iterations", 1))


# --- the origin


@pytest.mark.slow
@pytest.mark.parametrize("masked", [False, True])
def test_a_refinement_that_is_recentred_gives_the_same_images(
    data, tmp_path, refine, masked
):
    """But for its origin, which is at the centre of mass: of the map, or of the mask.

    The tables differ by the same motion, also of a particle that is undetermined.
    """
    place = np.array([1.5, -1.0, 0.4])  # the stand-in turns half2.mrc upside down
    z, y, x = np.mgrid[-8:8, -8:8, -8:8]
    away = (x - place[0]) ** 2 + (y - place[1]) ** 2 + (z - place[2]) ** 2
    write_mrc(data / "init.mrc", np.exp(-away / 4), PIXEL)
    options = ["--iterations", 1, "--half-sets", "--trust-contrast"]
    if masked:
        write_mrc(data / "mask.mrc", (away < 9).astype(float), PIXEL)
        places = np.argwhere(away < 9).mean(axis=0)[::-1]
        options, place = [*options, "--mask", data / "mask.mrc"], places - 8
    plain = command(data, *options)
    assert refine(*plain).code == 0
    moved = command(data, *options, "--recentre")
    moved[moved.index(data / "out")] = data / "moved"
    done = refine(*moved)
    assert done.code == 0 and "the origin has moved to (" in done.out
    report = json.loads((data / "moved/run.json").read_text())
    np.testing.assert_allclose(report["recentred_by_in_voxels"], place, atol=0.05)

    first, second = (
        read_particles(data / f"{x}/particles.star") for x in ("out", "moved")
    )
    change = np.asarray(second.poses.shifts) - np.asarray(first.poses.shifts)
    expected = (
        np.asarray(first.poses.rotations)[:, :2] @ report["recentred_by_in_voxels"]
    )
    np.testing.assert_allclose(change, expected, atol=1e-5)
    for name in ("map", "half1", "half2"):
        images = [
            simulate.slice_projector(
                jnp.asarray(read_mrc(data / f"{x}/{name}.mrc")[0])
            )(jax.tree.map(lambda leaf: leaf.astype(jnp.float32), file.poses))
            for x, file in (("out", first), ("moved", second))
        ]
        scale = np.abs(images[0]).max()
        np.testing.assert_allclose(images[0], images[1], atol=2e-3 * scale)
    volume, mask = (read_mrc(data / f"moved/{x}.mrc")[0] for x in ("map", "mask"))
    found = centre.centre_of_mass(mask if masked else np.clip(volume, 0, None))
    np.testing.assert_allclose(found, 0, atol=0.05)
    # How far poses have moved does not tell of the origin.
    tables = [
        read_star(data / f"{x}/particles.star")["particles"] for x in ("out", "moved")
    ]
    for name in ("jaxrefineShiftChange", "rlnAngleRot"):
        assert tables[0][name] == tables[1][name]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--symmetry", "D2"], "leaves the origin free along an axis"),
        (["--symmetry", "O"], "such as C1 or C4, got O"),
        (["--fix-shifts"], "--recentre must not be given with --fix-shifts"),
    ],
)
def test_an_origin_that_cannot_move_is_a_sentence(data, refine, options, words):
    refine(*command(data, "--recentre", *options)).assert_refused(words)
    assert not (data / "out").exists()


def test_a_map_without_a_centre_stays_where_it_is(data, run, stand_in):
    """Poses and map are written, and a sentence says why the origin has not moved."""
    engine = stand_in.refine

    def empty(*words, **further):
        result = engine(*words, **further)
        result.volume = 0 * result.volume
        return result

    implementation = partial(cli_refine.run, engine=Engine(stand_in.init, empty))
    words = command(data, "--recentre", "--iterations", 1)
    done = run(*words, commands=[replace(REFINE, run=implementation)])
    assert done.code == 0
    assert "the origin was not moved: the map that a mask is made from" in done.out
    report = json.loads((data / "out/run.json").read_text())
    assert report["finished"] and "not_recentred_because" in report
    given, written = (read_particles(data / f"{x}particles.star") for x in ("", "out/"))
    expected = given.poses.shifts + STEP
    np.testing.assert_allclose(written.poses.shifts, expected, atol=1e-5)


def test_a_particle_that_would_leave_the_box_stays_where_it_is(data, refine):
    """The mask is far from it: the origin would be at the mask's centre."""
    z, y, x = np.mgrid[-8:8, -8:8, -8:8]
    write_mrc(data / "init.mrc", np.exp(-(x**2 + y**2 + z**2) / 4), PIXEL)
    mask = x**2 + (y - 6) ** 2 + z**2 < 4
    write_mrc(data / "mask.mrc", mask.astype(float), PIXEL)
    words = ["--recentre", "--iterations", 1, "--half-sets", "--trust-contrast"]
    done = refine(*command(data, *words, "--mask", data / "mask.mrc"))
    told = "the particle must stay within the box when its origin moves, got "
    assert done.code == 0 and f"the origin was not moved: {told}" in done.out
    report = json.loads((data / "out/run.json").read_text())
    assert report["not_recentred_because"].startswith(told)
    assert report["postprocess"]["mask"] == str(data / "mask.mrc")
    assert not report["postprocess"]["mask_moved_with_the_origin"]
    written, start = (read_mrc(data / x)[0] for x in ("out/map.mrc", "init.mrc"))
    # The stand-in changes the scale of the map.
    np.testing.assert_allclose(written / written.max(), start / start.max(), rtol=1e-6)


# --- resuming


def test_a_run_carries_on_where_it_stopped(data, refine, stand_in):
    stand_in.stop_after = 2
    code, out, err = refine(*command(data, "--iterations", 4))
    assert code == 130 and not out and err.endswith("interrupted\n")
    assert not json.loads((data / "out/run.json").read_text())["finished"]
    assert not (data / "out/particles.star").exists()
    # Killed after a row, before its checkpoint.
    with (data / "out/metrics.jsonl").open("a") as file:
        file.write('{"iteration": 3}\n')
    stand_in.stop_after = None
    assert refine(*command(data, "--iterations", 4)).code == 0
    assert stand_in.iterations == [1, 2, 3, 4]
    assert [row["iteration"] for row in log(data / "out")] == [1, 2, 3, 4]
    given, refined = (read_particles(data / f"{x}particles.star") for x in ("", "out/"))
    expected = given.poses.shifts + 4 * STEP
    np.testing.assert_allclose(refined.poses.shifts, expected, atol=1e-5)


def test_a_run_that_stopped_at_once_begins_again(data, refine, stand_in):
    stand_in.stop_after = 0
    assert refine(*command(data, "--iterations", 2)).code == 130
    stand_in.stop_after = None
    assert refine(*command(data, "--iterations", 2)).code == 0
    assert stand_in.iterations == [1, 2]


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="Linux tells names")
def test_a_disk_that_fills_at_the_end_leaves_whole_files(
    data, refine, stand_in, monkeypatch
):
    """Whichever result does not fit: the others are whole, and the run carries on."""
    finals = ("map.mrc", "half1.mrc", "half2.mrc", "particles.star")
    finals += ("postprocess.mrc", "postprocess_masked.mrc", "mask.mrc", "fsc.png")
    finals += ("report.html",)
    words = command(data, "--iterations", 2, "--half-sets")
    out = data / "out"
    assert refine(*words).code == 0

    def content(name):
        """Of a file; a map's header has the time in it, and a report, too."""
        path = out / name
        if path.suffix == ".html":
            return path.read_text().rstrip().endswith("</html>")
        is_map = path.suffix == ".mrc"
        return read_mrc(path)[0].tobytes() if is_map else path.read_bytes()

    exact = {name: content(name) for name in finals}
    shutil.rmtree(out)
    fsync, written = os.fsync, []

    def full(descriptor):
        """Keep half of a file, and say so, as a full disk does."""
        name = Path(os.readlink(f"/proc/self/fd/{descriptor}")).name
        if name.startswith(f".{last}."):
            written.append(name)
            os.truncate(descriptor, os.fstat(descriptor).st_size // 2)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    for count, last in enumerate(finals):
        refine(*words).assert_refused(f"cannot write {out / last}: No space left")
        assert len(written) == count + 1
        assert not json.loads((out / "run.json").read_text())["finished"]
        present = {path.name for path in out.iterdir()}
        assert present == {"run.json", "metrics.jsonl", "state", *finals[:count]}
        assert all(content(name) == exact[name] for name in finals[:count])
    monkeypatch.undo()
    done = refine(*words)
    assert done.code == 0 and stand_in.iterations == [1, 2, 1, 2]
    assert all(content(name) == exact[name] for name in finals)


def test_a_finished_run_is_left_alone(data, refine, stand_in):
    assert refine(*command(data, "--iterations", 2)).code == 0
    files = [path for path in (data / "out").rglob("*") if path.is_file()]
    before = {path: path.stat().st_mtime_ns for path in files}
    code, out, err = refine(*command(data, "--iterations", 2))
    assert code == 0 and "already, finished" in out and not err
    assert before == {path: path.stat().st_mtime_ns for path in files}
    assert len(stand_in.calls) == 1


OTHERS = {
    "iterations": ["--iterations", 3],
    "seed": ["--seed", 1],
    "max_angle": ["--max-angle", 20],
    "half_sets": ["--half-sets"],
    "symmetry": ["--symmetry", "C2"],
    "fix_angles": ["--fix-angles"],
}


@pytest.mark.parametrize("finished", [True, False])
def test_other_settings_and_inputs_are_refused(data, refine, stand_in, finished):
    first = command(data, "--iterations", 2)
    stand_in.stop_after = None if finished else 1
    assert refine(*first).code == (0 if finished else 130)
    report = (data / "out/run.json").read_bytes()
    for name, options in OTHERS.items():
        refine(*first, *options).assert_refused(f"other settings ({name}); ")
    initial = (data / "init.mrc").read_bytes()
    write_mrc(data / "init.mrc", 2 * read_mrc(data / "init.mrc")[0], PIXEL)
    refine(*first).assert_refused("other settings (map)")
    (data / "init.mrc").write_bytes(initial)
    other = command(data, "--iterations", 2, star="plain.star")
    refine(*other).assert_refused("other settings (particles)")
    assert (data / "out/run.json").read_bytes() == report
    # Results do not depend on the memory, and a finished run needs none.
    stand_in.stop_after = None
    assert refine(*first, "--batch-size", 3).code == 0
    code, out, _ = refine(*first, "--memory", 0.001)
    assert code == 0 and "finished" in out


@pytest.mark.parametrize("finished", [True, False])
def test_other_images_are_refused_wherever_they_lie(data, refine, stand_in, finished):
    """Stacks of the same size and names, in another folder; copies are the same run."""
    folders = [data / name for name in ("images", "copies", "others")]
    stack = (data / "particles.mrcs").read_bytes()
    (data / "particles.mrcs").unlink()
    changed = stack[:-4] + np.float32(0.5).tobytes()
    for folder, content in zip(folders, (stack, stack, changed), strict=True):
        folder.mkdir()
        (folder / "particles.mrcs").write_bytes(content)

    def from_folder(folder: Path):
        return refine(*command(data, "--iterations", 2, "--datadir", folder))

    stand_in.stop_after = None if finished else 1
    assert from_folder(folders[0]).code == (0 if finished else 130)
    stand_in.stop_after = None
    from_folder(folders[2]).assert_refused("other settings (stacks)")
    assert from_folder(folders[1]).code == 0
    assert len(stand_in.iterations) == 2


def test_stacks_that_were_written_since_are_told_of(
    data, refine, stand_in, monkeypatch
):
    """Of large ones only a sample of the content counts, and the time is no proof."""
    monkeypatch.setattr("jaxrefine.runs.fingerprint._SAMPLE", 1)
    words = "have been written since this run began"
    stand_in.stop_after = 1
    assert words not in refine(*command(data, "--iterations", 2)).err
    stand_in.stop_after = None
    os.utime(data / "particles.mrcs", (1e9, 1e9))
    done = refine(*command(data, "--iterations", 2))
    assert done.code == 0 and words in done.err
    report = (data / "out/run.json").read_bytes()
    done = refine(*command(data, "--iterations", 2))
    assert words in done.err and "finished" in done.out
    assert (data / "out/run.json").read_bytes() == report


def test_a_folder_of_an_older_version(data, refine, stand_in):
    """That knew fewer options: they were not given."""
    first = command(data, "--iterations", 2)
    assert refine(*first).code == 0
    report = json.loads((data / "out/run.json").read_text())
    for name in ("mask", "resample", "max_angle"):
        assert not report["settings"].pop(name)
    (data / "out/run.json").write_text(json.dumps(report))
    assert "finished" in refine(*first).out
    refine(*first, "--resample").assert_refused("other settings (resample)")


@pytest.mark.slow
def test_what_is_not_modelled_is_said(data, refine, stand_in):
    """No defocus at all, and aberrations of single particles."""
    _, _, err = refine(*command(data, "--iterations", 1))
    assert "defocus" not in err
    words = command(data, "--iterations", 1, star="plain.star")
    words[words.index(data / "out")] = data / "plain"
    assert "plain.star gives no defocus: " in refine(*words).err
    blocks = read_star(data / "particles.star")
    blocks["optics"] |= {"rlnBeamTiltX": ["3.0"], "rlnMagMat00": ["1.05"]}
    blocks["optics"] |= {"rlnMagMat01": ["0"], "rlnMagMat10": ["0"]}
    blocks["optics"] |= {"rlnMagMat11": ["1"]}
    blocks["optics"] |= {"rlnMtfFileName": ["mtf.star"]}
    count = len(blocks["particles"]["rlnImageName"])
    blocks["particles"] |= {
        "rlnBeamTiltY": ["0.5"] * count,
        "rlnMagMat11": ["1"] * count,
    }
    write_star(data / "tilted.star", blocks)
    words = command(data, "--iterations", 1, star="tilted.star")
    words[words.index(data / "out")] = data / "tilted"
    code, _, err = refine(*words)
    assert code == 0
    assert "tilted.star: rlnBeamTiltY, rlnMtfFileName are ignored\n" in err


# --- bad input

BAD_OPTIONS = [
    ["--iterations", 0],
    ["--batch-size", 0],
    ["--max-angle", 0],
    ["--max-angle", 181],
    ["--max-angle", "nan"],
    ["--max-shift", -1],
    ["--max-shift", "inf"],
    ["--max-shift", 8.5],
    ["--shift-spread", 100],
    ["--seed", -1],
    ["--seed", 2**31],
    ["--max-resolution", 1],
    ["--particle-diameter", 33],
    ["--particle-diameter", "nan"],
    ["--max-resolution", 9, "--initial-resolution", 8],
    ["--max-shift", 3, "--fix-shifts"],
    ["--angle-spread", 3, "--fix-angles"],
    ["--tau", 0],
    ["--tau", "inf"],
    ["--preset", "paper"],
    ["--preset", "released"],
]


@pytest.mark.parametrize("bad", BAD_OPTIONS, ids=lambda bad: f"{bad[0]} {bad[1]}")
def test_a_bad_option_is_a_sentence(data, refine, stand_in, bad):
    words = "contrast-transfer" if bad[0] == "--preset" else bad[0]
    refine(*command(data, *bad)).assert_refused(words)
    assert not (data / "out").exists() and not stand_in.calls


@pytest.mark.parametrize(
    "option",
    [
        *(["--half-sets"], ["--max-angle", 9], ["--max-shift", 9]),
        *(["--symmetry", "C2"], ["--fix-angles"], ["--max-resolution", 9]),
        *(["--tau", 1], ["--angle-spread", 9], ["--memory", 2]),
    ],
)
def test_what_the_published_presets_cannot(data, run, option):
    bad = command(data, "--preset", "released", *option, star="plain.star")
    run(*bad).assert_refused(f"{option[0]} must be given with --preset default")
    assert not (data / "out").exists()


def of_another_size(data):
    write_mrc(data / "init.mrc", np.ones((N + 2,) * 3), PIXEL)


def of_another_voxel(data):
    write_mrc(data / "init.mrc", np.ones((N,) * 3), PIXEL * 1.01)


def of_zeros(data):
    write_mrc(data / "init.mrc", np.zeros((N,) * 3), PIXEL)


def used(data):
    (data / "out").mkdir()
    (data / "out/thesis.tex").write_text("precious")


def of_something_else(data):
    (data / "out").mkdir()
    (data / "out/run.json").write_text("[1]")


def odd(data):
    images = np.random.default_rng(1).normal(size=(COUNT, N + 1, N + 1))
    write_stack(data / "particles.mrcs", images.astype(np.float32), PIXEL)
    star = data / "particles.star"
    text = star.read_text()
    blocks = read_star(star)
    blocks["optics"]["rlnImageSize"] = [str(N + 1)]
    write_star(star, blocks)
    assert star.read_text() != text


BAD_INPUTS = {
    of_another_size: "got 18^3 voxels",
    of_another_voxel: "voxels of 2.02 A",
    of_zeros: "init.mrc must not be zero everywhere",
    lambda data: (data / "init.mrc").unlink(): "init.mrc does not exist",
    lambda data: (data / "particles.mrcs").unlink(): "names particles.mrcs, which",
    lambda data: (data / "particles.star").write_text("no"): "not a STAR file",
    lambda data: (data / "out").write_text("a file"): "out must be a folder, got",
    odd: "got images of 17 x 17 pixels",
    used: "holds files but no run.json",
    of_something_else: "run.json must be the report of a run",
}


@pytest.mark.parametrize("damage", BAD_INPUTS)
def test_bad_input_is_a_sentence(data, refine, stand_in, damage):
    damage(data)
    before = {path: path.stat().st_size for path in sorted(data.rglob("*"))}
    refine(*command(data)).assert_refused(BAD_INPUTS[damage])
    assert not stand_in.calls
    assert before == {path: path.stat().st_size for path in sorted(data.rglob("*"))}


def test_what_is_left_out_is_counted_apart(data, refine):
    """From particles that show nothing; all are marked in the table."""
    path = data / "particles.mrcs"
    content = bytearray(path.read_bytes())
    content[1024 : 1024 + 8 * N * N] = bytes(8 * N * N)  # two images
    path.write_bytes(content)
    done = refine(*command(data, "--iterations", 1))
    words = "; 1 show no particle, and are not in the map; 2 were left out\n"
    assert done.code == 0 and words in done.out
    report = json.loads((data / "out/run.json").read_text())
    assert (report["undetermined"], report["left_out"]) == (1, 2)
    table = read_star(data / "out/particles.star")["particles"]
    assert table["jaxrefineUndetermined"] == list("11000100")


@pytest.mark.parametrize("count", [4, 5])
def test_images_that_are_mostly_noise_are_told_of(data, refine, stand_in, count):
    """The line, the report and run.json warn of a map that resembles the first one."""
    stand_in.undetermined = list(range(count))
    done = refine(*command(data, "--iterations", 1))
    warning = f"{count} of {COUNT} images show no more of the particle than images of"
    is_most = 2 * count > COUNT
    assert done.code == 0 and (warning in done.out) == is_most
    page = (data / "out/report.html").read_text()
    assert (warning in page) == ("reference bias" in page) == is_most
    report = json.loads((data / "out/run.json").read_text())
    assert report["reference_bias"] is is_most


@pytest.mark.parametrize("discarded", [None, 1, 2])
def test_an_iteration_that_was_discarded_is_told_of(data, refine, stand_in, discarded):
    """If it is the last, whose poses and map are then not those that are written."""
    stand_in.discarded = discarded
    done = refine(*command(data, "--iterations", 2))
    words = "the last iteration made the half sets agree less and was discarded"
    page = (data / "out/report.html").read_text()
    assert done.code == 0
    assert (words in done.out.splitlines()) == (words in page) == (discarded == 2)


def test_a_map_of_no_image_is_said_to_be_empty(data, refine, stand_in):
    stand_in.undetermined = list(range(COUNT))
    done = refine(*command(data, "--iterations", 1))
    assert done.code == 0 and f"{COUNT} of {COUNT} images show no more" in done.out
    assert "the map is empty" in done.out and "resemble" not in done.out


@pytest.mark.parametrize(
    ("words", "fixed"),
    [
        ([], []),
        (["--fix-angles"], ["angles"]),
        (["--fix-shifts"], ["shifts"]),
        (["--fix-angles", "--fix-shifts"], ["angles", "shifts"]),
    ],
)
def test_what_is_fixed_is_said_not_to_be_paid_for(data, refine, words, fixed):
    """By the evidence for a particle; in the line, the report and run.json."""
    done = refine(*command(data, *words, "--iterations", 1))
    said = f"the {' and the '.join(fixed)} are fixed, and taken to be known for certain"
    page = (data / "out/report.html").read_text()
    assert done.code == 0 and (said in done.out) == (said in page) == bool(fixed)
    report = json.loads((data / "out/run.json").read_text())
    assert report["fixed_and_not_paid_for"] == fixed


def test_a_finished_run_of_a_published_preset_is_not_prepared_again(
    data, run, monkeypatch
):
    words = command(data, "--preset", "released", "--iterations", 1, star="plain.star")
    assert run(*words).code == 0

    def fail(*_, **__):
        raise AssertionError

    monkeypatch.setattr("jaxrefine.cli._published.prepare", fail)
    done = run(*words)
    assert done.code == 0 and "holds this refinement already" in done.out


@pytest.mark.slow
@pytest.mark.parametrize("preset", ["default", "released"])
@pytest.mark.parametrize(
    ("values", "words"),
    [([np.nan], "must be finite, got"), ([0] * N**2, "must not be constant, got 0")],
)
def test_an_image_that_is_none(data, run, preset, values, words):
    """It is named and marked, keeps its pose, and no other result depends on it."""
    path = data / "particles.mrcs"
    content = bytearray(path.read_bytes())
    place, new = 1024 + 4 * N * N * 5, np.array(values, np.float32).tobytes()
    content[place : place + len(new)] = new
    path.write_bytes(content)
    words_of_run = command(
        data, "--preset", preset, "--iterations", 1, star="plain.star"
    )
    done = run(*words_of_run)
    assert done.code == 0 and f"particles.mrcs {words}" in done.err
    table = read_star(data / "out/particles.star")["particles"]
    assert table["jaxrefineUndetermined"][5] == "1"
    given = read_star(data / "plain.star")["particles"]
    for name in ("rlnAngleRot", "rlnOriginXAngst"):
        assert table[name][5] == given[name][5]
    # As if it were not in the table.
    fewer = {name: x[:5] + x[6:] for name, x in given.items()}
    blocks = read_star(data / "plain.star") | {"particles": fewer}
    write_star(data / "fewer.star", blocks)
    again = command(data, "--preset", preset, "--iterations", 1, star="fewer.star")
    again[again.index(data / "out")] = data / "again"
    assert run(*again).code == 0
    maps = [read_mrc(data / f"{x}/map.mrc")[0] for x in ("out", "again")]
    np.testing.assert_array_equal(maps[0], maps[1])
    others = read_star(data / "again/particles.star")["particles"]
    assert table["rlnAngleRot"][:5] + table["rlnAngleRot"][6:] == others["rlnAngleRot"]


def test_a_resumed_run_may_have_other_batches(data, refine, stand_in):
    """They change no result: it is planned anew, for the memory that is free now."""
    stand_in.stop_after = 1
    refine(*command(data, "--iterations", 4))
    stand_in.stop_after = None
    assert refine(*command(data, "--iterations", 4, "--batch-size", 2)).code == 0
    assert [call.config.batch_size for call in stand_in.calls] == [COUNT, 2]


# --- the real ones


def interrupted_after_an_iteration():
    return interrupted_after(lambda path: path.name == "checkpoint.eqx")


@pytest.mark.slow
def test_the_published_algorithm_runs_and_resumes(data, run):
    """An interrupted run ends as an uninterrupted one."""
    words = ["--preset", "released", "--iterations", 2]
    assert run(*command(data, *words, star="plain.star")).code == 0
    undisturbed = read_mrc(data / "out/map.mrc")[0]
    assert undisturbed.std() > 0
    assert [row["iteration"] for row in log(data / "out")] == [1, 2]
    again = command(data, *words, star="plain.star")
    again[again.index(data / "out")] = data / "again"
    with interrupted_after_an_iteration():
        assert run(*again).code == 130
    assert run(*again).code == 0
    np.testing.assert_array_equal(read_mrc(data / "again/map.mrc")[0], undisturbed)
    tables = [read_star(data / f"{x}/particles.star") for x in ("out", "again")]
    assert tables[0] == tables[1]


@pytest.mark.slow
def test_the_production_engine_runs_and_resumes(simulated, tmp_path, run):
    """Poses and map come closer to the truth; a stopped run ends like others."""
    start = ["refine", simulated / "particles.star", "--map", simulated / "init.mrc"]
    start += ["--iterations", 2, "--max-shift", 2]
    assert run(*start, "--out", tmp_path / "undisturbed").code == 0
    errors = []
    for table in (simulated / "init.star", tmp_path / "undisturbed/particles.star"):
        words = ["evaluate", table, simulated / "truth.star", "--json"]
        assert run(*words, tmp_path / "errors.json").code == 0
        errors.append(json.loads((tmp_path / "errors.json").read_text()))
    for figure in ("angle_error_in_degrees_median", "shift_error_in_pixels_median"):
        assert errors[1][figure] < 0.5 * errors[0][figure]
    assert errors[1]["matched_by"] == "image name"

    with interrupted_after_an_iteration():
        assert run(*start, "--out", tmp_path / "stopped").code == 130
    assert run(*start, "--out", tmp_path / "stopped").code == 0
    for name in ("undisturbed", "stopped"):
        assert [row["iteration"] for row in log(tmp_path / name)] == [1, 2]
    undisturbed, stopped = (
        read_mrc(tmp_path / f"{name}/map.mrc")[0] for name in ("undisturbed", "stopped")
    )
    # Sums over particles in threads differ from run to run, by rounding.
    np.testing.assert_allclose(undisturbed, stopped, atol=1e-3 * undisturbed.max())
    undisturbed, stopped = (
        read_particles(tmp_path / f"{name}/particles.star").poses.shifts
        for name in ("undisturbed", "stopped")
    )
    np.testing.assert_allclose(undisturbed, stopped, atol=3e-3)


@pytest.mark.slow
def test_half_sets_are_refined_with_masks(simulated, tmp_path, run):
    """Poses improve, and the maps that are written have a solvent."""
    square = (np.arange(N) - N // 2) ** 2
    away = np.sqrt(square[:, None, None] + square[:, None] + square)
    mask = np.clip((7 - away) / 2, 0, 1)
    write_mrc(tmp_path / "mask.mrc", mask, 4.0)
    words = ["refine", simulated / "particles.star", "--map", simulated / "init.mrc"]
    words += ["--mask", tmp_path / "mask.mrc", "--mask-images", "--normalise"]
    words += ["--half-sets", "--iterations", 2, "--max-shift", 2]
    assert run(*words, "--out", tmp_path / "out").code == 0
    errors = []
    for table in (simulated / "init.star", tmp_path / "out/particles.star"):
        words = ["evaluate", table, simulated / "truth.star", "--json"]
        assert run(*words, tmp_path / "errors.json").code == 0
        found = json.loads((tmp_path / "errors.json").read_text())
        errors.append(found["angle_error_in_degrees_median"])
    assert errors[1] < 0.6 * errors[0]
    for name in ("map", "half1", "half2"):
        assert read_mrc(tmp_path / f"out/{name}.mrc")[0][mask == 0].any()


@pytest.mark.slow
def test_images_are_prepared_as_asked(data, refine, stand_in):
    """Inverted and normalised images are what the engine gets; the files stay."""
    before = (data / "particles.mrcs").read_bytes()
    refine(*command(data, "--iterations", 1))
    words = ("--invert", "--particle-diameter", 20, "--iterations", 1)
    more = command(data, *words)
    more[more.index(data / "out")] = data / "inverted"
    code, _, err = refine(*more)
    assert code == 0 and "particles at a time" in err
    plain, inverted = (
        call.particles.batch(np.arange(COUNT))[0] for call in stand_in.calls
    )
    axis = np.arange(N) - N // 2
    around = axis**2 + axis[:, None] ** 2 > 5**2
    expected = np.asarray(plain)
    expected = expected - expected[:, around].mean(axis=1)[:, None, None]
    expected /= -expected[:, around].std(axis=1)[:, None, None]
    np.testing.assert_allclose(inverted, expected, atol=1e-5)
    assert (data / "particles.mrcs").read_bytes() == before
    small = command(data, "--memory", 0.001)
    small[small.index(data / "out")] = data / "small"
    refine(*small).assert_refused("GiB")
    assert not (data / "small").exists()
