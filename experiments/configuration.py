"""Settings from TOML files with presets, from ``--set KEY=VALUE``, and from JSON.

What an entry may hold follows from its declaration in the settings.
"""

import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin

from jaxrefine import io
from jaxrefine.errors import InputError
from jaxrefine.runs.options import Option, declared

HERE = Path(__file__).resolve().parent

S = TypeVar("S")

_SAME_VOXEL = 0.01  # relative difference of sizes that are given in five digits
_NOT_GIVEN = 1.0  # angstroms: what many programs write for want of a voxel size
_KINDS = {
    bool: ("true or false", (bool,)),
    int: ("a whole number", (int,)),
    float: ("a number", (float, int)),
    str: ("a text", (str,)),
}
"""How each type is called, and what TOML and JSON may give for it."""


def read(
    settings_class: type[S],
    file: Path,
    preset: str,
    overrides: Sequence[str] = (),
    volume: Path | None = None,
) -> S:
    """Return the settings of a file and one of its presets.

    Parameters
    ----------
    settings_class
        The dataclass of options.
    file
        TOML file; a relative path counts from here, or else from ``experiments``.
    preset
        Name of one of its tables ``[preset.NAME]``.
    overrides
        Entries that replace those of the file, ``KEY=VALUE`` in TOML.
    volume
        The true map, which brings its ``size``.

    Raises
    ------
    InputError
        If the file or the map cannot be used, if the map's voxels are of another size
        than the settings' (1 A counts as not given), or if an entry is missing,
        unknown, of another type or out of range.
    """
    path = file if file.exists() else HERE / file
    values = _entries(path, preset)
    names = [each.name for each in declared(settings_class) if each.kind is not Path]
    for name in values:
        if name not in names:
            raise InputError(
                f"Every entry of {path} must be one of {', '.join(names)}, got {name}"
            )
    for override in overrides:
        name, _, text = override.partition("=")
        if name not in names:
            raise InputError(f"--set must name one of {', '.join(names)}, got {name}")
        try:
            values[name] = tomllib.loads(f"value = {text}")["value"]
        except tomllib.TOMLDecodeError as error:
            raise InputError(
                f"--set must be given KEY=VALUE in TOML, got {override}"
            ) from error
    if volume is not None:
        values |= _of_map(volume, values)
    elif "title" in values:
        values["title"] = f"{values['title']} (phantom)"
    return settings_from(settings_class, values, path)


def _entries(path: Path, preset: str) -> dict[str, Any]:
    """Return the entries of a TOML file, with those of a preset."""
    try:
        entries = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise InputError(f"{path.name} does not exist, here or in {HERE}.") from error
    except OSError as error:
        raise InputError(f"Cannot read {path}: {error.strerror}.") from error
    except ValueError as error:
        raise InputError(f"{path} is not a TOML file: {error}.") from error
    presets = entries.pop("preset", {})
    if preset not in presets:
        raise InputError(
            f"--preset must be one of {', '.join(presets)} of {path}, got {preset}"
        )
    return entries | presets[preset]


def _of_map(volume: Path, values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the entries that a true map brings."""
    size = len(io.read_mrc(volume)[0])
    voxel, expected = (
        io.voxel_size_in_angstroms(volume),
        values.get("voxel_size_in_angstroms"),
    )
    if expected and voxel != _NOT_GIVEN and abs(voxel / expected - 1) > _SAME_VOXEL:
        raise InputError(
            f"{volume} must have voxels of {expected:g} A, got {voxel:g} A; --set "
            f"voxel_size_in_angstroms={voxel:g} accepts the map's."
        )
    return {"volume": volume, "size": size}


def settings_from(
    settings_class: type[S], values: Mapping[str, Any], source: Path
) -> S:
    """Return the settings that have these values, checked against the declarations.

    Parameters
    ----------
    settings_class
        The dataclass of options.
    values
        Values by the options' names, as TOML and JSON hold them; others are ignored.
    source
        Where they are from, for the error.

    Raises
    ------
    InputError
        If a value is missing, of another type or out of range.
    """
    options = declared(settings_class)
    missing = [o.name for o in options if o.required and o.name not in values]
    if missing:
        raise InputError(f"{source} lacks {', '.join(missing)}.")
    given = {
        each.name: _value(each, values[each.name])
        for each in options
        if each.name in values
    }
    return settings_class(**given)


def _value(option: Option, value: Any) -> Any:
    """Return a value with the type that is declared, or refuse it."""
    if option.kind is Path:
        return None if value is None else Path(value)
    if get_origin(option.kind) is tuple:
        return _elements(option, value)
    name, types = _KINDS[option.kind]
    if type(value) not in types:
        raise InputError(f"{option.name} must be {name}, got {value!r}")
    value = option.kind(value)
    # In a file an option is written by its name alone.
    replace(option, positional=True, metavar=option.name).check(value)
    return value


def _elements(option: Option, values: Any) -> tuple:
    kinds = get_args(option.kind)
    if not isinstance(values, list | tuple):
        raise InputError(f"{option.name} must be a list, got {values!r}")
    if kinds[-1] is Ellipsis:
        kinds = kinds[:1] * len(values)
    elif len(values) != len(kinds):
        raise InputError(
            f"{option.name} must be a list of {len(kinds)} numbers, got {values}"
        )
    return tuple(
        _value(replace(option, kind=kind), value)
        for kind, value in zip(kinds, values, strict=True)
    )
