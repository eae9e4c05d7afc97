"""What docstrings need beyond reStructuredText: links from short names, and types.

Docstrings call functions as the code does: ``kbwf.expand``, ``maps.sums.solve``. Such a
name is a link if the public part of the package has one object whose path ends in it.
Types are those that the source has: arrays are ``Array``, and the stars of shapes such
as ``"*batch 3"`` are no markup.
"""

from typing import Any

from docutils.nodes import Element, reference
from sphinx.addnodes import pending_xref
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment
from sphinx.util.nodes import make_refnode


def resolve(
    app: Sphinx, env: BuildEnvironment, node: pending_xref, content: Element
) -> reference | None:
    """Return the link for a name that is not a full path; None without one."""
    if node.get("refdomain") != "py":
        return None
    ending = "." + node["reftarget"]
    objects = env.domains["py"].objects
    places = {
        (entry.docname, entry.node_id)
        for path, entry in objects.items()
        if path.endswith(ending)
    }
    if len(places) != 1:
        return None
    ((page, anchor),) = places
    return make_refnode(app.builder, node["refdoc"], page, anchor, content)


def shorten(text: str) -> str:
    """Return a type as the source has it."""
    return text.replace("jaxlib._jax.", "").replace("jaxtyping.", "")


def clean_signature(
    app: Sphinx,
    what: str,
    name: str,
    documented: object,
    options: object,
    signature: str | None,
    returned: str | None,
) -> tuple[str | None, str | None]:
    """Shorten the types of a signature."""
    return signature and shorten(signature), returned and shorten(returned)


def clean_types(
    app: Sphinx,
    what: str,
    name: str,
    documented: object,
    options: object,
    lines: list[str],
) -> None:
    """Correct the fields of a docstring that napoleon has made.

    The types of fields are shortened, and their stars quoted. Attributes that are told
    together must be one word, lest the first of them is taken for a type.
    """
    for number, line in enumerate(lines):
        if line.startswith((":vartype ", ":type ")):
            lines[number] = shorten(line).replace("*", r"\*")
        elif line.startswith(":ivar "):
            names, text = line.removeprefix(":ivar ").split(":", 1)
            lines[number] = f":ivar {names.replace(', ', ',')}:{text}"


def setup(app: Sphinx) -> dict[str, Any]:
    """Register all three; docstrings come after napoleon's 500."""
    app.connect("missing-reference", resolve)
    app.connect("autodoc-process-signature", clean_signature)
    app.connect("autodoc-process-docstring", clean_types, priority=900)
    return {"parallel_read_safe": True}
