"""Sweeps, ablation and cost: what they compute, how they resume, what they draw."""

import json
import math
import runpy
import sys
from dataclasses import fields, replace
from itertools import pairwise
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import matplotlib.image
import numpy as np
import pytest
from helpers import interrupted_after

from jaxrefine import simulate
from jaxrefine.data import observation
from jaxrefine.geometry import Poses, geodesic_distance
from jaxrefine.io import write_json
from jaxrefine.operators import kbwf, spatial
from jaxrefine.operators.gridding import Gridding
from jaxrefine.paper import NewtonSteps, Schedule, algorithm3, released_preset
from jaxrefine.poses.polish import polish_poses
from jaxrefine.poses.prior import priors_about
from jaxrefine.poses.solvers import LevenbergMarquardt, retract
from jaxrefine.refinement import insertion, map_step
from jaxrefine.refinement.config import RefineConfig

EXPERIMENTS = Path(__file__).resolve().parents[2] / "experiments"


@pytest.fixture
def draw(load, monkeypatch):
    """Run a script of a figure; return its exit code."""

    def run(name, *words):
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *map(str, words)])
        with pytest.raises(SystemExit) as stop:
            runpy.run_path(str(EXPERIMENTS / f"{name}.py"), run_name="__main__")
        return stop.value.code

    return run


def read(folder):
    return json.loads((folder / "metrics.json").read_text())


def report(folder):
    return json.loads((folder / "run.json").read_text())


# --- sweeps


@pytest.fixture(scope="module")
def swept(run_script, tmp_path_factory):
    """Return a sweep that was interrupted at its second point, and resumed."""
    out = tmp_path_factory.mktemp("sweep") / "run"
    words = ["configs/sweeps.toml", "--preset", "smoke", "--out", out]
    with interrupted_after(lambda path: path == out / "points/snr_db=10/run.json"):
        assert run_script("sweeps", *words) == 130
    assert not report(out)["finished"]
    assert len(read(out)["points"]) == 1
    first = out / "points/snr_db=20/metrics.json"
    stamp = first.stat().st_mtime_ns
    assert run_script("sweeps", *words) == 0
    assert report(out)["finished"]
    assert first.stat().st_mtime_ns == stamp
    return out


@pytest.mark.slow
def test_a_finished_sweep_is_left_alone(run_script, swept, capsys):
    stamp = (swept / "metrics.json").stat().st_mtime_ns
    words = ["configs/sweeps.toml", "--preset", "smoke", "--out", swept]
    assert run_script("sweeps", *words) == 0
    assert capsys.readouterr().out.startswith("| snr_db | method |")
    assert run_script("sweeps", *words, "--set", "seed=1") == 2
    assert "other settings (seed)" in capsys.readouterr().err
    assert (swept / "metrics.json").stat().st_mtime_ns == stamp


@pytest.mark.slow
def test_a_sweep_gathers_what_its_points_say(swept):
    gathered = read(swept)
    assert gathered["axis"] == "snr_db"
    assert [point["value"] for point in gathered["points"]] == [20.0, 10.0]
    for point in gathered["points"]:
        folder = swept / f"points/snr_db={point['value']:g}"
        assert report(folder)["settings"]["snr_db"] == point["value"]
        results = read(folder)
        of_the_paper = ["oracle (paper)", "unrefined (paper)", "joint (paper)"]
        methods = ["oracle", "unrefined", "joint", *of_the_paper, "true map"]
        assert list(point["methods"]) == methods
        for name, merits in point["methods"].items():
            assert merits == {key: results[name][key] for key in merits}
        (row,) = results["true map"]["history"]
        assert point["bound"] == {key: row[key] for key in point["bound"]}
        assert len(point["bound"]) == 4


@pytest.mark.slow
def test_the_bound_is_proportional_to_the_noise(swept):
    """Ten decibels are a factor of sqrt(10); all else is the same data set."""
    low, high = (point["bound"] for point in read(swept)["points"])
    for name, value in low.items():
        np.testing.assert_allclose(high[name] / value, math.sqrt(10), rtol=1e-4)


@pytest.mark.slow
def test_poses_found_in_the_true_map_are_as_good_as_the_bound(swept):
    """At 10 dB: 48 squares of Gaussians scatter by a fifth, their root by a tenth."""
    (row,) = read(swept / "points/snr_db=10")["true map"]["history"]
    for attained, bound in (
        ("angle_error_in_degrees_rms", "bound_angle_in_degrees_rms"),
        ("shift_error_in_pixels_rms", "bound_shift_in_pixels_rms"),
    ):
        assert 0.7 < row[attained] / row[bound] < 1.3


def test_the_bound_of_independent_errors(load):
    """The lengths of 3 and 2 Gaussians: Maxwell's and Rayleigh's medians."""
    angle, shift = math.radians(2.0), 0.5
    information = np.diag([angle**-2] * 3 + [shift**-2] * 2)
    bound = load("sweeps").cramer_rao(np.tile(information, (3, 1, 1)))
    assert bound["bound_angle_in_degrees_rms"] == pytest.approx(2 * math.sqrt(3))
    assert bound["bound_shift_in_pixels_rms"] == pytest.approx(0.5 * math.sqrt(2))
    assert bound["bound_angle_in_degrees_median"] == pytest.approx(2 * 1.5382, rel=0.1)
    expected = 0.5 * math.sqrt(2 * math.log(2))
    assert bound["bound_shift_in_pixels_median"] == pytest.approx(expected, rel=0.1)


def test_the_bound_knows_what_is_confounded(load):
    """A shift that a turn can make up for is known less well than by itself."""
    information = np.eye(5)
    information[0, 3] = information[3, 0] = 0.8
    bound = load("sweeps").cramer_rao(information[None])
    one = 1 / (1 - 0.8**2)
    assert bound["bound_shift_in_pixels_rms"] == pytest.approx(math.sqrt(one + 1))
    expected = math.degrees(math.sqrt(one + 2))
    assert bound["bound_angle_in_degrees_rms"] == pytest.approx(expected)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["sweeps", "--set", "axis='noise'"], "axis must be one of snr_db, particles"),
        (["sweeps", "--set", "size=8"], "at least 16 voxels for a phantom, got 8"),
        (["ablation", "--set", "methods=['none']"], "methods must be one of paper"),
        (["cost", "--set", "sizes=[16]"], "at least 2 different sizes, got [16]"),
    ],
)
def test_bad_input_is_one_sentence(run_script, words, sentence, tmp_path, capsys):
    name, *rest = words
    out = tmp_path / "out"
    config = f"configs/{name}.toml"
    assert run_script(name, config, "--preset", "smoke", "--out", out, *rest) == 2
    err = capsys.readouterr().err
    assert sentence in err and err.count("\n") == 1
    assert not out.exists()


# --- ablation


@pytest.fixture
def summed(load, tmp_path):
    """Return the ablation, its particles, their start and the sums over each fold."""
    ablation, file = load("ablation"), Path("configs/ablation.toml")
    settings = load("configuration").read(ablation.AblationSettings, file, "smoke")
    case = load("cases").init1(settings, "", tmp_path)
    config = RefineConfig(multi_start=())
    particles = ablation.particle_set_of(case, config, jax.random.key(0), False)
    state = ablation.white_start(particles, case, float(case.dataset.sigma))
    everyone = np.ones(len(particles), bool)
    sums = insertion.sum_up(particles, state.hypotheses, state.noise, everyone)
    return ablation, particles, state, sums


def test_each_rung_sets_one_more_flag(load):
    rungs = list(load("ablation").RUNGS.values())
    assert not any(vars(rungs[0]).values())
    changes = [
        [name for name in vars(below) if getattr(below, name) != getattr(above, name)]
        for below, above in pairwise(rungs)
    ]
    assert changes == [["update"], ["multi_start"], ["cross_validation"], ["folds"]]


def test_the_descent_on_slices_begins_with_a_fraction_of_newtons_steps(load):
    """One for all angles and one for both shifts, of the mean information."""
    information = jnp.stack(
        [jnp.diag(jnp.array([1.0, 2.0, 3.0, 40.0, 50.0])), 3.0 * jnp.eye(5)]
    )
    update = load("ablation").newton_descent(information, jnp.asarray(0.5))
    assert float(update.angle_step) == pytest.approx(0.5 / 2.5)
    assert float(update.shift_step) == pytest.approx(0.5 / 24.0)


@pytest.mark.slow
def test_what_is_predicted_is_not_in_the_maps_that_predict_it(summed):
    """Whatever the maps were before: the choice of tau forgets them."""
    ablation, particles, state, sums = summed
    of_all = map_step.update_maps(particles, state, ablation.compared_with(sums, False))
    chosen, again = (
        ablation.cross_validated(particles, each, sums) for each in (state, of_all)
    )
    assert float(chosen.tau) == float(again.tau) != float(state.tau)


@pytest.mark.slow
def test_the_papers_descent_is_that_of_algorithm_3(load):
    """On the cost (34) in units of the noise, shifts take the steps of `descend`.

    Angles are other coordinates there; they are only to lower the cost further.
    """
    n, sigma = 16, 0.2
    truth = simulate.phantom(jax.random.key(0), n)
    dataset = simulate.make_dataset(
        jax.random.key(1), truth, 1, max_shift=1.0, max_angle_error=0.1, snr_db=10.0
    )
    basis = kbwf.KBWF()
    footprint = spatial.footprint(basis)
    terms = algorithm3.map_terms(
        footprint, kbwf.expand(basis, truth), spatial.Support.ball(n)
    )
    image_filter = spatial.spline_filter(footprint, n)
    particle = algorithm3.particle(image_filter, dataset.images[0])
    particle = algorithm3.Particle(particle.filtered, jnp.zeros_like(particle.energy))
    start = jax.tree.map(lambda leaf: leaf[0], dataset.initial)

    def cost(rotation, shift):
        at = algorithm3.EulerPoses.of(Poses(rotation, shift))
        return algorithm3.particle_cost(terms, particle, at) / sigma**2

    def objective(rotation, shift):
        def moved(step):
            return cost(*retract(rotation, shift, step))

        nothing = jnp.zeros(5, shift.dtype)
        return moved(nothing), jax.grad(moved)(nothing), jnp.diag(nothing)

    ablation = load("ablation")
    both = ablation.PaperDescent(2e-4 * sigma**2, 2e-3 * sigma**2)
    shifts = ablation.PaperDescent(0.0, both.shift_step)
    shifted, both_moved = (
        update.minimise(objective, start.rotations, start.shifts, lambda *here: here)
        for update in (shifts, both)
    )
    dtype = start.shifts.dtype
    steps = algorithm3.PoseConfig(*jnp.array([0.0, 2e-3, 0.25], dtype))
    euler_start = algorithm3.EulerPoses.of(start)
    expected, info = algorithm3.descend(terms, particle, euler_start, steps)
    assert info.shift_moves.all()
    np.testing.assert_allclose(shifted.rotation, start.rotations, atol=1e-6)
    np.testing.assert_allclose(shifted.shift, expected.shifts, atol=1e-5)
    np.testing.assert_allclose(shifted.cost * sigma**2, info.cost, rtol=1e-5)
    assert both_moved.cost < shifted.cost
    # A cost and a trial or more in each of two line searches, three times; and the end.
    assert 1 + 3 * 4 <= both_moved.evaluations <= 1 + 3 * 2 * 11


@pytest.mark.slow
def test_the_papers_descent_keeps_to_what_is_allowed(load, tmp_path):
    """In the engine's polish: it makes poses more probable, within their bounds."""
    ablation, file = load("ablation"), Path("configs/ablation.toml")
    read_settings = load("configuration").read
    settings = read_settings(ablation.AblationSettings, file, "smoke")
    case = load("cases").init1(settings, "", tmp_path)
    particles, poses = load("methods").particles_of(case), case.dataset.initial
    poses = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), poses)
    last, sigma = (particles.image_size - 1) // 2, float(case.dataset.sigma)
    noise = jnp.full(last + 2, (sigma * particles.image_size) ** 2, jnp.float32)
    spectrum = Gridding().spectrum(case.truth.astype(jnp.float32), last)
    rotations, shifts = np.asarray(poses.rotations), np.asarray(poses.shifts)

    def polished(update):
        return polish_poses(
            particles,
            np.arange(len(particles)),
            spectrum,
            observation.view(particles, last, noise),
            priors_about(poses, 1.0, 10.0, 0.05, 0.2),
            rotations,
            shifts,
            update,
            len(particles),
        )

    found, start = (
        polished(ablation.PaperDescent(2e-4 * sigma**2, 2e-3 * sigma**2)),
        polished(LevenbergMarquardt(0)),
    )
    assert np.all(found.evidence >= start.evidence - 1.0)
    assert np.mean(found.evidence - start.evidence) > 1.0
    turned = geodesic_distance(jnp.asarray(found.rotations), poses.rotations)
    moved = np.linalg.norm(found.shifts - shifts, axis=-1)
    assert 0.01 < turned.max() < 0.0501 and 0.05 < moved.max() < 0.2001


@pytest.mark.slow
def test_ablation_runs(run_script, draw, tmp_path):
    """From the same start, with the poses of the step before where only maps differ."""
    out, picture = tmp_path / "run", tmp_path / "ablation.png"
    words = ["configs/ablation.toml", "--set", "methods=['between']", "--out", out]
    assert run_script("ablation", *words) == 0
    results = read(out)
    first, second, third, validated, folded = results.values()
    assert all(len(result["history"]) == 2 for result in results.values())

    def poses(result):
        return [row["angle_error_in_degrees_median"] for row in result["history"]]

    assert poses(first) != poses(second) != poses(third)
    assert poses(validated) == poses(third) and validated["fsc"] != third["fsc"]
    assert poses(folded) != poses(validated)
    assert draw("plot_ablation", out, "--out", picture) == 0
    assert_picture(picture)


@pytest.mark.slow
def test_without_folds_both_maps_are_of_all_particles(summed):
    """What the ablation hands to the engine's volume update gives one map, not two."""
    ablation, particles, state, sums = summed
    both, apart = (
        map_step.update_maps(particles, state, ablation.compared_with(sums, apart))
        for apart in (False, True)
    )
    one, two = (each.coefficients for each in both.maps)
    np.testing.assert_array_equal(one, two)
    one, two = (each.coefficients for each in apart.maps)
    assert float(jnp.abs(one - two).max()) > 0.1 * float(jnp.abs(one).max())


# --- the constants of the paper's preset


def test_each_constant_is_changed_alone(load):
    constants = load("constants")
    steps = NewtonSteps(Schedule(0.5, 1.0))
    config = replace(released_preset(0.1), keep_duals=True, steps=steps)
    different = []
    for change in constants.CHANGES.values():
        other = change(config)
        different += [
            field.name
            for field in fields(config)
            if not eqx.tree_equal(
                getattr(other, field.name), getattr(config, field.name)
            )
        ]
    assert different == [
        "poses_first",
        "steps",
        "lam",
        "lam",
        "rho",
        "rho",
        "admm_iterations",
        "pose_iterations",
        "keep_duals",
    ]


def test_lambda_and_rho_are_multiples_of_those_of_the_preset(load):
    changes = load("constants").CHANGES
    last = float(released_preset(0.1).lam.last)
    for name, multiple in (("lambda from 4 sigma", 4.0), ("lambda constant", 1.0)):
        lam = changes[name](released_preset(0.1)).lam
        assert float(lam.last) == last
        assert float(lam.first) == pytest.approx(multiple * last)
    for name, last in (("rho constant", 0.25), ("a quarter of rho", 0.25 * 0.002)):
        rho = changes[name](released_preset(0.1)).rho
        first = float(released_preset(0.1).rho.first)
        assert float(rho.first) == pytest.approx(0.25 * first)
        assert float(rho.last) == pytest.approx(last * first)


@pytest.mark.slow
def test_a_closing_update_makes_a_map_of_the_last_poses(run_script, tmp_path):
    out = tmp_path / "run"
    words = ["configs/constants.toml", "--set", "methods=['changed']", "--out", out]
    assert run_script("constants", *words) == 0
    results = read(out)
    assert len(results) == 11
    poses, closed = results["volume first"], results["volume first and last"]
    assert poses["history"][-1]["iteration"] == 2
    error = "angle_error_in_degrees_median"
    assert poses[error] == closed[error] and poses["fsc"] != closed["fsc"]


# --- cost


NAMES = ("projection matching", "projection matching, steps as 1/n")
NAMES += ("spatial, cost", "spatial, cost and gradient", "spatial, Algorithm 3")
NAMES += ("slices, cost and gradient", "slices, visit")


def point(size, scale=1.0):
    return {
        "size": size,
        "seconds_per_particle": {
            name: scale * 1e-6 * size**power for power, name in enumerate(NAMES)
        },
        "normal_operator_s": scale * 1e-9 * size**3.5,
        "compilation_s": dict.fromkeys((*NAMES, "normal operator"), 1.0),
        "line_search_trials": 1.5,
    }


def test_exponents_are_those_of_powers(load):
    """Whatever the machine's speed, and also of no growth at all."""
    points = [point(n, 7.0) for n in (16, 24, 46)]
    found, powers = load("cost").exponents(points), len(NAMES)
    np.testing.assert_allclose([*found.values()], [*range(powers), 3.5], atol=1e-9)


def test_the_first_round_is_not_counted(load):
    clock = iter(range(1000))
    waits = {"a": [5, 1, 1, 9], "b": [0, 2, 3, 4]}
    left = {name: iter(values) for name, values in waits.items()}

    def call(name):
        return lambda: [next(clock) for _ in range(next(left[name]))] and None

    calls = {name: call(name) for name in waits}
    typical, compilation = load("cost").measure(calls, 3, lambda: next(clock))
    # A call of k ticks lasts k + 1 between two looks at the clock.
    assert typical == {"a": 2, "b": 4}
    assert compilation == {"a": 4, "b": -3}


@pytest.mark.slow
def test_cost_runs_and_resumes(load, run_script, tmp_path, capsys):
    """Interrupted after the first size, it measures the second one alone."""
    out, cost, harness = tmp_path / "run", load("cost"), load("harness")
    file = Path("configs/cost.toml")
    settings = load("configuration").read(cost.CostSettings, file, "smoke")
    study = harness.Study(settings, "cost", "smoke", out)

    def stopping(size, settings):
        if size == 24:
            raise KeyboardInterrupt
        return cost.point(size, settings)

    with pytest.raises(KeyboardInterrupt):
        cost.run(study, stopping)
    (first,) = read(out)["points"]
    cost.run(study, lambda size, settings: point(size))
    assert read(out)["points"] == [first, point(24)]
    capsys.readouterr()
    words = ["configs/cost.toml", "--out", out]
    assert run_script("cost", *words) == 0
    assert capsys.readouterr().out.startswith("| ms per particle | n = 16 | n = 24 |")
    assert run_script("cost", *words, "--set", "seed=1") == 2
    assert "other settings (seed)" in capsys.readouterr().err

    times = first["seconds_per_particle"]
    assert list(times) == list(point(16)["seconds_per_particle"])
    assert min(times.values()) > 0 and first["normal_operator_s"] > 0
    assert list(first["compilation_s"]) == [*times, "normal operator"]
    assert 1 <= first["line_search_trials"] <= 10


# --- pictures


def assert_picture(path):
    pixels = matplotlib.image.imread(path)
    assert min(pixels.shape[:2]) >= 300
    assert np.mean(pixels[..., :3].min(axis=-1) < 0.9) > 0.01


CONDITIONS = {
    "title": "A title",
    "seed": 0,
    "size": 16,
    "particles": 100,
    "snr_db": -5.0,
    "max_angle_error_in_radians": 0.7,
    "max_shift": 3.0,
    "initial_blur": 4.0,
    "voxel_size_in_angstroms": 2.0,
    "batch_size": 8,
}
MERITS = {
    "mean_fsc": 0.5,
    "mean_fsc_aligned": 0.6,
    "rc": 7.0,
    "angle_error_in_degrees_median": 2.0,
    "fraction_within_10_degrees": 0.9,
    "wall_s": 10.0,
}


def store(folder, settings, results):
    folder.mkdir()
    write_json(folder / "metrics.json", results)
    report = {"settings": settings, "kept": {"start": "a start"}, "volume": None}
    write_json(folder / "run.json", report | {"finished": True})
    return folder


def fake_sweep(folder, axis, values, **changes):
    methods = dict.fromkeys(("oracle", "unrefined", "joint", "true map"), MERITS)
    points = [
        {
            "value": value,
            "methods": methods,
            "bound": {"bound_angle_in_degrees_median": 1.0 + i},
        }
        for i, value in enumerate(values)
    ]
    results = {"axis": axis, "points": points}
    return store(folder, CONDITIONS | changes, results)


def test_sweeps_are_drawn_together(draw, tmp_path, capsys):
    runs = [
        fake_sweep(tmp_path / "a", "snr_db", [0.0, -5.0]),
        fake_sweep(tmp_path / "b", "particles", [250, 500, 1000]),
    ]
    picture = tmp_path / "sweeps.png"
    assert draw("plot_sweeps", *runs, "--out", picture) == 0
    assert_picture(picture)
    other = fake_sweep(tmp_path / "c", "particles", [250, 500], snr_db=-10.0)
    picture.unlink()
    assert draw("plot_sweeps", runs[0], other, "--out", picture) == 2
    assert "of the same conditions" in capsys.readouterr().err
    plain = store(tmp_path / "d", CONDITIONS, {"joint": MERITS})
    assert draw("plot_sweeps", plain, "--out", picture) == 2
    assert "must be the run of a sweep" in capsys.readouterr().err
    assert not picture.exists()


def test_ablations_are_drawn_with_what_was_run(draw, tmp_path):
    results = dict.fromkeys(("joint", "+ folds", "joint (paper)"), MERITS)
    run = store(tmp_path / "a", CONDITIONS, results)
    assert draw("plot_ablation", run, run, "--out", tmp_path / "a.png") == 0
    assert_picture(tmp_path / "a.png")


def test_costs_are_drawn(load, draw, tmp_path, capsys):
    settings = {
        "title": "A title",
        "sizes": [16, 24],
        "repetitions": 3,
        "particles": 8,
        "snr_db": -5.0,
        "seed": 0,
        "max_shift": 3.0,
        "matching_step_in_degrees": 7.5,
    }
    points = [point(n) for n in (16, 24)]
    results = {"device": "a", "threads": 2, "points": points}
    results["exponents"] = load("cost").exponents(points)
    run, picture = store(tmp_path / "a", settings, results), tmp_path / "a.png"
    assert draw("plot_cost", run, "--out", picture) == 0
    assert_picture(picture)
    picture.unlink()
    unfinished = report(run) | {"finished": False}
    write_json(run / "run.json", unfinished)
    for folder, sentence in (
        (run, "is not finished"),
        (tmp_path / "absent", "must be the folder of a run"),
    ):
        assert draw("plot_cost", folder, "--out", picture) == 2
        assert sentence in capsys.readouterr().err
    assert not picture.exists()
