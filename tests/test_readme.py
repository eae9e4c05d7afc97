"""The README's example runs as a user would run it, and does what it says."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()


@pytest.mark.slow
def test_example_refines_poses():
    section = README.split("## The paper's algorithm in twenty lines")[1]
    example = re.findall(r"```python\n(.*?)```", section, re.DOTALL)[0]
    assert len([line for line in example.splitlines() if line.strip()]) <= 25
    run = subprocess.run(
        [sys.executable, "-W", "error", "-c", example],
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    initial, refined, fsc = run.stdout.splitlines()
    initial = ast.literal_eval(initial.removeprefix("initial "))
    refined = ast.literal_eval(refined.removeprefix("refined "))
    for figure in ("angle_error_deg_median", "shift_error_px_median"):
        assert refined[figure] < 0.5 * initial[figure]
    assert float(fsc.removeprefix("mean FSC ")) > 0.5


def test_the_library_example_uses_what_there_is():
    import jaxrefine  # noqa: PLC0415

    section = README.split("## As a library")[1].split("## ")[0]
    for field in re.findall(r"result\.([a-z_]+)", section):
        assert field in jaxrefine.refinement.loop.Result.__annotations__, field
    for name in re.findall(r"`([a-z_]+)`", section):
        modules = (jaxrefine.RefineConfig.__annotations__, ["optax"])
        assert any(name in module for module in modules), name


def test_every_name_in_the_equation_table_exists():
    import jaxrefine  # noqa: PLC0415

    table = README.split("## Where the paper is")[1].split("## Choices")[0]
    names = re.findall(r"`([a-z]+)\.([A-Za-z_0-9]+)`", table)
    assert len(names) > 20
    for module, name in names:
        if module != "jaxrefine":
            assert hasattr(getattr(jaxrefine, module), name), f"{module}.{name}"
