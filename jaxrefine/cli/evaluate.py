"""``jaxrefine evaluate``: how far poses are from the true ones."""

from collections import Counter
from collections.abc import Hashable, Sequence
from pathlib import Path

import numpy as np

from jaxrefine import evaluation, io, symmetry
from jaxrefine.cli._outputs import check_can_be_written, check_is_no_input
from jaxrefine.cli._particles import tell_where_from
from jaxrefine.cli.commands.evaluate import EvaluateSettings
from jaxrefine.cli.commands.shared import CryosparcSettings
from jaxrefine.errors import InputError
from jaxrefine.geometry import Poses
from jaxrefine.io.fields import is_cs
from jaxrefine.io.star import Table

_MOST_COPIES = 240  # Icosahedral expansion makes 60, and tables may be joined.
_SHOWN = (
    ("angle error, degrees", "angle_error_in_degrees"),
    ("shift error, pixels", "shift_error_in_pixels"),
)


def run(settings: EvaluateSettings) -> None:
    """Print the errors of the poses, and write them to a file if one was asked for.

    Raises
    ------
    InputError
        If the tables cannot be used, or their particles cannot be matched.
    """
    if settings.json is not None:
        check_can_be_written(settings.json)
        inputs = [settings.result, settings.truth]
        if settings.cryosparc.passthrough is not None:
            inputs.append(settings.cryosparc.passthrough)
        check_is_no_input(settings.json, *inputs)
    operators = symmetry.operators(settings.symmetry)
    paths = (settings.result, settings.truth)
    # What belongs to cryoSPARC's table does not concern the other, if that is RELION's.
    concerned = [path for path in paths if is_cs(path)] or paths
    tables = [
        _read(path, settings.cryosparc if path in concerned else CryosparcSettings())
        for path in paths
    ]
    result, truth = (
        io.poses_on_one_grid(table, path)
        for table, path in zip(tables, paths, strict=True)
    )
    for path, (poses, _) in zip(paths, (result, truth), strict=True):
        if not len(poses):
            raise InputError(f"{path} must hold particles, got none")
    (poses, pixel), (true_poses, true_pixel) = result, truth
    if pixel is not None and true_pixel is not None:  # the result may be binned
        shifts = true_poses.shifts * (true_pixel / pixel)
        true_poses = Poses(true_poses.rotations, shifts)
    places, matched_by = _match(tables, paths, len(poses), len(true_poses))
    places = evaluation.nearest_places(poses, true_poses, places, operators)
    errors = evaluation.pose_errors(poses, true_poses.take(places), operators)
    summary = evaluation.summarise(errors)
    content = {"particles": len(places), "matched_by": matched_by, **summary}
    if settings.json is not None:
        io.write_json(settings.json, content)
    print(f"{len(places)} particles, matched by {matched_by}")
    print(f"{'':>22}   median      p90      p95")
    for title, name in _SHOWN:
        figures = (summary[f"{name}_{figure}"] for figure in ("median", "p90", "p95"))
        print(f"{title:>22}" + "".join(f"{figure:9.3f}" for figure in figures))
    for degrees in (5, 10):
        share = 100 * summary[f"fraction_within_{degrees}_degrees"]
        print(f"{share:.1f} % within {degrees} degrees")


def _read(path: Path, cryosparc: CryosparcSettings) -> dict[str, Table]:
    """Read a table, and tell what of cryoSPARC's files it is made from."""
    table = io.read_table(path, cryosparc.passthrough, cryosparc.class_, with_ctf=False)
    tell_where_from(path, table)
    return table.blocks


def _match(tables, paths, count: int, true_count: int) -> tuple[np.ndarray, str]:
    """Return where each particle may be among the true ones, and how it was matched.

    A particle may be at several places, one a column, if the true poses have its image
    several times. Image names are compared as they are written, as they are equal in
    files of one project. If they differ, the images that they refer to are compared,
    which files in different folders name differently. If these differ, too, the order
    decides.
    """
    for names in (
        [_image_names(table) for table in tables],
        [io.image_identities(*pair) for pair in zip(tables, paths, strict=True)],
    ):
        found = _places(*names)
        if found is not None:
            places, most = found
            matched_by = "image name"
            if most > 1:
                matched_by += f", the nearest of up to {most} copies"
            return places, matched_by
    if count != true_count:
        raise InputError(
            f"{paths[1]} must hold all image names of {paths[0]}, each at most "
            f"{_MOST_COPIES} times, or as many particles to be matched by their order, "
            f"got {true_count} for {count}"
        )
    return np.arange(count)[:, None], "order, as the image names do not match"


def _image_names(table) -> list[str] | None:
    columns = (block.get("rlnImageName") for block in table.values())
    return next((column for column in columns if column is not None), None)


def _places(
    names: Sequence[Hashable] | None, true_names: Sequence[Hashable] | None
) -> tuple[np.ndarray, int] | None:
    """Return where each name is among the true ones, ``(names, copies)``.

    A name that is fewer times among the true ones than another repeats its places.
    Returned, too, is among how many places one is to be chosen, at most: just one if
    the true ones have each name once, or as often.

    None if a name is not among the true ones, or if these do not tell images apart:
    there is one name for all, or more copies than symmetry expansion makes.
    """
    if names is None or true_names is None:
        return None
    found: dict[Hashable, list[int]] = {}
    for place, name in enumerate(true_names):
        found.setdefault(name, []).append(place)
    copies = Counter(names)
    if not copies.keys() <= found.keys() or len(found) == 1 < len(true_names):
        return None
    most = max(len(found[name]) for name in copies)
    if most > _MOST_COPIES:
        return None
    chosen = [len(found[name]) for name in copies if len(found[name]) != copies[name]]
    places = np.array([np.resize(found[name], most) for name in names])
    return places, max(chosen, default=1)
