"""Comparisons: one simulated data set, reconstructed in several ways.

Every method gets the same :class:`Case`, reports its iterations to a :class:`Record`,
which survives interruptions, and returns an :class:`Outcome`. What the figures show is
measured here once, and kept in the run's folder:

- ``metrics.json``: for each method the figures of merit, resolution curves, densities
  of the pose errors, and one row for each iteration;
- ``maps/METHOD.mrc``, and ``maps/METHOD_003.mrc`` after each of its iterations;
- ``poses/METHOD.star``, and ``poses/truth.star``;
- ``maps/images.mrcs``: some of the images.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeVar

import harness
import jax
import jax.numpy as jnp
import numpy as np
from harness import Study
from settings import ComparisonSettings, DatasetSettings

from jaxrefine import evaluation, io
from jaxrefine._types import Volume
from jaxrefine.cli.demo import rc_text
from jaxrefine.geometry import Poses
from jaxrefine.maps.fsc import fsc
from jaxrefine.runs.history import History
from jaxrefine.runs.progress import Bars
from jaxrefine.simulate import Dataset

_SHOWN = 4  # images that are kept for the figures


class Case(NamedTuple):
    """A simulated data set, the truth behind it and a common start.

    What a reader must know of how the start was made is ``remark``.
    """

    truth: Volume
    dataset: Dataset
    initial_map: Volume
    voxel_size_in_angstroms: float
    remark: str = ""


@dataclass(frozen=True)
class Outcome:
    """What a method results in.

    Attributes
    ----------
    volume, poses
        The map, and the poses that it was made at.
    processed
        The map after post-processing, where that is part of the method.
    remark
        What a reader of the figures must know.
    wall_s
        Seconds it took, where its programs count them; else those of its record.
    finished
        Whether it came to its end; False where a time limit stopped it, and a later
        call with more time carries it on.
    """

    volume: np.ndarray
    poses: Poses
    processed: np.ndarray | None = None
    remark: str = ""
    wall_s: float | None = None
    finished: bool = True


class Record:
    """The iterations of a method, kept with the state to carry on from.

    Parameters
    ----------
    case
        What the method is given.
    folder
        The method's own, for its checkpoints or whatever its programs write.
    maps
        Path of its maps, without the iteration's number.
    bars
        Where progress is shown.
    name
        Of the method.
    """

    def __init__(self, case: Case, folder: Path, maps: Path, bars: Bars, name: str):
        self.case, self.folder = case, folder
        self.rows: list[dict[str, Any]] = []
        self._checkpoints = _checkpoints(folder)
        self._maps, self._bars, self._name = maps, bars, name
        self._advance: Callable[[Any, Mapping[str, Any]], None] | None = None

    @property
    def elapsed_s(self) -> float:
        """Seconds of work on this method, those of interrupted processes included."""
        return self._checkpoints.elapsed_s

    def resume(self, fresh: Any) -> Any:
        """Return the last state that was kept, or else the fresh one."""
        state = self._checkpoints.resume(lambda: fresh)
        if state is None:
            return fresh
        self.rows = self._checkpoints.rows()
        return state

    def expect(self, iterations: int | None) -> None:
        """Open a progress bar; without an end if the number is not known."""
        self._advance = self._bars.next(self._name, iterations, len(self.rows))

    def add(
        self, volume: Volume | np.ndarray, poses: Poses, state: Any = None, **numbers
    ) -> None:
        """Measure an iteration, keep its map and, if there is one, the state."""
        case, number = self.case, len(self.rows) + 1
        curve = fsc(jnp.asarray(volume, case.truth.dtype), case.truth)
        errors = evaluation.pose_errors(poses, case.dataset.truth)
        row = {
            "iteration": number,
            **evaluation.resolution_row(curve),
            **evaluation.summarise(errors),
            **numbers,
            "elapsed_s": self.elapsed_s,
        }
        self.rows.append(row)
        path = self._maps.with_name(f"{self._maps.name}_{number:03d}.mrc")
        io.write_mrc(path, np.asarray(volume), case.voxel_size_in_angstroms)
        if state is not None:
            self._checkpoints.record(state, row)
        if self._advance is not None:
            self._advance(state, row)


def _checkpoints(folder: Path) -> History:
    """Return the checkpoints of the method that has this folder."""
    return History(folder / "state", folder / "metrics.jsonl")


Method = Callable[[Case, Record], Outcome]
"""One way of reconstructing."""

S = TypeVar("S", bound=DatasetSettings)
C = TypeVar("C", bound=ComparisonSettings)
S_contra = TypeVar("S_contra", bound=DatasetSettings, contravariant=True)

Family = Callable[[S, Case], dict[str, Method]]
"""From settings and a case to methods, by name; none if RELION is not installed."""


@dataclass(frozen=True)
class Start(Generic[S_contra]):
    """How a data set and the start of its refinement are made.

    Attributes
    ----------
    describe
        Says in words what refinements begin with. A run keeps what is said when it
        begins.
    prepare
        Makes the case, of the settings, these words and the run folder.
    """

    describe: Callable[[S_contra], str]
    prepare: Callable[[S_contra, str, Path], Case]


def main(
    description: str | None,
    settings_class: type[C],
    start: Start[C],
    families: Mapping[str, Family[C]],
) -> int:
    """Run what is left of a study that the command line asks for.

    Parameters
    ----------
    description
        Of the study, for ``--help``.
    settings_class
        Its settings, whose ``methods`` name the families to run.
    start
        What refinements begin with.
    families
        Methods by the names that ``methods`` may list.

    Returns
    -------
    The exit code.
    """

    def command() -> None:
        study = harness.parse(description, settings_class)
        run(study, start, [families[name] for name in study.settings.methods])

    return harness.main(command)


def run(study: Study[S], start: Start[S], families: Sequence[Family[S]]) -> None:
    """Run what is left of a study, and print its table.

    Parameters
    ----------
    study
        What the command line asks for.
    start
        What refinements begin with.
    families
        The methods to run.

    Raises
    ------
    InputError
        If the folder or the data set is refused, or RELION fails.
    """
    settings = study.settings
    with study.open() as folder:
        out, begin = folder.path, folder.keep("start", start.describe(settings))
        if not folder.finished:
            case = start.prepare(settings, begin, out)
            chosen = [family(settings, case) for family in families]
            harness.add_provenance(out)
            methods = {name: each for group in chosen for name, each in group.items()}
            results = compare(out, case, methods)
            text = table(results, settings.caption(begin))
            (out / "table.md").write_text(text + "\n", encoding="utf-8")
            harness.finish(folder, without_relion=not all(chosen))
    print(table(harness.read_metrics(out), settings.caption(begin)))
    print(f"results are in {out}")


def compare(
    out: Path, case: Case, methods: Mapping[str, Method]
) -> dict[str, dict[str, Any]]:
    """Run the methods that have not come to their end; return the results of all.

    A method's map after post-processing is a result of its own, "NAME, post-processed".
    Every result says by which commit it was made.
    """
    maps, voxel = out / "maps", case.voxel_size_in_angstroms
    maps.mkdir(exist_ok=True)
    (out / "poses").mkdir(exist_ok=True)
    for name, volume in (("truth", case.truth), ("initial_map", case.initial_map)):
        io.write_mrc(maps / f"{name}.mrc", np.asarray(volume), voxel)
    _write_poses(out, "truth", case.dataset.truth, case)
    samples = np.asarray(case.dataset.images[:_SHOWN], np.float32)
    io.write_stack(maps / "images.mrcs", samples, voxel)
    results = harness.read_metrics(out)
    with Bars() as bars:
        for name, method in methods.items():
            folder = out / "work" / slug(name)
            if name in results and results[name]["finished"]:
                _checkpoints(folder).remove_states()
                continue
            folder.mkdir(parents=True, exist_ok=True)
            record = Record(case, folder, maps / slug(name), bars, name)
            outcome = method(case, record)
            wall = record.elapsed_s if outcome.wall_s is None else outcome.wall_s
            results[name] = _entry(case, outcome, outcome.volume, record.rows, wall)
            _write_poses(out, name, outcome.poses, case)
            io.write_mrc(maps / f"{slug(name)}.mrc", outcome.volume, voxel)
            if outcome.processed is not None:
                second = f"{name}, post-processed"
                results[second] = _entry(case, outcome, outcome.processed, [], wall)
                io.write_mrc(maps / f"{slug(second)}.mrc", outcome.processed, voxel)
            io.write_json(out / "metrics.json", results)
            if outcome.finished:
                _checkpoints(folder).remove_states()
    return results


def _write_poses(out: Path, name: str, poses: Poses, case: Case) -> None:
    images = case.dataset.images
    io.write_new_particles(
        out / "poses" / f"{slug(name)}.star",
        poses,
        [f"{i:06d}@particles.mrcs" for i in range(1, len(images) + 1)],
        images.shape[-1],
        case.voxel_size_in_angstroms,
    )


def _entry(
    case: Case, outcome: Outcome, volume: np.ndarray, history: list, wall_s: float
) -> dict[str, Any]:
    """Return what ``metrics.json`` holds of a method."""
    return {
        **measure(volume, outcome.poses, case.truth, case.dataset.truth),
        "wall_s": wall_s,
        "remark": outcome.remark,
        "finished": outcome.finished,
        "history": history,
        **harness.commit(),
    }


def measure(
    volume: np.ndarray, poses: Poses, truth: Volume, true_poses: Poses
) -> dict[str, Any]:
    """Return how far a map and its poses are from the true ones."""
    assessment = evaluation.assess(volume, poses, truth, true_poses)
    return {
        **assessment.row(),
        "fsc": _rounded(assessment.curve),
        "fsc_aligned": _rounded(assessment.aligned_curve),
        "differences": difference_densities(poses, true_poses),
    }


_ANGLE_EDGES = np.linspace(-20, 20, 81)  # degrees: the range that the paper shows
_SHIFT_EDGES = np.linspace(-4, 4, 81)  # pixels


def difference_densities(poses: Poses, truth: Poses) -> dict[str, Any]:
    """Return the densities of the pose errors that Figs. 5, 6, 11 and 12 show.

    Densities are per degree and per pixel, of all particles, including those outside of
    the bins, whose fraction is given too.
    """
    angles, shifts = evaluation.pose_differences(poses, truth)
    densities = {}
    for names, values, edges in (
        (("rot", "tilt", "psi"), angles, _ANGLE_EDGES),
        (("x", "y"), shifts, _SHIFT_EDGES),
    ):
        for name, column in zip(names, np.asarray(values).T, strict=True):
            counts, _ = np.histogram(column, edges)
            width = edges[1] - edges[0]
            densities[name] = {
                "first": float(edges[0]),
                "width": float(width),
                "density": _rounded(counts / (len(column) * width)),
                "outside": 1.0 - float(counts.sum()) / len(column),
            }
    return densities


def _rounded(values: jax.Array | np.ndarray) -> list[float]:
    return [round(float(value), 6) for value in values]


def table(results: Mapping[str, Mapping[str, Any]], caption: str) -> str:
    """Return the results as a Markdown table, with their conditions below."""
    head = (
        "| method | mean FSC | mean FSC, aligned | r_c (shells) | "
        "angle error, median (deg) | p90 | within 10 deg | "
        "shift error, median (px) | wall (s) |\n"
        "|---|---|---|---|---|---|---|---|---|"
    )
    rows = [
        f"| {name} | {r['mean_fsc']:.3f} | {r['mean_fsc_aligned']:.3f} "
        f"| {rc_text(r['rc'], len(r['fsc']) - 1)} "
        f"| {r['angle_error_in_degrees_median']:.2f} "
        f"| {r['angle_error_in_degrees_p90']:.1f} "
        f"| {100 * r['fraction_within_10_degrees']:.1f} % "
        f"| {r['shift_error_in_pixels_median']:.3f} | {r['wall_s']:.0f} |"
        for name, r in results.items()
    ]
    remarks = [f"- {name}: {r['remark']}" for name, r in results.items() if r["remark"]]
    below = ["", caption, *([""] if remarks else []), *remarks]
    return "\n".join([head, *rows, *below])


def slug(name: str) -> str:
    """Return a method's name as a file's: "joint (paper)" is ``joint_paper``."""
    return re.sub(r"[^a-z0-9-]+", "_", name.lower()).strip("_")
