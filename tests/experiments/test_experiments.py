"""The studies run, resume, and refuse to mix configurations."""

import importlib
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from argparse import Namespace
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrefine import io
from jaxrefine.errors import InputError
from jaxrefine.euler import euler_to_matrix
from jaxrefine.geometry import Poses, geodesic_distance, mirror
from jaxrefine.io import write_json, write_mrc
from jaxrefine.maps.align import move_map
from jaxrefine.maps.fsc import fsc
from jaxrefine.poses.matching import MatchConfig
from jaxrefine.refinement.config import RefineConfig
from jaxrefine.simulate import equidistributed_rotations, phantom

EXPERIMENTS = Path(__file__).resolve().parents[2] / "experiments"

FAST = ["--preset", "smoke", "--set", "particles=6", "--set", "paper_iterations=1"]
FAST += ["--set", "methods=['published']"]


def run(*words: str, cwd: Path, env=None) -> subprocess.CompletedProcess:
    command = [sys.executable, str(EXPERIMENTS / "init1.py"), "configs/hjc_init1.toml"]
    return subprocess.run(
        [*command, *words],
        capture_output=True,
        text=True,
        cwd=cwd,
        check=False,
        env=env,
    )


def timeless(path: Path) -> dict:
    """Read results without the times and commits that may differ from run to run."""

    def strip(value):
        if isinstance(value, dict):
            dropped = ("wall_s", "elapsed_s", "commit", "dirty")
            return {k: strip(v) for k, v in value.items() if k not in dropped}
        return [strip(v) for v in value] if isinstance(value, list) else value

    return strip(json.loads((path / "metrics.json").read_text()))


REFINED = Path("work/joint_released/state.eqx")

STOP = """
import sys
_, experiments, moment, *words = sys.argv
sys.argv = ["init1.py", *words]
sys.path.insert(0, experiments)
import harness, init1
from jaxrefine import io

original = getattr(io, moment)

def stopping(path, *content):
    original(path, *content)
    state = path.parent / "work/joint_released/state.eqx"
    stored = path.name == "metrics.json" and state.exists()
    if stored or path.parent.name == "joint_released":
        raise KeyboardInterrupt

setattr(io, moment, stopping)
sys.exit(harness.main(init1.main))
"""


@pytest.mark.slow
def test_interrupted_study_resumes_to_the_same_numbers(tmp_path):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    first = run(*FAST, "--out", str(whole), cwd=tmp_path)
    assert first.returncode == 0, first.stderr
    assert "| oracle (paper) |" in first.stdout
    for name in ("config.json", "provenance.json", "metrics.json", "done", "table.md"):
        assert (whole / name).exists()
    assert "phantom" in json.loads((whole / "config.json").read_text())["map"]

    # Stopped twice: in the middle of the first method that refines poses, and when it
    # has its result but still its checkpoint, which is not the next method's.
    words = ["configs/hjc_init1.toml", *FAST, "--out", str(broken)]
    for moment in ("save_checkpoint", "write_json"):
        stopped = subprocess.run(
            [sys.executable, "-c", STOP, str(EXPERIMENTS), moment, *words],
            check=False,
            capture_output=True,
            text=True,
            cwd=tmp_path,
        )
        assert stopped.returncode == 130, stopped.stderr
        assert "interrupted; the same command resumes" in stopped.stderr
        assert "Traceback" not in stopped.stderr
        assert [*broken.glob("work/*/state.eqx")] == [broken / REFINED]
        assert not (broken / "done").exists()
    assert "joint (released)" in timeless(broken)
    second = run(*FAST, "--out", str(broken), cwd=tmp_path)
    assert second.returncode == 0, second.stderr
    assert timeless(broken) == timeless(whole)
    assert not list(broken.glob("work/*/state.eqx"))
    for path in (whole / "maps").iterdir():
        assert (
            path.read_bytes()[1024:]
            == (broken / "maps" / path.name).read_bytes()[1024:]
        )

    stamp = (whole / "metrics.json").stat().st_mtime_ns
    again = run(*FAST, "--out", str(whole), cwd=tmp_path)
    assert again.returncode == 0
    assert "| oracle (paper) |" in again.stdout
    assert (whole / "metrics.json").stat().st_mtime_ns == stamp

    other = run(*FAST, "--set", "seed=1", "--out", str(whole), cwd=tmp_path)
    assert other.returncode == 2
    assert "another configuration" in other.stderr
    assert (whole / "metrics.json").stat().st_mtime_ns == stamp


@pytest.mark.slow
def test_without_relion_a_study_ends_and_is_drawn(tmp_path):
    """Its curves are left out, which the figures say; a later call does nothing."""
    out = tmp_path / "run"
    words = [*FAST[:-1], "methods=['published', 'relion']", "--out", str(out)]
    bare = {**os.environ, "PATH": ""}
    stamps = []
    for _ in range(2):
        done = run(*words, cwd=tmp_path, env=bare)
        assert done.returncode == 0, done.stderr
        stamps.append((out / "metrics.json").stat().st_mtime_ns)
    assert stamps[0] == stamps[1]
    assert "RELION is not installed" in (out / "done").read_text()
    picture = tmp_path / "fig08.png"
    drawn = subprocess.run(
        [sys.executable, EXPERIMENTS / "fig08_convergence.py", out, "--out", picture],
        check=False,
        capture_output=True,
        text=True,
        env=bare,
    )
    assert drawn.returncode == 0, drawn.stderr
    before = json.loads((out / "metrics.json").read_text())
    calls = json.loads((out / "provenance.json").read_text())["calls"]
    made_by = before["oracle (paper)"]["commit"]
    assert [call["commit"] for call in calls] == [made_by]
    assert calls[0]["relion"] is None
    table = io.read_star(out / "poses/joint_released.star")["particles"]
    assert len(table["rlnAngleRot"]) == 6

    # What is kept is enough to measure all results again; but for them, all stays.
    spoilt = {name: entry | {"mean_fsc": -1.0} for name, entry in before.items()}
    write_json(out / "metrics.json", spoilt)
    words = [sys.executable, EXPERIMENTS / "remeasure.py", out]
    again = subprocess.run(words, check=False, capture_output=True, text=True, env=bare)
    assert (again.returncode, again.stdout) == (0, ""), again.stderr
    after = json.loads((out / "metrics.json").read_text())
    for name, entry in before.items():
        assert after[name]["history"] == entry["history"]
        assert after[name]["commit"] == entry["commit"]
        assert set(after[name]["measured_by"]) == {"commit", "dirty"}
        for key in ("mean_fsc", "mean_fsc_aligned", "angle_error_deg_median"):
            assert after[name][key] == pytest.approx(entry[key], abs=1e-3)


@pytest.mark.slow
def test_every_baseline_runs(tmp_path):
    """Together with the engine; poses and maps are kept, RELION's where it is."""
    out = tmp_path / "run"
    words = ["methods=['engine', 'matching', 'relion']", "size=32", "particles=24"]
    sets = [word for each in [*words, "relion_limit_min=1"] for word in ("--set", each)]
    done = run("--preset", "smoke", *sets, "--out", str(out), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    results = timeless(out)
    names = ["oracle", "unrefined", "joint", "projection matching"]
    kept = ["oracle", "joint", "projection_matching"]
    if shutil.which("relion_refine") is None:
        assert list(results) == names
    else:
        assert list(results) == [
            *names,
            *("RELION, true poses", "RELION auto-refine"),
            "RELION auto-refine, post-processed",
        ]
        assert "iterations" in results["RELION auto-refine"]["remark"]
        kept.append("relion_auto-refine")
    assert "1 rounds, steps of 20 degrees" in results["projection matching"]["remark"]
    truth = io.read_poses(out / "poses/truth.star")
    for name in kept:
        assert len(io.read_poses(out / f"poses/{name}.star")) == len(truth)
        assert (out / f"maps/{name}.mrc").exists()


CONFIGS = {
    "init1": ["hjc_init1", "hjc_released", "ptch1_init1"],
    "init2": ["hjc_init2"],
    "sweeps": ["sweeps"],
    "ablation": ["ablation"],
    "cost": ["cost"],
}


def test_every_preset_of_every_configuration_is_complete(monkeypatch):
    monkeypatch.syspath_prepend(EXPERIMENTS)
    harness = importlib.import_module("harness")
    known = {name for names in CONFIGS.values() for name in names}
    assert known == {path.stem for path in EXPERIMENTS.glob("configs/*.toml")}
    for study, names in CONFIGS.items():
        keys = importlib.import_module(study).KEYS
        for name in names:
            path = EXPERIMENTS / f"configs/{name}.toml"
            for preset in tomllib.loads(path.read_text())["preset"]:
                config = harness.resolve(options(config=path, preset=preset), keys)
                assert config["preset"] == preset


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--set", "nonsense=1"], "--set knows"),
        (["--set", "particles=many"], "is not KEY=VALUE"),
        (["--set", "particles=6.5"], "--set particles=6.5 wants"),
        (["--set", "snr_db='0.1'"], "wants a value of the type of 10.0"),
        (["--set", "paper_step_scales=1.0"], "wants a value of the type of [1000.0]"),
        (["--set", "paper_step_scales=['1']"], "wants a value of the type of [1000.0]"),
        (["--volume", "absent.mrc"], "does not exist"),
    ],
)
def test_bad_input_is_one_sentence(words, sentence, tmp_path):
    result = run("--preset", "smoke", *words, cwd=tmp_path)
    assert result.returncode == 2
    assert sentence in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
    assert not list(tmp_path.iterdir())


# --- in this process


@pytest.fixture
def init1(monkeypatch):
    monkeypatch.syspath_prepend(EXPERIMENTS)
    return importlib.import_module("init1")


@pytest.fixture
def harness(init1):
    return init1.harness


def options(**changes):
    chosen = {"config": Path("configs/hjc_init1.toml"), "preset": "smoke"}
    return Namespace(
        **(chosen | {"volume": None, "out": None, "overrides": []} | changes)
    )


def test_a_map_brings_its_size(init1, harness, tmp_path):
    path = tmp_path / "map.mrc"
    write_mrc(path, np.ones((18, 18, 18)), 1.0)
    config = harness.resolve(options(volume=path), init1.KEYS)
    assert (config["size"], config["map"]) == (18, "map.mrc")
    assert harness.resolve(options(), init1.KEYS)["size"] == 16


def test_a_map_of_other_voxels_wants_a_word(init1, harness, tmp_path):
    """1 A is what programs write that do not know; the preset knows."""
    path, key = tmp_path / "map.mrc", "voxel_size_in_angstroms"
    own = harness.resolve(options(), init1.KEYS)[key]
    for voxel, kept in ((1.0, own), (1.005 * own, own)):
        write_mrc(path, np.ones((18, 18, 18)), voxel)
        assert harness.resolve(options(volume=path), init1.KEYS)[key] == kept
    write_mrc(path, np.ones((18, 18, 18)), 2.5)
    with pytest.raises(InputError, match=rf"2.5 A, and the preset smoke of {own:g} A"):
        harness.resolve(options(volume=path), init1.KEYS)
    words = [f"{key}=2.5"]
    found = harness.resolve(options(volume=path, overrides=words), init1.KEYS)
    assert found[key] == 2.5


def test_more_time_carries_on_what_a_limit_stopped(init1, harness, tmp_path):
    comparison, path = init1.comparison, tmp_path / "run"

    def family(config, case):
        def method(case, record):
            record.resume(jnp.zeros((), jnp.int32))
            done = len(record.history) + 1
            poses, number = case.dataset.truth, jnp.asarray(done, jnp.int32)
            record.add(case.truth, poses, number)
            told, end = f"{done} of 2", config["relion_limit_min"] == 2
            return comparison.Outcome(case.truth, poses, remark=told, finished=end)

        return {"slow": method}

    def study(*overrides):
        overrides = ["methods=['some']", "particles=4", *overrides]
        chosen = options(out=path, overrides=overrides)
        config = harness.resolve(chosen, init1.KEYS)
        comparison.run(chosen, config, init1.cases.init1, {"some": family})
        entry = io.read_json(path / "metrics.json")["slow"]
        assert entry["remark"] == f"{len(entry['history'])} of 2"
        kept = (path / "work/slow/state.eqx").exists()
        return entry["finished"], len(entry["history"]), kept

    for _ in range(2):  # the same command does nothing
        assert study("relion_limit_min=1") == (False, 1, True)
    with pytest.raises(InputError, match="another configuration"):
        study("relion_limit_min=2", "seed=1")
    for limit in (2, 2, 3):  # a method that has ended is not run again
        assert study(f"relion_limit_min={limit}") == (True, 2, False)
    assert io.read_json(path / "config.json")["relion_limit_min"] == 3


@pytest.mark.slow
@pytest.mark.parametrize("name", ["projection matching", "joint, matched first"])
def test_an_interrupted_method_resumes_to_the_same_numbers(
    init1, harness, tmp_path, monkeypatch, name
):
    """Stopped after its first iteration, with the checkpoint written."""
    comparison, methods = init1.comparison, init1.methods
    config = harness.resolve(options(overrides=["particles=32"]), init1.KEYS)
    case = init1.cases.init1(config, None, tmp_path)
    matching = MatchConfig(angle_step_in_degrees=30.0, max_shift=2.0)
    settings = RefineConfig(half_sets=True, iterations=3, multi_start=())
    method = {
        "projection matching": methods.projection_matching(matching, 2, seed=0),
        "joint, matched first": methods.refinement(settings, 0, matching),
    }[name]
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    for out in (whole, broken):
        out.mkdir()
    comparison.compare(whole, case, {name: method})

    save = io.save_checkpoint

    def stopping(path, *content):
        save(path, *content)
        if path.name == "state.eqx":
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(io, "save_checkpoint", stopping)
        comparison.compare(broken, case, {name: method})
    assert not (broken / "metrics.json").exists()
    comparison.compare(broken, case, {name: method})
    assert timeless(broken) == timeless(whole)
    assert len(timeless(whole)[name]["history"]) >= 2


def test_iterations_of_relions_are_told_once(init1, harness, tmp_path, monkeypatch):
    """A run that is carried on tells its last iteration again."""
    comparison, methods, relion = init1.comparison, init1.methods, init1.methods.relion
    config = harness.resolve(options(overrides=["particles=4"]), init1.KEYS)
    case = init1.cases.init1(config, None, tmp_path)
    truth, poses = np.asarray(case.truth, np.float32), case.dataset.truth

    def state(number, finished=False):
        halves = (truth, truth)
        return relion.Refined(truth, poses, number, 60.0, finished, {}, halves)

    def refine(numbers, end):
        def auto_refine(*_, callback, **__):
            for number in numbers:
                callback(state(number))
            if not end:
                raise KeyboardInterrupt
            return state(4, finished=True)

        return auto_refine

    monkeypatch.setattr(relion, "postprocess", lambda folder, half1, *_: half1)
    chosen = {"by RELION": methods.relion_refinement(40.0, True, 100.0, seed=0)}
    monkeypatch.setattr(relion, "auto_refine", refine([1, 2], end=False))
    with pytest.raises(KeyboardInterrupt):
        comparison.compare(tmp_path, case, chosen)
    monkeypatch.setattr(relion, "auto_refine", refine([2, 3], end=True))
    found = comparison.compare(tmp_path, case, chosen)["by RELION"]
    assert [row["relion_iteration"] for row in found["history"]] == [1, 2, 3]
    assert [row["iteration"] for row in found["history"]] == [1, 2, 3]
    assert found["remark"] == "4 iterations, 1 minutes, from 40 Å"


def test_a_run_of_init2_keeps_its_start(init1, tmp_path, monkeypatch):
    """Should RELION be installed, or removed, before it is carried on."""
    init2, starts = importlib.import_module("init2"), []

    def look(chosen, config, *rest):
        harness = init1.harness
        harness.open_run(chosen, config)
        starts.append(config["start"])

    monkeypatch.setattr(init2.comparison, "run", look)
    for begun, later in ((False, True), (True, False)):
        words = [
            "init2.py",
            "configs/hjc_init2.toml",
            "--out",
            str(tmp_path / str(begun)),
        ]
        monkeypatch.setattr(sys, "argv", words)
        for there in (begun, later):
            monkeypatch.setattr(init2.cases.relion, "available", lambda now=there: now)
            init2.main()
    assert starts[0] == starts[1] and "RELION is not installed" in starts[0]
    assert starts[2] == starts[3] and "by RELION, ab initio" in starts[2]


def test_set_keeps_the_types(init1, harness):
    words = ["snr_db=1", "paper_step_scales=[1, 2.5]", "particles=7", "title='x'"]
    config = harness.resolve(options(overrides=words), init1.KEYS)
    assert config["paper_step_scales"] == [1.0, 2.5]
    assert isinstance(config["snr_db"], float) and isinstance(config["particles"], int)
    with pytest.raises(InputError, match="particles=true wants"):
        harness.resolve(options(overrides=["particles=true"]), init1.KEYS)


@pytest.mark.parametrize(
    ("word", "sentence"),
    [
        ("seed=-1", "seed is -1; 0 to"),
        ("seed=9223372036854775808", "seed is 9223372036854775808; 0 to"),
        ("matching_rounds=0", "matching_rounds is 0; a positive number"),
        ("voxel_size_in_angstroms=0.0", "voxel_size_in_angstroms is 0.0; a positive"),
        ("voxel_size_in_angstroms=nan", "voxel_size_in_angstroms is nan; a positive"),
        ("matching_step_deg=inf", "matching_step_deg is inf; what is finite"),
        ("initial_blur=nan", "initial_blur is nan; what is finite"),
        ("paper_step_scales=[1.0, inf]", "[1.0, inf]; what is finite"),
        ("paper_step_scales=[0]", "[0.0]; positive ones"),
    ],
)
def test_what_no_study_can_work_with_is_refused(init1, harness, word, sentence):
    with pytest.raises(InputError, match=re.escape(sentence)):
        harness.resolve(options(overrides=[word]), init1.KEYS)


@pytest.mark.parametrize(
    ("config", "word", "sentence"),
    [
        ("hjc_init1", "paper_step_scales=['a']", "a value of the type of []"),
        ("hjc_init2", "ab_initio_iterations=[1, 2]", "[1, 2]; 3 numbers"),
        ("hjc_init2", "ab_initio_resolutions=[35.0]", "[35.0]; 2 numbers"),
        ("sweeps", "snr_db_values=[]", "snr_db_values is empty"),
    ],
)
def test_lists_that_cannot_be_are_refused(harness, config, word, sentence):
    path = Path(f"configs/{config}.toml")
    chosen = options(config=path, preset="cpu", overrides=[word])
    with pytest.raises(InputError, match=re.escape(sentence)):
        harness.resolve(chosen, ["seed"])


def test_what_cannot_begin_leaves_its_folder_free(init1, harness, tmp_path):
    """The corrected command may have the same one; a run in it is not touched."""
    path, family = tmp_path / "run", {"some": lambda config, case: {}}

    def study(*overrides):
        chosen = options(out=path, overrides=["methods=['some']", *overrides])
        config = harness.resolve(chosen, init1.KEYS)
        init1.comparison.run(chosen, config, init1.cases.init1, family)

    with pytest.raises(InputError, match="0 particles"):
        study("particles=0")
    assert not path.exists()
    path.symlink_to(tmp_path / "there")
    (tmp_path / "there").mkdir()
    with pytest.raises(InputError, match="0 particles"):
        study("particles=0")
    study("particles=4")
    harness.give_back(path)
    assert {"config.json", "done", "maps"} <= {file.name for file in path.iterdir()}


def test_files_of_a_run_that_are_not_json_are_named(init1, harness, tmp_path):
    config = harness.resolve(options(), init1.KEYS)
    for name, read in (
        ("metrics.json", lambda: harness.read_metrics(tmp_path)),
        ("config.json", lambda: harness.open_run(options(out=tmp_path), config)),
    ):
        (tmp_path / name).write_text("{")
        with pytest.raises(InputError, match=f"{name} is not JSON"):
            read()


def test_a_configuration_that_cannot_be_read(init1, harness, tmp_path):
    with pytest.raises(InputError, match="Cannot read .*: Is a directory"):
        harness.resolve(options(config=tmp_path), init1.KEYS)
    path = tmp_path / "config.toml"
    path.write_bytes(b"\xff\xfe = 1")
    with pytest.raises(InputError, match="is not a TOML file"):
        harness.resolve(options(config=path), init1.KEYS)
    whole = (EXPERIMENTS / "configs/hjc_init1.toml").read_text()
    path.write_text(re.sub("^(seed|max_shift) = .*\n", "", whole, flags=re.MULTILINE))
    with pytest.raises(InputError, match="lacks seed, max_shift"):
        harness.resolve(options(config=path), init1.KEYS)


def test_provenance_is_added_to_what_earlier_runs_have(harness, tmp_path):
    """Which was one call alone, not a list of them."""
    write_json(tmp_path / "provenance.json", {"commit": "old"})
    now = harness.write_provenance(tmp_path)
    harness.write_provenance(tmp_path)
    assert io.read_json(tmp_path / "provenance.json")["calls"] == [
        {"commit": "old"},
        now,
    ]


def test_an_empty_folder_may_hold_a_run(init1, harness, tmp_path):
    config = harness.resolve(options(), init1.KEYS)
    for _ in range(2):
        assert harness.open_run(options(out=tmp_path), config) == tmp_path


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (InputError("Bad."), 2, ": Bad."),
        (OSError(28, "No space left on device"), 2, "No space left on device"),
        (KeyboardInterrupt(), 130, "interrupted; the same command resumes"),
    ],
)
def test_a_study_that_stops_says_why(harness, capsys, error, code, words):
    def study():
        raise error

    assert harness.main(study) == code
    err = capsys.readouterr().err
    assert words in err and err.count("\n") == 1


TERMINATED = """
import os, signal, sys
sys.path.insert(0, sys.argv[1])
import harness

def study():
    try:
        os.kill(os.getpid(), signal.SIGTERM)
    finally:
        print("ended")

sys.exit(harness.main(study))
"""


def test_a_terminated_study_stops_as_an_interrupted_one():
    """What it has started is ended, as ``finally`` says; by default it would not."""
    words = [sys.executable, "-c", TERMINATED, str(EXPERIMENTS)]
    done = subprocess.run(words, check=False, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (130, "ended\n")
    assert "interrupted" in done.stderr


def test_every_method_has_files_of_its_own(init1, harness):
    scales = "paper_step_scales=[1, 10, 1000, 1e6, 1e-6, 0.1]"
    config = harness.resolve(options(overrides=[scales]), init1.KEYS)
    case = SimpleNamespace(dataset=SimpleNamespace(sigma=0.1))
    names = [
        name
        for family in init1.FAMILIES.values()
        for name in family({**config, "relion_limit_min": 1}, case)
    ]
    slugs = [init1.comparison.slug(name) for name in names]
    assert len(set(slugs)) == len(names) >= 14
    assert all(re.fullmatch("[a-z0-9_-]+", slug) for slug in slugs)
    slug = init1.comparison.slug("joint (paper, steps x 1000)")
    assert slug == "joint_paper_steps_x_1000"


def test_unknown_families_are_refused(tmp_path):
    words = ["--set", "methods=['engine', 'magic']", "--out", str(tmp_path / "out")]
    result = run("--preset", "smoke", *words, cwd=tmp_path)
    assert result.returncode == 2 and "not magic" in result.stderr
    assert not (tmp_path / "out").exists()


ROW = {
    "remark": "",
    "mean_fsc": 0.5,
    "mean_fsc_aligned": 0.625,
    "rc": 8.0,
    "angle_error_deg_median": 1.25,
    "angle_error_deg_p90": 3.0,
    "fraction_within_10_deg": 1.0,
    "shift_error_px_median": 0.125,
    "wall_s": 12.0,
    "fsc": [1.0] * 9,
}


def test_the_table(init1, harness, tmp_path):
    """A curve that never falls is a lower bound, and NaN survives the file."""
    results = {"a": ROW, "b": {**ROW, "rc": 7.9, "angle_error_deg_p90": float("nan")}}
    config = harness.resolve(options(), init1.KEYS)
    text = init1.comparison.table(results, config)
    head, rule, first, second, blank, said = text.splitlines()
    assert not blank and "HJC, Init-1 (phantom): built-in phantom" in said
    assert "| mean FSC | mean FSC, aligned |" in head
    assert len({line.count("|") for line in (head, rule, first, second)}) == 1
    assert first.startswith("| a | 0.500 | 0.625 | ≥ 8.0 | 1.25 | 3.0 |")
    assert second.startswith("| b | 0.500 | 0.625 | 7.9 | 1.25 | nan |")
    write_json(tmp_path / "metrics.json", results)
    again = init1.comparison.table(harness.read_metrics(tmp_path), config)
    assert again == text


@pytest.mark.parametrize(
    ("folder", "module"), [("benchmarks", "run"), ("experiments", "machine")]
)
def test_cores_are_counted_where_affinity_is_unknown(monkeypatch, folder, module):
    monkeypatch.syspath_prepend(EXPERIMENTS.parent / folder)
    counting = importlib.import_module(module)
    assert counting.available_cores() >= 1
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    assert counting.available_cores() == os.cpu_count()


@pytest.mark.parametrize("mirrored", [False, True])
def test_a_map_and_its_poses_are_brought_to_the_truths_place(init1, mirrored):
    """From any turn, by some voxels, in either hand; some poses are of no use."""
    cases = init1.cases
    n, count = 24, 60
    truth = phantom(jax.random.key(0), n).astype(jnp.float32)
    shift = jnp.zeros((count, 2), jnp.float32)
    poses = Poses(equidistributed_rotations(jax.random.key(1), count), shift)
    poses = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), poses)
    rotation = euler_to_matrix(jnp.asarray([0.4, 1.1, -0.7], jnp.float32))
    volume = move_map(truth, rotation.T, jnp.asarray([1.5, -2.0, 1.0], jnp.float32))
    rotations = poses.rotations @ rotation.T
    if mirrored:
        volume, rotations = cases._mirrored(volume), mirror(rotations)
    off = euler_to_matrix(jnp.asarray([0.0, 1.5, 0.0], jnp.float32))
    rotations = rotations.at[:10].set(rotations[:10] @ off)
    given = Poses(rotations, shift)
    moved, found = cases._in_the_frame_of(truth, poses, volume, given)
    assert float(jnp.min(fsc(moved, truth)[: n // 2 - 1])) > 0.99
    distance = geodesic_distance(found, poses.rotations)
    assert float(jnp.max(distance[10:])) < 0.02


STOP_MATCHED = """
import sys

experiments, *words = sys.argv[1:]
sys.argv = ["init2.py", *words]
sys.path.insert(0, experiments)
import harness, init2
from jaxrefine import io

save = io.save_checkpoint

def stopping(path, *content):
    save(path, *content)
    if path.parent.name == "joint_matched_first" and path.name == "state.eqx":
        raise KeyboardInterrupt

io.save_checkpoint = stopping
sys.exit(harness.main(init2.main))
"""


@pytest.mark.slow
def test_init2_carries_on_and_is_drawn(tmp_path):
    """From RELION's ab-initio map where it is installed, else from matching."""
    out = tmp_path / "run"
    words = ["configs/hjc_init2.toml", "--preset", "smoke", "--out", str(out)]
    program = [sys.executable, "-c", STOP_MATCHED, str(EXPERIMENTS)]
    stopped = subprocess.run(
        [*program, *words], check=False, capture_output=True, text=True, cwd=tmp_path
    )
    assert stopped.returncode == 130, stopped.stderr
    kept = out / "work/joint_matched_first/matched.eqx"
    stamp, before = kept.stat().st_mtime_ns, timeless(out)
    assert list(before) == ["oracle", "unrefined", "joint", "joint, post-processed"]
    again = subprocess.run(
        [sys.executable, str(EXPERIMENTS / "init2.py"), *words],
        check=False,
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert again.returncode == 0, again.stderr
    assert kept.stat().st_mtime_ns == stamp
    after = timeless(out)
    assert {name: after[name] for name in before} == before
    assert list(after)[-2:] == [
        "joint, matched first",
        "joint, matched first, post-processed",
    ]
    for script in ("fig09_slices", "fig10_fsc", "fig11_angle_errors"):
        picture = tmp_path / f"{script}.png"
        drawn = subprocess.run(
            [sys.executable, str(EXPERIMENTS / f"{script}.py"), out, "--out", picture],
            check=False,
            capture_output=True,
            text=True,
        )
        assert drawn.returncode == 0, drawn.stderr
        assert picture.stat().st_size > 10_000
