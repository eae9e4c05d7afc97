"""The studies run, resume, and refuse to mix configurations."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

EXPERIMENTS = Path(__file__).resolve().parents[1] / "experiments"

FAST = ["--preset", "smoke", "--set", "particles=6", "--set", "paper_iterations=1"]


def run(*words: str, cwd: Path) -> subprocess.CompletedProcess:
    command = [sys.executable, str(EXPERIMENTS / "init1.py"), "configs/hjc_init1.toml"]
    return subprocess.run(
        [*command, *words], capture_output=True, text=True, cwd=cwd, check=False
    )


def timeless(path: Path) -> dict:
    """Read results without the times that differ from run to run."""

    def strip(value):
        if isinstance(value, dict):
            dropped = ("wall_s", "elapsed_s")
            return {k: strip(v) for k, v in value.items() if k not in dropped}
        return [strip(v) for v in value] if isinstance(value, list) else value

    return strip(json.loads((path / "metrics.json").read_text()))


@pytest.mark.slow
def test_interrupted_study_resumes_to_the_same_numbers(tmp_path):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    first = run(*FAST, "--out", str(whole), cwd=tmp_path)
    assert first.returncode == 0, first.stderr
    assert "| oracle (paper) |" in first.stdout
    for name in ("config.json", "provenance.json", "metrics.json", "done", "fsc.png"):
        assert (whole / name).exists()
    assert "phantom" in json.loads((whole / "config.json").read_text())["map"]

    # As if stopped in the middle: the last method's checkpoint instead of its result.
    stop = (
        "import sys; sys.argv = sys.argv[1:]; sys.path.insert(0, sys.argv[0]);"
        "import init1, harness; from jaxrefine import io;"
        "save = io.save_checkpoint;\n"
        "def saved(path, tree, metadata):\n"
        "    save(path, tree, metadata)\n"
        "    if path.name == 'state.eqx': raise KeyboardInterrupt\n"
        "io.save_checkpoint = saved\n"
        "try:\n    harness.main(init1.main)\nexcept KeyboardInterrupt:\n    pass\n"
    )
    words = ["configs/hjc_init1.toml", *FAST, "--out", str(broken)]
    subprocess.run(
        [sys.executable, "-c", stop, str(EXPERIMENTS), *words],
        check=True,
        capture_output=True,
        cwd=tmp_path,
    )
    assert (broken / "state.eqx").exists()
    assert not (broken / "done").exists()
    second = run(*FAST, "--out", str(broken), cwd=tmp_path)
    assert second.returncode == 0, second.stderr
    assert timeless(broken) == timeless(whole)
    assert not (broken / "state.eqx").exists()

    stamp = (whole / "metrics.json").stat().st_mtime_ns
    again = run(*FAST, "--out", str(whole), cwd=tmp_path)
    assert again.returncode == 0
    assert "| oracle (paper) |" in again.stdout
    assert (whole / "metrics.json").stat().st_mtime_ns == stamp

    other = run(*FAST, "--set", "seed=1", "--out", str(whole), cwd=tmp_path)
    assert other.returncode == 2
    assert "another configuration" in other.stderr
    assert (whole / "metrics.json").stat().st_mtime_ns == stamp


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--set", "nonsense=1"], "--set knows"),
        (["--set", "particles=many"], "is not KEY=VALUE"),
        (["--volume", "absent.mrc"], "does not exist"),
    ],
)
def test_bad_input_is_one_sentence(words, sentence, tmp_path):
    result = run("--preset", "smoke", *words, cwd=tmp_path)
    assert result.returncode == 2
    assert sentence in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
    assert not list(tmp_path.iterdir())
