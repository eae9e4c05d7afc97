"""Folders of runs: whatever stops a run, it carries on and ends as if nothing had."""

import errno
import json
import os
import subprocess
import sys

import equinox as eqx
import numpy as np
import pytest

from jaxrefine import cli
from jaxrefine.errors import InputError
from jaxrefine.io import load_checkpoint
from jaxrefine.runs.folder import RunFolder

resource = pytest.importorskip("resource", reason="wants a Unix system")

# A run of a stand-in, in processes that stop themselves at their n-th call of a
# function, built-in ones included. Times and versions are left out of the files.
LOOP = """
import json, os, signal, sys, traceback
from pathlib import Path
from types import SimpleNamespace

import numpy as np
from jaxrefine.runs import folder as module

device = SimpleNamespace(platform="none", device_kind="none", memory_stats=dict)
module.jax = SimpleNamespace(devices=lambda: [device])
module.time = SimpleNamespace(perf_counter=lambda: 0.0)
module.version = module.peak_rss_mib = lambda *_: None

def run(out, ledger):
    folder = module.RunFolder(out, "run.json", {"seed": 1})
    start = {"iteration": np.zeros((), int), "map": np.linspace(0.0, 1.0, 50)}
    state = folder.resume(lambda: start) or start
    os.write(ledger, b"from %d\\n" % state["iteration"])
    while state["iteration"] < 12:
        state = {
            "iteration": state["iteration"] + 1,
            "map": np.sin(3 * state["map"] + state["iteration"]),
        }
        row = {"iteration": int(state["iteration"]), "mean": float(state["map"].mean())}
        folder.record(state, row)
        os.write(ledger, b"done %d\\n" % state["iteration"])
    folder.finish({"mean": float(state["map"].mean())})

def attempt(out, calls, end):
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    ledger = os.open(f"{out}.ledger", os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    code = 1

    def count(frame, event, _):
        nonlocal calls
        calls -= event in ("call", "c_call")
        if calls == 0:
            calls = -1
            os.kill(os.getpid(), end)

    try:
        sys.setprofile(count)
        run(out, ledger)
        code = 0
    except KeyboardInterrupt:
        code = 130
    except BaseException:
        traceback.print_exc()
    finally:
        sys.setprofile(None)
        os._exit(code)

base, report = Path(sys.argv[1]), {}
# What is done once in a process is done here, before there are any others.
for _ in range(2):
    run(base / "first", os.open(os.devnull, os.O_WRONLY))
for name, end, seed in json.loads(sys.argv[2]):
    rng, codes = np.random.default_rng(seed), []
    while not codes or codes[-1] in (-9, 130):
        calls = 0 if seed is None else int(rng.integers(1, 1500))
        codes.append(attempt(base / name, calls, end))
    report[name] = codes
print(json.dumps(report))
"""
RUNS = [("whole", 9, None)]
RUNS += [(f"killed{seed}", 9, seed) for seed in range(3)]
RUNS += [("interrupted", 2, 0)]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Undisturbed and disturbed runs: their folder, and their processes' exit codes."""
    base = tmp_path_factory.mktemp("runs")
    words = [sys.executable, "-c", LOOP, str(base), json.dumps(RUNS)]
    done = subprocess.run(words, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return base, json.loads(done.stdout), done.stderr


def contents(folder):
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def test_runs_end_as_if_nothing_had_stopped_them(runs):
    base, codes, errors = runs
    whole = contents(base / "whole")
    assert set(whole) == {
        "run.json",
        "metrics.jsonl",
        "state/checkpoint.eqx",
        "state/previous.eqx",
    }
    assert codes["whole"] == [0] and len(whole["metrics.jsonl"].splitlines()) == 12
    assert sum(len(each) - 1 for each in codes.values()) > 100
    for name, _, _ in RUNS:
        assert codes[name][-1] == 0, errors
        assert contents(base / name) == whole, name


def test_no_more_than_an_iteration_is_lost(runs):
    """A run begins at the last iteration whose end it has lived to see, or later."""
    begun = 0
    for name in runs[1]:
        done = 0
        for line in (runs[0] / f"{name}.ledger").read_text().splitlines():
            word, iteration = line.split()
            if word == "from":
                assert done <= int(iteration) <= done + 1
                begun += int(iteration) > 0
            done = int(iteration)
    assert begun > 50


# --- in this process


class State(eqx.Module):
    iteration: np.ndarray
    volume: np.ndarray


def state(iteration, n=8):
    return State(np.asarray(iteration), np.full((n, n, n), 0.5 + iteration))


def a_folder(path):
    return RunFolder(path / "out", "run.json", {"seed": 0})


@pytest.fixture
def begun(tmp_path):
    """A run that stopped after three iterations; its checkpoints."""
    folder = a_folder(tmp_path)
    assert folder.resume(lambda: state(0)) is None
    for i in (1, 2, 3):
        folder.record(state(i), {"iteration": i})
    saved = tmp_path / "out/state"
    return saved / "checkpoint.eqx", saved / "previous.eqx"


def resumed(path):
    found = a_folder(path).resume(lambda: state(0))
    rows = (path / "out/metrics.jsonl").read_text().splitlines()
    assert [json.loads(row)["iteration"] for row in rows] == [
        *range(1, int(found.iteration) + 1)
    ]
    return found


def truncate(path):
    path.write_bytes(path.read_bytes()[:-100])


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


DAMAGES = [truncate, flip, lambda path: path.write_bytes(b""), os.unlink]


@pytest.mark.parametrize("damage", DAMAGES, ids=["short", "flipped", "empty", "gone"])
def test_the_state_before_steps_in(begun, tmp_path, capsys, damage):
    newest, previous = begun
    assert eqx.tree_equal(resumed(tmp_path), state(3))
    assert not capsys.readouterr().err
    damage(newest)
    assert eqx.tree_equal(resumed(tmp_path), state(2))
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and str(newest) in error and str(previous) in error
    # It is not replaced by the damaged one: it stays until there is a newer one.
    assert eqx.tree_equal(resumed(tmp_path), state(2))
    folder = a_folder(tmp_path)
    folder.resume(lambda: state(0))
    folder.record(state(3), {"iteration": 3})
    assert [int(load_checkpoint(path, state(0))[0].iteration) for path in begun] == [
        3,
        2,
    ]


@pytest.mark.parametrize("damage", DAMAGES[:3], ids=["short", "flipped", "empty"])
def test_without_a_whole_state_nothing_is_touched(begun, tmp_path, damage):
    for path in begun:
        damage(path)
    before = contents(tmp_path)
    with pytest.raises(InputError, match="delete both to begin anew") as caught:
        resumed(tmp_path)
    assert all(str(path) in str(caught.value) for path in begun)
    assert contents(tmp_path) == before
    for path in begun:
        path.unlink()
    assert a_folder(tmp_path).resume(lambda: state(0)) is None


def test_another_structure_is_not_damage(begun, tmp_path):
    before = contents(tmp_path)
    with pytest.raises(InputError, match="another structure"):
        a_folder(tmp_path).resume(lambda: state(0, n=6))
    assert contents(tmp_path) == before


def refuse(*_):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_full_disk_leaves_the_last_state(begun, tmp_path, monkeypatch, call):
    folder = a_folder(tmp_path)
    folder.resume(lambda: state(0))
    with monkeypatch.context() as patch:
        patch.setattr(os, call, refuse)
        with pytest.raises(InputError, match="Cannot write .*: No space left"):
            folder.record(state(4), {"iteration": 4})
    assert sorted(contents(tmp_path / "out/state")) == [path.name for path in begun]
    assert eqx.tree_equal(resumed(tmp_path), state(3))


@pytest.mark.parametrize("size", [0, 55, 500, 4000])
def test_writes_that_the_system_cuts_short(begun, tmp_path, size):
    """The system refuses for real to write beyond so many bytes of a file."""
    folder = a_folder(tmp_path)
    folder.resume(lambda: state(0))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        with pytest.raises(InputError, match="Cannot write .*: File too large"):
            folder.record(state(4), {"iteration": 4})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert sorted(contents(tmp_path / "out/state")) == [path.name for path in begun]
    assert eqx.tree_equal(resumed(tmp_path), state(3))


def test_a_large_state_on_a_full_disk(begun, tmp_path):
    """One that does not fit into Python's buffers, whose writers have errors too."""
    large, folder = state(4, n=40), a_folder(tmp_path)
    folder.resume(lambda: state(0))
    before = contents(tmp_path / "out/state")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(InputError, match="Cannot write .*: File too large"):
            folder.record(large, {"iteration": 4})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert contents(tmp_path / "out/state") == before


@pytest.mark.parametrize("made", [True, False])
def test_a_disk_that_is_full_at_once(tmp_path, monkeypatch, made):
    """The same command begins anew when there is room."""
    if not made:
        (tmp_path / "out").mkdir()
    folder = a_folder(tmp_path)
    folder.resume(lambda: state(0))
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", refuse)
        with pytest.raises(InputError, match="No space left"):
            folder.record(state(1), {"iteration": 1})
    folder.abandon()
    assert (tmp_path / "out").exists() != made
    assert not contents(tmp_path)
    assert a_folder(tmp_path).resume(lambda: state(0)) is None


def test_a_folder_belongs_to_one_process(begun, tmp_path):
    """As long as it lives; a process may open its folder again."""
    folder = a_folder(tmp_path)
    again = (
        "import sys; from pathlib import Path; from jaxrefine.runs.folder import *\n"
        "try: RunFolder(Path(sys.argv[1]), 'run.json', {'seed': 0})\n"
        "except InputError as error: print(error)"
    )
    words = [sys.executable, "-c", again, str(tmp_path / "out")]
    said = subprocess.run(words, check=True, capture_output=True, text=True).stdout
    assert said == f"Another process is writing to {tmp_path / 'out'}.\n"
    assert a_folder(tmp_path).rows() == folder.rows()
    del folder
    said = subprocess.run(words, check=True, capture_output=True, text=True).stdout
    assert not said


def test_a_damaged_log_costs_its_lines_only(begun, tmp_path):
    path = tmp_path / "out/metrics.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(lines[0] + b"\xff\x00\n" + lines[2])
    assert [row["iteration"] for row in a_folder(tmp_path).rows()] == [1, 3]


@pytest.mark.parametrize("itself", [True, False])
def test_a_command_ends_with_a_sentence(tmp_path, monkeypatch, capsys, itself):
    """Whether the system refuses the command itself, or a run's folder."""
    folder = a_folder(tmp_path)

    def fail(_):
        refuse() if itself else folder.record(state(1), {"iteration": 1})

    monkeypatch.setattr(cli.fsc, "run", fail)
    monkeypatch.setattr(os, "fsync", refuse)
    assert cli.main(["fsc", "a.mrc", "b.mrc"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "No space left on device" in error


def test_temporary_files_of_the_dead(begun, tmp_path):
    """They go; what is not one stays; they do not make a folder someone else's."""
    name = ".checkpoint.eqx." + 32 * "0" + ".tmp"
    kept = (".checkpoint.eqx.tmp", "checkpoint.eqx." + 32 * "0" + ".tmp")
    for each in (name, *kept):
        (begun[0].parent / each).touch()
    a_folder(tmp_path)
    names = [path.name for path in begun]
    assert sorted(contents(begun[0].parent)) == sorted([*names, *kept])
    fresh = tmp_path / "fresh"
    (fresh / "out").mkdir(parents=True)
    (fresh / "out" / name).touch()
    a_folder(fresh)
    assert set(contents(fresh)) == {"out/run.json"}
    (tmp_path / "other/out").mkdir(parents=True)
    (tmp_path / "other/out/file").touch()
    (tmp_path / "other/out" / name).touch()
    with pytest.raises(InputError, match="holds files but no run.json"):
        a_folder(tmp_path / "other")
    assert len(contents(tmp_path / "other")) == 2
