"""What a benchmark is, and how its calls are timed.

Each benchmark is a module of this folder with

- ``CASES``, the names of what it can measure, and ``PARTS``, those of what can be
  measured of a case by itself, if any;
- ``measure(case, settings)``, which returns the figures of a case, ready for JSON;
- ``table(records)``, which returns stored records (:mod:`records`) as Markdown.
"""

import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import jax
from records import Record


@dataclass(frozen=True)
class Settings:
    """What the command line says beside the cases.

    Attributes
    ----------
    data
        The folder of the real maps, for the benchmarks that use them.
    parts
        What to measure of a case; empty for all.
    """

    data: Path
    parts: Collection[str] = ()

    def measures(self, part: str) -> bool:
        """Return whether a part is to be measured."""
        return not self.parts or part in self.parts


class Benchmark(Protocol):
    """A module that measures something; see the module's docstring."""

    CASES: Collection[str]
    PARTS: Collection[str]

    def measure(self, case: str, settings: Settings) -> dict[str, Any]:
        """Return the figures of a case."""
        ...

    def table(self, records: Sequence[Record]) -> str:
        """Return records of this benchmark as Markdown."""
        ...


def interleaved_times(
    calls: dict[str, Callable[[], Any]], rounds: int
) -> dict[str, list[float]]:
    """Return the seconds of each call in every round, after one call to warm up.

    The rounds are interleaved, so that all calls see the same machine.
    """
    for call in calls.values():
        jax.block_until_ready(call())
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            start = time.perf_counter()
            jax.block_until_ready(call())
            times[name].append(time.perf_counter() - start)
    return times
