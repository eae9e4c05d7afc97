"""The figures of the pages are those that the experiments have stored."""

import importlib
import itertools
import re
from pathlib import Path
from types import ModuleType

import pytest

from jaxrefine.errors import InputError

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]

RUNS = {
    "hjc": "hjc_init1_small",
    "ptch1": "ptch1_init1_small",
    "hjc_cpu": "hjc_init1_cpu",
    "ptch1_cpu": "ptch1_init1_cpu",
    "released": "hjc_released_small",
    "ptch1_released": "ptch1_released_small",
    "init2": "hjc_init2_small",
    "literal": "hjc_init2_small_literal",
    "ablation_low": "hjc_ablation_low_small",
    "constants": "hjc_constants_small",
    "constants_high": "hjc_constants_high_small",
    "ptch1_constants": "ptch1_constants_small",
}
"""Names, in the sentences below, of folders of ``experiments/results``."""

MERITS = {
    "fsc": "mean_fsc",
    "aligned": "mean_fsc_aligned",
    "within": "fraction_within_10_degrees",
    "angle": "angle_error_in_degrees_median",
    "shift": "shift_error_in_pixels_median",
    "rc": "rc",
}
"""Names of figures of merit in these sentences."""

SENTENCES = {
    "docs/experiments.md": [
        # the figures, 5, 6, 11 and 12
        "medians of {hjc_cpu[joint][angle]:.1f} and {ptch1_cpu[joint][angle]:.1f} "
        "degrees at `cpu` (the paper's algorithm {hjc_cpu[joint (paper)][angle]:.1f} "
        "and {ptch1_cpu[joint (paper)][angle]:.1f}), {hjc[joint][angle]:.1f} and "
        "{ptch1[joint][angle]:.1f} at `small` (the paper's algorithm "
        "{hjc[joint (paper)][angle]:.1f} and {ptch1[joint (paper)][angle]:.1f})",
        "medians of {hjc_cpu[joint][shift]:.2f} and {ptch1_cpu[joint][shift]:.2f} "
        "pixels at `cpu` (the paper's algorithm {hjc_cpu[joint (paper)][shift]:.2f} "
        "and {ptch1_cpu[joint (paper)][shift]:.2f}), {hjc[joint][shift]:.2f} and "
        "{ptch1[joint][shift]:.2f} at `small` (the paper's algorithm "
        "{hjc[joint (paper)][shift]:.2f} and {ptch1[joint (paper)][shift]:.2f})",
        "at `small`, medians of {init2[joint][angle]:.1f} degrees (matched first "
        "{init2[joint, matched first][angle]:.1f}) and "
        "{init2[RELION auto-refine][angle]:.1f}",
        "at `small`, medians of {init2[joint][shift]:.2f} pixels (matched first "
        "{init2[joint, matched first][shift]:.2f}) and "
        "{init2[RELION auto-refine][shift]:.2f}",
        # Init-1: what the paper shows, and what we measure
        "The paper's algorithm: {hjc[joint (paper)][fsc]:.3f} of "
        "{hjc[oracle (paper)][fsc]:.3f} and {ptch1[joint (paper)][fsc]:.3f} of "
        "{ptch1[oracle (paper)][fsc]:.3f} at `small`, with "
        "{hjc[joint (paper)][within]:.0%} and {ptch1[joint (paper)][within]:.0%} of "
        "the particles within 10 degrees, from ±40 degrees at -5 dB, and "
        "{hjc_cpu[joint (paper)][fsc]:.3f} of {hjc_cpu[oracle (paper)][fsc]:.3f} and "
        "{ptch1_cpu[joint (paper)][fsc]:.3f} of {ptch1_cpu[oracle (paper)][fsc]:.3f}, "
        "with {hjc_cpu[joint (paper)][within]:.0%} and "
        "{ptch1_cpu[joint (paper)][within]:.0%}, at `cpu`; a descent in the *true* map "
        "gets {hjc[descent in the true map][within]:.0%} and "
        "{ptch1[descent in the true map][within]:.0%} at `small`.",
        "{hjc[joint][fsc]:.3f} of {hjc[oracle][fsc]:.3f} and {ptch1[joint][fsc]:.3f} "
        "of {ptch1[oracle][fsc]:.3f}, with {hjc[joint][within]:.0%} and "
        "{ptch1[joint][within]:.0%}, and at `cpu` {hjc_cpu[joint][fsc]:.3f} of "
        "{hjc_cpu[oracle][fsc]:.3f} and {ptch1_cpu[joint][fsc]:.3f} of "
        "{ptch1_cpu[oracle][fsc]:.3f}.",
        "for little noise, it gets to {hjc[joint (released)][angle]:.0f} degrees",
        "| unrefined poses fail (Fig. 3c) | {ptch1_cpu[unrefined (paper)][fsc]:.2f} to "
        "{hjc[unrefined][aligned]:.2f} |",
        "aligned, {hjc[joint (paper)][aligned]:.3f} (the engine "
        "{hjc[joint][aligned]:.3f}) against {hjc[RELION auto-refine][aligned]:.3f}, "
        "and {ptch1[joint (paper)][aligned]:.3f} ({ptch1[joint][aligned]:.3f}) against "
        "{ptch1[RELION auto-refine][aligned]:.3f} "
        "({hjc[RELION auto-refine, post-processed][aligned]:.3f} and "
        "{ptch1[RELION auto-refine, post-processed][aligned]:.3f} after "
        "post-processing).",
        "from have {hjc[RELION, local searches][aligned]:.3f} and "
        "{ptch1[RELION, local searches][aligned]:.3f}, with "
        "{hjc[RELION, local searches][within]:.1%} and "
        "{ptch1[RELION, local searches][within]:.1%} within 10 degrees "
        "({hjc[RELION, local searches, post-processed][aligned]:.3f} and "
        "{ptch1[RELION, local searches, post-processed][aligned]:.3f} after "
        "post-processing).",
        "{hjc[RELION auto-refine][within]:.0%} and "
        "{ptch1[RELION auto-refine][within]:.0%} of the particles end within 10 "
        "degrees",
        "to {hjc[joint (paper)][rc]:.1f} and {ptch1[joint (paper)][rc]:.1f} shells at "
        "`small` and {hjc_cpu[joint (paper)][rc]:.1f} and "
        "{ptch1_cpu[joint (paper)][rc]:.1f} at `cpu`, where its oracle ends at "
        "{hjc[oracle (paper)][rc]:.1f} and {ptch1[oracle (paper)][rc]:.1f}, "
        "{hjc_cpu[oracle (paper)][rc]:.1f} and {ptch1_cpu[oracle (paper)][rc]:.1f};",
        "the paper's reconstruction from true poses {hjc[oracle (paper)][fsc]:.3f} and "
        "{ptch1[oracle (paper)][fsc]:.3f}, where the engine's, with TV's weight by "
        "cross-validation, has {hjc[oracle][fsc]:.3f} and {ptch1[oracle][fsc]:.3f}; at "
        "`cpu`, with more particles, {hjc_cpu[oracle (paper)][fsc]:.3f} and "
        "{ptch1_cpu[oracle (paper)][fsc]:.3f} where the engine's has "
        "{hjc_cpu[oracle][fsc]:.3f} and {ptch1_cpu[oracle][fsc]:.3f} |",
        # Init-2
        "{literal[joint][fsc]:.3f} where the oracle has {literal[oracle][fsc]:.3f}.",
        "aligned, {init2[joint][aligned]:.3f} (matched first "
        "{init2[joint, matched first][aligned]:.3f}) against "
        "{init2[RELION auto-refine][aligned]:.3f}, and after post-processing "
        "{init2[joint, post-processed][aligned]:.3f} "
        "({init2[joint, matched first, post-processed][aligned]:.3f}) against "
        "{init2[RELION auto-refine, post-processed][aligned]:.3f} |",
        "medians of {init2[joint][angle]:.1f} degrees and {init2[joint][shift]:.2f} "
        "pixels (matched first {init2[joint, matched first][angle]:.1f} and "
        "{init2[joint, matched first][shift]:.2f}) against "
        "{init2[RELION auto-refine][angle]:.1f} and "
        "{init2[RELION auto-refine][shift]:.2f}; but {init2[joint][within]:.0%} "
        "({init2[joint, matched first][within]:.1%}) of the particles are within 10 "
        "degrees, and {init2[RELION auto-refine][within]:.0%} of RELION's",
        # ablation and constants
        "holds well: {ablation_low[joint (paper)][within]:.0%} within 10 degrees and "
        "{ablation_low[joint (paper)][aligned]:.3f}, where the engine has "
        "{ablation_low[joint][within]:.0%} and {ablation_low[joint][aligned]:.3f}. On "
        "slices it has {ablation_low[on slices][within]:.0%} and "
        "{ablation_low[on slices][aligned]:.3f}",
        "{constants[volume first][fsc]:.3f} as they stand, and "
        "{constants[volume first][aligned]:.3f} when that rigid motion is undone.",
        "({constants_high[volume first][fsc]:.3f} instead of "
        "{constants_high[joint (paper)][fsc]:.3f})",
        "{constants_high[lambda constant][aligned]:.3f} aligned instead of "
        "{constants_high[joint (paper)][aligned]:.3f}.",
        "a median of {ptch1_constants[joint (paper)][angle]:.2f} degrees, "
        "{ptch1_constants[joint (paper)][within]:.1%} within 10, mean FSC "
        "{ptch1_constants[joint (paper)][fsc]:.3f} of "
        "{ptch1_constants[oracle (paper)][fsc]:.3f} as the maps stand "
        "({ptch1_constants[joint (paper)][aligned]:.3f} of "
        "{ptch1_constants[oracle (paper)][aligned]:.3f} aligned).",
    ],
    "docs/method.md": [
        "aligned, {released[joint (paper)][aligned]:.3f} and "
        "{ptch1_released[joint (paper)][aligned]:.3f} of the "
        "{released[oracle (paper)][aligned]:.3f} and "
        "{ptch1_released[oracle (paper)][aligned]:.3f} that",
    ],
}
"""Sentences with figures, and where these are stored, as "{run[method][merit]}"."""


@pytest.fixture
def pages(monkeypatch) -> ModuleType:
    """What makes the tables of the pages."""
    monkeypatch.syspath_prepend(ROOT / "experiments")
    return importlib.import_module("pages")


def changed(text: str) -> str:
    """Return a text whose figures are off by one in their last digit."""
    return re.sub(r"\d(?![\d.]*\d)", lambda digit: str((int(digit[0]) + 1) % 10), text)


def test_tables_have_the_figures_that_are_stored(pages):
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        assert pages.updated(text) == text, (
            f"make tables brings {page.name} up to date; its words may need it, too"
        )


def test_no_figure_of_a_table_can_be_off_by_one(pages):
    """All are changed; one that stayed as it is would not be told from a stored one."""

    def spoil(table: re.Match[str]) -> str:
        head, rule, *rows = table[4].splitlines(keepends=True)
        wrong = [
            re.sub(r"(?<=.\|).*", lambda cells: changed(cells[0]), r) for r in rows
        ]
        assert not set(wrong) & set(rows)
        spoilt.extend(wrong)
        return "".join([table[1], head, rule, *wrong])

    spoilt: list[str] = []
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        assert pages.updated(pages.TABLE.sub(spoil, text)) == text
    assert len(spoilt) > 80


def test_tables_of_these_figures_say_what_they_are_made_of(pages):
    """A table with such a heading, whose line above is gone or misspelt, is found."""
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        rest = pages.TABLE.sub("", text)
        for line in re.findall(r"^\|.*\|$", rest, re.MULTILINE):
            cells = {cell.strip() for cell in line.split("|")}
            ours = {*pages.COMPARISON, *pages.SWEEP} - {"mean FSC"}
            assert not cells & ours, f"{page.name}: {line}"


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ("| method | aligned |\n|---|---|\n| joined | 0.1 |\n", "got joined"),
        ("| method | FSC |\n|---|---|\n| joint | 0.1 |\n", "got FSC"),
        ("| method | aligned |\n|---|---|\n| joint |\n", "must have 2 cells"),
        ("\n| method | aligned |\n|---|---|\n| joint | 0.1 |\n", "must follow"),
    ],
)
def test_a_table_that_cannot_be_made_is_refused(pages, table, message):
    with pytest.raises(InputError, match=message):
        pages.updated(f"<!-- results: hjc_init1_small -->\n{table}")


def test_columns_of_words_and_empty_cells_stay(pages):
    head = "<!-- results: hjc_init1_small -->\n| method | aligned | remark |\n"
    rows = (
        "|---|---|---|\n| joint: ours | {} | good |\n| oracle |  | from true poses |\n"
    )
    stored = pages.results("hjc_init1_small")["joint"]["mean_fsc_aligned"]
    updated = pages.updated(head + rows.format("?"))
    assert updated == head + rows.format(f"{stored:.3f}")


def words(text: str) -> str:
    """Return a text without its line breaks, percentages as Python writes them."""
    return " ".join(text.split()).replace(" %", "%")


def stored_in(pages: ModuleType) -> dict[str, dict[str, dict[str, float]]]:
    return {
        name: {
            method: {short: entry[merit] for short, merit in MERITS.items()}
            for method, entry in pages.results(run).items()
        }
        for name, run in RUNS.items()
    }


@pytest.mark.parametrize("page", SENTENCES)
def test_sentences_have_the_figures_that_are_stored(pages, page):
    text, stored = words((ROOT / page).read_text(encoding="utf-8")), stored_in(pages)
    for sentence in SENTENCES[page]:
        now = sentence.format(**stored)
        assert now in text, f"{page} must say: {now}"


def test_no_figure_of_a_sentence_is_typed_in():
    for sentence in itertools.chain(*SENTENCES.values()):
        rest = re.sub(r"\{.*?\}", "", sentence)
        assert not re.findall(r"\d\.\d|\d%", rest), sentence


@pytest.mark.parametrize("page", SENTENCES)
def test_no_figure_of_a_sentence_can_be_off_by_one(pages, page):
    text, stored = words((ROOT / page).read_text(encoding="utf-8")), stored_in(pages)
    for sentence in SENTENCES[page]:
        now = sentence.format(**stored)
        assert now not in text.replace(now, changed(now)), f"twice in {page}: {now}"
