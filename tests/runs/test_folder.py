"""Folders of runs: whatever stops a run, it carries on and ends as if nothing had."""

import errno
import json
import os
import subprocess
import sys

import numpy as np
import pytest

from jaxrefine.errors import InputError
from jaxrefine.io import load_checkpoint
from jaxrefine.runs.folder import RunFolder

# A run of a stand-in, in processes that stop themselves at their n-th call of a
# function, built-in ones included. How many calls a whole run takes depends on the
# version of Python: it is counted first, and stops are drawn from the first third.
LOOP = """
import json, os, sys, traceback
from pathlib import Path

import numpy as np
from jaxrefine.runs.folder import RunFolder

def run(out, ledger):
    with RunFolder(out, "run.json", {"seed": 1}) as folder:
        start = {"iteration": np.zeros((), int), "map": np.linspace(0.0, 1.0, 50)}
        state = folder.history.resume(lambda: start) or start
        os.write(ledger, b"from %d\\n" % state["iteration"])
        while state["iteration"] < 12:
            state = {
                "iteration": state["iteration"] + 1,
                "map": np.sin(3 * state["map"] + state["iteration"]),
            }
            row = {"iteration": int(state["iteration"]), "mean": state["map"].mean()}
            folder.history.record(state, row)
            os.write(ledger, b"done %d\\n" % state["iteration"])
        folder.finish({"mean": float(state["map"].mean())})

def calls_of_a_run(out):
    calls = 0

    def count(frame, event, _):
        nonlocal calls
        calls += event in ("call", "c_call")

    sys.setprofile(count)
    run(out, os.open(os.devnull, os.O_WRONLY))
    sys.setprofile(None)
    return calls

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
most = calls_of_a_run(base / "counted") // 3
for name, end, seed in json.loads(sys.argv[2]):
    rng, codes = np.random.default_rng(seed), []
    while not codes or codes[-1] in (-9, 130):
        assert len(codes) < 1000, f"{name} does not end"
        calls = 0 if seed is None else int(rng.integers(1, most))
        codes.append(attempt(base / name, calls, end))
    report[name] = codes
print(json.dumps(report))
"""
RUNS = [("undisturbed", 9, None)]
RUNS += [(f"killed{seed}", 9, seed) for seed in range(3)]
RUNS += [("interrupted", 2, 0)]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Undisturbed and disturbed runs: their folder, and their processes' exit codes."""
    pytest.importorskip("fcntl", reason="needs a Unix system")
    base = tmp_path_factory.mktemp("runs")
    words = [sys.executable, "-c", LOOP, str(base), json.dumps(RUNS)]
    done = subprocess.run(words, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return base, json.loads(done.stdout), done.stderr


def contents(folder):
    """Every file; of a checkpoint, the arrays, without the time that they took."""
    like, found = {"iteration": np.zeros((), int), "map": np.zeros(50)}, {}
    for path in folder.rglob("*"):
        if path.suffix == ".eqx":
            state, saved = load_checkpoint(path, like)
            arrays = {name: value.tobytes() for name, value in state.items()}
            found[path.name] = arrays, saved["lines"]
        elif path.is_file():
            found[path.name] = path.read_bytes()
    return found


def names(folder):
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)) for path in files}


def test_runs_end_as_if_nothing_had_stopped_them(runs):
    base, codes, errors = runs
    assert names(base / "undisturbed") == {
        *("run.json", "metrics.jsonl"),
        *("state/checkpoint.eqx", "state/previous.eqx"),
    }
    expected = contents(base / "undisturbed")
    assert codes["undisturbed"] == [0]
    assert len(expected["metrics.jsonl"].splitlines()) == 12
    assert sum(len(each) - 1 for each in codes.values()) > 100
    for name, _, _ in RUNS:
        assert codes[name][-1] == 0, errors
        assert contents(base / name) == expected, name
        assert names(base / name) == names(base / "undisturbed")


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


def state(iteration):
    return {"iteration": np.asarray(iteration), "map": np.full(50, 0.5 + iteration)}


def a_folder(path, settings=None, **further):
    return RunFolder(path / "out", "run.json", settings or {"seed": 0}, **further)


def report(path):
    return json.loads((path / "out/run.json").read_text())


def test_the_report_marks_the_folder(tmp_path):
    settings = {"seed": 0, "mask": None, "steps": (1, 2)}
    with a_folder(tmp_path, settings, details={"command": "jaxrefine"}) as folder:
        assert (
            report(tmp_path)
            == folder.report()
            == {
                "finished": False,
                "settings": {"seed": 0, "mask": None, "steps": [1, 2]},
                "kept": {},
                "command": "jaxrefine",
            }
        )
        assert folder.keep("batch_size", 5) == folder.keep("batch_size", 7) == 5
    again = a_folder(tmp_path, settings)
    assert not again.finished and again.keep("batch_size", 9) == 5
    again.finish({"resolution": 3.5})
    assert again.finished and report(tmp_path)["resolution"] == 3.5
    again = a_folder(tmp_path, settings)
    assert again.finished
    again.reopen()
    assert not a_folder(tmp_path, settings).finished


def test_another_run_is_refused(tmp_path):
    with a_folder(tmp_path, {"seed": 0, "map": "a", "mask": None}) as folder:
        folder.finish({})
    before = report(tmp_path)
    with pytest.raises(InputError, match=r"other settings \(map, seed\); repeat its"):
        a_folder(tmp_path, {"seed": 1, "map": "b", "mask": None})
    assert report(tmp_path) == before


def test_an_option_that_a_version_does_not_know_is_not_given(tmp_path):
    with a_folder(tmp_path, {"seed": 0, "mask": None, "invert": False}) as folder:
        folder.finish({})
    assert a_folder(tmp_path, {"seed": 0, "resample": False}).finished
    with pytest.raises(InputError, match=r"\(resample\)"):
        a_folder(tmp_path, {"seed": 0, "resample": True})


def test_settings_that_may_change_are_carried_on_with(tmp_path):
    """A time limit, say: with more time there is more to do."""
    limits = {"may_change": ["limit_min"]}
    with a_folder(tmp_path, {"seed": 0, "limit_min": 10}, **limits) as folder:
        folder.finish({})
    assert a_folder(tmp_path, {"seed": 0, "limit_min": 10}, **limits).finished
    with pytest.raises(InputError, match=r"\(seed\)"):
        a_folder(tmp_path, {"seed": 1, "limit_min": 20}, **limits)
    assert not a_folder(tmp_path, {"seed": 0, "limit_min": 20}, **limits).finished
    assert report(tmp_path)["settings"]["limit_min"] == 20
    assert not a_folder(tmp_path, {"seed": 0, "limit_min": 20}, **limits).finished


@pytest.mark.parametrize("content", ["[1]", '{"settings": 1}', "{"])
def test_a_report_of_something_else(tmp_path, content):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/run.json").write_text(content)
    with pytest.raises(InputError, match="run.json"):
        a_folder(tmp_path)
    assert (tmp_path / "out/run.json").read_text() == content


def test_a_place_that_is_no_folder_for_a_run(tmp_path):
    (tmp_path / "out").write_text("precious")
    with pytest.raises(InputError, match="out must be a folder, got a file"):
        a_folder(tmp_path)
    with pytest.raises(InputError, match="cannot write"):
        a_folder(tmp_path / "out")
    assert (tmp_path / "out").read_text() == "precious"


# --- refused runs


def refuse(*_):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("error", [InputError("bad"), MemoryError("bad")])
@pytest.mark.parametrize("existed", [True, False])
def test_a_refused_run_leaves_nothing(tmp_path, existed, error):
    """Not even folders that were made above its own; those that were there stay."""
    base = tmp_path / "new/folder"
    if existed:
        (base / "out").mkdir(parents=True)
    with pytest.raises(type(error), match="bad"), a_folder(base) as folder:
        folder.history.resume(lambda: state(0))
        raise error
    assert (base / "out").exists() == (tmp_path / "new").exists() == existed
    assert not names(tmp_path)


@pytest.mark.parametrize("existed", [True, False])
def test_a_disk_that_is_full_at_once(tmp_path, monkeypatch, existed):
    """The same command begins again when there is room."""
    if existed:
        (tmp_path / "out").mkdir()
    with a_folder(tmp_path) as folder:
        folder.history.resume(lambda: state(0))
        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", refuse)
            with pytest.raises(InputError, match="No space left"):
                folder.history.record(state(1), {"iteration": 1})
        folder.give_back()
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", refuse)
        with pytest.raises(InputError, match="No space left"):
            a_folder(tmp_path)
    assert (tmp_path / "out").exists() == existed
    assert not names(tmp_path)
    assert a_folder(tmp_path).history.resume(lambda: state(0)) is None


def test_what_can_be_carried_on_stays(tmp_path):
    """A state, or files beside the report, which marks them as the run's."""
    with pytest.raises(InputError), a_folder(tmp_path) as folder:
        folder.history.resume(lambda: state(0))
        folder.history.record(state(1), {"iteration": 1})
        raise InputError("bad input")
    again = a_folder(tmp_path).history.resume(lambda: state(0))
    assert int(again["iteration"]) == 1
    with pytest.raises(InputError), a_folder(tmp_path / "other") as folder:
        (folder.path / "map.mrc").touch()
        raise InputError("bad input")
    assert names(tmp_path / "other") == {"out/map.mrc", "out/run.json"}
    assert not a_folder(tmp_path / "other").finished


def test_an_interruption_is_no_refusal(tmp_path):
    with pytest.raises(KeyboardInterrupt), a_folder(tmp_path):
        raise KeyboardInterrupt
    assert names(tmp_path) == {"out/run.json"}


# --- processes


@pytest.mark.slow
def test_a_folder_belongs_to_one_process(tmp_path):
    """As long as it is used; a process may open its folder again."""
    folder = a_folder(tmp_path)
    again = (
        "import sys; from pathlib import Path; from jaxrefine.runs.folder import *\n"
        "try: RunFolder(Path(sys.argv[1]), 'run.json', {'seed': 0})\n"
        "except InputError as error: print(error)"
    )
    words = [sys.executable, "-c", again, str(tmp_path / "out")]

    def said():
        return subprocess.run(words, check=True, capture_output=True, text=True).stdout

    busy = f"another process is writing to {tmp_path / 'out'}\n"
    assert said() == busy
    assert a_folder(tmp_path).report() == folder.report()
    del folder
    assert not said()
    with a_folder(tmp_path):
        assert said() == busy
    assert not said()


def test_temporary_files_of_the_dead(tmp_path):
    """They go, and do not make a folder someone else's."""
    name = ".run.json." + 32 * "0" + ".tmp"
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / name).touch()
    a_folder(tmp_path)
    assert names(tmp_path) == {"out/run.json"}
    (tmp_path / "other/out").mkdir(parents=True)
    for each in ("file", name):
        (tmp_path / "other/out" / each).touch()
    with pytest.raises(InputError, match="holds files but no run.json"):
        a_folder(tmp_path / "other")
    assert len(names(tmp_path / "other")) == 2


@pytest.mark.parametrize("kept", [None, [], "text", 3])
def test_a_report_that_was_changed_is_a_sentence(tmp_path, kept):
    def a_folder():
        return RunFolder(tmp_path / "run", "report.json", {"seed": 1})

    with a_folder():
        pass
    path = tmp_path / "run/report.json"
    report = json.loads(path.read_text())
    path.write_text(json.dumps(report | {"kept": kept}))
    before = path.read_bytes()
    with pytest.raises(InputError, match="something else than an object for 'kept'"):
        a_folder()
    for changed in ("null", "[]", '"text"', '{"settings": null}', '{"settings": []}'):
        path.write_text(changed)
        with pytest.raises(InputError, match="must be the report of a run.*; remove"):
            a_folder()
    for changed in ("", "{", '{"settings": {"seed": 1}, "finished": '):
        path.write_text(changed)
        with pytest.raises(InputError, match="is not a JSON file; remove"):
            a_folder()
    for finished in ("null", "1", '"true"', "[]"):
        path.write_text(f'{{"settings": {{"seed": 1}}, "finished": {finished}}}')
        with pytest.raises(InputError, match="true or false for 'finished'; remove"):
            a_folder()
    path.write_bytes(before)
