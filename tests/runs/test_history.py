"""Histories: whatever happens to the disk, the last good state is found."""

import errno
import json
import os

import equinox as eqx
import numpy as np
import pytest

from jaxrefine.errors import InputError
from jaxrefine.io import load_checkpoint
from jaxrefine.runs.history import History

resource = pytest.importorskip("resource", reason="needs a Unix system")


class State(eqx.Module):
    iteration: np.ndarray
    volume: np.ndarray


def state(iteration, n=8):
    return State(np.asarray(iteration), np.full((n, n, n), 0.5 + iteration))


def a_history(path):
    return History(path / "state", path / "metrics.jsonl")


def contents(folder):
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


@pytest.fixture
def begun(tmp_path):
    """A run that stopped after three iterations; its checkpoints."""
    history = a_history(tmp_path)
    assert not history.has_state and history.resume(lambda: state(0)) is None
    for i in (1, 2, 3):
        history.record(state(i), {"iteration": i})
    assert history.has_state
    return history.newest, history.previous


def resumed(path):
    history = a_history(path)
    last = history.resume(lambda: state(0))
    rows = [json.loads(line) for line in history.log.read_text().splitlines()]
    assert rows == history.rows()
    assert [row["iteration"] for row in rows] == [*range(1, int(last.iteration) + 1)]
    return last


def truncate(path):
    path.write_bytes(path.read_bytes()[:-100])


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def change_version(path):
    content = path.read_bytes()
    assert content.count(b"checkpoint 3") == 1
    path.write_bytes(content.replace(b"checkpoint 3", b"checkpoint 7"))


def clear(path):
    path.write_bytes(b"")


DAMAGES = [truncate, flip, clear, change_version, os.unlink]


@pytest.mark.parametrize(
    "damage", DAMAGES, ids=["short", "flipped", "empty", "version", "gone"]
)
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
    history = a_history(tmp_path)
    history.resume(lambda: state(0))
    history.record(state(3), {"iteration": 3})
    assert [int(load_checkpoint(path, state(0))[0].iteration) for path in begun] == [
        3,
        2,
    ]


@pytest.mark.parametrize("damage", DAMAGES[:3], ids=["short", "flipped", "empty"])
def test_without_a_whole_state_nothing_is_touched(begun, tmp_path, damage):
    for path in begun:
        damage(path)
    before = contents(tmp_path)
    with pytest.raises(InputError, match="delete them to begin again") as caught:
        resumed(tmp_path)
    assert all(str(path) in str(caught.value) for path in begun)
    assert contents(tmp_path) == before
    for path in begun:
        path.unlink()
    assert a_history(tmp_path).resume(lambda: state(0)) is None


def test_another_structure_is_not_damage(begun, tmp_path):
    before = contents(tmp_path)
    with pytest.raises(InputError, match="another structure"):
        a_history(tmp_path).resume(lambda: state(0, n=6))
    assert contents(tmp_path) == before


def refuse(*_):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_full_disk_leaves_the_last_state(begun, tmp_path, monkeypatch, call):
    history = a_history(tmp_path)
    history.resume(lambda: state(0))
    with monkeypatch.context() as patch:
        patch.setattr(os, call, refuse)
        with pytest.raises(InputError, match="cannot write .*: No space left"):
            history.record(state(4), {"iteration": 4})
    assert sorted(contents(tmp_path / "state")) == [path.name for path in begun]
    assert eqx.tree_equal(resumed(tmp_path), state(3))


@pytest.mark.parametrize("size", [0, 55, 500, 4000])
def test_writes_that_the_system_cuts_short(begun, tmp_path, size):
    """The system refuses for real to write beyond so many bytes of a file."""
    history = a_history(tmp_path)
    history.resume(lambda: state(0))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        with pytest.raises(InputError, match="cannot write .*: File too large"):
            history.record(state(4), {"iteration": 4})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert sorted(contents(tmp_path / "state")) == [path.name for path in begun]
    assert eqx.tree_equal(resumed(tmp_path), state(3))


def test_a_large_state_on_a_full_disk(begun, tmp_path):
    """One that does not fit into Python's buffers, whose writers have errors too."""
    large, history = state(4, n=40), a_history(tmp_path)
    history.resume(lambda: state(0))
    before = contents(tmp_path / "state")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(InputError, match="cannot write .*: File too large"):
            history.record(large, {"iteration": 4})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert contents(tmp_path / "state") == before


def test_states_of_another_version_are_not_to_be_deleted(begun, tmp_path):
    """If neither is whole, one that may be whole for another version has the word."""
    for path in begun:
        change_version(path)
    with pytest.raises(InputError, match=f"{begun[0]} was saved by another version"):
        resumed(tmp_path)


@pytest.mark.parametrize(
    "damage",
    [
        lambda lines: lines[0] + b"\xff\x00\n" + lines[2] + b"[1]\n",
        lambda lines: lines[0] + b"null\n" + lines[2],
        lambda lines: lines[0].replace(b"1", b'"1"') + lines[1] + lines[2],
        lambda lines: b"{}\n" + lines[1] + lines[2],
        lambda lines: lines[0] + lines[2],
        lambda lines: b"[" * 10_000,
        lambda lines: b"",
        None,
    ],
)
def test_a_damaged_log_is_restored(begun, tmp_path, capsys, damage):
    """It costs nothing, because the state has the rows."""
    path = tmp_path / "metrics.jsonl"
    before = path.read_bytes()
    if damage is None:
        path.unlink()
    else:
        path.write_bytes(damage(before.splitlines(keepends=True)))
    assert eqx.tree_equal(resumed(tmp_path), state(3))
    assert path.read_bytes() == before
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and f"{path} is damaged or lacks rows" in error


def test_time_is_counted_from_the_first_process_on(begun, tmp_path):
    first = a_history(tmp_path)
    first.resume(lambda: state(0))
    before = first.elapsed_s
    assert before > 0
    first.record(state(4), {"iteration": 4})
    second = a_history(tmp_path)
    assert second.elapsed_s < before
    second.resume(lambda: state(0))
    assert second.elapsed_s > before


def test_temporary_files_of_the_dead(begun, tmp_path):
    """They go; what is not one stays."""
    name = ".checkpoint.eqx." + 32 * "0" + ".tmp"
    kept = (".checkpoint.eqx.tmp", "checkpoint.eqx." + 32 * "0" + ".tmp")
    for each in (name, *kept):
        (begun[0].parent / each).touch()
    a_history(tmp_path)
    names = [path.name for path in begun]
    assert sorted(contents(begun[0].parent)) == sorted([*names, *kept])


def test_states_that_are_no_longer_needed(begun, tmp_path):
    history = a_history(tmp_path)
    history.remove_states()
    assert not history.has_state and set(contents(tmp_path)) == {"metrics.jsonl"}
    history.remove_states()
