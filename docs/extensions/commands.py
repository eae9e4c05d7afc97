"""The options of every command, from the declarations that its parser is made of."""

import argparse
from typing import Any

from sphinx.application import Sphinx

PAGE = "command-line"
MARK = "<!-- every command, with its options -->"


def insert(app: Sphinx, page: str, source: list[str]) -> None:
    """Put the commands in the place that the page has for them."""
    if page == PAGE:
        before, after = source[0].split(MARK)
        source[0] = before + "\n".join(sections()) + after


def sections() -> list[str]:
    """Return a section for each command, in Markdown."""
    try:
        from jaxrefine.cli.commands import COMMANDS
        from jaxrefine.runs.options import markdown_table
    except ImportError:
        return sections_of_parser()
    return [
        f"## jaxrefine {each.name}\n\n{sentence(each.summary)}\n\n"
        f"{each.description}\n\n{markdown_table(each.settings)}"
        for each in COMMANDS
    ]


def sections_of_parser() -> list[str]:
    """Return the sections from argparse's help, until options are declared."""
    from jaxrefine.cli import _parser

    (commands,) = (
        action
        for action in _parser()._actions
        if isinstance(action, argparse._SubParsersAction)
    )
    summaries = {each.dest: each.help for each in commands._choices_actions}
    parts = []
    for name, parser in commands.choices.items():
        rows = [row(each) for each in parser._actions if each.dest != "help"]
        parts.append(
            f"## jaxrefine {name}\n\n{sentence(summaries[name] or '')}\n\n"
            f"{parser.description or ''}\n\n"
            "| option | meaning | default |\n|---|---|---|\n" + "\n".join(rows) + "\n"
        )
    return parts


def row(action: Any) -> str:
    """Return an option of argparse as a row of a table."""
    name = " ".join(action.option_strings) or action.metavar or action.dest
    default = "" if action.default in (None, False) else action.default
    if action.required:
        default = "required"
    text = (action.help or "").replace("|", "\\|")
    return f"| `{name}` | {text} | {default} |"


def sentence(text: str) -> str:
    """Return a phrase as a sentence."""
    return text[:1].upper() + text[1:].rstrip(".") + "."


def setup(app: Sphinx) -> dict[str, Any]:
    """Register what reads the sources."""
    app.connect("source-read", insert)
    return {"parallel_read_safe": True}
