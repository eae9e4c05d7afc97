"""Signals that ask a command to end: SIGINT (Ctrl-C), and SIGTERM (of queues).

Either ends the command with a word on standard error and the exit code that shells give
to the signal.
"""

import os
import signal
import sys
from types import FrameType
from typing import NoReturn, final

_WORDS = {signal.SIGINT: "interrupted", signal.SIGTERM: "terminated"}
_AGAIN_S = 1.0


@final
class Stopped(KeyboardInterrupt):
    """A signal has asked this process to end.

    Parameters
    ----------
    number
        The signal.
    """

    def __init__(self, number: int):
        super().__init__()
        self.number = number


def answer() -> None:
    """Answer the signals from now on by `Stopped`, unless they are to be ignored.

    An exception may get lost, if it is raised where Python can only report it, as in a
    destructor: it is raised again, until it is heard by `end`.
    """
    for number in _WORDS:
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, _stop)


def end(stop: KeyboardInterrupt) -> int:
    """Say that the command was stopped; return its exit code."""
    number = stop.number if isinstance(stop, Stopped) else signal.SIGINT
    signal.setitimer(signal.ITIMER_REAL, 0)
    print(_WORDS[signal.Signals(number)], file=sys.stderr)
    return 128 + number


def _stop(number: int, frame: FrameType | None) -> NoReturn:
    stop = Stopped(number)
    if _imports(frame):
        # Modules that are half loaded would turn an exception into another, or crash.
        # There is nothing to clean up: what a killed run leaves, the next one can use.
        code = end(stop)
        sys.stderr.flush()
        os._exit(code)
    signal.signal(signal.SIGALRM, lambda _, frame: _stop(number, frame))
    signal.setitimer(signal.ITIMER_REAL, _AGAIN_S)
    raise stop


def _imports(frame: FrameType | None) -> bool:
    """Return whether Python is importing a module."""
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            return True
        frame = frame.f_back
    return False
