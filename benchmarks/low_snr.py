"""What a refinement does at low SNR, iteration by iteration, and what poses can give.

Every case is a data set of :mod:`datasets`; FSC is against the truth, without a mask,
as it stands. The parts of a case are

- ``folds``: the refinement, carried on beyond the iteration in which it would end;
- ``limited``: the same up to a band limit of 16 cycles per box;
- ``half_sets``: the same with half sets;
- ``truth``: poses that are found in the true map, by the engine's own search and
  polishing at a given band limit, and the maps that are made of them.

For each iteration it is said how well the map of all particles agrees with the truth,
what the engine believes (the correlation of its folds, or half sets), the gain by which
it multiplies the shells of a fold's map, and the gain that would fit the true map best.

A map of poses that were found in the true map is better than these poses are: the noise
of every image was turned until it looked like the truth. ``others`` are therefore the
same errors of the poses, each dealt to the image of another particle, whose noise knows
nothing of them.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from benchmark import Settings
from datasets import DATA_SETS, describe, mean_fsc, poses, simulate
from records import Record, markdown_table

import jaxrefine as jr
from jaxrefine.geometry import Poses
from jaxrefine.maps import admm
from jaxrefine.maps.folds import FOLDS
from jaxrefine.maps.fsc import crossing, fsc
from jaxrefine.operators import slices
from jaxrefine.refinement import map_step, pose_step, sets
from jaxrefine.refinement.result import RefineInfo
from jaxrefine.refinement.state import RefineState

CASES = ("hjc46-12", "hjc64-low", "ptch64-low", "hjc64", "hjc32")
PARTS = ("folds", "limited", "half_sets", "truth")
REFINEMENTS = {
    "folds": jr.RefineConfig(),
    "limited": jr.RefineConfig(max_r_max=16),
    "half_sets": jr.RefineConfig(half_sets=True),
}
SEEDS, ITERATIONS, BAND_LIMITS = (0, 1, 2), 20, (16, 22, 31)
KEY = jax.random.key(0)


def run_on(
    data: dict[str, np.ndarray], config: jr.RefineConfig
) -> list[dict[str, Any]]:
    """Refine for all iterations, whenever the refinement would end."""
    truth, rows = poses(data["angles"], data["shifts"]), []
    latest = None
    given = (
        jr.Particles(data["images"]),
        poses(data["start"], np.zeros_like(data["shifts"])),
        jnp.asarray(data["initial"]),
        replace(config, iterations=ITERATIONS),
    )

    def callback(state: RefineState, info: RefineInfo) -> None:
        nonlocal latest
        latest = state
        volume, of_fold = (
            np.asarray(each)
            for each in (state.volume, state.set_states[0].maps[0].coefficients)
        )
        errors = jr.evaluation.summarise(jr.evaluation.pose_errors(state.poses, truth))
        first = state.set_states[0]
        rows.append(
            {
                **info.row(),
                "mean_fsc": mean_fsc(volume, data["volume"]),
                "shell_of_half": resolution(volume, data["volume"], 0.5),
                "fold_fsc": np.asarray(first.fold_fsc).tolist(),
                "gain": np.asarray(first.gain).tolist(),
                "ideal_gain": gain(of_fold, data["volume"]),
                **errors,
                "would_end": bool(state.finished),
            }
        )

    while len(rows) < ITERATIONS:
        # Not the state of the result, whose maps have another weight of the prior.
        state = latest and eqx.tree_at(lambda s: s.finished, latest, jnp.asarray(False))
        result = jr.refine(*given, key=KEY, state=state, callback=callback)
        rows[-1]["final_mean_fsc"] = mean_fsc(result.volume, data["volume"])
        rows[-1]["tau_of_the_final_map"] = result.tau
    return rows


def resolution(volume: np.ndarray, truth: np.ndarray, threshold: float) -> float:
    """Return the shell where the correlation with the truth falls below a threshold."""
    return float(crossing(fsc(jnp.asarray(volume), jnp.asarray(truth)), threshold))


def gain(volume: np.ndarray, truth: np.ndarray) -> list[float]:
    """Return what each shell of a map is best multiplied by to be the truth."""
    n = truth.shape[0]
    first, second = (np.fft.fftn(np.asarray(each, float)) for each in (volume, truth))
    axis = n * np.fft.fftfreq(n)
    radius = np.sqrt(axis[:, None, None] ** 2 + axis[:, None] ** 2 + axis**2)
    shell = np.round(radius).astype(int).ravel()
    cross = np.bincount(shell, (first.conj() * second).real.ravel())
    power = np.bincount(shell, (np.abs(first) ** 2).ravel())
    return (cross / np.maximum(power, np.finfo(float).tiny))[: n // 2 + 1].tolist()


def found_in_truth(data: dict[str, np.ndarray], r_max: int) -> dict[str, Any]:
    """Find poses in the true map up to a band limit; make maps of them."""
    particles, config = jr.Particles(data["images"]), jr.RefineConfig()
    start = poses(data["start"], np.zeros_like(data["shifts"]))
    truth = poses(data["angles"], data["shifts"])
    given, volume = sets.checked(particles, start, jnp.asarray(data["volume"]))
    draw, (particle_set,) = sets.divide(particles, given, config, KEY, None)
    state = map_step.start(particle_set, volume)
    power = data["sigma"] ** 2 * data["volume"].shape[0] ** 2
    state = eqx.tree_at(
        lambda s: (s.maps, s.gain, s.noise),
        state,
        (
            (admm.init(volume),) * FOLDS,
            jnp.ones_like(state.gain),
            jnp.full_like(state.noise, power),
        ),
    )
    limit = slices.bucket(r_max, particles.image_size)
    maps = pose_step.reference_maps(particle_set, state)
    for iteration in config.multi_start:
        key = jax.random.fold_in(draw, iteration)
        state, _ = pose_step.update_poses(
            particle_set, state, maps, iteration, limit, key
        )
    found = state.hypotheses.best()
    rotations, shifts = map(np.asarray, jax.tree.leaves(found))
    true_rotations, true_shifts = map(np.asarray, jax.tree.leaves(truth))
    other = np.random.default_rng(1).permutation(len(found))
    turned = np.einsum("pij,pkj->pik", rotations, true_rotations)[other]
    moved = (shifts - true_shifts)[other]
    others = Poses(
        jnp.asarray(np.einsum("pij,pjk->pik", turned, true_rotations)),
        jnp.asarray(true_shifts + moved),
    )

    def made(of: Poses) -> float:
        result = jr.reconstruct(particles, of, key=KEY)
        return mean_fsc(result.volume, data["volume"])

    return {
        "r_max": limit,
        "found": made(found),
        "others": made(others),
        **jr.evaluation.summarise(jr.evaluation.pose_errors(found, truth)),
    }


def measure(case: str, settings: Settings) -> dict[str, Any]:
    """Measure the parts of a case, for each seed."""
    figures: dict[str, Any] = DATA_SETS[case]._asdict()
    figures.pop("seed")
    runs = []
    for seed in SEEDS:
        data = simulate(DATA_SETS[case]._replace(seed=seed), settings.data)
        measured: dict[str, Any] = {"seed": seed}
        for part, config in REFINEMENTS.items():
            if settings.measures(part):
                measured[part] = run_on(data, config)
        if settings.measures("truth"):
            last = (DATA_SETS[case].size - 1) // 2
            limits = sorted({min(limit, last) for limit in BAND_LIMITS})
            measured["truth"] = [found_in_truth(data, limit) for limit in limits]
        runs.append(measured)
    return {**figures, "runs": runs}


def table(records: Sequence[Record]) -> str:
    """Return the iterations of each refinement, and the poses found in the truth."""
    header = ("iteration", "mean FSC", "score of the folds", "score of half sets")
    header += ("median error (degrees)", "band limit", "runs that keep it")
    header += ("runs that would end here",)
    of_truth = ("band limit", "median error (degrees)", "map of these poses")
    of_truth += ("of the same errors, dealt to other images",)
    tables = []
    for each in records:
        runs = each["figures"]["runs"]
        seeds = f"{len(runs)} seed{'s' * (len(runs) > 1)}"
        tables.append(f"{describe(each['case'], each['figures'])}, {seeds}.\n")
        for part in REFINEMENTS:
            measured = [run[part] for run in runs if part in run]
            if measured:
                rows = [_iteration(rows) for rows in zip(*measured, strict=True)]
                tables.append(f"`{part}`:\n\n{markdown_table(header, rows)}")
        measured = [run["truth"] for run in runs if "truth" in run]
        if measured:
            rows = [_of_truth(rows) for rows in zip(*measured, strict=True)]
            text = markdown_table(of_truth, rows)
            tables.append(f"Poses found in the true map:\n\n{text}")
    return "\n".join(tables)


def _mean(rows: Sequence[dict[str, Any]], name: str, digits: int) -> str:
    """Return the mean of a figure over all seeds; nothing if it was not measured."""
    values = [row[name] for row in rows]
    return "" if None in values else f"{np.mean(values):.{digits}f}"


def _iteration(rows: Sequence[dict[str, Any]]) -> tuple[str, ...]:
    """Return the row of an iteration, of one row for each seed."""
    return (
        str(rows[0]["iteration"]),
        _mean(rows, "mean_fsc", 3),
        _mean(rows, "fold_score", 3),
        _mean(rows, "gold_score", 3),
        _mean(rows, "angle_error_in_degrees_median", 2),
        "/".join(str(limit) for limit in sorted({row["r_max"] for row in rows})),
        str(sum(row["is_kept"] for row in rows)),
        str(sum(row["would_end"] for row in rows)),
    )


def _of_truth(rows: Sequence[dict[str, Any]]) -> tuple[str, ...]:
    """Return the row of a band limit, of one row for each seed."""
    return (
        str(rows[0]["r_max"]),
        _mean(rows, "angle_error_in_degrees_median", 2),
        _mean(rows, "found", 3),
        _mean(rows, "others", 3),
    )
