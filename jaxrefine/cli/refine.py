"""``jaxrefine refine``: particles, a map and rough poses in; all three refined out."""

import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxrefine import io, symmetry
from jaxrefine._processes import check_same, of_first, wait_for_first
from jaxrefine.cli import (
    _ending,
    _maps,
    _particles,
    _postprocessed,
    _production,
    _published,
)
from jaxrefine.cli._refinement import Inputs, Outcome
from jaxrefine.cli._runtime import check_devices
from jaxrefine.cli.commands.refine import RefineSettings
from jaxrefine.cli.engine import DEFAULT, Engine
from jaxrefine.errors import InputError
from jaxrefine.geometry import Poses, geodesic_distance
from jaxrefine.maps.fsc import HALF_MAP_THRESHOLD, resolution
from jaxrefine.maps.postprocess import Postprocessed
from jaxrefine.report import html
from jaxrefine.runs import entries, options, provenance
from jaxrefine.runs.fingerprint import times_digest
from jaxrefine.runs.folder import NoFolder, RunFolder
from jaxrefine.runs.progress import Bars


def run(settings: RefineSettings, engine: Engine = DEFAULT) -> None:
    """Refine, or carry on, or say that it is done.

    Parameters
    ----------
    settings
        What to do.
    engine
        What does it with the default preset.

    Raises
    ------
    InputError
        If the inputs cannot be used, the folder is not that of this run, or the system
        refuses to write.
    """
    published = settings.preset != "default"
    check_devices(settings.devices)
    if published and jax.process_count() > 1:
        raise InputError(
            "--preset must be default in several processes, got "
            f"{settings.preset} in {jax.process_count()}"
        )
    _ending.check_recentring(settings)
    inputs = _read(settings, diameter_used=not published)
    identity = _particles.identity(settings, inputs.source)
    environment = provenance.environment()
    check_same(identity | environment["versions"])
    if jax.process_index() > 0:
        _assist(settings, inputs, engine)
        return
    details: dict[str, Any] = {
        "command": options.command_line("refine", settings),
        "options": options.as_json(settings),
        **environment,
    }
    stacks = list(inputs.source.stacks.values())
    with RunFolder(settings.out, "run.json", identity, details=details) as folder:
        written = times_digest(stacks)
        if folder.keep("stacks_written", written) != written:
            folder.forget("images")
            print(
                f"the stacks of {settings.particles} have been written since this run "
                "began; their sizes and a sample of their content have not changed, "
                "and they are taken to be the same",
                file=sys.stderr,
            )
        # Process 0 tells the others whether there is anything to do.
        if of_first(np.asarray(folder.finished)):
            print(f"{settings.out} holds this refinement already, finished")
            return
        if published:
            refinement = _published.prepare(settings, inputs, folder)
        else:
            refinement = _production.prepare(settings, inputs, engine)
        config, resolved = refinement.config, _resolved_texts(refinement.resolved)
        folder.describe(
            resolved=refinement.resolved,
            engine_config_in_radians_and_pixels=entries.as_json(config, type(config)),
        )
        for flag, text in resolved.items():
            print(f"{flag}: {text}", file=sys.stderr)
        with Bars() as bars:
            outcome = refinement.run(folder, bars)
        changes = _changes(settings, inputs.source.poses, outcome.poses)
        outcome = replace(outcome, columns=outcome.columns | changes)
        if settings.recentre:
            inputs, outcome = _ending.recentred(settings, inputs, outcome)
        _write(settings.out, inputs, outcome)
        processed = _ending.postprocessed(settings, inputs, outcome)
        if isinstance(processed, Postprocessed):
            _write_processed(settings, inputs, outcome, processed)
        elif inputs.makes_masks:
            outcome = _with_mask(settings.out, inputs, outcome)
        usage = provenance.usage(folder.history.elapsed_s)
        origin = {name: details[name] for name in ("command", "versions", "device")}
        rows = folder.history.rows()
        report = html.Report(
            title=f"Refinement of {settings.particles.name}",
            settings=resolved,
            rows=rows,
            remarks=_remarks(outcome, processed, rows),
            **_results(settings, inputs, outcome, processed),
            **origin,
            **usage,
        )
        html.write(settings.out / "report.html", report)
        told = _told_of(settings, outcome, processed)
        folder.finish({**outcome.report, **told, **usage})
        wait_for_first()
    print(_summary(settings.out, report, outcome, processed))


def _assist(settings: RefineSettings, inputs: Inputs, engine: Engine) -> None:
    """Do a share of what process 0 does, which alone writes."""
    refinement = _production.prepare(settings, inputs, engine)
    if of_first(np.asarray(False)):  # it has been done before
        return
    with Bars() as bars:
        refinement.run(NoFolder(), bars)
    wait_for_first()


def _read(settings: RefineSettings, *, diameter_used: bool) -> Inputs:
    """Read the particles, the map and the mask."""
    source = _particles.read(
        settings.particles,
        settings.images,
        settings.cryosparc,
        with_poses=True,
        diameter_used=diameter_used,
    )
    volume, mask = _maps.read_map_and_mask_for(
        source,
        settings.map,
        _mask_file(settings),
        settings.map_voxel_size,
        settings.resample,
        settings.images.trust_contrast,
    )
    return Inputs(source, volume, mask, settings.mask == "auto")


def _resolved_texts(resolved: dict[str, Any]) -> dict[str, str]:
    """Return the values that the options have, with their units, by their flags."""
    declared = {each.name: each for each in options.declared(RefineSettings)}
    texts = {}
    for name, value in resolved.items():
        option = declared[name]
        text = option.default_text if value is None else f"{value:.4g} {option.unit}"
        texts[option.flag] = text.rstrip()
    return texts


def _changes(
    settings: RefineSettings, given: Poses, refined: Poses
) -> dict[str, np.ndarray]:
    """Return how far each pose has moved: the angle of its turn, and pixels.

    The turn is from the nearest copy of the given pose. If there are several, it is
    said which one that is: the number of the row that ``jaxrefine expand`` writes of
    it, from 1.
    """
    operators = symmetry.operators(settings.symmetry_relax)
    dtype = refined.rotations.dtype
    copies = (np.asarray(given.rotations)[:, None] @ operators).astype(dtype)
    there = np.broadcast_to(np.asarray(refined.rotations)[:, None], copies.shape)
    turn = np.asarray(jax.jit(geodesic_distance)(copies, there))
    move = np.asarray(refined.shifts, float) - np.asarray(given.shifts, float)
    nearest = np.argmin(turn, axis=1)
    copy = {} if len(operators) == 1 else {"jaxrefineSymmetryCopy": 1 + nearest}
    return {
        "jaxrefineAngleChange": np.rad2deg(np.min(turn, axis=1)),
        "jaxrefineShiftChange": np.linalg.norm(move, axis=1),
        **copy,
    }


def _write(out: Path, inputs: Inputs, outcome: Outcome) -> None:
    """Write the maps and the table of particles."""
    source = inputs.source
    pixel = source.particles.pixel_size_in_angstroms
    io.write_mrc(out / "map.mrc", outcome.volume, pixel)
    for number, half in enumerate(outcome.half_maps or (), start=1):
        io.write_mrc(out / f"half{number}.mrc", half, pixel)
    io.write_particles(out / "particles.star", source, outcome.poses, outcome.columns)


def _with_mask(out: Path, inputs: Inputs, outcome: Outcome) -> Outcome:
    """Write the mask of the map; if there is none, the report says why.

    With half sets there is the mask of their maps, if they can be processed.
    """
    mask = _ending.automatic_mask(inputs, outcome)
    if isinstance(mask, str):
        return replace(outcome, report=outcome.report | {"no_mask_because": mask})
    pixel = inputs.source.particles.pixel_size_in_angstroms
    io.write_mrc(out / "mask.mrc", mask, pixel)
    return outcome


def _write_processed(
    settings: RefineSettings,
    inputs: Inputs,
    outcome: Outcome,
    processed: Postprocessed,
) -> None:
    """Write what was made of the half maps."""
    pixel = inputs.source.particles.pixel_size_in_angstroms
    mask, moved = _mask_of(settings, outcome)
    caption = f"Half maps of {settings.out}, "
    caption += _postprocessed.mask_in_words(mask, moved=moved)
    _postprocessed.write(settings.out, processed, pixel, caption)


def _mask_of(settings: RefineSettings, outcome: Outcome) -> tuple[Path | None, bool]:
    """Return the file of the mask of the half maps, and whether it has moved.

    The file is None if the mask was made of them. A mask that has moved with the origin
    is in none but the one that is written.
    """
    path = _mask_file(settings)
    if path is None:
        return None, False
    moved = "recentred_by_in_voxels" in outcome.report
    return (settings.out / "mask.mrc" if moved else path), moved


def _mask_file(settings: RefineSettings) -> Path | None:
    """Return the file of the given mask; None if there is none, or masks are made."""
    return None if settings.mask == "auto" else settings.mask


def _told_of(
    settings: RefineSettings, outcome: Outcome, processed: Postprocessed | str | None
) -> dict[str, Any]:
    """Return what ``run.json`` says of the half maps."""
    if processed is None:
        return {}
    if isinstance(processed, str):
        return {"not_postprocessed_because": processed}
    path, moved = _mask_of(settings, outcome)
    mask = {"mask": str(path) if path else None, "mask_moved_with_the_origin": moved}
    return {"postprocess": {**mask, **processed.row()}}


def _results(
    settings: RefineSettings,
    inputs: Inputs,
    outcome: Outcome,
    processed: Postprocessed | str | None,
) -> dict[str, Any]:
    """Return what the HTML report says of the results."""
    columns, curve = outcome.columns, outcome.report.get("half_set_fsc")
    folds = outcome.report.get("fold_fsc")
    undetermined = columns.get("jaxrefineUndetermined")
    path, moved = _mask_of(settings, outcome)
    mask = "an automatic mask" if path is None else "the given mask"
    return {
        "pixel_size_in_angstroms": inputs.source.particles.pixel_size_in_angstroms,
        "poses": outcome.poses,
        "angle_change_in_degrees": columns["jaxrefineAngleChange"],
        "shift_change_in_pixels": columns["jaxrefineShiftChange"],
        "initial_map": np.asarray(inputs.volume),
        "volume": outcome.volume,
        "half_set_fsc": None if curve is None else np.asarray(curve),
        "postprocessed": processed if isinstance(processed, Postprocessed) else None,
        "mask": f"{mask}, moved with the origin" if moved else mask,
        "fold_fsc": None if folds is None else np.asarray(folds),
        "angle_std_in_degrees": columns.get("jaxrefineAngleStd"),
        "shift_std_in_pixels": columns.get("jaxrefineShiftStd"),
        "undetermined": None if undetermined is None else undetermined.astype(bool),
        "left_out": outcome.report.get("left_out", 0),
    }


def _summary(
    out: Path,
    report: html.Report,
    outcome: Outcome,
    processed: Postprocessed | str | None,
) -> str:
    """Return the result in a sentence, and the figures of the half maps below it."""
    text = f"{len(report.poses)} particles and a map are in {out}"
    if report.undetermined_count:
        count = report.undetermined_count
        text += f"; {count} show no particle, and are not in the map"
    if report.left_out:
        text += f"; {report.left_out} were left out"
    lines = [text]
    told = outcome.report
    if "recentred_by_in_voxels" in told:
        place = ", ".join(f"{each:.2f}" for each in told["recentred_by_in_voxels"])
        lines.append(f"the origin has moved to ({place}), x, y, z in voxels")
    lines += report.remarks
    pixel = report.pixel_size_in_angstroms
    if isinstance(processed, Postprocessed):
        lines += _postprocessed.lines(processed, pixel)
    elif report.half_set_fsc is not None:
        unmasked = resolution(report.half_set_fsc, len(report.volume), pixel)
        lines.append(
            f"resolution at FSC {HALF_MAP_THRESHOLD}: {unmasked.text()} (without a "
            "mask)"
        )
    return "\n".join(lines)


def _remarks(
    outcome: Outcome, processed: Postprocessed | str | None, rows: Sequence[html.Row]
) -> list[str]:
    """Return what is known, what to be wary of, and what was not done, in sentences."""
    remarks = []
    if outcome.report.get("reference_bias"):
        count = len(outcome.poses) - outcome.report["left_out"]
        undetermined = outcome.report["undetermined"]
        if undetermined == count:
            consequence = "No image is left to make a map of, and the map is empty"
        else:
            consequence = (
                "Noise that is aligned to a map comes to resemble it (reference bias), "
                "so neither the map nor a resolution can be trusted"
            )
        remarks.append(
            f"{undetermined} of {count} images show no more of the particle than "
            f"images of noise do after such a search. {consequence}: look at what was "
            "picked, and see whether the initial map is that of these particles"
        )
    if fixed := outcome.report.get("fixed_and_not_paid_for"):
        remarks.append(
            f"the {' and the '.join(fixed)} are fixed, and taken to be known for "
            "certain. If they were found in these images by a search, such as that of "
            "jaxrefine match, images of noise may pass for particles, because the "
            "evidence does not pay for that search"
        )
    if rows and not rows[-1].get("is_kept", True):
        remarks.append(
            "the last iteration made the half sets agree less and was discarded"
        )
    if "limits" in outcome.report:
        remarks.append(outcome.report["limits"])
    for name in ("contrast_limits", "defocus_limits"):
        if name in outcome.report:
            remarks.append(outcome.report[name])
    if "not_recentred_because" in outcome.report:
        reason = outcome.report["not_recentred_because"]
        remarks.append(f"the origin was not moved: {reason}")
    if "no_mask_because" in outcome.report:
        reason = outcome.report["no_mask_because"]
        remarks.append(f"no mask was made of the map: {reason}")
    if isinstance(processed, str):
        remarks.append(f"the half maps were not post-processed: {processed}")
    return remarks
