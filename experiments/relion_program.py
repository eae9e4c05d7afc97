"""One of RELION's programs: run in a folder, with a log there and a time limit."""

import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from jaxrefine.errors import InputError
from jaxrefine.runs.provenance import available_cores

_POLL_S = 0.2  # between two looks at what a program has written
_PATIENCE_S = 20.0  # for a program that was asked to stop
_DYING_WITH_US = ["setpriv", "--pdeathsig", "TERM", "--"]  # of Linux
_SHORT_S = 3600.0  # enough for a program that does not iterate


def mpirun(processes: int) -> list[str]:
    """Return the launcher; Open MPI must be told of root and of few cores."""
    scarce = processes > available_cores() // 2  # a core may count twice
    as_root = ["--allow-run-as-root"] * (os.geteuid() == 0)
    return ["mpirun", "-n", str(processes), *as_root, *["--oversubscribe"] * scarce]


def complete(folder: Path, name: str, options: list[str]) -> None:
    """Run a program that has nothing to show until it ends."""
    if not run(folder, name, [f"relion_{name}", *options], _SHORT_S, lambda: None):
        raise InputError(f"relion_{name} took more than {_SHORT_S:g} s in {folder}")


def run(
    folder: Path, name: str, command: list[str], limit_s: float, watch: Callable
) -> bool:
    """Run a program; return whether it came to its end before the time limit."""
    if shutil.which(command[0]) is None:
        raise InputError(f"{command[0]} is not installed.")
    launcher = _DYING_WITH_US if shutil.which("setpriv") else []
    path, end = folder / f"{name}.log", time.monotonic() + limit_s
    with open(path, "a+b") as log:
        log.write(f"\n{' '.join(command)}\n\n".encode())
        log.flush()
        begin = log.tell()
        process = subprocess.Popen(
            [*launcher, *command],
            cwd=folder,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
        try:
            while process.poll() is None and time.monotonic() < end:
                time.sleep(_POLL_S)
                watch()
            code = process.poll()
        finally:
            for number in (signal.SIGTERM, signal.SIGKILL):
                if process.poll() is None:
                    os.killpg(process.pid, number)
                    with suppress(subprocess.TimeoutExpired):
                        process.wait(_PATIENCE_S)
        if code:
            log.seek(begin)
            error = _last_error(log.read().decode(errors="replace"))
            raise InputError(f"RELION failed: {error} See {path}.")
    return code == 0


def _last_error(text: str) -> str:
    """Return the last error that RELION reports, or the last line."""
    pattern = r"^ERROR:\s*(?:ERROR:\s*)?(\S.*)$"
    lines = re.findall(pattern, text, re.MULTILINE) or text.split("\n")
    return next((line.strip() for line in reversed(lines) if line.strip()), "")
