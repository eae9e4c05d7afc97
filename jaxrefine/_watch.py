"""How long computations say how far they are."""

import threading
from collections.abc import Callable

Watch = Callable[[str, int, int], None]
"""``watch(stage, done, total)``: what is being computed, and how much of it is done."""


def unwatched(stage: str, done: int, total: int) -> None:
    """Tell nobody."""
    del stage, done, total


class Stage:
    """One part of a computation, which says how much of it is done, from any thread.

    Parameters
    ----------
    watch
        Who is told.
    name
        What is computed.
    total
        How much there is of it.
    """

    def __init__(self, watch: Watch, name: str, total: int):
        self._watch, self._name, self._total = watch, name, total
        self._done, self._lock = 0, threading.Lock()
        watch(name, 0, total)

    def advance(self, count: int = 1) -> None:
        """Say that so much more is done."""
        with self._lock:
            self._done += count
            self._watch(self._name, self._done, self._total)
