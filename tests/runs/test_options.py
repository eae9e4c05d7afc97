"""Options: all that follows from a declaration follows from it."""

import argparse
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest

from jaxrefine.errors import InputError
from jaxrefine.runs import options
from jaxrefine.runs.options import group, option


@dataclass(frozen=True, kw_only=True)
class Shared:
    invert: bool = option(False, help="protein is dark")
    diameter: float | None = option(
        None, unit="angstroms", least=0, above=True, help="of the particle"
    )


@dataclass(frozen=True, kw_only=True)
class Settings:
    map: Path = option(positional=True, metavar="MAP.mrc", help="the map")
    out: Path = option(affects_results=False, help="folder to write to")
    max_angle: float | None = option(
        None,
        unit="degrees",
        least=0,
        above=True,
        most=180,
        excludes=("fix_angles",),
        presets=("default",),
        default_text="no limit",
        implies="Sets --spread to half of it.",
        help="largest turn | 100 % of it",
    )
    fix_angles: bool = option(False, help="keep the angles")
    count: int = option(3, least=1, help="how many")
    b_factor: float | None = option(None, help="of the map")
    share: float = option(0.5, least=0, most=1, help="how much")
    preset: str = option("default", choices=("default", "paper"), help="which")
    symmetry: str = option("C1", convert=str.upper, help="point group")
    shared: Shared = group(Shared, "images")


def parse(*words):
    parser = argparse.ArgumentParser()
    options.add_options(parser, Settings)
    namespace = parser.parse_args(["a.mrc", "--out", "out", *words])
    return options.settings_from(Settings, vars(namespace))


def test_a_parser_gives_typed_settings():
    plain = parse()
    assert plain == Settings(map=Path("a.mrc"), out=Path("out"))
    words = ["--max-angle", "30", "--count", "7", "--invert", "--diameter", "1.5"]
    given = parse(*words, "--symmetry", "d7")
    assert given == Settings(
        map=Path("a.mrc"),
        out=Path("out"),
        max_angle=30.0,
        count=7,
        symmetry="D7",
        shared=Shared(invert=True, diameter=1.5),
    )
    assert type(given.count) is int and type(given.max_angle) is float


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"max_angle": 1 / 3, "count": 10**12},
        {"b_factor": -1e-5, "shared": Shared(invert=True, diameter=200.0)},
        {"b_factor": -50.0, "preset": "paper", "fix_angles": True, "symmetry": "O"},
    ],
)
def test_words_give_the_same_settings_again(given):
    settings = Settings(map=Path("my map.mrc"), out=Path("a b"), **given)
    parser = argparse.ArgumentParser()
    options.add_options(parser, Settings)
    again = parser.parse_args(options.words(settings))
    assert options.settings_from(Settings, vars(again)) == settings


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        (
            {"max_angle": 181.0},
            "--max-angle must be more than 0 and at most 180 degrees, got 181",
        ),
        (
            {"max_angle": 0.0},
            "--max-angle must be more than 0 and at most 180 degrees, got 0",
        ),
        (
            {"max_angle": math.nan},
            "--max-angle must be a finite number of degrees, got nan",
        ),
        ({"b_factor": -math.inf}, "--b-factor must be a finite number, got -inf"),
        ({"count": 0}, "--count must be at least 1, got 0"),
        (
            {"shared": Shared(diameter=-1.0)},
            "--diameter must be more than 0 angstroms, got -1",
        ),
        ({"preset": "other"}, "--preset must be one of default, paper, got other"),
        (
            {"max_angle": 3.0, "preset": "paper"},
            "--max-angle must be given with --preset default, got --preset paper",
        ),
        (
            {"max_angle": 3.0, "fix_angles": True},
            "--max-angle must not be given with --fix-angles, got both",
        ),
    ],
)
def test_bad_values_are_one_sentence(given, sentence):
    settings = Settings(map=Path("a.mrc"), out=Path("out"), **given)
    with pytest.raises(InputError) as caught:
        options.check(settings)
    assert str(caught.value) == sentence


def test_bounds_are_in_the_range_or_not_as_declared():
    for words in (["--max-angle", "180"], ["--max-angle", "1e-9"], ["--count", "1"]):
        parse(*words)


@pytest.mark.parametrize(
    ("given", "joined"),
    [
        (["--b-factor", "-1e6", "a.mrc"], ["--b-factor=-1e6", "a.mrc"]),
        (["--b-factor", "-.5", "--count", "3"], ["--b-factor=-.5", "--count", "3"]),
        (["--b-factor", "-inf"], ["--b-factor=-inf"]),
        (["--b-factor=-1e6", "-2"], ["--b-factor=-1e6", "-2"]),
        (["a.mrc", "-1e6", "--", "-2"], ["a.mrc", "-1e6", "--", "-2"]),
        (["--b-factor", "1e6", "--fix-angles", "-o"],) * 2,
    ],
)
def test_negative_numbers_are_not_taken_for_options(given, joined):
    assert options.with_numbers_joined(given) == joined


def test_a_word_may_stand_beside_a_type():
    """Its option's conversion knows it; a file of this name has a folder before it."""

    def convert(text):
        return "auto" if text == "auto" else Path(text)

    @dataclass(frozen=True, kw_only=True)
    class Masked:
        mask: Path | Literal["auto"] | None = option(None, convert=convert, help="it")

    (declared,) = options.declared(Masked)
    assert declared.kind is Path
    parser = argparse.ArgumentParser()
    options.add_options(parser, Masked)
    for words, value in (([], None), (["--mask", "auto"], "auto")):
        settings = options.settings_from(Masked, vars(parser.parse_args(words)))
        assert settings.mask == value and options.words(settings) == words
    given = vars(parser.parse_args(["--mask", "./auto"]))
    assert options.settings_from(Masked, given).mask == Path("auto")


def test_the_help_says_units_defaults_and_effects():
    parser = argparse.ArgumentParser(prog="program")
    options.add_options(parser, Settings)
    text = " ".join(parser.format_help().split())
    for told in (
        "--max-angle DEGREES largest turn | 100 % of it (more than 0 and at most 180 "
        "degrees; default: no limit; --preset default only). "
        "Sets --spread to half of it.",
        "--count N how many (at least 1; default: 3)",
        "--preset {default,paper} which (default: default)",
        "images: --invert protein is dark",
        "--diameter ANGSTROMS of the particle (more than 0 angstroms)",
        "--share X how much (from 0 to 1; default: 0.5)",
    ):
        assert told in text, text


def test_the_table_has_a_row_for_each_option():
    table = options.markdown_table(Settings)
    head, line, *rows = table.splitlines()
    assert head.count("|") == line.count("|")
    assert [row.split("`")[1] for row in rows] == [
        *("MAP.mrc", "--out", "--max-angle", "--fix-angles", "--count", "--b-factor"),
        "--share",
        *("--preset", "--symmetry", "--invert", "--diameter"),
    ]
    assert rows[2] == (
        r"| `--max-angle` | largest turn \| 100 % of it (`--preset` default only). "
        "Sets --spread to half of it. | degrees | more than 0 and at most 180 | "
        "no limit | yes |"
    )
    assert rows[0].endswith("| required | yes |")
    assert rows[1].endswith("| required | no |")
    assert rows[3].endswith("| off | yes |") and "| 3 |" in rows[4]
    assert "| from 0 to 1 | 0.5 |" in rows[6]
    assert "| `default`, `paper` | default |" in rows[7]


def test_settings_as_json():
    values = options.as_json(parse("--count", "5", "--invert"))
    assert values == {
        "map": "a.mrc",
        "out": "out",
        "max_angle": None,
        "fix_angles": False,
        "count": 5,
        "b_factor": None,
        "share": 0.5,
        "preset": "default",
        "symmetry": "C1",
        "invert": True,
        "diameter": None,
    }
