"""Reports are valid JSON, whatever the numbers."""

import json
from pathlib import Path

import numpy as np
import pytest

from jaxrefine.errors import InputError
from jaxrefine.io import append_line, json_line, read_json, write_json, write_lines


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


def test_logs_grow_by_lines_and_are_written_anew(tmp_path):
    path = tmp_path / "log.jsonl"
    rows = [{"i": i, "nan": float("nan"), "text": "ä\u2028\n"} for i in range(3)]
    lines = [json_line(row) for row in rows]
    for line in lines:
        append_line(path, line)
    expected = [row | {"nan": None} for row in rows]
    assert list(map(json.loads, path.read_text().splitlines())) == expected
    write_lines(path, lines[:2])
    assert list(map(json.loads, path.read_text().splitlines())) == expected[:2]
    write_lines(path, [])
    assert path.read_bytes() == b""


def test_a_log_that_cannot_be_written_is_a_sentence(tmp_path):
    for write in (append_line, write_lines):
        with pytest.raises(InputError, match="cannot write .*absent"):
            write(tmp_path / "absent/log.jsonl", "{}")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full")
def test_a_log_on_a_full_disk_is_a_sentence():
    with pytest.raises(InputError, match="cannot write /dev/full: No space left"):
        append_line("/dev/full", "{}")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "is not a JSON file"),
        (b"{", "is not a JSON file"),
        (b"\xff\xfe", "is not a JSON file"),
        (b"[" * 100_000, "is not a JSON file"),
        (b"1" * 10_000, "is not a JSON file"),
        (b"[" * 101 + b"]" * 101, "must hold objects nested at most 100 deep"),
        (
            b'{"a":' * 400 + b"1" + b"}" * 400,
            "must hold objects nested at most 100 deep",
        ),
    ],
)
def test_a_file_that_is_not_json_is_a_sentence(tmp_path, content, words):
    path = tmp_path / "run.json"
    path.write_bytes(content)
    with pytest.raises(InputError, match=f"{path} {words}"):
        read_json(path)
    path.write_bytes(b"[" * 100 + b"]" * 100)
    assert read_json(path)
