"""The command line as a whole: exit codes, usage, and what is imported."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from jaxrefine import cli
from jaxrefine.cli.commands import COMMANDS, Command
from jaxrefine.cli.commands.demo import DemoSettings
from jaxrefine.cli.commands.fsc import FscSettings
from jaxrefine.cli.commands.postprocess import PostprocessSettings
from jaxrefine.cli.commands.reconstruct import ReconstructSettings
from jaxrefine.io import write_mrc

PROGRAM = [sys.executable, "-m", "jaxrefine.cli"]


@pytest.fixture
def maps(tmp_path):
    """A folder with two maps."""
    rng = np.random.default_rng(0)
    for name in "ab":
        write_mrc(tmp_path / f"{name}.mrc", rng.normal(size=(12, 12, 12)), 2.5)
    return tmp_path


def start(words, **streams):
    return subprocess.run(list(map(str, words)), text=True, check=False, **streams)


@pytest.mark.parametrize(
    "words", [["--help"], *([command.name, "--help"] for command in COMMANDS)]
)
def test_help_loads_nothing_heavy(words):
    """JAX, NumPy and matplotlib take seconds to load."""
    code = (
        "import sys\n"
        "from jaxrefine import cli\n"
        "try: cli.main(sys.argv[1:])\n"
        "except SystemExit: pass\n"
        "names = {name.partition('.')[0] for name in sys.modules}\n"
        "heavy = {'jax', 'jaxlib', 'numpy', 'scipy', 'matplotlib', 'equinox', 'tqdm'}\n"
        "print(sorted(names & heavy))"
    )
    done = start([sys.executable, "-c", code, *words], stdout=subprocess.PIPE)
    *text, heavy = done.stdout.splitlines()
    assert done.returncode == 0 and heavy == "[]"
    assert text[0].startswith("usage: jaxrefine")


def test_the_help_names_every_command(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert all(command.name in text for command in COMMANDS)


def test_version(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["--version"])
    assert stop.value.code == 0 and "jaxrefine 0" in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["reconcile"],
        ["fsc"],
        ["fsc", "a.mrc"],
        ["fsc", "a.mrc", "b.mrc", "--colour"],
        ["demo"],
        ["demo", "--out", "x", "--size", "big"],
        ["demo", "--out", "x", "--preset", "other"],
    ],
)
def test_usage_errors_exit_with_2(arguments, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        cli.main(arguments)
    assert stop.value.code == 2
    assert "usage: jaxrefine" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (KeyboardInterrupt(), 130, "interrupted"),
        (OSError(28, "No space left on device"), 2, "No space left on device"),
        (OSError("nobody knows"), 2, "nobody knows"),
        (MemoryError(), 2, "not enough memory"),
        (RuntimeError("RESOURCE_EXHAUSTED: all of it"), 2, "not enough memory"),
    ],
)
def test_interruptions_and_refusals_are_a_sentence(run, error, code, words):
    def fail(settings):
        raise error

    command = Command("fail", "summary", "description", FscSettings, fail)
    result = run("fail", "a.mrc", "b.mrc", commands=[command])
    assert (result.code, result.out) == (code, "")
    assert result.err.count("\n") == 1 and words in result.err
    assert "None" not in result.err


@pytest.mark.parametrize(
    ("settings", "words", "advice"),
    [
        (FscSettings, ["a.mrc", "b.mrc"], set()),
        (DemoSettings, ["--out", "b"], {"--batch-size"}),
        (ReconstructSettings, ["a", "--out", "b"], {"--batch-size", "--devices"}),
    ],
)
def test_a_smaller_batch_is_advised_where_there_is_one(run, settings, words, advice):
    """And fewer devices, where their number is an option."""

    def fail(settings):
        raise MemoryError

    command = Command("fail", "summary", "description", settings, fail)
    err = run("fail", *words, commands=[command]).err
    assert {
        option for option in ("--batch-size", "--devices") if option in err
    } == advice


def test_a_negative_number_may_have_an_exponent(run):
    seen = []
    command = Command(
        "sharpen", "summary", "description", PostprocessSettings, seen.append
    )
    words = ["a.mrc", "b.mrc", "--out", "out", "--b-factor", "-1e6"]
    assert run("sharpen", *words, commands=[command]).code == 0
    assert seen[0].b_factor == -1e6


def test_an_error_of_ours_is_not_hidden(run):
    def fail(settings):
        raise RuntimeError("a mistake")

    command = Command("fail", "summary", "description", FscSettings, fail)
    with pytest.raises(RuntimeError, match="a mistake"):
        run("fail", "a.mrc", "b.mrc", commands=[command])


@pytest.mark.slow
def test_a_process_of_its_own(maps):
    """Exit codes and streams as a shell sees them."""
    both = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    good = start([*PROGRAM, "fsc", maps / "a.mrc", maps / "b.mrc"], **both)
    assert (good.returncode, good.stderr) == (0, "") and "# resolution" in good.stdout
    bad = start([*PROGRAM, "fsc", maps / "a.mrc", maps / "absent.mrc"], **both)
    assert (bad.returncode, bad.stdout) == (2, "")
    assert bad.stderr.count("\n") == 1 and "absent.mrc" in bad.stderr


@pytest.mark.skipif(sys.platform != "linux", reason="Linux tells of limits")
@pytest.mark.parametrize(("flag", "mib"), [("-v", 1200), ("-v", 200), ("-d", 150)])
def test_a_limit_within_which_jax_would_abort_is_refused(maps, flag, mib):
    command = f'ulimit {flag} {mib * 1024}; exec "$@"'
    words = ["sh", "-c", command, "sh", *PROGRAM, "fsc", maps / "a.mrc", maps / "b.mrc"]
    done = start(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.count("\n") == 1 and f"`ulimit {flag}`" in done.stderr
    assert f"a limit of {mib} MiB" in done.stderr


@pytest.mark.slow
def test_a_reader_that_leaves_is_no_error(maps):
    reading, writing = os.pipe()
    os.close(reading)
    files = [maps / "a.mrc", maps / "b.mrc", "--json", maps / "out.json"]
    done = start([*PROGRAM, "fsc", *files], stdout=writing, stderr=subprocess.PIPE)
    os.close(writing)
    assert (done.returncode, done.stderr) == (141, "")
    assert (maps / "out.json").exists()


def test_the_installed_command(maps):
    program = Path(sys.executable).parent / "jaxrefine"
    if not program.exists():
        pytest.skip("the package is not installed as a command")
    done = start(
        [program, "fsc", maps / "a.mrc", maps / "absent.mrc"], stderr=subprocess.PIPE
    )
    assert done.returncode == 2 and "absent.mrc" in done.stderr


LOADING = """
import os, sys
from jaxrefine.cli import __main__

class Sender:
    def find_spec(self, name, *_):
        if name == "{module}":
            os.kill(os.getpid(), {number})

sys.meta_path.insert(0, Sender())
sys.exit(__main__.run())
"""


@pytest.mark.parametrize(
    ("number", "word"),
    [
        (signal.SIGTERM, "terminated"),
        (signal.SIGINT, "interrupted"),
        (signal.SIGHUP, "disconnected"),
    ],
)
@pytest.mark.parametrize("module", ["jax", "numpy", "scipy.ndimage", "mrcfile"])
def test_a_signal_is_answered_while_modules_are_loaded(maps, number, word, module):
    """As an exception it would be lost there, or become another one."""
    program = [sys.executable, "-c", LOADING.format(module=module, number=int(number))]
    words = ["postprocess", maps / "a.mrc", maps / "b.mrc", "--out", maps / "out"]
    both = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    done = start([*program, *words], **both)
    assert (done.returncode, done.stdout) == (128 + number, "")
    assert done.stderr == f"{word}\n"


@pytest.mark.parametrize(
    ("number", "word"),
    [(signal.SIGTERM, "terminated"), (signal.SIGHUP, "disconnected")],
)
def test_a_signal_is_answered_while_a_command_runs(maps, number, word):
    """It leaves what an interrupted run leaves."""
    out = maps / "out"
    words = [*PROGRAM, "simulate", maps / "a.mrc", "--out", out, "--snr-db", 0]
    words += ["--particles", 10**8]
    with subprocess.Popen(
        [*map(str, words)], stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            while not list(out.glob("*")) and process.poll() is None:
                time.sleep(0.05)
            process.send_signal(number)
            _, err = process.communicate(timeout=120)
        finally:
            process.kill()
    assert process.returncode == 128 + number and err.endswith(f"{word}\n")


LOST = """
import os, signal, sys, time
from jaxrefine.cli import _signals

class Fragile:
    def __del__(self):
        os.kill(os.getpid(), signal.SIGTERM)

_signals.answer()
try:
    Fragile()
    time.sleep(60)
except KeyboardInterrupt as stop:
    sys.exit(_signals.end(stop))
"""


def test_a_signal_that_python_only_reports_is_repeated():
    done = start([sys.executable, "-c", LOST], stderr=subprocess.PIPE, timeout=50)
    assert (done.returncode, done.stderr) == (143, "terminated\n")


CLEANING = """
import os, signal, sys, time
from jaxrefine.cli import _signals

_signals.answer()
try:
    try:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(60)
    finally:
        time.sleep(1.5)
        print("clean")
except KeyboardInterrupt as stop:
    sys.exit(_signals.end(stop))
"""


def test_one_signal_does_not_interrupt_what_is_done_at_the_end():
    both = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    done = start([sys.executable, "-c", CLEANING], timeout=50, **both)
    assert (done.returncode, done.stdout) == (143, "clean\n")
