"""What JAX is told before a command runs: in processes of their own."""

import os
import subprocess
import sys

import jax
import pytest

from jaxrefine.cli import _runtime
from jaxrefine.errors import InputError
from jaxrefine.runs import provenance

TELL = """
import jax
from jaxrefine.cli import _runtime
_runtime.set_up()
jax.jit(lambda x: x + 1)(1.0)
print(jax.device_count(), jax.config.jax_compilation_cache_dir)
"""


def told(home, program=TELL, **environment):
    """Run a program with a home folder of its own; return what it prints."""
    names = ("XDG_CACHE_HOME", "JAX_NUM_CPU_DEVICES", "JAX_COMPILATION_CACHE_DIR")
    names += ("JAX_CUDA_VISIBLE_DEVICES",)
    kept = {k: v for k, v in os.environ.items() if k not in (*names, "JAXREFINE_CACHE")}
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", program],
        env=kept | {"HOME": str(home)} | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0 and not done.stderr, done.stderr
    return done.stdout.split()


def entries(folder):
    return [path for path in folder.rglob("*-cache") if path.is_file()]


def test_programs_are_kept_for_the_next_run(tmp_path):
    devices, folder = told(tmp_path)
    assert folder.startswith(str(tmp_path / ".cache" / "jaxrefine"))
    known = hasattr(os, "sched_getaffinity")
    cores = len(os.sched_getaffinity(0)) if known else (os.cpu_count() or 1)
    assert int(devices) == min(cores, 8)
    kept = entries(tmp_path)
    assert kept
    before = {path: path.stat().st_mtime_ns for path in kept}
    told(tmp_path)
    assert {path: path.stat().st_mtime_ns for path in entries(tmp_path)} == before


@pytest.mark.parametrize(
    "environment",
    [
        {"JAXREFINE_CACHE": "0"},
        {"JAX_COMPILATION_CACHE_DIR": "", "JAXREFINE_CACHE": ""},
    ],
)
def test_it_can_be_turned_off(tmp_path, environment):
    """By our variable; JAX's own, though empty, is not overruled."""
    assert told(tmp_path, **environment)[1:] in (["None"], [])
    assert not entries(tmp_path)


def test_the_folder_and_the_devices_can_be_chosen(tmp_path):
    chosen = tmp_path / "elsewhere"
    devices, folder = told(
        tmp_path, JAXREFINE_CACHE=str(chosen), JAX_NUM_CPU_DEVICES="3"
    )
    assert devices == "3" and folder.startswith(str(chosen)) and entries(chosen)
    cache = tmp_path / "of-jax"
    assert told(tmp_path, JAX_COMPILATION_CACHE_DIR=str(cache))[1] == str(cache)


ASK = """
import sys
import jax
from jaxrefine.cli import _runtime
from jaxrefine.errors import InputError
_runtime.set_up(int(sys.argv[1]))
try:
    _runtime.check_devices(int(sys.argv[1]))
    said = "taken"
except InputError as error:
    said = error
print(jax.device_count(), jax.config.values["jax_cuda_visible_devices"], said)
"""


def asked(home, count, **environment):
    """Return the devices that there are, the GPUs that may be used, and what is said.

    Without a GPU, only their numbers can be looked at.
    """
    program = f"import sys; sys.argv[1:] = ['{count}']\n{ASK}"
    devices, visible, *said = told(home, program, **environment)
    return int(devices), visible, " ".join(said)


CORES = provenance.available_cores()


def test_the_first_of_the_devices_can_be_asked_for(tmp_path):
    assert asked(tmp_path, 1) == (1, "0", "taken")
    assert asked(tmp_path, CORES)[::2] == (CORES, "taken")
    given = {"JAX_NUM_CPU_DEVICES": "3", "JAX_CUDA_VISIBLE_DEVICES": "5,2,7"}
    assert asked(tmp_path, 2, **given) == (2, "5,2", "taken")


def test_more_devices_than_there_are_are_refused(tmp_path):
    """Cores, or what JAX's own variable says."""
    count, _, said = asked(tmp_path, CORES + 1)
    assert count == CORES
    assert said == f"--devices must be at most {CORES} (cpu), got {CORES + 1}"
    given = {"JAX_NUM_CPU_DEVICES": "3", "JAX_CUDA_VISIBLE_DEVICES": "5"}
    said = "--devices must be at most 3 (cpu), got 4"
    assert asked(tmp_path, 4, **given) == (3, "5", said)


def test_devices_that_are_in_use_already_are_counted():
    count = jax.device_count()
    _runtime.check_devices(None)
    _runtime.check_devices(count)
    with pytest.raises(InputError, match=f"at most {count} .*, got {count + 1}"):
        _runtime.check_devices(count + 1)
    with pytest.raises(InputError, match=f"must be {count}, as many .*, got 0"):
        _runtime.check_devices(0)


def test_a_folder_that_cannot_be_made_is_done_without(tmp_path):
    """A file where the folder should be; nothing is said."""
    (tmp_path / ".cache").write_text("")
    assert told(tmp_path)[1] == "None"


def test_damaged_entries_are_compiled_anew(tmp_path):
    """As another run's would be that are not written to the end."""
    told(tmp_path)
    for path in entries(tmp_path):
        path.write_bytes(path.read_bytes()[:20])
    told(tmp_path)


def test_an_import_tells_jax_nothing(tmp_path):
    program = "import jax, jaxrefine, jaxrefine.cli; jaxrefine.refine; "
    program += "print(jax.config.jax_compilation_cache_dir)"
    assert told(tmp_path, program) == ["None"]


def test_processors_have_folders_of_their_own(tmp_path, monkeypatch):
    monkeypatch.setenv("JAXREFINE_CACHE", str(tmp_path))
    folders = set()
    for flags in ("sse avx", "sse avx avx512f"):
        known = [f"flags : {flags}"]
        monkeypatch.setattr(_runtime, "_features", lambda known=known: known)
        folders.add(_runtime.cache_folder())
    assert len(folders) == 2
    assert all(folder.parent == tmp_path for folder in folders)
