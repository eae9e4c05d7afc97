"""Progress bars for long runs, on standard error."""

import sys
from collections.abc import Callable
from typing import Any

from tqdm import tqdm


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
        self, name: str, iterations: int, done: int = 0
    ) -> Callable[[Any, dict[str, int | float]], None]:
        """Open the bar of the next run, and return what moves it."""
        if self._bar is not None:
            self._bar.close()
        bar = self._bar = tqdm(
            desc=f"{name:>28}", total=iterations, initial=done, file=sys.stderr
        )

        def advance(state: Any, row: dict[str, int | float]) -> None:
            del state
            shown = {"FSC": f"{row['mean_fsc']:.3f}"}
            if "angle_error_deg_median" in row:
                shown["error"] = f"{row['angle_error_deg_median']:.1f}°"
            bar.set_postfix(shown, refresh=False)
            bar.update()

        return advance
