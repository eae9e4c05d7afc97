"""A command in several processes: how they find each other, and how they end.

``srun`` and ``mpirun`` start processes and number them; elsewhere the options
``--coordinator``, ``--processes`` and ``--process`` say the same. From there on the
processes are those of ``jax.distributed``. When one of them dies, JAX aborts the others
without a word to the user, so each runs under the eyes of a parent that has a last one.

This module imports JAX only where it connects the processes: it must not have been
used before the parent forks.
"""

import os
import signal
import sys
import threading
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from dataclasses import dataclass
from types import FrameType
from typing import final

from jaxrefine.errors import InputError

LOST_S = 60
"""Seconds after which a process that has not been heard of counts as dead."""

LOST = (
    "another process has ended, or cannot be reached; start all of them again to carry "
    "on"
)
LOST_CODE = 1
_SHUTDOWN_S = 60
_PATIENCE_S = 86400
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

# What launchers call the number of processes and that of each: those of Open MPI,
# MPICH and its relatives, and of a step of Slurm (srun), which comes last since others
# may have been started by it.
_LAUNCHERS = (
    ("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK"),
    ("PMI_SIZE", "PMI_RANK"),
    ("SLURM_STEP_NUM_TASKS", "SLURM_PROCID"),
)
_INTERACTIVE = "SLURM_PTY_PORT"  # of a shell that srun has started


@final
@dataclass(frozen=True)
class Launch:
    """Which of several processes this one is.

    Attributes
    ----------
    coordinator
        Where the first process listens, ``HOST:PORT``; None if JAX can tell.
    count, index
        How many processes there are, and the number of this one, from 0.
    """

    coordinator: str | None
    count: int
    index: int


def launch(options: Namespace) -> Launch | None:
    """Return which process this is; None if it is the only one.

    Parameters
    ----------
    options
        The options of a command, of which some may have ``coordinator``, ``processes``
        and ``process``.

    Raises
    ------
    InputError
        If some of these are missing, or do not fit each other.
    """
    if not hasattr(options, "coordinator"):
        return None
    coordinator, count, index = (
        options.coordinator,
        options.processes,
        options.process,
    )
    for names in () if _INTERACTIVE in os.environ else _LAUNCHERS:
        known = [os.environ.get(name, "") for name in names]
        if all(text.isdecimal() for text in known) and int(known[0]) > 1:
            count = int(known[0]) if count is None else count
            index = int(known[1]) if index is None else index
            break
    else:
        given = (coordinator, count, index)
        if None in given and given != (None, None, None):
            raise InputError(
                "--coordinator, --processes and --process must be given together, "
                "unless srun or mpirun starts the processes"
            )
    if coordinator is not None:
        host, _, port = coordinator.rpartition(":")
        bare = ":" in host and not host.startswith("[")  # of IPv6
        if not host or bare or not port.isdecimal() or not 0 < int(port) < 2**16:
            raise InputError(
                f"--coordinator must be HOST:PORT or [HOST]:PORT, got {coordinator}"
            )
    if count is None or index is None:
        return None
    if not 0 <= index < count:
        raise InputError(
            f"--process must be less than --processes, {count}, got {index}"
        )
    return None if count == 1 else Launch(coordinator, count, index)


def fork(launched: Launch) -> None:
    """Go on in a child; the parent waits for it and says what no child can say.

    The parent hands signals on, and ends with the child's exit code. The child ends
    with its parent.
    """
    alive, held = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(held)
        os.setpgid(0, 0)  # so that a terminal's signals come from the parent alone
        threading.Thread(target=_end_with, args=(alive,), daemon=True).start()
        return
    os.close(alive)

    def hand_on(number: int, frame: FrameType | None) -> None:
        del frame
        with suppress(ProcessLookupError):
            os.kill(child, number)

    for number in _SIGNALS:
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, hand_on)
    _, status = os.waitpid(child, 0)
    code = os.waitstatus_to_exitcode(status)
    if code == -signal.SIGABRT:
        code = LOST_CODE
        _say(
            f"process {launched.index} of {launched.count} was aborted, as JAX does "
            f"when it loses another (its own words are above): {LOST}"
        )
    elif code < 0:
        name = signal.Signals(-code).name
        code = 128 - code
        _say(f"process {launched.index} of {launched.count} was killed by {name}")
    os._exit(code)


def connect(launched: Launch) -> None:
    """Join the other processes, before JAX is used.

    Raises
    ------
    InputError
        If they cannot be found.
    """
    import jax

    # The others wait while process 0 reads all images, which may take an hour.
    patience = f"--xla_cpu_collective_timeout_seconds={_PATIENCE_S}"
    os.environ["XLA_FLAGS"] = f"{patience} {os.environ.get('XLA_FLAGS', '')}".strip()
    where = launched.coordinator or "the address that the launcher gives"
    _say(
        f"process {launched.index} of {launched.count} waits for the others at {where}"
    )
    # JAX waits without Python, which could not answer signals.
    answers = {number: signal.getsignal(number) for number in _SIGNALS}
    for number, answer in answers.items():
        if answer != signal.SIG_IGN:
            signal.signal(number, signal.SIG_DFL)
    try:
        jax.distributed.initialize(
            launched.coordinator,
            launched.count,
            launched.index,
            heartbeat_timeout_seconds=LOST_S,
            shutdown_timeout_seconds=_SHUTDOWN_S,
        )
    except (ValueError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(
            f"process {launched.index} of {launched.count} must reach the others; "
            f"--coordinator HOST:PORT says where the first one listens: {reason}"
        ) from error
    finally:
        for number, answer in answers.items():
            signal.signal(number, answer)


@contextmanager
def one_speaks(launched: Launch | None) -> Iterator[None]:
    """Have all processes but the first say nothing, unless they raise an error."""
    if launched is None or launched.index == 0:
        yield
        return
    with open(os.devnull, "w") as nowhere:
        with redirect_stdout(nowhere), redirect_stderr(nowhere):
            yield


def leave(code: int) -> int:
    """Return an exit code; end at once where others may wait for a failed process.

    JAX would have them wait for each other when Python ends.
    """
    if code and is_connected():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return code


def is_connected() -> bool:
    """Return whether this process has joined others."""
    if "jax" not in sys.modules:
        return False
    import jax

    return jax.distributed.is_initialized()


def _end_with(pipe: int) -> None:
    """End this process when the other end of a pipe is closed."""
    os.read(pipe, 1)
    os._exit(LOST_CODE)


def _say(sentence: str) -> None:
    print(f"jaxrefine: {sentence}", file=sys.stderr, flush=True)
