"""Reports are valid JSON, whatever the numbers."""

import json
from pathlib import Path

import numpy as np
import pytest

from jaxrefine.errors import InputError
from jaxrefine.io import append_json_line, keep_lines, read_json_lines, write_json


def refuse(word):
    raise AssertionError(f"{word} is not JSON")


def test_numbers_that_json_lacks_become_null(tmp_path):
    path = tmp_path / "report.json"
    nan, inf = float("nan"), float("inf")
    content = {"a": nan, "b": [1.5, -inf, {"c": (inf, 2)}], "d": np.float64(nan)}
    write_json(path, {**content, "e": "NaN", "f": True, "g": None})
    expected = {"a": None, "b": [1.5, None, {"c": [None, 2]}], "d": None}
    expected |= {"e": "NaN", "f": True, "g": None}
    assert json.loads(path.read_text(), parse_constant=refuse) == expected


def test_a_report_that_cannot_be_written_is_a_sentence(tmp_path):
    (tmp_path / "file").write_text("precious")
    for place in ("absent/report.json", "file/report.json"):
        with pytest.raises(InputError, match="cannot write"):
            write_json(tmp_path / place, {})
    assert (tmp_path / "file").read_text() == "precious"


def test_logs_keep_their_first_lines(tmp_path):
    """Whatever the last line looks like, if it is not among them."""
    path = tmp_path / "log.jsonl"
    for i in range(3):
        append_json_line(path, {"i": i, "nan": float("nan"), "text": "ä\u2028\n"})
    with path.open("ab") as file:
        file.write(b'{"i": \xff')
    assert [row["i"] for row in read_json_lines(path)] == [0, 1, 2]
    keep_lines(path, 2)
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert rows == read_json_lines(path)
    assert [row["i"] for row in rows] == [0, 1]
    assert rows[0]["nan"] is None and rows[0]["text"] == "ä\u2028\n"
    keep_lines(tmp_path / "absent.jsonl", 2)
    assert (tmp_path / "absent.jsonl").read_bytes() == b""


def test_a_log_that_cannot_be_written_is_a_sentence(tmp_path):
    with pytest.raises(InputError, match="cannot write .*absent"):
        append_json_line(tmp_path / "absent/log.jsonl", {})


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full")
def test_a_log_on_a_full_disk_is_a_sentence():
    with pytest.raises(InputError, match="cannot write /dev/full: No space left"):
        append_json_line("/dev/full", {"iteration": 1})
