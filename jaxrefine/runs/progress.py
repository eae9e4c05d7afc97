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


class Bars:
    """One progress bar after another, on standard error."""

    def __init__(self):
        self._bar: tqdm | None = None

    def __enter__(self) -> "Bars":
        return self

    def __exit__(self, *exception) -> None:
        if self._bar is not None:
            self._bar.close()

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
