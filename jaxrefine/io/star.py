"""Tables in the STAR format.

This is RELION's dialect: a row is one line, and a block holds one table. Names of
columns are used here without their leading underscore, names of blocks without their
leading ``data_``.
"""

import codecs
import re
import reprlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Array

from jaxrefine.errors import InputError
from jaxrefine.io.atomic import atomic_path, existing_file, reading

Table = dict[str, list[str]]
"""The values of each column by its name; all columns have the same length."""


class Pairs(Table):
    """A table of one row that its file holds as name-value pairs, not as a loop.

    An empty block is also read as `Pairs`, without columns.
    """


Values = Sequence[Any] | Array | np.ndarray
"""The values of a column to write: strings, or objects that ``str`` converts."""

_UTF16 = codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE
_WORD = re.compile(r"\S+", re.ASCII)
_CLOSING = {quote: re.compile(rf"(?<!\a){quote}(?=\s|$)", re.ASCII) for quote in "\"'"}
# Bytes that are not UTF-8 are read as U+DC80 to U+DCFF, and written as they were.
_NO_TEXT = r"\0\ud800-\udc7f\udd00-\udfff"
_NEEDS_QUOTES = re.compile(rf"""^$|[\s{_NO_TEXT}]|^(?:["'_#;]|data_|loop_)""")
_UNWRITABLE = re.compile(rf"[\a\r\n{_NO_TEXT}]")  # not even within quotes
_NOT_IN_NAMES = re.compile(rf"[\s\x1c-\x1f{_NO_TEXT}]", re.ASCII)
_CELLS_AT_ONCE = 2**14  # of a loop, that are turned from rows to columns
_REPEATED = 2**8  # strings of a column that are kept once, if it has not many more


def read_star(path: str | Path) -> dict[str, Table]:
    """Read every block of a STAR file.

    A block of name-value pairs becomes a table of one row, of type `Pairs`; an empty
    loop becomes a table whose columns are empty. Values remain strings, without their
    quotes; `write_star` writes them back unchanged, but comments are lost. In a loop of
    two columns the second value may be missing, as in RELION, and is then empty. A
    block of pairs followed by a loop is an error; RELION itself reads only its pairs.

    A file need not be UTF-8: other bytes are kept as they are (``surrogateescape``).

    Raises
    ------
    InputError
        If the file is missing or is not a STAR file, if a row has too few or too many
        values, or if a block or a column occurs twice.
    """
    path = existing_file(path)
    blocks: dict[str, Table] = {}
    name, table, rows = "", None, None
    with (
        reading(path),
        open(path, encoding="utf-8-sig", errors="surrogateescape") as file,
    ):
        for number, line in enumerate(file, start=1):
            if "\0" in line:
                utf16 = line.encode("utf-8", "surrogateescape")[:2] in _UTF16
                kind = "text in UTF-16, it must be UTF-8" if utf16 else "not text"
                raise InputError(f"{path} is not a STAR file: it is {kind}")
            values = _values(line)
            if not values:
                continue
            first = "" if line.lstrip().startswith(("'", '"')) else values[0]
            alone = len(values) == 1
            if alone and first.startswith("data_"):
                if rows is not None:
                    rows.flush()
                name, table, rows = first.removeprefix("data_"), Pairs(), None
                _insert(blocks, name, table, path, number)
            elif table is None:
                raise InputError(
                    f"{path}, line {number}: this is not a STAR file, because it does "
                    "not begin with a data_ block"
                )
            elif alone and first == "loop_":
                if table or rows is not None:
                    raise InputError(
                        f"{path}, line {number}: a block must hold one table, got a "
                        "second one"
                    )
                table = blocks[name] = {}
                rows = _Rows(table)
            elif rows is None:
                if len(values) != 2 or not first.startswith("_"):
                    raise InputError(
                        f"{path}, line {number}: the line must be loop_, or a name and "
                        f"a value, got {reprlib.repr(line.strip())}"
                    )
                _insert(table, first[1:], [values[1]], path, number)
            elif alone and first.startswith("_") and not rows.count:
                _insert(table, first[1:], [], path, number)
            else:
                if alone and len(table) == 2:
                    values.append("")
                if len(values) != len(table):
                    raise InputError(
                        f"{path}, line {number}: the row must have {len(table)} "
                        f"values, one for each column, got {len(values)}"
                    )
                rows.add(values)
    if rows is not None:
        rows.flush()
    if not blocks:
        raise InputError(f"{path} is not a STAR file: it has no data_ block")
    return blocks


class _Rows:
    """The rows of a loop, turned into columns many at a time.

    A column in which few strings occur holds each of them once.
    """

    def __init__(self, table: Table):
        self.count = 0
        self._table, self._rows = table, []
        self._seen: dict[str, dict[str, str]] = {}

    def add(self, values: list[str]) -> None:
        """Add a row, which has a value for each column."""
        self.count += 1
        self._rows.append(values)
        if len(self._rows) * len(values) >= _CELLS_AT_ONCE:
            self.flush()

    def flush(self) -> None:
        """Add the rows to the columns."""
        for name, *values in zip(self._table, *self._rows, strict=True):
            seen = self._seen.setdefault(name, {})
            self._table[name].extend(map(seen.setdefault, values, values))
            if len(seen) > _REPEATED:
                seen.clear()
        self._rows.clear()


def write_star(path: str | Path, blocks: Mapping[str, Mapping[str, Values]]) -> None:
    """Write blocks in RELION's style: `Pairs` as name-value pairs, others as loops.

    Numbers are written with as many digits as identify them. A file with optics groups
    is marked with the version of RELION 3.1, because RELION takes a file without that
    mark for an older one, and converts it. The file appears complete or not at all.

    Raises
    ------
    InputError
        If there are no blocks, if the columns of a block differ in length, if a column
        of `Pairs` does not have exactly one value, if a column is not a list of values,
        if a name has blanks or a value cannot be quoted, or if the file cannot be
        written.
    """
    if not blocks:
        raise InputError(f"cannot write {path}: there must be at least one block")
    version = ["", "# version 30001"] if "optics" in blocks else []
    lines = []
    for name, table in blocks.items():
        where = f"cannot write {path}, block {name!r}"
        columns = {
            column: _quoted(values, f"{where}, column {column!r}")
            for column, values in table.items()
        }
        lengths = {len(column) for column in columns.values()}
        if len(lengths) > 1 or (isinstance(table, Pairs) and lengths - {1}):
            expected = "one value" if isinstance(table, Pairs) else "the same length"
            raise InputError(
                f"{where}: all columns must have {expected}, got lengths of "
                f"{', '.join(map(str, sorted(lengths)))}"
            )
        for label in (f"data_{name}", *columns):
            if not label or _NOT_IN_NAMES.search(label):
                raise InputError(
                    f"{where}: names must be text without blanks, got {label!r}"
                )
        lines += [*version, "", f"data_{name}", ""]
        if isinstance(table, Pairs):
            for column, (value,) in columns.items():
                lines.append(f"_{column:<40} {value:>12}")
        else:
            lines.append("loop_ ")
            lines += [f"_{column} #{i} " for i, column in enumerate(columns, start=1)]
            for row in zip(*columns.values(), strict=True):
                lines.append(" ".join(f"{value:>12}" for value in row))
        lines.append("")
    with atomic_path(path) as temporary:
        temporary.write_text(
            "\n".join(lines) + "\n", encoding="utf-8", errors="surrogateescape"
        )


def quoted(value: str, where: str) -> str:
    r"""Return a value with the quotes that it needs in a row.

    A quote within the value that looks like a closing one is marked by a BEL (``\a``),
    as RELION does.

    Raises
    ------
    InputError
        If the value is not text of one line, or needs quotes and contains a BEL.
    """
    if not _NEEDS_QUOTES.search(value):
        return value
    if _UNWRITABLE.search(value):
        raise InputError(f"{where}: a STAR file cannot hold the value {value!r}")
    for quote in "\"'":
        if not re.search(rf"{quote}\s", value):
            return f"{quote}{value}{quote}"
    return '"' + re.sub(r'"(?=\s)', '\a"', value) + '"'


def _quoted(values: Values, where: str) -> list[str]:
    """Return the values of a column with the quotes that they need."""
    array = np.asarray(values) if hasattr(values, "ndim") else None
    if array is not None and array.ndim != 1:
        raise InputError(
            f"{where}: values must be a list, got an array of shape {array.shape}"
        )
    if isinstance(values, str | bytes) or not isinstance(values, Iterable):
        kind = type(values).__name__
        raise InputError(f"{where}: values must be a list, got a single {kind}")
    values = values if array is None else array
    return [quoted(str(value), where) for value in values]


def _values(line: str) -> list[str]:
    """Split a line into its values, without their quotes and without a comment.

    A quote after a BEL does not close a value, and the BEL is not part of the value. A
    quote that nothing closes is part of a word. The time is linear in the length.
    """
    if line.isascii() and not any(character in line for character in "\"'#"):
        return line.split()
    values, place, unclosed = [], 0, set()
    while word := _WORD.search(line, place):
        start, place = word.span()
        quote, closing = line[start], None
        if quote == "#":
            break
        if quote in _CLOSING and quote not in unclosed:
            closing = _CLOSING[quote].search(line, start + 1)
            if closing is None:
                unclosed.add(quote)  # There is none further on either.
        if closing is None:
            values.append(word[0])
        else:
            values.append(line[start + 1 : closing.start()].replace("\a", ""))
            place = closing.end()
    return values


def _insert(
    mapping: dict, name: str, item: Table | list[str], path: Path, line: int
) -> None:
    if name in mapping:
        raise InputError(f"{path}, line {line}: {name!r} occurs twice")
    mapping[name] = item
