"""The studies run, resume, and refuse folders of runs with other settings."""

import json
import math
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest
from helpers import interrupted_after

from jaxrefine import io
from jaxrefine.errors import InputError
from jaxrefine.euler import euler_to_matrix
from jaxrefine.geometry import Poses, geodesic_distance, mirror
from jaxrefine.io import write_json
from jaxrefine.maps.align import move_map
from jaxrefine.maps.fsc import fsc
from jaxrefine.poses.matching import MatchConfig
from jaxrefine.refinement.config import RefineConfig
from jaxrefine.simulate import equidistributed_rotations, phantom

TESTS = Path(__file__).resolve().parents[1]
EXPERIMENTS = TESTS.parent / "experiments"

FAST = ["--preset", "smoke", "--set", "particles=6", "--set", "paper_iterations=1"]
FAST += ["--set", "released_iterations=1"]
FAST += ["--set", "methods=['paper', 'released']"]


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


def without_times(value):
    """Drop the times and commits that may differ from run to run."""
    if isinstance(value, dict):
        dropped = ("wall_s", "elapsed_s", "commit", "dirty")
        return {k: without_times(v) for k, v in value.items() if k not in dropped}
    return [without_times(v) for v in value] if isinstance(value, list) else value


def timeless(path: Path) -> dict:
    """Read the results of a run without times and commits."""
    results = json.loads((path / "metrics.json").read_text())
    return {name: without_times(entry) for name, entry in results.items()}


REFINED = Path("work/joint_paper/state/checkpoint.eqx")

INTERRUPTED = """
import sys
from importlib import import_module
from pathlib import Path

experiments, tests, name, last, state, *words = sys.argv[1:]
sys.argv = [f"{name}.py", *words]
sys.path[:0] = [experiments, tests]
study = import_module(name)
from helpers import interrupted_after

with interrupted_after(lambda path: path.name == last and Path(state).exists()):
    sys.exit(study.main())
"""


def interrupt(
    name: str, last: str, state: Path, words: list[str], cwd: Path
) -> subprocess.CompletedProcess:
    """Run a study until it has written a file of a name, and a state is there."""
    folders = [str(EXPERIMENTS), str(TESTS)]
    return subprocess.run(
        [sys.executable, "-c", INTERRUPTED, *folders, name, last, str(state), *words],
        check=False,
        capture_output=True,
        text=True,
        cwd=cwd,
    )


@pytest.mark.slow
def test_interrupted_study_resumes_to_the_same_numbers(tmp_path):
    unbroken, broken = tmp_path / "unbroken", tmp_path / "broken"
    first = run(*FAST, "--out", str(unbroken), cwd=tmp_path)
    assert first.returncode == 0, first.stderr
    assert "| oracle (paper) |" in first.stdout
    for name in ("provenance.json", "metrics.json", "table.md"):
        assert (unbroken / name).exists()
    report = io.read_json(unbroken / "run.json")
    assert report["finished"] and report["settings"]["particles"] == 6
    assert "phantom" in report["settings"]["title"]

    # Stopped twice: in the middle of the first method that refines poses, and when it
    # has its result but still its checkpoint, which is not the next method's.
    words = ["configs/hjc_init1.toml", *FAST, "--out", str(broken)]
    for last in ("checkpoint.eqx", "metrics.json"):
        stopped = interrupt("init1", last, broken / REFINED, words, tmp_path)
        assert stopped.returncode == 130, stopped.stderr
        assert "interrupted; the same command resumes" in stopped.stderr
        assert "Traceback" not in stopped.stderr
        assert [*broken.glob("work/*/state/checkpoint.eqx")] == [broken / REFINED]
        assert not io.read_json(broken / "run.json")["finished"]
    assert "joint (paper)" in timeless(broken)
    second = run(*FAST, "--out", str(broken), cwd=tmp_path)
    assert second.returncode == 0, second.stderr
    assert timeless(broken) == timeless(unbroken)
    assert not list(broken.glob("work/*/state"))
    for path in (unbroken / "maps").iterdir():
        assert (
            path.read_bytes()[1024:]
            == (broken / "maps" / path.name).read_bytes()[1024:]
        )

    stamp = (unbroken / "metrics.json").stat().st_mtime_ns
    again = run(*FAST, "--out", str(unbroken), cwd=tmp_path)
    assert again.returncode == 0
    assert "| oracle (paper) |" in again.stdout
    assert (unbroken / "metrics.json").stat().st_mtime_ns == stamp

    other = run(*FAST, "--set", "seed=1", "--out", str(unbroken), cwd=tmp_path)
    assert other.returncode == 2
    assert "a run with other settings (seed)" in other.stderr
    assert (unbroken / "metrics.json").stat().st_mtime_ns == stamp


@pytest.mark.slow
def test_without_relion_a_study_ends_and_is_drawn(tmp_path):
    """Its curves are left out, which the figures say; a later call does nothing."""
    out = tmp_path / "run"
    words = [*FAST[:-1], "methods=['paper', 'relion']", "--out", str(out)]
    bare = {**os.environ, "PATH": ""}
    stamps = []
    for _ in range(2):
        done = run(*words, cwd=tmp_path, env=bare)
        assert done.returncode == 0, done.stderr
        stamps.append((out / "metrics.json").stat().st_mtime_ns)
    assert stamps[0] == stamps[1]
    assert "RELION is not installed" in io.read_json(out / "run.json")["lacking"]
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
    table = io.read_star(out / "poses/joint_paper.star")["particles"]
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
        for key in ("mean_fsc", "mean_fsc_aligned", "angle_error_in_degrees_median"):
            assert after[name][key] == pytest.approx(entry[key], abs=1e-3)


@pytest.mark.slow
def test_every_baseline_runs(tmp_path):
    """Together with the engine; poses and maps are kept, RELION's where it is."""
    out = tmp_path / "run"
    words = ["methods=['engine', 'matching', 'relion']", "size=32", "particles=16"]
    sets = [word for each in [*words, "relion_limit_min=2"] for word in ("--set", each)]
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


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--set", "particles=6.5"], "particles must be a whole number, got 6.5"),
        (["--set", "methods=['engine', 'magic']"], "methods must be one of engine"),
        (["--volume", "absent.mrc"], "absent.mrc does not exist"),
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
def study(load):
    """Return a study of Init-1 with the settings of a preset, and others if wished."""

    def make(*overrides, out=None):
        path, preset = Path("configs/hjc_init1.toml"), "smoke"
        settings = load("configuration").read(
            load("init1").Init1Settings, path, preset, overrides
        )
        return load("harness").Study(settings, path.stem, preset, out)

    return make


@pytest.fixture
def case(load, study, tmp_path):
    """Return the case of such a study."""

    def make(*overrides):
        return load("cases").init1(study(*overrides).settings, "", tmp_path)

    return make


@pytest.mark.slow
def test_more_time_carries_on_what_a_limit_stopped(load, study, tmp_path):
    comparison, path = load("comparison"), tmp_path / "run"

    def family(settings, case):
        def method(case, record):
            record.resume(jnp.zeros((), jnp.int32))
            done = len(record.rows) + 1
            poses, number = case.dataset.truth, jnp.asarray(done, jnp.int32)
            record.add(case.truth, poses, number)
            told, end = f"{done} of 2", settings.relion_limit_min == 2
            return comparison.Outcome(case.truth, poses, remark=told, finished=end)

        return {"slow": method}

    def run(*overrides):
        chosen = study("particles=4", *overrides, out=path)
        comparison.run(chosen, load("cases").INIT1, [family])
        entry = io.read_json(path / "metrics.json")["slow"]
        assert entry["remark"] == f"{len(entry['history'])} of 2"
        kept = (path / "work/slow/state/checkpoint.eqx").exists()
        return entry["finished"], len(entry["history"]), kept

    for _ in range(2):  # the same command does nothing
        assert run("relion_limit_min=1") == (False, 1, True)
    with pytest.raises(InputError, match=r"a run with other settings \(seed\)"):
        run("relion_limit_min=2", "seed=1")
    for limit in (2, 2, 3):  # a method that has ended is not run again
        assert run(f"relion_limit_min={limit}") == (True, 2, False)
    assert io.read_json(path / "run.json")["settings"]["relion_limit_min"] == 3


def interrupted(method):
    """Return a method that is interrupted when its first iteration has been kept."""

    def run(case, record):
        add = record.add

        def stopping(*arguments, **numbers):
            add(*arguments, **numbers)
            raise KeyboardInterrupt

        record.add = stopping
        return method(case, record)

    return run


@pytest.mark.slow
@pytest.mark.parametrize("name", ["projection matching", "joint, matched first"])
def test_an_interrupted_method_resumes_to_the_same_numbers(load, case, tmp_path, name):
    compare, methods = load("comparison").compare, load("methods")
    matching = MatchConfig(angle_step=math.radians(30), max_shift=2.0)
    settings = RefineConfig(half_sets=True, iterations=3, multi_start=())
    method = {
        "projection matching": methods.projection_matching(matching, 2, seed=0),
        "joint, matched first": methods.refinement(settings, 0, matching),
    }[name]
    given = case("particles=32")
    unbroken, broken = tmp_path / "unbroken", tmp_path / "broken"
    for out in (unbroken, broken):
        out.mkdir()
    compare(unbroken, given, {name: method})
    with pytest.raises(KeyboardInterrupt):
        compare(broken, given, {name: interrupted(method)})
    assert not (broken / "metrics.json").exists()
    compare(broken, given, {name: method})
    assert timeless(broken) == timeless(unbroken)
    assert len(timeless(unbroken)[name]["history"]) >= 2


# In place of `mpirun`: iterations 1 and 2, and carried on, iteration 3 and the end.
REFINES = """#!{python}
import shutil, sys, time
from pathlib import Path

root = sys.argv[sys.argv.index("--o") + 1]

def write(prefix, *maps):
    shutil.copy("particles.star", f"{{prefix}}_data.star")
    for name in maps:
        shutil.copy("auto_refine_reference.mrc", f"{{prefix}}_{{name}}.mrc")
    for name, pair in (
        ("half1_model", "rlnCurrentResolution 20.5"),
        ("half2_model", "rlnCurrentResolution 20.5"),
        ("model", "rlnCurrentResolution 20.5"),
        ("sampling", "rlnPsiStep 15"),
        ("optimiser", "rlnOverallAccuracyRotations 1.5"),
    ):
        Path(f"{{prefix}}_{{name}}.star").write_text(f"data_\\n_{{pair}}\\n")

carried_on = "--continue" in sys.argv
for number in [3] if carried_on else [1, 2]:
    write(f"{{root}}_it{{number:03d}}", "half1_class001", "half2_class001")
if carried_on:
    write(root, "class001", "half1_class001_unfil", "half2_class001_unfil")
else:
    time.sleep(60)
"""


@pytest.mark.slow
def test_iterations_of_relions_are_told_once(load, case, tmp_path, put_on_path):
    """A run that is carried on tells its last iteration again."""
    put_on_path("mpirun", REFINES.format(python=sys.executable))
    post_process = "#!/bin/sh\ncp half1.mrc postprocess_masked.mrc\n"
    put_on_path("relion_postprocess", post_process)
    comparison, methods = load("comparison"), load("methods")
    given = case("particles=4")
    method = methods.relion_refinement(40.0, True, 100.0, seed=0, local_order=3)
    chosen = {"by RELION": method}

    def is_second(path):
        previous = path.with_name("previous.eqx")
        return path.name == "checkpoint.eqx" and previous.exists()

    with jax.enable_x64(False):  # as a study runs
        with pytest.raises(KeyboardInterrupt), interrupted_after(is_second):
            comparison.compare(tmp_path, given, chosen)
        found = comparison.compare(tmp_path, given, chosen)["by RELION"]
    assert [row["relion_iteration"] for row in found["history"]] == [1, 2, 3]
    assert [row["iteration"] for row in found["history"]] == [1, 2, 3]
    assert found["remark"] == (
        "4 iterations, 0 minutes, from 40 Å, first in steps of 3.75 degrees within "
        "22.5 degrees of the initial poses "
        "(--healpix_order 3 --auto_local_healpix_order 3)"
    )


@pytest.fixture
def install_relion(tmp_path_factory, monkeypatch):
    """Leave RELION's programs on the path, and nothing else; or not even them."""
    folder = tmp_path_factory.mktemp("relion")
    names = ("refine", "refine_mpi", "reconstruct", "postprocess")
    for program in ("mpirun", *(f"relion_{name}" for name in names)):
        (folder / program).write_text("#!/bin/sh\n")
        (folder / program).chmod(0o755)
    return lambda there: monkeypatch.setenv("PATH", str(folder) if there else "")


def test_a_run_of_init2_keeps_its_start(load, tmp_path, install_relion):
    """Should RELION be installed, or removed, before it is carried on."""
    cases, comparison, harness = map(load, ("cases", "comparison", "harness"))
    settings = load("configuration").read(
        load("init2").Init2Settings, Path("configs/hjc_init2.toml"), "smoke"
    )
    starts = []

    def prepare(settings, start, out):
        starts.append(start)
        raise KeyboardInterrupt

    looking = replace(cases.INIT2, prepare=prepare)
    for begun, later in ((False, True), (True, False)):
        study = harness.Study(settings, "hjc_init2", "smoke", tmp_path / str(begun))
        for there in (begun, later):
            install_relion(there)
            with pytest.raises(KeyboardInterrupt):
                comparison.run(study, looking, [])
    assert starts[0] == starts[1] and "RELION is not installed" in starts[0]
    assert starts[2] == starts[3] and "by RELION, ab initio" in starts[2]


def test_a_study_that_cannot_begin_leaves_its_folder_free(load, study, tmp_path):
    """The corrected command may have the same one; a run in it is not touched."""
    path = tmp_path / "run"

    def run(size):
        chosen = study("particles=4", f"size={size}", out=path)
        load("comparison").run(chosen, load("cases").INIT1, [lambda *_: {}])

    with pytest.raises(InputError, match="at least 16 voxels .*got 8"):
        run(8)
    assert not path.exists()
    path.mkdir()
    with pytest.raises(InputError, match="at least 16 voxels .*got 8"):
        run(8)
    run(16)
    with pytest.raises(InputError, match="a run with other settings"):
        run(8)
    assert {"run.json", "maps"} <= {file.name for file in path.iterdir()}


def test_files_of_a_run_that_are_not_json_are_named(load, study, tmp_path):
    for name, read in (
        ("metrics.json", lambda: load("harness").read_metrics(tmp_path)),
        ("run.json", lambda: study(out=tmp_path).open()),
    ):
        (tmp_path / name).write_text("{")
        with pytest.raises(InputError, match=f"{name} is not a JSON file"):
            read()


def test_what_computes_is_added_to_the_provenance_once(load, tmp_path):
    harness, path = load("harness"), tmp_path / "provenance.json"
    io.write_json(path, {"calls": [{"commit": "old"}]})
    for _ in range(2):
        harness.add_provenance(tmp_path)
    earlier, now = io.read_json(path)["calls"]
    assert earlier == {"commit": "old"}
    assert now["commit"] == harness.commit()["commit"]
    assert {"jax", "python"} <= set(now["versions"]) and now["device"]


@pytest.mark.parametrize("installed", [False, True])
def test_a_run_without_relion_is_finished_until_it_is_there(
    load, study, tmp_path, install_relion, installed
):
    harness, chosen = load("harness"), study(out=tmp_path / "run")
    install_relion(installed)
    with chosen.open() as folder:
        harness.finish(folder, without_relion=True)
    with chosen.open() as folder:
        assert folder.finished != installed


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (InputError("Bad."), 2, ": Bad."),
        (OSError(28, "No space left on device"), 2, "No space left on device"),
        (KeyboardInterrupt(), 130, "interrupted; the same command resumes"),
    ],
)
def test_a_study_that_stops_says_why(load, capsys, error, code, words):
    def command():
        raise error

    assert load("harness").main(command) == code
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


def test_every_method_has_files_of_its_own(load, study):
    init1, slug = load("init1"), load("comparison").slug
    settings = study("relion_limit_min=1").settings
    case = SimpleNamespace(dataset=SimpleNamespace(sigma=0.1))
    names = [
        name for family in init1.FAMILIES.values() for name in family(settings, case)
    ]
    slugs = [slug(name) for name in names]
    assert len(set(slugs)) == len(names) >= 10
    assert all(re.fullmatch("[a-z0-9_-]+", slug) for slug in slugs)
    assert slug("joint (paper, printed steps)") == "joint_paper_printed_steps"


ROW = {
    "remark": "",
    "mean_fsc": 0.5,
    "mean_fsc_aligned": 0.625,
    "rc": 8.0,
    "angle_error_in_degrees_median": 1.25,
    "angle_error_in_degrees_p90": 3.0,
    "fraction_within_10_degrees": 1.0,
    "shift_error_in_pixels_median": 0.125,
    "wall_s": 12.0,
    "fsc": [1.0] * 9,
}


def test_the_table(load, study, tmp_path):
    """A curve that never falls is a lower bound, and NaN survives the file."""
    results = {
        "a": ROW,
        "b": {**ROW, "rc": 7.9, "angle_error_in_degrees_p90": float("nan")},
    }
    settings, table = study().settings, load("comparison").table
    caption = settings.caption(settings.start)
    text = table(results, caption)
    head, rule, first, second, blank, said = text.splitlines()
    assert not blank and "HJC, Init-1 (phantom): built-in phantom" in said
    assert "| mean FSC | mean FSC, aligned |" in head
    assert len({line.count("|") for line in (head, rule, first, second)}) == 1
    assert first.startswith("| a | 0.500 | 0.625 | ≥ 8.0 | 1.25 | 3.0 |")
    assert second.startswith("| b | 0.500 | 0.625 | 7.9 | 1.25 | nan |")
    write_json(tmp_path / "metrics.json", results)
    assert table(load("harness").read_metrics(tmp_path), caption) == text


@pytest.mark.slow
@pytest.mark.parametrize("mirrored", [False, True])
def test_a_map_and_its_poses_are_brought_to_the_truths_place(load, mirrored):
    """Whatever their place, orientation and hand, even if a sixth of the poses fail."""
    cases = load("cases")
    n, count = 24, 60
    truth = phantom(jax.random.key(0), n).astype(jnp.float32)
    shift = jnp.zeros((count, 2), jnp.float32)
    poses = Poses(equidistributed_rotations(jax.random.key(1), count), shift)
    poses = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), poses)
    rotation = euler_to_matrix(jnp.asarray([0.4, 1.1, -0.7], jnp.float32))
    volume = move_map(truth, rotation.T, jnp.asarray([1.5, -2.0, 1.0], jnp.float32))
    rotations = poses.rotations @ rotation.T
    if mirrored:
        volume, rotations = cases.mirror_map(volume), mirror(rotations)
    off = euler_to_matrix(jnp.asarray([0.0, 1.5, 0.0], jnp.float32))
    rotations = rotations.at[:10].set(rotations[:10] @ off)
    moved, aligned = cases.in_the_frame_of(truth, poses, volume, rotations)
    assert float(jnp.min(fsc(moved, truth)[: n // 2 - 1])) > 0.99
    distance = geodesic_distance(aligned, poses.rotations)
    assert float(jnp.max(distance[10:])) < 0.02


@pytest.mark.slow
def test_init2_carries_on_and_is_drawn(tmp_path):
    """From RELION's ab-initio map where it is installed, else from matching."""
    out = tmp_path / "run"
    words = ["configs/hjc_init2.toml", "--preset", "smoke", "--out", str(out)]
    work = out / "work/joint_matched_first"
    state, kept = work / "state/checkpoint.eqx", work / "matched.eqx"
    stopped = interrupt("init2", state.name, state, words, tmp_path)
    assert stopped.returncode == 130, stopped.stderr
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
