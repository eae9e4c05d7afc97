"""Commands in several processes: the results of one, and how they end."""

import signal
import socket
import subprocess
import sys
import time
from argparse import Namespace

import mrcfile
import numpy as np
import pytest
from helpers import blobs

from jaxrefine import cli
from jaxrefine.cli import _processes
from jaxrefine.cli._processes import Launch
from jaxrefine.errors import InputError
from jaxrefine.io import write_mrc

PROGRAM = [sys.executable, "-m", "jaxrefine.cli"]


def launch(monkeypatch, environment, coordinator=None, processes=None, process=None):
    for names in _processes._LAUNCHERS:
        for name in names:
            monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    return _processes.launch(
        Namespace(coordinator=coordinator, processes=processes, process=process)
    )


@pytest.mark.parametrize(
    ("environment", "options", "expected"),
    [
        ({}, (), None),
        ({}, ("a:1", 1, 0), None),
        ({}, ("a:1", 3, 2), Launch("a:1", 3, 2)),
        ({"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"}, (), None),
        (
            {"SLURM_STEP_NUM_TASKS": "4", "SLURM_PROCID": "3"},
            (),
            Launch(None, 4, 3),
        ),
        # A batch script's own step has one task, whatever the job has.
        (
            {"SLURM_NTASKS": "4", "SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"},
            (),
            None,
        ),
        (
            {"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "1"},
            ("node7:4000",),
            Launch("node7:4000", 2, 1),
        ),
        ({"PMI_SIZE": "2", "PMI_RANK": "0"}, (), Launch(None, 2, 0)),
        ({"PMI_SIZE": "2", "PMI_RANK": "1"}, (None, 1, 0), None),
        # What mpirun starts by srun has the number of its daemon there.
        (
            {
                "SLURM_STEP_NUM_TASKS": "2",
                "SLURM_PROCID": "0",
                "OMPI_COMM_WORLD_SIZE": "8",
                "OMPI_COMM_WORLD_RANK": "3",
            },
            ("[::1]:4000",),
            Launch("[::1]:4000", 8, 3),
        ),
        # The shell of srun --pty is not a process of several.
        (
            {
                "SLURM_STEP_NUM_TASKS": "4",
                "SLURM_PROCID": "0",
                "SLURM_PTY_PORT": "35000",
            },
            (),
            None,
        ),
    ],
)
def test_which_process_this_is(monkeypatch, environment, options, expected):
    assert launch(monkeypatch, environment, *options) == expected


@pytest.mark.parametrize(
    ("options", "word"),
    [
        (("a:1",), "--processes"),
        ((None, 2, 0), "--coordinator"),
        (("a:1", 2), "--process "),
        (("a", 2, 0), "got a$"),
        ((":80", 2, 0), r"HOST:PORT or \[HOST\]:PORT, got :80"),
        (("a:70000", 2, 0), "got a:70000"),
        (("::1:4000", 2, 0), "got ::1:4000"),
        (("a:1", 2, 2), "less than --processes, 2, got 2"),
    ],
)
def test_what_does_not_fit_is_refused(monkeypatch, options, word):
    with pytest.raises(InputError, match=word):
        launch(monkeypatch, {}, *options)


EXCHANGED = """
import sys
import jax, numpy as np
jax.config.update("jax_num_cpu_devices", int(sys.argv[2]))
jax.distributed.initialize(sys.argv[1], 3, int(sys.argv[3]), local_device_ids=[])
from jaxrefine import _processes
index = jax.process_index()
own = {"a": np.full((2, 3), index, np.float32), "b": np.array([index > 0])}
whole = _processes.gather(own)
assert whole["a"].tolist() == [[i] * 3 for i in (0, 0, 1, 1, 2, 2)], whole
assert whole["b"].tolist() == [False, True, True], whole
odd = np.array([-0.0, np.nan, 1e-45, np.inf, 3.0], np.float32)
first = _processes.of_first((odd * (1 - index), np.int32(7 + index)))
last = _processes.of_process(np.array([[index > 0], [False]]), 2)
assert np.asarray(last).tolist() == [[True], [False]], last
assert np.asarray(first[0]).tobytes() == odd.tobytes(), first
word = "Größe" if index == 0 else "something longer" * index
assert _processes.text_of_first(word) == "Größe"
assert int(first[1]) == 7 and _processes.on_this_machine() == 3
print("good")
"""


@pytest.mark.parametrize("devices", [1, 2])
def test_what_is_exchanged_arrives_bit_for_bit(devices):
    where = address()
    started = [
        subprocess.Popen(
            [sys.executable, "-c", EXCHANGED, where, str(devices), str(index)],
            stdout=subprocess.PIPE,
            text=True,
        )
        for index in range(3)
    ]
    for process in started:
        output, _ = process.communicate(timeout=240)
        assert process.returncode == 0 and output.endswith("good\n")


def address() -> str:
    """Return an address on this machine where nobody listens."""
    with socket.socket() as tried:
        tried.bind(("localhost", 0))
        return f"localhost:{tried.getsockname()[1]}"


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("processes")
    write_mrc(folder / "map.mrc", np.asarray(blobs(16)), 4.0)
    words = ["simulate", folder / "map.mrc", "--out", folder / "sim"]
    words += ["--particles", 150, "--snr-db", 0, "--ctf", "--initial-blur", 1]
    assert cli.main([str(word) for word in words]) == 0
    return folder / "sim"


def refine(data, out, *words):
    words = ["refine", data / "init.star", "--map", data / "init.mrc", *words]
    words += ["--iterations", 2, "--out", out, "--devices", 1]
    return [*PROGRAM, *map(str, words)]


def start_all(count, command, out):
    """Start a command in processes, whose standard errors go to files beside `out`."""
    where, started = address(), []
    for index in range(count):
        words = ["--coordinator", where, "--processes", str(count)]
        with open(error_of(out, index), "w") as file:
            started.append(
                subprocess.Popen(
                    [*command, *words, "--process", str(index)], stderr=file
                )
            )
    return started


def error_of(out, index):
    return out.with_name(f"{out.name}.{index}.txt")


def content(out):
    """What a run has found, without the times at which it did."""
    maps = [mrcfile.read(path).tobytes() for path in sorted(out.glob("*.mrc"))]
    return [(out / "particles.star").read_text(), *maps]


@pytest.fixture(scope="module")
def expected(data, tmp_path_factory):
    out = tmp_path_factory.mktemp("one") / "out"
    subprocess.run(refine(data, out), check=True, stderr=subprocess.DEVNULL)
    return content(out)


@pytest.mark.slow
def test_several_processes_find_what_one_finds(data, tmp_path, expected):
    """Three visit particles, and two of them insert images.

    Then they find that there is nothing left to do.
    """
    out = tmp_path / "out"
    for _ in range(2):
        for process in start_all(3, refine(data, out), out):
            assert process.wait(timeout=900) == 0
        assert content(out) == expected


@pytest.mark.slow
@pytest.mark.parametrize(
    ("victim", "number"), [(0, signal.SIGKILL), (1, signal.SIGTERM)]
)
def test_when_one_is_killed_the_others_end(data, tmp_path, expected, victim, number):
    """Within the stated time, with a sentence; what is there can be carried on."""
    out = tmp_path / "out"
    started = start_all(2, refine(data, out), out)
    try:
        while not (out / "state" / "checkpoint.eqx").exists():
            assert all(process.poll() is None for process in started)
            time.sleep(0.1)
        started[victim].send_signal(number)
        begin = time.monotonic()
        code = started[1 - victim].wait(timeout=900)
        assert time.monotonic() - begin < 3 * _processes.LOST_S
        killed = started[victim].wait(timeout=60)
    finally:
        for process in started:
            process.kill()
            process.wait()
    assert code == _processes.LOST_CODE
    assert killed == (-number if number == signal.SIGKILL else 128 + number)
    said = error_of(out, 1 - victim).read_text()
    assert "another process has ended" in said and "Traceback" not in said
    assert not (out / "map.mrc").exists()
    subprocess.run(refine(data, out), check=True, stderr=subprocess.DEVNULL)
    assert content(out) == expected


@pytest.mark.slow
def test_processes_that_do_something_else_are_refused(data, tmp_path):
    """Their results would be mixed without a word."""
    out, where = tmp_path / "out", address()
    started = []
    for index, tau in enumerate((0.5, 0.6)):
        words = ["--coordinator", where, "--processes", 2, "--process", index]
        command = refine(data, out, "--tau", tau, *words)
        with open(error_of(out, index), "w") as file:
            started.append(subprocess.Popen(command, stderr=file))
    codes = [process.wait(timeout=300) for process in started]
    assert codes[1] == 2 and codes[0] in (1, 2)
    assert "process 0, got others (tau)" in error_of(out, 1).read_text()


@pytest.mark.slow
def test_a_process_that_waits_for_others_answers_signals(data, tmp_path):
    out = tmp_path / "out"
    words = ["--coordinator", address(), "--processes", 2, "--process", 0]
    with open(error_of(out, 0), "w") as file:
        process = subprocess.Popen(refine(data, out, *words), stderr=file)
    try:
        while "waits for the others" not in error_of(out, 0).read_text():
            assert process.poll() is None
            time.sleep(0.1)
        time.sleep(1)
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=30) == 128 + signal.SIGTERM
    finally:
        process.kill()
        process.wait()
    assert not out.exists()


@pytest.mark.slow
def test_bad_input_ends_all(data, tmp_path):
    """Process 0 says what is wrong."""
    out = tmp_path / "out"
    started = start_all(2, refine(data, out, "--tau", "-1"), out)
    assert [process.wait(timeout=300) for process in started] == [2, 2]
    wrong = refine(data, out, "--mask", data / "absent.mrc")
    started = start_all(2, wrong, out)
    codes = [process.wait(timeout=300) for process in started]
    assert codes[0] == 2 and codes[1] in (1, 2)
    assert "absent.mrc" in error_of(out, 0).read_text()
    assert not out.exists()
    paper = start_all(2, refine(data, out, "--preset", "paper"), out)
    assert [process.wait(timeout=300) for process in paper][0] == 2
    assert "must be default in several processes" in error_of(out, 0).read_text()
