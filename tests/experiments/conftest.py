"""The modules of ``experiments``, which are scripts and no package."""

import importlib
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

EXPERIMENTS = Path(__file__).resolve().parents[2] / "experiments"


@pytest.fixture(scope="session")
def load():
    """Import one of the modules by its name."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(EXPERIMENTS)
        yield importlib.import_module


@pytest.fixture(scope="session")
def run_script(load: Callable[[str], ModuleType]):
    """Run the ``main`` of a study with a command line; return its exit code."""

    def run(name: str, *words: object) -> int:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", [f"{name}.py", *map(str, words)])
            return load(name).main()

    return run


@pytest.fixture
def put_on_path(tmp_path_factory: pytest.TempPathFactory, monkeypatch):
    """Make programs, of a name and a text, that are found before all others."""
    folder = tmp_path_factory.mktemp("bin")
    monkeypatch.setenv("PATH", str(folder), prepend=os.pathsep)

    def put(name: str, text: str) -> None:
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)

    return put
