"""Signals that ask a command to end: of Ctrl-C, of queues, and of a lost terminal.

SIGINT, SIGTERM and SIGHUP end the command with one word on the standard error and the
exit code that shells give to the signal.
"""

import os
import signal
import sys
from contextlib import suppress
from types import FrameType
from typing import NoReturn, final

_WORDS = {
    signal.SIGINT: "interrupted",
    signal.SIGTERM: "terminated",
    signal.SIGHUP: "disconnected",
}
_AGAIN_S = 0.1


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

    Python cannot raise an exception in a destructor and the like: it only reports it,
    and goes on. A `Stopped` that is reported is raised again, a moment later.
    """
    for number in _WORDS:
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, _stop)
    report = sys.unraisablehook

    def repeat(unraisable: "sys.UnraisableHookArgs") -> None:
        if not isinstance(unraisable.exc_value, Stopped):
            report(unraisable)
            return
        number = unraisable.exc_value.number
        signal.signal(signal.SIGALRM, lambda _, frame: _stop(number, frame))
        signal.setitimer(signal.ITIMER_REAL, _AGAIN_S)

    sys.unraisablehook = repeat


def end(stop: KeyboardInterrupt) -> int:
    """Say that the command was stopped; return its exit code."""
    number = stop.number if isinstance(stop, Stopped) else signal.SIGINT
    with suppress(OSError):  # The terminal may have gone.
        print(_WORDS[signal.Signals(number)], file=sys.stderr)
    return 128 + number


def _stop(number: int, frame: FrameType | None) -> NoReturn:
    stop = Stopped(number)
    if _imports(frame):
        # Modules that are half loaded would turn an exception into another, or crash.
        # There is nothing to clean up: what a killed run leaves, the next one can use.
        code = end(stop)
        with suppress(OSError):
            sys.stderr.flush()
        os._exit(code)
    raise stop


def _imports(frame: FrameType | None) -> bool:
    """Return whether Python is importing a module."""
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            return True
        frame = frame.f_back
    return False
