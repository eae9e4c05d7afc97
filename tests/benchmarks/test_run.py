"""The driver of the benchmarks: what it refuses, stores and shows."""

import importlib
import json
import re
from pathlib import Path

import pytest

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
