"""Error messages: all of one form, to which the command line adds what it needs."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "jaxrefine"
NAMES = ("Finufft",)  # which begin with a capital anywhere


def messages():
    """Yield the pieces of every message, and where it is; values in it are no text."""
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Name):
                continue
            if node.func.id in ("InputError", "DamagedCheckpoint"):
                (text,) = node.args
                parts = text.values if isinstance(text, ast.JoinedStr) else [text]
                pieces = [getattr(part, "value", None) for part in parts]
                place = f"{path.relative_to(PACKAGE)}:{node.lineno}"
                yield pytest.param(pieces, id=place)


@pytest.mark.parametrize("pieces", list(messages()))
def test_a_message_is_a_sentence_without_a_capital_and_a_full_stop(pieces):
    first, last = pieces[0], pieces[-1]
    if isinstance(first, str):
        assert not first[0].isupper() or first.startswith(NAMES)
    if isinstance(last, str):
        assert not last.endswith(".")
