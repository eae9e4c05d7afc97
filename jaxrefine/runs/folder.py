"""The folder of a run: it knows what the run was, and carries on where it stopped."""

import hashlib
import json
import os
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax

from jaxrefine import io
from jaxrefine.errors import InputError
from jaxrefine.io._atomic import Lock, leftovers, lock
from jaxrefine.io.checkpoint import DamagedCheckpoint
from jaxrefine.runs.provenance import peak_rss_mib

_METRICS = "metrics.jsonl"


class RunFolder:
    """A folder that belongs to one run with one set of settings.

    A report, ``NAME.json``, is written first and marks the folder; it is written again,
    with ``finished`` true, when all else is there. A run that is killed, or whose disk
    is full, loses no more than the iteration that it was in. On a local disk no other
    process can write there meanwhile (network file systems may not tell).

    Parameters
    ----------
    path
        The folder; made if absent.
    report
        Name of the report.
    settings
        All that the results depend on.

    Raises
    ------
    InputError
        If the folder holds something else, or a run with other settings, or another
        process is writing to it.
    """

    def __init__(self, path: Path, report: str, settings: dict[str, Any]):
        self.path, self._report = path, path / report
        self._newest = path / "state" / "checkpoint.eqx"
        self._previous = self._newest.with_name("previous.eqx")
        self._settings = json.loads(json.dumps(settings))
        self._begin, self._rows, self._earlier = time.perf_counter(), 0, 0.0
        self.finished, self._made, self._kept = False, not path.exists(), {}
        if path.exists() and not path.is_dir():
            raise InputError(f"{path} is a file; a folder to write to is wanted.")
        with io.writing(path):
            path.mkdir(parents=True, exist_ok=True)
        self._lock: Lock | None = lock(path)
        if self._report.exists():
            self._recognise()
        elif set(path.iterdir()) - set(leftovers(path)):
            raise InputError(
                f"{path} holds files but no {report}; name a new or an empty folder."
            )
        else:
            self._write(finished=False)
        for remains in leftovers(path) + leftovers(self._newest.parent):
            remains.unlink()

    def _recognise(self) -> None:
        report = io.read_json(self._report)
        old = report.get("settings") if isinstance(report, dict) else None
        if not isinstance(old, dict):
            raise InputError(f"{self._report} is not the report of such a run.")
        new, absent = self._settings, object()
        others = []
        for name in sorted(new.keys() | old.keys()):
            pair = old.get(name, absent), new.get(name, absent)
            # Of another version, to which an option that is not given is none.
            unknown = absent in pair and (None in pair or any(x is False for x in pair))
            if pair[0] != pair[1] and not unknown:
                others.append(name)
        if others:
            raise InputError(
                f"{self.path} holds a run with another {', '.join(others)}; repeat its "
                "command, or name another folder."
            )
        self.finished = report.get("finished") is True
        self._kept = report.get("kept", {})

    def keep(self, name: str, value: Any) -> Any:
        """Return what was kept by this name since the run began, or else keep this."""
        if name not in self._kept:
            self._kept[name] = value
            self._write(finished=False)
        return self._kept[name]

    def abandon(self) -> None:
        """Leave nothing behind of a run that has no state yet."""
        if self._newest.exists() or self._previous.exists():
            return
        for path in (self._report, self.path / _METRICS):
            path.unlink(missing_ok=True)
        self._lock = None
        state = self._newest.parent
        for folder in (state, self.path) if self._made else (state,):
            with suppress(OSError):  # absent, or with somebody else's files
                folder.rmdir()

    def resume(self, like: Callable[[], Any]) -> Any:
        """Return the last state, or None if there is none yet.

        ``like`` makes a state of the same structure, shapes and types; it is asked only
        if there is one. Rows of the log that are newer than the state are dropped.

        A last state that is damaged, or missing, is replaced by the one before it, with
        a sentence on standard error.

        Raises
        ------
        InputError
            If there are states but none of them is whole, or if they are those of
            another version or of another structure.
        """
        state = None
        if self._newest.exists() or self._previous.exists():
            state, saved = self._load(like())
            self._rows, self._earlier = saved["rows"], saved["wall_s"]
        io.keep_lines(self.path / _METRICS, self._rows)
        return state

    def _load(self, like: Any) -> tuple[Any, Any]:
        """Load the newest checkpoint that is whole, and make it the newest."""
        for path in filter(Path.exists, (self._newest, self._previous)):
            with suppress(DamagedCheckpoint):
                found = io.load_checkpoint(path, like)
                if path is self._previous:
                    print(
                        f"{self._newest} is missing or damaged; the run carries on "
                        f"from {path}.",
                        file=sys.stderr,
                    )
                    os.replace(path, self._newest)
                return found
        raise InputError(
            f"Neither {self._newest} nor {self._previous} is a whole checkpoint; "
            "delete both to begin anew."
        )

    def record(self, state: Any, row: dict[str, Any]) -> None:
        """Add a row to the log, and save the state; the one before it is kept, too."""
        io.append_json_line(self.path / _METRICS, row)
        self._rows += 1
        self._newest.parent.mkdir(exist_ok=True)
        saved = {"rows": self._rows, "wall_s": self._wall()}
        io.save_checkpoint(self._newest, state, saved, self._previous)

    def finish(self, results: dict[str, Any]) -> None:
        """Write the report of a run whose files are all there."""
        self._write(finished=True, **results)

    def rows(self) -> list[dict[str, Any]]:
        """Return the rows of the log."""
        lines = (self.path / _METRICS).read_text(errors="replace").splitlines()
        rows = []
        for line in lines:
            with suppress(ValueError):  # a damaged line is not worth the results
                rows.append(json.loads(line))
        return [row for row in rows if isinstance(row, dict)]

    def provenance(self) -> dict[str, Any]:
        """Return what the run is made with, and what it has taken so far."""
        device = jax.devices()[0]
        memory = device.memory_stats() or {}
        return {
            "versions": {
                name: version(name) for name in ("jaxrefine", "jax", "jaxlib", "numpy")
            },
            "device": f"{device.platform}, {device.device_kind}",
            "wall_s": self._wall(),
            "peak_rss_mib": peak_rss_mib(),
            "peak_device_mib": memory.get("peak_bytes_in_use", 0) / 2**20 or None,
        }

    def _wall(self) -> float:
        return self._earlier + time.perf_counter() - self._begin

    def _write(self, *, finished: bool, **results: Any) -> None:
        io.write_json(
            self._report,
            {
                "finished": finished,
                "settings": self._settings,
                "kept": self._kept,
                **results,
                **self.provenance(),
            },
        )


def file_digest(path: Path) -> str:
    """Return the SHA-256 of a file, by which the same input is known again."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
