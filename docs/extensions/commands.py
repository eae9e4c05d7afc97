"""The options of every command, from the declarations that its parser is made of."""

import re
from typing import Any

from sphinx.application import Sphinx

from jaxrefine.cli.commands import COMMANDS
from jaxrefine.runs.options import markdown_table

PAGE = "command-line"
MARK = "<!-- every command, with its options -->"


def insert(app: Sphinx, page: str, source: list[str]) -> None:
    """Put the commands in the place that the page has for them."""
    if page == PAGE:
        before, after = source[0].split(MARK)
        source[0] = before + "\n".join(sections()) + after


def sections() -> list[str]:
    """Return a section for each command, in Markdown."""
    return [
        f"## jaxrefine {each.name}\n\n"
        + as_code(f"{sentence(each.summary)} {each.description}\n\n")
        + as_code(markdown_table(each.settings))
        for each in COMMANDS
    ]


def as_code(text: str) -> str:
    """Return a text with its options in backticks."""
    return re.sub(r"(?<![\w`-])--[a-z][a-z-]*", r"`\g<0>`", text)


def sentence(text: str) -> str:
    """Return a phrase as a sentence."""
    return text[:1].upper() + text[1:].rstrip(".") + "."


def setup(app: Sphinx) -> dict[str, Any]:
    """Register what reads the sources."""
    app.connect("source-read", insert)
    return {"parallel_read_safe": True}
