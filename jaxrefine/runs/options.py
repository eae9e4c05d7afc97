"""The options of a command, each of them declared once.

The settings of a command are a frozen dataclass whose fields carry the declarations::

    @dataclass(frozen=True, kw_only=True)
    class RefineSettings:
        particles: Path = option(positional=True, help="table of particles")
        max_angle: float | None = option(
            None, unit="degrees", least=0, above=True, most=180, help="largest turn"
        )

The type of a field is its annotation: ``bool``, ``int``, ``float``, ``str`` or
``Path``, each of which may be None, or a word, ``Literal["auto"]``, which the option's
``convert`` then knows. (Settings that no command line gives may also hold
tuples of these, whose entries their reader checks.) From the declarations follow the
parser (:func:`add_options`, :func:`settings_from`), the checks of the values
(:func:`check`), the words that give the same settings again (:func:`words`), the
entries of a run's report (:func:`as_json`) and the table in the documentation
(:func:`markdown_table`). Of what a run depends on, see
:mod:`jaxrefine.runs.fingerprint`.

This module imports neither JAX nor NumPy, so that a command can be described without
the time that they take to load.
"""

import argparse
import math
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields, replace
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, final, get_args, get_origin, get_type_hints

from jaxrefine.errors import InputError
from jaxrefine.runs import entries

_OPTION, _GROUP = "option", "group of options"
_METAVARS = {int: "N", float: "X", Path: "PATH", str: "NAME"}


@final
@dataclass(frozen=True)
class Option:
    """What is said of an option, and all that follows from it.

    Attributes
    ----------
    help
        What it is, as a phrase.
    default
        Its value if it is not given; ``dataclasses.MISSING`` if it must be.
    default_text
        What happens if it is not given, where the value alone does not say so.
    unit
        Of the value, in the plural.
    least, most
        The range of the value. A number without a bound must be finite.
    above
        Whether the value must be more than ``least``, not just at least.
    choices
        The values that it may have.
    excludes
        Names of options that it cannot be given with.
    implies
        A sentence that says what it sets for other options.
    presets
        The values of the option ``preset`` that have this option; empty for all.
    affects_results
        Whether the results depend on it. A path on which they do is an input file, and
        they depend on its content.
    positional
        Whether it is given by its place, without a flag.
    metavar
        What its value is called in the help.
    convert
        What makes the value of its text, where that is not the type.
    name, kind, group, section
        Of the field: its name, its type without None, the field of the settings that
        it is grouped under, and the heading of the group. :func:`declared` sets them.
    """

    help: str
    default: Any = MISSING
    default_text: str = ""
    unit: str = ""
    least: int | float | None = None
    most: int | float | None = None
    above: bool = False
    choices: tuple[str, ...] = ()
    excludes: tuple[str, ...] = ()
    implies: str = ""
    presets: tuple[str, ...] = ()
    affects_results: bool = True
    positional: bool = False
    metavar: str = ""
    convert: Callable[[str], Any] | None = None
    name: str = ""
    kind: Any = str
    group: str = ""
    section: str = ""

    @property
    def flag(self) -> str:
        """How the option is written on the command line."""
        if self.positional:
            return self.metavar
        return f"--{self.name.rstrip('_').replace('_', '-')}"  # class_ is a keyword

    @property
    def required(self) -> bool:
        """Whether it must be given."""
        return self.default is MISSING

    @property
    def range_text(self) -> str:
        """The range of the value in words; empty if it has none."""
        if self.least is not None and self.most is not None and not self.above:
            return f"from {number_text(self.least)} to {number_text(self.most)}"
        bounds = []
        if self.least is not None:
            word = "more than" if self.above else "at least"
            bounds.append(f"{word} {number_text(self.least)}")
        if self.most is not None:
            bounds.append(f"at most {number_text(self.most)}")
        return " and ".join(bounds)

    @property
    def outcome_by_default(self) -> str:
        """What happens if it is not given, in words; empty if nothing does."""
        if self.default_text or self.required:
            return self.default_text
        if self.default is None or self.default is False:
            return ""
        return value_text(self.default)

    def value(self, settings: Any) -> Any:
        """Return the option's value among the settings of a command."""
        owner = getattr(settings, self.group) if self.group else settings
        return getattr(owner, self.name)

    def check(self, value: Any) -> None:
        """Refuse a value that is out of range.

        Raises
        ------
        InputError
            If it is, with the option's flag, its range and the value.
        """
        if value is None or self.kind is bool:
            return
        if self.choices and value not in self.choices:
            raise InputError(
                f"{self.flag} must be one of {', '.join(self.choices)}, got {value}"
            )
        if self.kind not in (int, float):
            return
        unit = f" {self.unit}" if self.unit else ""
        if self.kind is float and not math.isfinite(value):
            of = f" of{unit}" if unit else ""
            raise InputError(f"{self.flag} must be a finite number{of}, got {value}")
        low = self.least is not None and (
            value < self.least or (self.above and value == self.least)
        )
        if low or (self.most is not None and value > self.most):
            raise InputError(
                f"{self.flag} must be {self.range_text}{unit}, got {number_text(value)}"
            )

    def help_text(self) -> str:
        """Return the option's help: what it is, its range, its default, its effects."""
        facts = [f"{self.range_text} {self.unit}".strip()]
        if self.outcome_by_default:
            facts.append(f"default: {self.outcome_by_default}")
        if self.presets:
            facts.append(f"--preset {' or '.join(self.presets)} only")
        told = "; ".join(filter(None, facts))
        told = f"{self.help} ({told})" if told else self.help
        return f"{told}. {self.implies}" if self.implies else told


def option(default: Any = MISSING, *, help: str, **declaration: Any) -> Any:
    """Declare a field of settings as an option; see :class:`Option` for what to say."""
    declared_so = Option(help=help, default=default, **declaration)
    return field(default=default, metadata={_OPTION: declared_so})


def group(
    settings_class: Callable[[], Any], section: str, **changes: Mapping[str, Any]
) -> Any:
    """Declare a field that holds settings of their own, which commands share.

    Parameters
    ----------
    settings_class
        A dataclass of options that all have a default.
    section
        The heading of these options in the help.
    changes
        What is said of an option otherwise here than where it is declared, by its name.
    """
    return field(default_factory=settings_class, metadata={_GROUP: (section, changes)})


def declared(settings_class: type) -> tuple[Option, ...]:
    """Return the options of settings in their order, those of groups in their place."""
    hints, options = get_type_hints(settings_class), []
    for each in fields(settings_class):
        if _GROUP in each.metadata:
            section, changes = each.metadata[_GROUP]
            place = {"group": each.name, "section": section}
            for inner in declared(hints[each.name]):
                options.append(replace(inner, **place, **changes.get(inner.name, {})))
        else:
            kind = _without_none(hints[each.name])
            options.append(replace(each.metadata[_OPTION], name=each.name, kind=kind))
    return tuple(options)


def _without_none(annotation: Any) -> Any:
    """Return the type of a value, without None and single words beside it."""
    if get_origin(annotation) in (UnionType, Union):
        (annotation,) = {
            each
            for each in get_args(annotation)
            if each is not type(None) and get_origin(each) is not Literal
        }
    return annotation


def add_options(parser: argparse.ArgumentParser, settings_class: type) -> None:
    """Add the options of settings to a parser."""
    sections: dict[str, Any] = {"": parser}
    for each in declared(settings_class):
        if each.section not in sections:
            sections[each.section] = parser.add_argument_group(each.section)
        add = sections[each.section].add_argument
        told = each.help_text().replace("%", "%%")
        if each.kind is bool:
            add(each.flag, dest=each.name, action="store_true", help=told)
            continue
        metavar = each.metavar or each.unit.upper() or _METAVARS[each.kind]
        keywords: dict[str, Any] = {"type": each.convert or each.kind, "help": told}
        if not each.positional:
            keywords["dest"] = each.name
        if each.choices:
            keywords["choices"] = each.choices
        else:
            keywords["metavar"] = metavar
        if each.positional:
            add(each.name, **keywords)
        elif each.required:
            add(each.flag, required=True, **keywords)
        else:
            add(each.flag, default=each.default, **keywords)


def with_numbers_joined(arguments: Sequence[str]) -> list[str]:
    """Return the words of a command line, negative numbers joined to their options.

    ``--b-factor -1e6`` becomes ``--b-factor=-1e6``: argparse takes a number with an
    exponent for an option.
    """
    joined: list[str] = []
    for word in arguments:
        follows = bool(joined) and joined[-1].startswith("--") and "=" not in joined[-1]
        if follows and joined[-1] != "--" and _is_negative_number(word):
            joined[-1] += f"={word}"
        else:
            joined.append(word)
    return joined


def _is_negative_number(word: str) -> bool:
    try:
        float(word)
    except ValueError:
        return False
    return word.startswith("-")


def settings_from(settings_class: type, values: Mapping[str, Any]) -> Any:
    """Return the settings that have these values, checked; defaults for the others.

    Parameters
    ----------
    settings_class
        The dataclass.
    values
        Values by the options' names, such as those of a parser's namespace; others are
        ignored.

    Raises
    ------
    InputError
        As :func:`check`.
    """
    settings = _build(settings_class, values)
    check(settings)
    return settings


def _build(settings_class: type, values: Mapping[str, Any]) -> Any:
    hints, chosen = get_type_hints(settings_class), {}
    for each in fields(settings_class):
        if _GROUP in each.metadata:
            chosen[each.name] = _build(hints[each.name], values)
        elif each.name in values:
            chosen[each.name] = values[each.name]
    return settings_class(**chosen)


def check(settings: Any) -> None:
    """Refuse values that are out of range, and options that do not go together.

    Raises
    ------
    InputError
        If a value is out of its range, if the preset does not have an option that is
        given, or if an option is given with another one that it excludes.
    """
    options = declared(type(settings))
    given = {o.name: o for o in options if o.value(settings) != o.default}
    for each in options:
        each.check(each.value(settings))
    for each in given.values():
        if each.presets and settings.preset not in each.presets:
            raise InputError(
                f"{each.flag} must be given with --preset "
                f"{' or '.join(each.presets)}, got --preset {settings.preset}"
            )
        for other in each.excludes:
            if other in given:
                raise InputError(
                    f"{each.flag} must not be given with {given[other].flag}, got both"
                )


def words(settings: Any) -> list[str]:
    """Return the words of a command line that gives these settings, and no defaults."""
    positional, flagged = [], []
    for each in declared(type(settings)):
        value = each.value(settings)
        if each.positional:
            positional.append(str(value))
        elif value is True:
            flagged.append(each.flag)
        elif value != each.default:
            text = value_text(value)
            # A value such as -1e-5 would be taken for an option.
            joined = text.startswith("-")
            flagged += [f"{each.flag}={text}"] if joined else [each.flag, text]
    return positional + flagged


def command_line(command: str, settings: Any) -> str:
    """Return the command line that runs a command with these settings."""
    return shlex.join(["jaxrefine", command, *words(settings)])


def as_json(settings: Any) -> dict[str, Any]:
    """Return the value of every option by its name, as JSON can hold it."""
    options = declared(type(settings))
    return {each.name: entries.as_json(each.value(settings)) for each in options}


def markdown_table(settings_class: type) -> str:
    """Return the options as a Markdown table, for the documentation."""
    rows: list[Sequence[str]] = [
        ("option", "meaning", "unit", "range", "default", "results depend on it"),
        ("---",) * 6,
    ]
    for each in declared(settings_class):
        meaning = each.help
        if each.presets:
            meaning += f" (`--preset` {' or '.join(each.presets)} only)"
        if each.implies:
            meaning += f". {each.implies}"
        default = each.outcome_by_default or ("off" if each.kind is bool else "none")
        rows.append(
            (
                f"`{each.flag}`",
                meaning,
                each.unit,
                ", ".join(f"`{c}`" for c in each.choices) or each.range_text,
                "required" if each.required else default,
                "yes" if each.affects_results else "no",
            )
        )
    lines = (" | ".join(cell.replace("|", r"\|") for cell in row) for row in rows)
    return "\n".join(f"| {line} |" for line in lines) + "\n"


def value_text(value: Any) -> str:
    """Return a value as it is written on the command line."""
    return number_text(value) if isinstance(value, float) else str(value)


def number_text(value: int | float) -> str:
    """Return the shortest text of a number that is read as the same number."""
    short = f"{value:g}"
    return short if float(short) == value else str(value)
