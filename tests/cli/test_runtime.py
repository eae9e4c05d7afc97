"""What JAX is told before a command runs: in processes of their own."""

import os
import subprocess
import sys

import jax
import pytest

from jaxrefine.cli import _runtime
from jaxrefine.errors import InputError

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


def test_fewer_devices_can_be_asked_for(tmp_path):
    """Whatever the environment says; the command's own check agrees."""
    program = TELL.replace("set_up()", "set_up(2)\n_runtime.check_devices(2)")
    devices, _ = told(tmp_path, program, JAX_NUM_CPU_DEVICES="3")
    assert devices == "2"


def test_devices_that_are_not_there_are_refused():
    count = jax.device_count()
    _runtime.check_devices(None)
    _runtime.check_devices(count)
    with pytest.raises(InputError, match=f"at most {count} .*, got {count + 1}"):
        _runtime.check_devices(count + 1)


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
