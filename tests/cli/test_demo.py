"""``jaxrefine demo``: what it writes, how it is resumed, and what is refused."""

import json
import math
import subprocess
import sys
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrefine.cli import demo as implementation
from jaxrefine.cli.commands.demo import DEMO, DemoSettings
from jaxrefine.cli.engine import Engine
from jaxrefine.io import read_mrc
from jaxrefine.maps.fsc import fsc
from jaxrefine.runs.options import declared

BAD_NUMBERS = [
    ("size", 2),
    ("size", 0),
    ("size", -16),
    ("size", 12),
    ("particles", 0),
    ("particles", -3),
    ("snr-db", "nan"),
    ("snr-db", "inf"),
    ("max-shift", -1),
    ("max-shift", "nan"),
    ("max-angle-error", -0.1),
    ("max-angle-error", "inf"),
    ("initial-blur", -1),
    ("initial-blur", "nan"),
    ("initial-blur", "inf"),
    ("batch-size", 0),
    ("seed", -1),
    ("seed", 2**31),
    ("seed", 10**30),
]


@pytest.mark.parametrize(("name", "value"), BAD_NUMBERS)
def test_a_demo_with_bad_numbers_is_refused(run, tmp_path, name, value):
    out = tmp_path / "demo"
    small = ["--size", 16, "--particles", 4]
    run("demo", "--out", out, *small, f"--{name}={value}").assert_refused(f"--{name}")
    assert not out.exists()


def test_a_demo_does_not_write_among_other_files(run, tmp_path):
    (tmp_path / "thesis.tex").write_text("precious")
    run("demo", "--out", tmp_path).assert_refused("holds files but no demo.json")
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


@pytest.mark.parametrize("inside", ["", "demo", "deep/demo"])
def test_a_demo_does_not_write_into_a_file(run, tmp_path, inside):
    (tmp_path / "file").write_text("precious")
    run("demo", "--out", tmp_path / "file" / inside).assert_refused("file")
    assert (tmp_path / "file").read_text() == "precious"


# --- with a stand-in for the engine

SMALL = ["--size", 16, "--particles", 4]


class State(eqx.Module):
    iteration: jax.Array


@pytest.fixture
def engine():
    """Count what is asked of the engine; stop it where a test says so."""
    seen = SimpleNamespace(configs=[], stop_after=None, iterations=[])

    def reconstruct(particles, poses, config, *, key, watch):
        watch("sums", 0, len(particles))
        seen.configs.append(config)
        n = particles.image_size
        volume = np.random.default_rng(0).normal(size=(n, n, n)).astype(np.float32)
        return SimpleNamespace(volume=volume)

    def refine(particles, poses, volume, config, *, key, state, callback, watch):
        seen.configs.append(config)
        done = 0 if state is None else int(state.iteration)
        for i in range(done + 1, 4):
            state = State(jnp.asarray(i))
            seen.iterations.append(i)
            callback(state, SimpleNamespace(row=lambda i=i: {"iteration": i}))
            if seen.stop_after == i:
                raise KeyboardInterrupt
        return SimpleNamespace(
            volume=np.asarray(volume),
            poses=poses,
            undetermined=np.zeros(len(particles), bool),
            state=state,
        )

    def init(*_, key):
        return State(jnp.asarray(0))

    seen.reconstruct, seen.refine, seen.init = reconstruct, refine, init
    return seen


@pytest.fixture
def show(run, engine):
    """Run the demo with the stand-in."""
    stand_in = Engine(engine.init, engine.refine, engine.reconstruct)
    command = replace(DEMO, run=partial(implementation.run, engine=stand_in))
    return lambda *words: run("demo", *words, commands=[command])


@pytest.mark.slow
def test_an_interrupted_demo_carries_on(show, engine, tmp_path):
    out = tmp_path / "demo"
    engine.stop_after = 2
    result = show("--out", out, *SMALL)
    assert (result.code, result.out) == (130, "")
    assert result.err.endswith("interrupted\n")
    assert not (out / "summary.json").exists()
    engine.stop_after = None
    show("--out", out, *SMALL, "--seed", 1).assert_refused("other settings (seed)")
    assert show("--out", out, *SMALL).code == 0
    assert engine.iterations == [1, 2, 3]
    affecting = {
        option.name for option in declared(DemoSettings) if option.affects_results
    }
    marked = json.loads((out / "demo.json").read_text())
    assert marked["settings"].keys() == affecting
    files = {path: path.stat().st_mtime_ns for path in out.iterdir()}
    again = show("--out", out, *SMALL)
    assert again.code == 0 and "already, finished" in again.out
    assert "mean FSC" in again.out
    assert files == {path: path.stat().st_mtime_ns for path in out.iterdir()}


@pytest.mark.slow
def test_what_the_engine_is_given(show, engine, tmp_path):
    words = ["--batch-size", 3, "--max-angle-error", 90, "--max-shift", 4]
    assert show("--out", tmp_path / "demo", *SMALL, *words).code == 0
    assert len(engine.configs) == 3
    for config in engine.configs:
        assert config.batch_size == 3
        # The standard deviation of uniform errors, and a little more.
        assert math.pi / 2 / math.sqrt(3) < config.angle_spread < math.pi / 3
        assert 4 / math.sqrt(3) < config.shift_spread < 3 and config.max_shift >= 8


def test_the_figures_without_the_memory_and_beyond_the_last_shell():
    summary = dict.fromkeys(FIGURES, 1.0)
    summary |= {
        "rc_oracle": 8.0,
        "rc_joint": 7.9,
        "gauge_rotation_in_degrees_joint": 4.25,
    }
    summary |= {"mean_fsc_aligned_joint": 0.625, "mean_fsc_joint": 0.5}
    summary |= {"peak_rss_mib": None, "settings": {"size": 17}}
    text = implementation.report_text(summary)
    assert "≥ 8.0" in text and "4.25 degrees" in text and "MiB" not in text
    assert "joint 0.500 0.625 7.9" in " ".join(text.split())


# --- a whole demo

TINY = ["--size", "16", "--particles", "8", "--seed", "3"]
MAPS = {"truth", "initial", "oracle", "joint", "unrefined"}
PICTURES = {"particles", "slices", "fsc", "angle_errors", "shift_errors"}
WAYS = ("oracle", "joint", "unrefined")
FIGURES = (
    {f"mean_fsc_{way}" for way in WAYS}
    | {f"mean_fsc_aligned_{way}" for way in WAYS}
    | {f"rc_{way}" for way in WAYS}
    | {"gauge_rotation_in_degrees_joint"}
    | {
        f"angle_error_in_degrees_{x}_{y}"
        for x in ("median", "p90")
        for y in ("init", "joint")
    }
    | {
        "fraction_within_10_degrees",
        "shift_error_in_pixels_median",
        "wall_s",
        "peak_rss_mib",
    }
)
# A process of its own: in this one, settings and the type checker are those of tests.
PROGRAM = [sys.executable, "-m", "jaxrefine.cli", "demo", *TINY]


def start(words):
    return subprocess.run(
        list(map(str, words)), capture_output=True, text=True, check=False
    )


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """The output folder of a tiny demo, and what was printed."""
    out = tmp_path_factory.mktemp("demo") / "new" / "folder"
    return out, start([*PROGRAM, "--out", out])


@pytest.mark.slow
def test_a_demo_writes_all_it_promises(demo):
    out, finished = demo
    assert finished.returncode == 0, finished.stderr
    assert "Traceback" not in finished.stderr and "Warning" not in finished.stderr
    names = {path.name for path in out.iterdir()}
    expected = {f"{name}.mrc" for name in MAPS} | {f"{name}.png" for name in PICTURES}
    assert expected | {"demo.json", "summary.json"} <= names
    for name in MAPS:
        volume, voxel = read_mrc(out / f"{name}.mrc")
        assert volume.shape == (16, 16, 16) and voxel == 1.0
        assert volume.std() > 0
    for name in PICTURES:
        assert (out / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    assert str(out) in finished.stdout and "mean FSC" in finished.stdout


@pytest.mark.slow
def test_the_summary_holds_valid_figures(demo):
    out, _ = demo
    summary = json.loads((out / "summary.json").read_text())
    assert FIGURES <= set(summary)
    assert all(math.isfinite(summary[name]) for name in FIGURES)
    for way in WAYS:
        assert -1 <= summary[f"mean_fsc_{way}"] <= 1
        assert -1 <= summary[f"mean_fsc_aligned_{way}"] <= 1
        assert 0 <= summary[f"rc_{way}"] <= 8
        # The figure is that of the map beside it.
        truth, volume = (read_mrc(out / f"{x}.mrc")[0] for x in ("truth", way))
        mean = float(jnp.mean(fsc(jnp.asarray(truth), jnp.asarray(volume))[1:]))
        assert summary[f"mean_fsc_{way}"] == pytest.approx(mean, abs=1e-4)
    for when in ("init", "joint"):
        median, p90 = (
            summary[f"angle_error_in_degrees_{figure}_{when}"]
            for figure in ("median", "p90")
        )
        assert 0 < median <= p90 <= 180
    assert 0 <= summary["fraction_within_10_degrees"] <= 1
    assert summary["shift_error_in_pixels_median"] >= 0
    assert summary["wall_s"] > 0 and summary["peak_rss_mib"] > 10
    marked = json.loads((out / "demo.json").read_text())
    assert marked["finished"] and summary["settings"] == marked["settings"]
    assert summary["settings"]["size"] == 16
    assert summary["settings"]["seed"] == 3


@pytest.mark.slow
def test_a_demo_repeats_itself(demo, tmp_path):
    out, _ = demo
    again = tmp_path / "again"
    assert start([*PROGRAM, "--out", again]).returncode == 0
    first, second = (
        json.loads((folder / "summary.json").read_text()) for folder in (out, again)
    )
    # Sums over particles in threads differ from run to run, by rounding.
    for name in FIGURES - {"wall_s", "peak_rss_mib"}:
        assert first[name] == pytest.approx(second[name], rel=1e-2, abs=1e-2), name
    for name in MAPS:
        here, there = (read_mrc(folder / f"{name}.mrc")[0] for folder in (out, again))
        np.testing.assert_allclose(here, there, atol=1e-2 * np.abs(here).max())
