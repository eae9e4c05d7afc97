"""Tables in the STAR format.

This is RELION's dialect: a row is one line, and a block holds one table. Names of
columns are used here without their leading underscore, names of blocks without their
leading ``data_``.
"""

import re
import reprlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Array

from jaxrefine.errors import InputError
from jaxrefine.io.atomic import atomic_path, existing_file

Table = dict[str, list[str]]
"""The values of each column by its name; all columns have the same length."""


class Pairs(Table):
    """A table of one row that its file holds as name-value pairs, not as a loop.

    An empty block is also read as `Pairs`, without columns.
    """


Values = Sequence[Any] | Array | np.ndarray
"""The values of a column to write: strings, or objects that ``str`` converts."""

_VALUE = re.compile(
    r"""\"(.*?)(?<!\a)\"(?=\s|$)|'(.*?)(?<!\a)'(?=\s|$)|(\S+)""", re.ASCII
)
_NEEDS_QUOTES = re.compile(r"""^$|[\s\0\ud800-\udfff]|^(?:["'_#;]|data_|loop_)""")
_UNWRITABLE = re.compile(r"[\0\a\r\n\ud800-\udfff]")  # not even within quotes
_NOT_IN_NAMES = re.compile(r"[\s\x1c-\x1f\0\ud800-\udfff]", re.ASCII)


def read_star(path: str | Path) -> dict[str, Table]:
    """Read every block of a STAR file.

    A block of name-value pairs becomes a table of one row, of type `Pairs`; an empty
    loop becomes a table whose columns are empty. Values remain strings, without their
    quotes; `write_star` writes them back unchanged, but comments are lost. In a loop of
    two columns the second value may be missing, as in RELION, and is then empty. A
    block of pairs followed by a loop is an error; RELION itself reads only its pairs.

    Raises
    ------
    InputError
        If the file is missing or is not a STAR file, if a row has too few or too many
        values, or if a block or a column occurs twice.
    """
    path = existing_file(path)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise InputError(f"{path} is not a STAR file: it is not text") from None
    if "\0" in text:
        raise InputError(f"{path} is not a STAR file: it is not text")

    blocks: dict[str, Table] = {}
    name, table = "", None
    in_loop = False
    for number, line in enumerate(text.split("\n"), start=1):
        values = _values(line)
        if not values:
            continue
        where = f"{path}, line {number}"
        first = "" if line.lstrip().startswith(("'", '"')) else values[0]
        alone = len(values) == 1
        if alone and first.startswith("data_"):
            name, table, in_loop = first.removeprefix("data_"), Pairs(), False
            _insert(blocks, name, table, where)
        elif table is None:
            raise InputError(
                f"{where}: this is not a STAR file, because it does not begin with a "
                "data_ block"
            )
        elif alone and first == "loop_":
            if table or in_loop:
                raise InputError(
                    f"{where}: a block must hold one table, got a second one"
                )
            table, in_loop = {}, True
            blocks[name] = table
        elif in_loop and alone and first.startswith("_") and not any(table.values()):
            _insert(table, first[1:], [], where)
        elif in_loop:
            if alone and len(table) == 2:
                values = [*values, ""]
            if len(values) != len(table):
                raise InputError(
                    f"{where}: the row must have {len(table)} values, one for each "
                    f"column, got {len(values)}"
                )
            for column, value in zip(table.values(), values, strict=True):
                column.append(value)
        elif len(values) == 2 and first.startswith("_"):
            _insert(table, first[1:], [values[1]], where)
        else:
            raise InputError(
                f"{where}: the line must be loop_, or a name and a value, got "
                f"{reprlib.repr(line.strip())}"
            )
    if not blocks:
        raise InputError(f"{path} is not a STAR file: it has no data_ block")
    return blocks


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
        temporary.write_text("\n".join(lines) + "\n", encoding="utf-8")


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

    A quote after a BEL does not close a value, and the BEL is not part of the value.
    """
    if line.isascii() and not any(character in line for character in "\"'#"):
        return line.split()
    values = []
    for match in _VALUE.finditer(line):
        if match[0].startswith("#"):
            break
        value = match[match.lastindex or 0]
        values.append(value if match.lastindex == 3 else value.replace("\a", ""))
    return values


def _insert(mapping: dict, name: str, item: Table | list[str], where: str) -> None:
    if name in mapping:
        raise InputError(f"{where}: {name!r} occurs twice")
    mapping[name] = item
