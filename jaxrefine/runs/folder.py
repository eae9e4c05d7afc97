"""The folder of a run: what the run is, whether it is finished, and who may write."""

import json
from collections.abc import Collection
from contextlib import suppress
from pathlib import Path
from typing import Any, final

from jaxrefine import io
from jaxrefine.errors import InputError
from jaxrefine.io.atomic import Lock, leftovers, lock
from jaxrefine.runs.history import History, Unwritten

_REMEDY = "; remove the folder, or name another one"


@final
class NoFolder:
    """What a process has that writes nothing, because another one does."""

    history = Unwritten()

    def kept(self, name: str) -> None:
        """Know of nothing that was kept."""
        del name

    def keep(self, name: str, value: Any) -> Any:
        """Keep nothing."""
        del name
        return value


@final
class RunFolder:
    """A folder that belongs to one run with one set of settings.

    A report is written first and marks the folder; it is written again, with
    ``finished`` true, when all other files are there. On a local disk no other process
    can write to the folder meanwhile (network file systems may not tell).

    Used in a ``with`` statement, the folder is freed at its end for other processes;
    and if an error ends it, be it bad input or too little memory, what the run has made
    is removed unless there is something in it to carry on from.

    Parameters
    ----------
    path
        The folder; made if absent.
    report
        Name of the report, a JSON file.
    settings
        All that the results depend on. Values are those of JSON.
    details
        Further entries of the report, which do not identify the run.
    may_change
        Keys of ``settings`` that do not identify the run either, such as time limits:
        a run that is finished with other values of them is to be carried on.

    Attributes
    ----------
    path
        The folder.
    finished
        Whether the run has come to its end.
    history
        The iterations of the run, in ``state`` and ``metrics.jsonl``.

    Raises
    ------
    InputError
        If the folder holds something else, or a run with other settings, or another
        process is writing to it.
    """

    def __init__(
        self,
        path: Path,
        report: str,
        settings: dict[str, Any],
        *,
        details: dict[str, Any] | None = None,
        may_change: Collection[str] = (),
    ):
        self.path, self._report = path, path / report
        self._settings = json.loads(json.dumps(settings))
        self._details, self._kept = dict(details or {}), {}
        self.finished = False
        if path.exists() and not path.is_dir():
            raise InputError(f"{path} must be a folder, got a file")
        # Innermost first, to be removed in this order.
        self._created = [p for p in (path, *path.parents) if not p.exists()]
        with io.writing(path):
            path.mkdir(parents=True, exist_ok=True)
        self._lock: Lock | None = lock(path)
        if self._report.exists():
            self._recognise(may_change)
        elif set(path.iterdir()) - set(leftovers(path)):
            raise InputError(
                f"{path} must be a new or an empty folder, or that of a run, got one "
                f"that holds files but no {report}"
            )
        for temporary in leftovers(path):
            temporary.unlink()
        self.history = History(path / "state", path / "metrics.jsonl")
        if not self._report.exists():
            try:
                self._write(finished=False)
            except InputError:
                self.give_back()
                raise

    def __enter__(self) -> "RunFolder":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: Any) -> None:
        if kind is not None and issubclass(kind, Exception):
            self.give_back()
        self._lock = None

    def _recognise(self, may_change: Collection[str]) -> None:
        """Read the report of an earlier process; refuse another run."""
        try:
            report = io.read_json(self._report)
        except InputError as error:
            raise InputError(f"{error}{_REMEDY}") from None
        earlier = report.get("settings") if isinstance(report, dict) else None
        if not isinstance(earlier, dict):
            raise InputError(
                f"{self._report} must be the report of a run, got something else"
                f"{_REMEDY}"
            )
        changed = _differences(earlier, self._settings)
        others = [name for name in changed if name not in may_change]
        if others:
            raise InputError(
                f"{self.path} must hold a run with these settings, got a run with "
                f"other settings ({', '.join(others)}); repeat its command, or name "
                "another folder"
            )
        finished = report.get("finished")
        if not isinstance(finished, bool):
            raise InputError(
                f"{self._report} must be the report of a run as it was written, got "
                f"something else than true or false for 'finished'{_REMEDY}"
            )
        self.finished = finished and not changed
        self._kept = report.get("kept", {})
        if not isinstance(self._kept, dict):
            raise InputError(
                f"{self._report} must be the report of a run as it was written, got "
                f"something else than an object for 'kept'{_REMEDY}"
            )
        if changed:
            self._write(finished=False)

    def report(self) -> dict[str, Any]:
        """Return the content of the report."""
        return io.read_json(self._report)

    def keep(self, name: str, value: Any) -> Any:
        """Return what was kept by this name since the run began, or else keep this."""
        if name not in self._kept:
            self._kept[name] = value
            if not self.finished:
                self._write(finished=False)
        return self._kept[name]

    def kept(self, name: str) -> Any:
        """Return what was kept by this name since the run began; None if nothing."""
        return self._kept.get(name)

    def forget(self, name: str) -> None:
        """Keep nothing by this name any more."""
        self._kept.pop(name, None)

    def describe(self, **details: Any) -> None:
        """Add entries to the report that do not identify the run."""
        self._details |= details
        self._write(finished=False)

    def reopen(self) -> None:
        """Mark a finished run as not finished, since there is more to do."""
        self.finished = False
        self._write(finished=False)

    def finish(self, results: dict[str, Any]) -> None:
        """Write the report of a run whose files are all there.

        Parameters
        ----------
        results
            Further entries of the report.
        """
        self._write(finished=True, **results)
        self.finished = True

    def give_back(self) -> None:
        """Remove what this run has made, if there is nothing in it to carry on from.

        Files that are not its own stay, and with them the report that marks them.
        """
        own = {self._report, self.history.log, self.history.newest.parent}
        if self.history.has_state or set(self.path.iterdir()) - own:
            return
        self.history.remove_states()
        for file in (self._report, self.history.log):
            file.unlink(missing_ok=True)
        self._lock = None
        with suppress(OSError):  # with somebody else's files
            for folder in self._created:
                folder.rmdir()

    def _write(self, *, finished: bool, **results: Any) -> None:
        io.write_json(
            self._report,
            {
                "finished": finished,
                "settings": self._settings,
                "kept": self._kept,
                **self._details,
                **results,
            },
        )


def _differences(earlier: dict[str, Any], present: dict[str, Any]) -> list[str]:
    """Return the names of settings that differ.

    A version that did not know an option did as if it was not given: it counts as None
    or False there.
    """
    changed = []
    for name in sorted(earlier.keys() | present.keys()):
        if name in earlier and name in present:
            differs = earlier[name] != present[name]
        else:
            differs = (earlier | present)[name] not in (None, False)
        if differs:
            changed.append(name)
    return changed
