"""What the README and the pages say holds: examples run, names and links exist."""

import ast
import importlib
import pkgutil
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import pytest

import jaxrefine
from jaxrefine import cli, evaluation, io, simulate
from jaxrefine.cli.commands import COMMANDS

ROOT = Path(__file__).resolve().parents[2]
README = ROOT / "README.md"
PAGES = [
    README,
    *(ROOT / name for name in ("CONTRIBUTING.md", "CHANGELOG.md")),
    *(ROOT / name / "README.md" for name in ("experiments", "notebooks")),
    *sorted((ROOT / "docs").glob("*.md")),
]
PACKAGE = ROOT / "jaxrefine"
PARTS = {path.name.removesuffix(".py") for path in PACKAGE.iterdir()}
PROGRAM = {"cli", "report", "runs"}
"""Packages of the command line, which are not attributes of the library."""

# Examples that refine poses; all others take the time of an import.
REFINES = ("jr.refine(", "paper.refine(", "refine_files(")
REFINED = "refined/particles.star"  # a table that an example reads


def named(path: Path) -> str:
    return str(path.relative_to(ROOT))


def examples() -> dict[str, str]:
    """Return the blocks of Python of all pages, each once, by page and place."""
    found: dict[str, str] = {}
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        blocks = re.findall(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
        for place, block in enumerate(blocks, start=1):
            if block not in found.values():
                found[f"{named(page)}:{place}"] = block
    return found


EXAMPLES = examples()


def output_of(example: str, folder: Path | None = None) -> list[str]:
    run = subprocess.run(
        [sys.executable, "-W", "error", "-c", example],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    return run.stdout.splitlines()


def example_with(text: str) -> str:
    (example,) = (block for block in EXAMPLES.values() if text in block)
    return example


@pytest.mark.parametrize(
    "place",
    [
        place
        for place, block in EXAMPLES.items()
        if not any(call in block for call in REFINES) and REFINED not in block
    ],
)
def test_example_runs(place):
    output_of(EXAMPLES[place])


def test_example_leaves_out_images_without_a_particle(tmp_path):
    table = {"rlnImageName": list("abc"), "jaxrefineUndetermined": list("010")}
    (tmp_path / "refined").mkdir()
    io.write_star(tmp_path / REFINED, {"optics": {}, "particles": table})
    output_of(example_with(REFINED), tmp_path)
    kept = io.read_star(tmp_path / "refined/kept.star")["particles"]
    assert kept["rlnImageName"] == ["a", "c"]


@pytest.mark.slow
def test_example_of_the_readme_refines_poses():
    example = example_with("jr.refine(")
    assert example in README.read_text(encoding="utf-8")
    initial, refined, fsc = output_of(example)
    error_of = {
        line.split(": ")[0]: float(line.split(": ")[1].removesuffix(" degrees"))
        for line in (initial, refined)
    }
    assert error_of["refined"] < 0.2 * error_of["initial"]
    assert float(fsc.split(": ")[1]) > 0.75


@pytest.mark.slow
def test_example_of_the_method_refines_poses():
    example = example_with("paper.refine(")
    assert len([line for line in example.splitlines() if line.strip()]) <= 25
    initial, refined, fsc = output_of(example)
    for figure in ("angle_error_in_degrees_median", "shift_error_in_pixels_median"):
        value = rf"'{figure}': ([\d.e-]+)"
        before, after = (
            float(re.findall(value, line)[0]) for line in (initial, refined)
        )
        assert after < 0.5 * before
    assert float(fsc.removeprefix("mean FSC ")) > 0.5


@pytest.mark.slow
def test_example_of_files_refines_them(tmp_path):
    """A small data set: what is written is closer to the truth than what was read."""
    data, out = tmp_path / "data", tmp_path / "out"
    out.mkdir()
    truth = simulate.phantom(jax.random.key(0), 16)
    io.write_mrc(tmp_path / "map.mrc", truth, 4.0)
    words = ["simulate", tmp_path / "map.mrc", "--out", data, "--particles", 64]
    words += ["--snr-db", 6, "--max-shift", 1, "--max-angle-error", 14]
    words += ["--initial-blur", 1]
    assert cli.main([str(word) for word in words]) == 0
    files = ", ".join(repr(str(data / name)) for name in ("particles.star", "init.mrc"))
    call = f"import pathlib\nrefine_files({files}, pathlib.Path({str(out)!r}))\n"
    output_of(f"{example_with('refine_files(')}\n{call}")
    assert io.read_mrc(out / "map.mrc")[0].shape == truth.shape
    true = io.read_poses(data / "truth.star")
    before, after = (
        evaluation.summarise(evaluation.pose_errors(io.read_poses(path), true))
        for path in (data / "init.star", out / "particles.star")
    )
    for figure in ("angle_error_in_degrees_median", "shift_error_in_pixels_median"):
        assert after[figure] < 0.5 * before[figure]


def code_spans(text: str) -> list[str]:
    """Return what single backticks hold, outside of blocks of code."""
    outside = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
    return re.findall(r"`([^`\n]+)`", outside)


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_names_of_the_package_exist(page):
    for span in code_spans(page.read_text(encoding="utf-8")):
        name = span.removeprefix("jaxrefine.")
        parts = name.split(".")
        if re.fullmatch(r"[a-z_]+(\.\w+)+", name) and parts[0] in PARTS:
            assert exists(parts), f"{named(page)}: there is no {name}"


def exists(parts: list[str]) -> bool:
    """Whether there is such a name; of the library, without a further import."""
    if parts[0] in PROGRAM:
        try:
            pkgutil.resolve_name(".".join(["jaxrefine", *parts]))
        except (ImportError, AttributeError):
            return False
        return True
    found: Any = jaxrefine
    for part in parts:
        if not hasattr(found, part):
            return False
        found = getattr(found, part)
    return parts[0] in jaxrefine.__all__


def messages() -> list[str]:
    """Return the texts of the package, with an ellipsis where a value is put in."""
    found = []
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            parts = node.values if isinstance(node, ast.JoinedStr) else [node]
            texts = [
                part.value if isinstance(part, ast.Constant) else "..."
                for part in parts
            ]
            if all(isinstance(text, str) for text in texts):
                found.append("".join(map(str, texts)))
    return found


def test_messages_that_are_quoted_exist():
    """Those of troubleshooting; what is not the program's own is left out by dots."""
    text = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    quoted = [" ".join(each.split()) for each in re.findall(r'\*"([^"]+)"\*', text)]
    assert len(quoted) >= 5
    known = messages()
    for each in quoted:
        pieces = [piece for piece in each.split("...") if piece.strip(" ()")]
        assert any(in_order(pieces, message) for message in known), each


def in_order(pieces: list[str], text: str) -> bool:
    """Whether a text has these pieces, one after another."""
    return re.search(".*".join(map(re.escape, pieces)), text) is not None


def test_the_table_of_equations_has_every_part_of_the_method():
    text = (ROOT / "docs" / "method.md").read_text(encoding="utf-8")
    table = text.split("## Where each equation is")[1].split("\n## ")[0]
    named_there = [span for span in code_spans(table) if "." in span]
    assert len(named_there) > 25
    for number in ("(2)", "(3)", "(5)", "(31)", "(33)", "(34)", "Theorem 1"):
        assert number in table


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_links_lead_somewhere(page):
    for target in links(page.read_text(encoding="utf-8")):
        file, _, anchor = target.partition("#")
        path = page.parent / file if file else page
        if path.parent == ROOT / "docs" / "notebooks":  # copied there by the build
            path = ROOT / "notebooks" / path.name
        if path.parent == ROOT / "docs" / "api":  # made there by the build
            path = PACKAGE / path.stem.replace("index", ".")
        assert path.exists(), f"{named(page)}: {target}"
        if anchor and path.suffix == ".md":
            assert anchor in anchors(path), f"{named(page)}: {target}"


def links(text: str) -> list[str]:
    """Return the targets of the links that stay in the repository."""
    outside = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
    targets = re.findall(r"\]\(([^)\s]+)\)", outside)
    return [each for each in targets if not re.match(r"https?:", each)]


def anchors(path: Path) -> set[str]:
    """Return the anchors of a page: those of its headings, and labels."""
    text = path.read_text(encoding="utf-8")
    found = set(re.findall(r"^\(([\w-]+)\)=$", text, re.MULTILINE))
    count: dict[str, int] = {}
    for heading in re.findall(r"^#+ (.+)$", text, re.MULTILINE):
        slug = re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
        found.add(f"{slug}-{count[slug]}" if slug in count else slug)
        count[slug] = count.get(slug, 0) + 1
    if path == ROOT / "docs" / "command-line.md":  # sections made by the build
        found |= {f"jaxrefine-{command.name}" for command in COMMANDS}
    return found


def test_readme_is_short():
    assert len(README.read_text(encoding="utf-8").splitlines()) <= 150


@pytest.mark.parametrize("command", ["jaxrefine demo --out demo", "pytest"])
def test_readme_has_the_commands_of_the_set_up(command):
    line = rf'^pip install -e "\.\[test\]" && {command}\b'
    assert len(re.findall(line, README.read_text(encoding="utf-8"), re.MULTILINE)) == 1


@pytest.fixture
def benchmarks(monkeypatch):
    """The driver of the benchmarks."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return importlib.import_module("run")


def tables(text: str) -> list[list[list[str]]]:
    """Return the cells of the tables of a text, the header first, without the rule."""
    blocks = re.findall(r"(?:^\|.*\|\n)+", text, re.MULTILINE)
    cells = [
        [re.split(r" *\| *", line.strip("| ")) for line in block.splitlines()]
        for block in blocks
    ]
    return [[header, *rows] for header, _, *rows in cells]


def figures_by_case(text: str) -> dict[str, dict[str, str]]:
    """Return the cells of tables, by the case in their first cell and their heading."""
    found: dict[str, dict[str, str]] = {}
    for header, *rows in tables(text):
        for row in rows:
            case = re.findall(r"`([^`]+)`", row[0])[-1]
            found.setdefault(case, {}).update(zip(header, row, strict=False))
    return found


def test_the_results_of_the_readme_are_those_that_are_stored(benchmarks):
    section = README.read_text(encoding="utf-8").split("\n## Results\n")[1]
    told = figures_by_case(section.split("\n## ")[0])
    stored = figures_by_case(benchmarks.table("refinement"))
    assert len(told) >= 5
    for case, figures in told.items():
        assert figures.items() <= stored[case].items()
        assert float(figures["joint"]) > float(figures["RELION, true poses"])


def test_pages_show_the_figures_that_are_stored(benchmarks, monkeypatch):
    pytest.importorskip("sphinx", reason="the pages are made by Sphinx")
    monkeypatch.syspath_prepend(ROOT / "docs" / "extensions")
    extension = importlib.import_module("measurements")
    stored = {path.stem for path in (ROOT / "benchmarks" / "results").glob("*.json")}
    shown = set()
    for page in (ROOT / "docs").glob("*.md"):
        read: list[str] = []
        app = SimpleNamespace(env=SimpleNamespace(note_dependency=read.append))
        source = [page.read_text(encoding="utf-8")]
        extension.insert(app, page.stem, source)
        assert "<!-- benchmark" not in source[0]
        for path in map(Path, read):
            assert benchmarks.table(path.stem) in source[0]
            shown.add(path.stem)
    assert stored <= shown <= benchmarks.NAMES.keys()


@pytest.mark.parametrize("page", ["README.md", "docs/command-line.md"])
def test_every_command_is_in_the_table(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    for command in COMMANDS:
        assert re.search(rf"^\| \[?`jaxrefine {command.name}\b", text, re.MULTILINE)


def test_the_drawing_of_the_house_has_every_package():
    drawing = (ROOT / "docs" / "images" / "house.svg").read_text(encoding="utf-8")
    bold = re.findall(r'font-weight="bold">([^<]+)<', drawing)
    rooms = set(", ".join(bold).split(", "))
    for part in PARTS:
        if not part.startswith("_") or part == "_types":
            assert part in rooms or part in ("py.typed",), part
