"""Progress bars for long runs, on standard error."""

import sys
from collections.abc import Callable, Mapping
from typing import Any

from tqdm import tqdm

_SHOWN = {
    "mean_fsc": ("FSC", "{:.3f}"),
    "angle_error_in_degrees_median": ("error", "{:.1f}°"),
    "r_max": ("band", "{}"),
    "fold_score": ("folds' FSC", "{:.3f}"),
    "angle_change_in_degrees": ("turned", "{:.2f}°"),
    "resolution_in_angstroms": ("resolution", "{:.1f} Å"),
    "angle_step_in_degrees": ("step", "{:.2g}°"),
    "objective": ("objective", "{:.5g}"),
}
"""What of a row is shown, as what, and how."""

_STAGE_INTERVAL = 0.5  # seconds between two looks at a stage


class Bars:
    """One progress bar after another, on standard error.

    Below it, another one shows the stage that a run is in.
    """

    def __init__(self):
        self._bar: tqdm | None = None
        self._stage: tqdm | None = None
        self._name = ""

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
            self._name = stage
            self._stage = tqdm(
                desc=f"{stage:>28}",
                total=total,
                file=sys.stderr,
                position=0 if self._bar is None else 1,
                leave=self._bar is None,
                mininterval=_STAGE_INTERVAL,
            )
        self._stage.update(done - self._stage.n)

    def next(
        self, name: str, iterations: int | None, done: int = 0
    ) -> Callable[[Any, Mapping[str, Any]], None]:
        """Open the bar of the next run, and return what moves it.

        Without a number of iterations it counts them, and has no end.
        """
        if self._bar is not None:
            self._bar.close()
        bar = self._bar = tqdm(
            desc=f"{name:>28}", total=iterations, initial=done, file=sys.stderr
        )

        def advance(state: Any, row: Mapping[str, Any]) -> None:
            del state
            shown = {
                title: form.format(row[name])
                for name, (title, form) in _SHOWN.items()
                if name in row
            }
            bar.set_postfix(shown, refresh=False)
            bar.update(row.get("iteration", bar.n + 1) - bar.n)

        return advance
