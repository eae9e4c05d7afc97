"""The API reference: a page for every package, made of what is in it.

A module or a package that is added appears by itself.
"""

import ast
from pathlib import Path
from typing import Any

from sphinx.application import Sphinx

PACKAGE = Path(__file__).resolve().parents[2] / "jaxrefine"


def write(app: Sphinx) -> None:
    """Write the pages, unless they are there already."""
    folder = Path(app.srcdir) / "api"
    folder.mkdir(exist_ok=True)
    pages = {"index": overview()}
    for package in packages():
        pages[package.name] = page(package)
    for name, text in pages.items():
        path = folder / f"{name}.rst"
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            path.write_text(text, encoding="utf-8")
    for path in folder.glob("*.rst"):
        if path.stem not in pages:
            path.unlink()


def packages() -> list[Path]:
    """Return the folders of all packages, the outermost first."""
    inner = sorted(path.parent for path in PACKAGE.glob("*/__init__.py"))
    return [PACKAGE, *inner]


def page(package: Path) -> str:
    """Return the page of a package: its docstring, its functions, its modules."""
    title = dotted(package) if package != PACKAGE else "jaxrefine: single modules"
    lines = [title, "=" * len(title), "", f".. automodule:: {dotted(package)}", ""]
    lines += directives(private_origins(package))
    for heading in modules(package):
        lines += [heading, "-" * len(heading), ""]
        lines += directives([("module", f"{dotted(package)}.{heading}")])
    return "\n".join(lines)


def modules(package: Path) -> list[str]:
    """Return the public modules of a package, with packages inside it and theirs."""
    paths = package.glob("*.py") if package == PACKAGE else package.rglob("*.py")
    files = {path.relative_to(package).with_suffix("").parts for path in paths}
    names = {parts[:-1] if parts[-1] == "__init__" else parts for parts in files}
    return [".".join(p) for p in sorted(names) if p and not p[-1].startswith("_")]


def directives(objects: list[tuple[str, str]]) -> list[str]:
    """Return the lines that document objects, of pairs of kind and path."""
    lines = []
    for kind, path in objects:
        lines.append(f".. auto{kind}:: {path}")
        lines += [] if kind == "function" else ["   :members:"]
        lines.append("")
    return lines


def private_origins(package: Path) -> list[tuple[str, str]]:
    """Return what a package offers of its private modules, by kind and path."""
    objects = []
    for module, name in imports(package / "__init__.py"):
        if module.startswith(f"{dotted(package)}._") and package != PACKAGE:
            kind = "class" if name[0].isupper() else "function"
            objects.append((kind, f"{module}.{name}"))
    return objects


def overview() -> str:
    """Return the first page: the public face, and what each package is for."""
    lines = ["API reference", "=============", "", "The public face", "-" * 15, ""]
    for module, name in imports(PACKAGE / "__init__.pyi"):
        if module and not name.startswith("_") and not module.startswith("_"):
            kind = "class" if name[0].isupper() else "func"
            lines.append(f"- :{kind}:`jaxrefine.{name} <jaxrefine.{module}.{name}>`")
    lines += ["", "The packages", "-" * 12, "", ".. toctree::", "   :maxdepth: 1", ""]
    lines += [f"   {package.name}" for package in packages()]
    for package in packages()[1:]:
        lines += ["", f":doc:`{dotted(package)} <{package.name}>`"]
        lines += [f"   {summary(package / '__init__.py')}".replace("\n", " ")]
    return "\n".join(lines) + "\n"


def imports(path: Path) -> list[tuple[str, str]]:
    """Return the modules and names that a file imports from the package."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return [
        (node.module or "", alias.name)
        for node in tree.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    ]


def dotted(package: Path) -> str:
    """Return the name that a package is imported by."""
    return ".".join(package.relative_to(PACKAGE.parent).parts)


def summary(path: Path) -> str:
    """Return the first paragraph of a module's docstring."""
    docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
    return (docstring or "").split("\n\n")[0]


def setup(app: Sphinx) -> dict[str, Any]:
    """Write the pages before the sources are listed."""
    app.connect("builder-inited", write)
    return {"parallel_read_safe": True}
