"""Values as the report of a run holds them, in the types that JSON has.

Like :mod:`jaxrefine.runs.options`, this module imports neither JAX nor NumPy.
"""

from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, get_type_hints


def as_json(value: Any, declared: Any = None) -> Any:
    """Return a value as JSON can hold it.

    A dataclass becomes an object of its fields, whatever their depth; an array becomes
    a list, or a number if it has no axes; a path becomes its text. Other values stay as
    they are.

    Parameters
    ----------
    value
        For instance the parameters of an engine.
    declared
        The type that it is known to have. The object of a dataclass of another type
        begins with ``"class"``, the name of its type, without which a reader could not
        tell which it is.
    """
    if isinstance(value, tuple | list):
        return [as_json(each) for each in value]
    if isinstance(value, Path):
        return str(value)
    if hasattr(value, "tolist"):
        return value.tolist()
    if not is_dataclass(value):
        return value
    kind = type(value)
    name = {} if declared is kind else {"class": kind.__name__}
    hints = get_type_hints(kind)
    return name | {
        each.name: as_json(getattr(value, each.name), hints[each.name])
        for each in fields(value)
    }
