"""How far long runs are, on standard error: as bars, or as lines in a log."""

import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

from tqdm import tqdm

_SHOWN = {
    "mean_fsc": ("FSC", "{:.3f}"),
    "angle_error_in_degrees_median": ("error", "{:.1f}°"),
    "r_max": ("band", "{}"),
    "fold_score": ("folds' FSC", "{:.3f}"),
    "gold_score": ("half sets' FSC", "{:.3f}"),
    "angle_change_in_degrees": ("turned", "{:.2f}°"),
    "resolution_in_angstroms": ("resolution", "{:.1f} Å"),
    "angle_step_in_degrees": ("step", "{:.2g}°"),
    "objective": ("objective", "{:.5g}"),
}
"""What of a row is shown, as what, and how."""

_STAGE_INTERVAL = 0.5  # seconds between two looks at a stage
_LINE_INTERVAL = 10.0  # seconds between two lines of a run, without a terminal
_STAGE_LINE_INTERVAL = 60.0  # and of a stage within
_LINE = "{desc}: {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]"
_LINE_WITHOUT_END = "{desc}: {n_fmt} [{elapsed}{postfix}]"


class Bars:
    """One progress bar after another, on standard error.

    Below it, another one shows the stage that a run is in. Where standard error is no
    terminal, but a log, there is a line now and then: every 10 s for a run, every 60 s
    within a stage, and one at the end of each, except of stages below a bar.
    """

    def __init__(self):
        self._bar: tqdm | _Line | None = None
        self._stage: tqdm | _Line | None = None
        self._name = ""
        self._on_terminal = sys.stderr.isatty()

    def __enter__(self) -> "Bars":
        return self

    def __exit__(self, *exception) -> None:
        for bar in (self._stage, self._bar):
            if bar is not None:
                bar.close()

    def watch(self, stage: str, done: int, total: int) -> None:
        """Show how far a stage is, a :obj:`jaxrefine._watch.Watch`."""
        if self._stage is None or stage != self._name or done < self._stage.n:
            if self._stage is not None:
                self._stage.close()
            self._name, is_alone = stage, self._bar is None
            if self._on_terminal:
                self._stage = tqdm(
                    desc=f"{stage:>28}",
                    total=total,
                    file=sys.stderr,
                    position=0 if is_alone else 1,
                    leave=is_alone,
                    mininterval=_STAGE_INTERVAL,
                )
            else:
                self._stage = _Line(stage, total, 0, _STAGE_LINE_INTERVAL, is_alone)
        self._stage.update(done - self._stage.n)

    def next(
        self, name: str, iterations: int | None, done: int = 0
    ) -> Callable[[Any, Mapping[str, Any]], None]:
        """Open the bar of the next run, and return what moves it.

        Without a number of iterations it counts them, and has no end.
        """
        if self._bar is not None:
            self._bar.close()
        if self._on_terminal:
            bar = tqdm(
                desc=f"{name:>28}", total=iterations, initial=done, file=sys.stderr
            )
        else:
            bar = _Line(name, iterations, done, _LINE_INTERVAL, tells_end=True)
        self._bar = bar

        def advance(state: Any, row: Mapping[str, Any]) -> None:
            del state
            shown = {
                title: form.format(row[name])
                for name, (title, form) in _SHOWN.items()
                if row.get(name) is not None
            }
            bar.set_postfix(shown, refresh=False)
            bar.update(row.get("iteration", bar.n + 1) - bar.n)

        return advance


class _Line:
    """What stands in for a bar of tqdm in a log: a line now and then.

    Parameters
    ----------
    name
        What is counted.
    total, done
        How much there is of it, if that is known, and how much of it has been done.
    interval
        Seconds between two lines.
    tells_end
        Whether there is a line at the end, even before its time.
    """

    def __init__(
        self, name: str, total: int | None, done: int, interval: float, tells_end: bool
    ):
        self.n, self._total, self._initial = done, total, done
        self._name, self._shown, self._said = name, "", done
        self._interval, self._tells_end = interval, tells_end
        self._begin = self._last = time.monotonic()

    def set_postfix(self, shown: Mapping[str, str], *, refresh: bool) -> None:
        """Say this, too, in later lines."""
        del refresh
        self._shown = ", ".join(f"{title}={value}" for title, value in shown.items())

    def update(self, count: int) -> None:
        """Count what is done, and say it if it is time to."""
        self.n += count
        is_time = time.monotonic() >= self._last + self._interval
        if is_time or (self._tells_end and self.n == self._total):
            self._say()

    def close(self) -> None:
        """Say how far it is in the end, unless that has been said."""
        if self._tells_end:
            self._say()

    def _say(self) -> None:
        if self.n == self._said:
            return
        self._said, self._last = self.n, time.monotonic()
        line = tqdm.format_meter(
            self.n,
            self._total or 0,
            self._last - self._begin,
            prefix=self._name,
            postfix=self._shown,
            initial=self._initial,
            bar_format=_LINE if self._total else _LINE_WITHOUT_END,
        )
        print(line, file=sys.stderr, flush=True)
