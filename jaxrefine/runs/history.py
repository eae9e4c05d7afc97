"""The iterations of a run on disk: a row for each, and the state after the last."""

import json
import os
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, final

from jaxrefine import io
from jaxrefine.errors import InputError
from jaxrefine.io.atomic import leftovers
from jaxrefine.io.checkpoint import DamagedCheckpoint, OtherCheckpoint


@final
class Unwritten:
    """The history of a process that writes nothing, because another one does."""

    has_state = False

    def resume(self, like: Callable[[], Any]) -> None:
        """Know of no earlier state."""
        del like

    def record(self, state: Any, row: dict[str, Any]) -> None:
        """Write nothing."""
        del state, row


@final
class History:
    """A log with a row for each iteration, and checkpoints to carry on from.

    A process that is killed at any time, or whose disk is full, loses no more than the
    iteration that it was in: the state before the last is kept, too, until there is a
    newer one. Each state holds the rows so far. The log is what is read by others: it
    is brought into agreement with the state on resuming, whatever has become of it.

    Parameters
    ----------
    states
        Folder of the checkpoints, ``checkpoint.eqx`` and ``previous.eqx``. It is made
        with the first of them.
    log
        The file of rows, a line of JSON for each.
    """

    def __init__(self, states: Path, log: Path):
        self.log = log
        self.newest = states / "checkpoint.eqx"
        self.previous = states / "previous.eqx"
        self._lines, self._earlier_s = [], 0.0
        self._begin = time.perf_counter()
        for temporary in leftovers(states):
            temporary.unlink()

    @property
    def has_state(self) -> bool:
        """Whether there is a checkpoint, damaged or not."""
        return self.newest.exists() or self.previous.exists()

    @property
    def elapsed_s(self) -> float:
        """Seconds of work so far, those of interrupted processes included."""
        return self._earlier_s + time.perf_counter() - self._begin

    def resume(self, like: Callable[[], Any]) -> Any:
        """Return the last state, or None if there is none yet.

        A last state that is damaged, or missing, is replaced by the one before it, with
        a sentence on standard error.

        Parameters
        ----------
        like
            Makes a state of the same structure, shapes and types. It is called only if
            there is a state to load.

        Raises
        ------
        InputError
            If all states are damaged, or if they are those of another version or have
            another structure.
        """
        state = None
        if self.has_state:
            state, saved = self._load(like())
            self._lines, self._earlier_s = saved["lines"], saved["wall_s"]
        self._restore_log()
        return state

    def _restore_log(self) -> None:
        """Bring the log into agreement with the state."""
        whole = "".join(f"{line}\n" for line in self._lines).encode()
        found = None
        if self.log.exists():
            with io.reading(self.log):
                found = self.log.read_bytes()
        if found == whole:
            return
        # Newer rows than the state's are no surprise.
        if not (found or b"").startswith(whole):
            print(
                f"{self.log} is damaged or lacks rows; it is restored from "
                f"{self.newest}.",
                file=sys.stderr,
            )
        io.write_lines(self.log, self._lines)

    def _load(self, like: Any) -> tuple[Any, Any]:
        """Load the newest intact checkpoint, and make it the newest of all."""
        other = None
        for path in filter(Path.exists, (self.newest, self.previous)):
            try:
                loaded = io.load_checkpoint(path, like)
            except DamagedCheckpoint as error:
                if other is None and isinstance(error, OtherCheckpoint):
                    other = error
                continue
            if path is self.previous:
                print(
                    f"{self.newest} is missing or damaged; the run carries on "
                    f"from {path}.",
                    file=sys.stderr,
                )
                os.replace(path, self.newest)
            return loaded
        raise other or InputError(
            f"{self.newest} or {self.previous} must be a whole checkpoint, got none "
            "or damaged ones; delete them to begin again"
        )

    def record(self, state: Any, row: dict[str, Any]) -> None:
        """Add a row to the log and save the state; the state before it is kept, too.

        Raises
        ------
        InputError
            If the system refuses to write: the last state is then still there.
        """
        line = io.json_line(row)
        io.append_line(self.log, line)
        self._lines.append(line)
        self.newest.parent.mkdir(parents=True, exist_ok=True)
        saved = {"lines": self._lines, "wall_s": self.elapsed_s}
        io.save_checkpoint(self.newest, state, saved, self.previous)

    def rows(self) -> list[dict[str, Any]]:
        """Return the rows of the iterations so far, those of earlier processes first.

        NaN and infinity are None.
        """
        return [json.loads(line) for line in self._lines]

    def remove_states(self) -> None:
        """Remove the checkpoints, of a run that will not be carried on."""
        for path in (self.newest, self.previous):
            path.unlink(missing_ok=True)
        with suppress(OSError):  # absent, or with other files
            self.newest.parent.rmdir()
