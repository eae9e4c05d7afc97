"""The layers of the package: a package imports only from layers below its own."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "jaxrefine"

LAYERS = [
    {"errors", "_arrays", "_types", "_version", "_watch", "_limits"},
    {"_batching", "_processes", "aberrations", "geometry", "symmetry"},
    {"ctf", "euler"},
    {"operators"},
    {"data"},
    {"maps"},
    {"poses"},
    {"refinement", "paper"},
    {"simulate", "evaluation"},
    {"io"},
    {"report", "runs"},
    {"cli"},
]
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}
MODULES = sorted(PACKAGE.rglob("*.py"))


def layer_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported_layers(path: Path) -> set[str]:
    """Every ``jaxrefine`` module that a file imports, at any depth of nesting."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name} uses a relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    inside = (name.split(".") for name in found if name.startswith("jaxrefine."))
    return {parts[1] for parts in inside}


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_module_imports_only_from_below(path):
    if layer_of(path) == "__init__":
        return
    own = layer_of(path)
    assert own in LEVEL, f"{own} has no layer: add it to LAYERS"
    for other in imported_layers(path) - {own}:
        assert LEVEL[other] < LEVEL[own], f"{own} must not import {other}"


IMPORT_ALL = """
import importlib, pkgutil
import jax
before = dict(jax.config.values)
import jaxrefine
for module in pkgutil.walk_packages(jaxrefine.__path__, "jaxrefine."):
    if not module.name.endswith(".__main__"):
        importlib.import_module(module.name)
assert dict(jax.config.values) == before
"""


def test_importing_changes_no_global_state():
    """JAX's configuration stays, and no device is opened: here there is none."""
    environment = {**os.environ, "JAX_PLATFORMS": "none"}
    subprocess.run([sys.executable, "-c", IMPORT_ALL], check=True, env=environment)


def test_importing_loads_nothing_that_is_not_used_yet():
    """SciPy and matplotlib take as long as the rest; JAX waits for its first use."""
    code = (
        "import sys, jaxrefine; assert 'jax' not in sys.modules; jaxrefine.refine; "
        "assert not {'scipy', 'matplotlib', 'mrcfile'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
