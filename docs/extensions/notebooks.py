"""The notebooks of the repository as pages: copied to where Sphinx looks for pages."""

import shutil
from pathlib import Path
from typing import Any

from sphinx.application import Sphinx

NOTEBOOKS = Path(__file__).resolve().parents[2] / "notebooks"


def copy(app: Sphinx) -> None:
    """Copy the notebooks that are new or have changed, and remove the others."""
    folder = Path(app.srcdir) / "notebooks"
    folder.mkdir(exist_ok=True)
    sources = {path.name: path for path in NOTEBOOKS.glob("*.ipynb")}
    for name, source in sources.items():
        target = folder / name
        if not target.exists() or target.read_bytes() != source.read_bytes():
            shutil.copyfile(source, target)
    for path in folder.iterdir():
        if path.name not in sources:
            path.unlink()


def setup(app: Sphinx) -> dict[str, Any]:
    """Copy them before the sources are listed."""
    app.connect("builder-inited", copy)
    return {"parallel_read_safe": True}
