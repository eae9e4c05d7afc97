"""What a refinement does at low SNR, iteration by iteration, and what poses can give.

Every case is a data set of :mod:`datasets`; FSC is against the truth, without a mask,
as it stands. The parts of a case are

- ``folds``: the refinement, carried on beyond the iteration in which it would stop;
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
PARTS = ("folds", "half_sets", "truth")
SEEDS, ITERATIONS, BAND_LIMITS = (0, 1, 2), 20, (16, 22, 31)
KEY = jax.random.key(0)


def run_on(data: dict[str, np.ndarray], half_sets: bool) -> list[dict[str, Any]]:
    """Refine for all iterations, whenever the refinement would stop."""
    truth, rows = poses(data["angles"], data["shifts"]), []
    config = jr.RefineConfig(half_sets=half_sets, iterations=ITERATIONS)
    given = (
        jr.Particles(data["images"]),
        poses(data["start"], np.zeros_like(data["shifts"])),
        jnp.asarray(data["initial"]),
        config,
    )

    def callback(state: RefineState, info: RefineInfo) -> None:
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
                "would_stop": bool(state.finished),
            }
        )

    state = None
    while len(rows) < ITERATIONS:
        result = jr.refine(*given, key=KEY, state=state, callback=callback)
        state = eqx.tree_at(lambda s: s.finished, result.state, jnp.asarray(False))
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
    for iteration in config.multi_start:
        key = jax.random.fold_in(draw, iteration)
        state, _ = pose_step.update_poses(particle_set, state, iteration, limit, key)
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
        if settings.measures("folds"):
            measured["folds"] = run_on(data, False)
        if settings.measures("half_sets"):
            measured["half_sets"] = run_on(data, True)
        if settings.measures("truth"):
            last = (DATA_SETS[case].size - 1) // 2
            limits = sorted({min(limit, last) for limit in BAND_LIMITS})
            measured["truth"] = [found_in_truth(data, limit) for limit in limits]
        runs.append(measured)
    return {**figures, "runs": runs}


def table(records: Sequence[Record]) -> str:
    """Return two tables of each case: the iterations, and the poses of the truth."""
    tables = []
    for each in records:
        figures = each["figures"]
        runs = figures["runs"]
        title = f"{describe(each['case'], figures)}, {_count(len(runs), 'seed')}"
        rows = [_iterations(runs, number) for number in range(ITERATIONS)]
        header = ("iteration", "mean FSC", "score of the folds", "of half sets")
        header += ("median error (degrees)", "band limit")
        tables.append(f"{title}:\n\n{markdown_table(header, filter(None, rows))}")
        header = ("band limit", "median error (degrees)", "map of these poses")
        header += ("of the same errors, dealt to other images",)
        rows = [
            _of_truth([run["truth"][place] for run in runs])
            for place in range(len(runs[0].get("truth", ())))
        ]
        tables.append(f"Poses found in the true map:\n\n{markdown_table(header, rows)}")
    return "\n".join(tables)


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'s' * (number > 1)}"


def _iterations(runs: Sequence[dict[str, Any]], number: int) -> tuple[str, ...]:
    """Return a row of the first table, the means over all seeds; none if not made."""
    folds = [run["folds"][number] for run in runs if "folds" in run]
    halves = [run["half_sets"][number] for run in runs if "half_sets" in run]
    if not folds:
        return ()
    return (
        str(number + 1),
        f"{np.mean([row['mean_fsc'] for row in folds]):.3f}",
        f"{np.mean([row['fold_score'] for row in folds]):.3f}",
        f"{np.mean([row['gold_score'] for row in halves]):.3f}" if halves else "",
        f"{np.mean([row['angle_error_in_degrees_median'] for row in folds]):.2f}",
        "/".join(str(limit) for limit in sorted({row["r_max"] for row in folds})),
    )


def _of_truth(found: Sequence[dict[str, Any]]) -> tuple[str, ...]:
    """Return a row of the second table, the means over all seeds."""
    return (
        str(found[0]["r_max"]),
        f"{np.mean([row['angle_error_in_degrees_median'] for row in found]):.2f}",
        f"{np.mean([row['found'] for row in found]):.3f}",
        f"{np.mean([row['others'] for row in found]):.3f}",
    )
