"""Finished runs of comparisons, as figures and ``remeasure.py`` read them.

Runs whose folders have no ``run.json`` are those of commits before 2026-12, with their
settings in ``config.json`` and an empty file ``done``; some runs of ``results`` are.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import harness
import numpy as np
from comparison import slug
from configuration import settings_from
from settings import DatasetSettings, Init1Start, StudySettings

from jaxrefine import io
from jaxrefine.errors import InputError

S = TypeVar("S", bound=StudySettings)


@dataclass(frozen=True)
class Run:
    """A finished run.

    Attributes
    ----------
    folder
        Where it is.
    settings
        Its data set.
    start
        What its refinements began with, in words.
    results
        What it measured: of each method of a comparison, or of the points of a sweep.
    lacking
        What was left out, as a sentence.
    """

    folder: Path
    settings: DatasetSettings
    start: str
    results: dict[str, Any]
    lacking: str

    @property
    def caption(self) -> str:
        """The conditions of the run."""
        return self.settings.caption(self.start)

    def present(self, methods: Sequence[str]) -> list[str]:
        """Return those of the methods that were run.

        Raises
        ------
        InputError
            If none was.
        """
        chosen = [name for name in methods if name in self.results]
        if not chosen:
            raise InputError(
                f"{self.folder} must have the result of at least one of "
                f"{', '.join(methods)}, it has none"
            )
        return chosen

    def values(self, key: str, methods: Sequence[str]) -> dict[str, Any]:
        """Return one entry of the results, by method, of those that were run."""
        return {name: self.results[name][key] for name in self.present(methods)}

    def map(self, name: str) -> np.ndarray:
        """Return a map, ``[z, y, x]``, such as "truth" or that of a method.

        Raises
        ------
        InputError
            If the folder holds no maps, or not this one.
        """
        maps = self.folder / "maps"
        if not maps.is_dir():
            raise InputError(
                f"The figure needs the maps of the run, and {maps} does not exist; the "
                "run's command with another --out makes them."
            )
        return io.read_mrc(maps / f"{slug(name)}.mrc")[0]

    def images(self) -> np.ndarray:
        """Return the samples of the images that were kept; perhaps none."""
        path = self.folder / "maps" / "images.mrcs"
        return io.read_stack(path)[0] if path.exists() else np.empty((0, 1, 1))


def open_run(folder: Path) -> Run:
    """Read the settings and the results of a run.

    Raises
    ------
    InputError
        If the folder holds no comparison of methods, or an unfinished one.
    """
    source, values, lacking = _stored(folder)
    settings = settings_from(DatasetSettings, values, source)
    start = values.get("start") or settings_from(Init1Start, values, source).start
    results = harness.read_metrics(folder)
    if "RELION, true poses" in results and "RELION auto-refine" not in results:
        lacking = "RELION's auto-refine was given no time, and is left out."
    return Run(folder, settings, start, results, lacking)


def settings_of(settings_class: type[S], folder: Path) -> S:
    """Read the settings of a finished run.

    Raises
    ------
    InputError
        If the folder holds no run with such settings, or an unfinished one.
    """
    source, values, _ = _stored(folder)
    return settings_from(settings_class, values, source)


def _stored(folder: Path) -> tuple[Path, Mapping[str, Any], str]:
    """Return the file with the settings of a run, these, and what was left out."""
    report, config = folder / "run.json", folder / "config.json"
    if report.is_file():
        told = io.read_json(report)
        values = told["settings"] | told["kept"] | {"volume": told["volume"]}
        finished, lacking = told["finished"], told.get("lacking", "")
        source = report
    elif config.is_file():
        values, done = io.read_json(config), folder / "done"
        if "map_sha256" in values:
            values = values | {"volume": values["map"]}
        finished = done.exists()
        lacking = done.read_text(encoding="utf-8").strip() if finished else ""
        source = config
    else:
        raise InputError(f"{folder} must be the folder of a run, it has no run.json")
    if not finished:
        raise InputError(
            f"The run in {folder} is not finished; its command resumes it."
        )
    return source, values, lacking
