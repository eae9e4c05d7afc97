"""The driver of the benchmarks: what it refuses, stores and shows."""

import argparse
import importlib
import json
import re
from dataclasses import asdict
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrefine import io, simulate
from jaxrefine.cli.commands.simulate import SimulateSettings
from jaxrefine.refinement.config import RefineConfig, Tuning
from jaxrefine.refinement.contrast import contrast
from jaxrefine.runs.options import add_options, settings_from

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture
def run(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    return importlib.import_module("run")


@pytest.fixture
def records(run):
    return importlib.import_module("records")


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["nothing"], "NAME must be one of spatial, .*, got nothing"),
        (["spatial", "--case", "47"], "--case must be one of 46, 64, 90, got 47"),
        (["spatial", "slices", "--case", "46"], "--case, .* need exactly one NAME"),
        (["refinement", "--parts", "joint"], "--parts needs --json"),
        (["spatial", "--parts", "x", "--json", "f"], "--parts must be one of .none."),
    ],
)
def test_bad_options_are_one_sentence(run, capsys, words, sentence):
    with pytest.raises(SystemExit) as stop:
        run.main(words)
    assert stop.value.code == 2
    assert re.search(f"error: {sentence}", capsys.readouterr().err)


def test_what_the_command_line_is_told_is_declared(run):
    parser = argparse.ArgumentParser()
    add_options(parser, SimulateSettings)
    words = ["map.mrc", "--out", "data", *run.load("ctf").SIMULATE.split()]
    settings = settings_from(SimulateSettings, vars(parser.parse_args(words)))
    assert settings.ctf and settings.max_shift == 3


def test_every_stored_case_is_in_the_table(run, records, capsys):
    run.main(["--table"])
    text = capsys.readouterr().out
    stored = sorted(records.RESULTS.glob("*.json"))
    sections = re.findall(r"^## .*`(\w+)`", text, re.MULTILINE)
    assert [path.stem for path in stored] == sorted(sections)
    for path in stored:
        benchmark = run.load(path.stem)
        for record in records.read(path):
            assert record["case"] in benchmark.CASES
            alone = benchmark.table([record])
            lines = [line for line in alone.splitlines() if line]
            assert lines[-1] in text, (path.stem, record["case"])
    rows = [line for line in text.splitlines() if line.startswith("|")]
    for header, rule in zip(rows, rows[1:], strict=False):
        if set(rule) <= set("| -"):
            assert header.count("|") == rule.count("|")


def test_a_record_replaces_the_one_of_the_same_case_and_cores(records, tmp_path):
    path = tmp_path / "results.json"
    first, other = (records.record(name, {"figure": 1}) for name in ("a", "b"))
    again = records.record("a", {"figure": 2})
    fewer = {**again, "provenance": {**again["provenance"], "cores": 0}}
    for record in (first, other, fewer, again):
        records.store(path, record)
    assert json.loads(path.read_text()) == [other, fewer, again]
    provenance = again["provenance"]
    assert {"commit", "dirty", "date", "machine", "cores"} < set(provenance)
    assert {"python", "jax", "jaxrefine"} < set(provenance["versions"])


@pytest.mark.slow
def test_a_benchmark_is_run_and_stored(run, records, tmp_path):
    path = tmp_path / "results.json"
    run.main(["spatial", "--case", "46", "--json", str(path)])
    (record,) = records.read(path)
    assert record["figures"]["normal_operator"]["ratio"] > 0
    assert "46" in run.load("spatial").table([record])


def test_the_constants_are_compared_with_a_lower_and_a_higher_value(run):
    neighbours = run.load("tuning").NEIGHBOURS
    defaults = asdict(Tuning())
    # The data sets have one optics group, for which this constant has no effect.
    assert neighbours.keys() == defaults.keys() - {"least_per_group"}
    for name, (lower, higher) in neighbours.items():
        assert lower < defaults[name] < higher, name


def test_constants_are_shown_by_what_they_change(run):
    same = {
        **{"mean_fsc": 0.75, "fraction_within_10_degrees": 0.9, "iterations": 5},
        **{"angle_error_in_degrees_median": 1.5},
    }
    better = {**same, "mean_fsc": 0.875, "angle_error_in_degrees_median": 1.25}
    refinements = [
        {"half_sets": False, "change": {}, **same},
        {"half_sets": False, "change": {"sample": 500}, **same},
        {"half_sets": True, "change": {}, **better},
        {"half_sets": True, "change": {"stalled": 1e-3}, **same, "iterations": 4},
    ]
    data = {"file": "hjc_46.mrc", "size": 32, "particles": 300, "snr_db": 0.0}
    figures = {**data, "defaults": asdict(Tuning()), "refinements": refinements}
    table = run.load("tuning").table([{"case": "hjc32", "figures": figures}])
    rows = [line.strip("| ").split(" | ") for line in table.splitlines()[4:]]
    assert rows == [
        ["defaults", "", "0.750", "90.0 %", "1.50", "5"],
        ["`sample`", "2000 → 500", "+0.000", "+0.0 %", "+0.00", "+0"],
        ["defaults, half sets", "", "0.875", "90.0 %", "1.25", "5"],
        ["`stalled`", "0.002 → 0.001", "-0.125", "+0.0 %", "+0.25", "-1"],
    ]


def test_a_constant_is_measured(run, records, tmp_path, monkeypatch):
    """By a refinement of each of its values; what these find is made up here."""
    pytest.importorskip("finufft", reason="data sets are simulated by finufft")
    path, volume = tmp_path / "results.json", simulate.phantom(jax.random.key(0), 46)
    io.write_mrc(tmp_path / "hjc_46.mrc", np.asarray(volume), 1.0)
    tuning = run.load("tuning")

    def refine(data, config):
        assert data["images"].shape == (300, 32, 32)
        found = dict.fromkeys(tuning.FIGURES, config.tuning.settled)
        return found | {"r_max": [7, 11]}

    monkeypatch.setattr(tuning, "refine", refine)
    where = ["--data", str(tmp_path), "--json", str(path)]
    run.main(["tuning", "--case", "hjc32", "--parts", "settled", *where])
    (record,) = records.read(path)
    default, *others = record["figures"]["refinements"]
    assert default["change"] == {} and default["mean_fsc"] == Tuning().settled
    assert tuple(other["mean_fsc"] for other in others) == tuning.NEIGHBOURS["settled"]
    assert all(each["iterations"] == 2 for each in (default, *others))
    assert "`settled`" in tuning.table([record])


@pytest.mark.slow
def test_a_data_set_is_refined_in_a_process_of_its_own(run):
    """With the figures that benchmarks store, of the changed parameters."""
    rng, n = np.random.default_rng(0), 16
    volume = np.asarray(simulate.phantom(jax.random.key(0), n))
    data = {
        "images": rng.normal(size=(20, n, n)).astype(np.float32),
        "volume": volume,
        "initial": volume,
        "angles": rng.uniform(0, 1, (20, 3)),
        "shifts": np.zeros((20, 2)),
    }
    refine_dataset = importlib.import_module("refine_dataset")
    found = refine_dataset.refine(
        data | {"start": data["angles"]}, RefineConfig(iterations=1, first_r_max=5)
    )
    assert found["r_max"] == [5] and found["images_mib"] == 20 * n**2 * 4 / 2**20
    assert 0 < found["wall_s"] < found["process_s"]
    assert set(run.load("tuning").FIGURES) - {"iterations"} <= found.keys()


def test_a_gain_fits_the_truth(run):
    """It undoes a factor, and halves a map that is half noise."""
    rng, n = np.random.default_rng(0), 24
    truth, noise = rng.normal(size=(2, n, n, n))
    gain = run.load("low_snr").gain
    np.testing.assert_allclose(gain(2 * truth, truth), 0.5)
    np.testing.assert_allclose(gain(truth + noise, truth)[6:], 0.5, atol=0.1)


def test_iterations_at_low_snr_are_shown_as_means_over_seeds(run):
    low_snr = run.load("low_snr")
    row = {"iteration": 1, "mean_fsc": 0.5, "fold_score": 0.25, "gold_score": None}
    row |= {"angle_error_in_degrees_median": 4.0, "r_max": 7, "would_end": True}
    row["is_kept"] = True
    other = row | {"mean_fsc": 0.75, "r_max": 10, "would_end": False}
    found = {"r_max": 16, "angle_error_in_degrees_median": 4, "found": 1, "others": 0.5}
    runs = [
        {"seed": seed, "limited": [each], "truth": [found]}
        for seed, each in enumerate((row, other))
    ]
    data = {"file": "hjc_46.mrc", "size": 32, "particles": 300, "snr_db": 0.0}
    text = low_snr.table([{"case": "hjc32", "figures": {**data, "runs": runs}}])
    rows = [line for line in text.splitlines() if line.startswith("| 1")]
    assert rows == [
        "| 1 | 0.625 | 0.250 |  | 4.00 | 7/10 | 2 | 1 |",
        "| 16 | 4.00 | 1.000 | 0.500 |",
    ]
    assert "2 seeds" in text and "`limited`" in text and "`folds`" not in text


@pytest.mark.slow
def test_the_control_of_matching_is_like_real_particles(run, data_dir, tmp_path):
    """Its spectrum is theirs, and its images show the map at the true poses."""
    pytest.importorskip("finufft", reason="data sets are simulated by finufft")
    matching = run.load("matching")
    stack = data_dir / "real_betagal" / "betagal_emd2984_particles_101_96px.mrcs"
    truth, level = matching.simulate(1.0, data_dir, tmp_path)
    source = io.read_particles(tmp_path / "particles.star")
    images = np.asarray(source.particles.images[np.arange(101)], float)
    shares = [
        spectrum[4:13].sum() / spectrum[30:46].sum()
        for spectrum in map(matching.spectrum, (images, io.read_stack(stack)[0]))
    ]
    assert shares[0] == pytest.approx(shares[1], rel=0.1)
    volume = jnp.asarray(io.read_mrc(tmp_path / "map.mrc")[0])
    found = contrast(source.particles, truth, volume, RefineConfig(first_r_max=12))
    assert found.correlation > 0.2
    faint = matching.simulate(0.5, data_dir, tmp_path)[1]
    assert level - faint == pytest.approx(20 * np.log10(2), abs=1e-6)
