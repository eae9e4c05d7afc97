"""Reports are valid JSON, whatever the numbers."""

import json

import numpy as np
import pytest

from jaxrefine.errors import InputError
from jaxrefine.io import write_json


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


def test_places_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("precious")
    for place in ("absent/report.json", "file/report.json"):
        with pytest.raises(InputError, match="Cannot write"):
            write_json(tmp_path / place, {})
    assert (tmp_path / "file").read_text() == "precious"
