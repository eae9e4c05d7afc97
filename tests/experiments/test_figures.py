"""Every figure is drawn from what a finished run holds, and from nothing else."""

import runpy
import shutil
import sys
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest

from jaxrefine import io

EXPERIMENTS = Path(__file__).resolve().parents[2] / "experiments"
SCRIPTS = sorted(EXPERIMENTS.glob("fig[0-9][0-9]_*.py"))
N = 12

REPORT = {
    "finished": True,
    "settings": {
        "title": "Test, Init-1",
        "seed": 0,
        "size": N,
        "particles": 30,
        "snr_db": -5.0,
        "max_angle_error_in_radians": 0.7,
        "max_shift": 3.0,
        "initial_blur": 4.0,
        "voxel_size_in_angstroms": 5.0,
        "batch_size": 8,
        "volume": "a digest",
    },
    "kept": {"start": "a start"},
    "volume": "maps/random numbers.mrc",
    "lacking": "",
}
METHODS = {  # and their iterations
    "oracle": 1,
    "unrefined": 1,
    "joint": 9,
    "joint, post-processed": 0,
    "oracle (paper)": 3,
    "joint (paper)": 3,
    "RELION auto-refine": 2,
    "RELION auto-refine, post-processed": 0,
    "RELION, local searches": 2,
    "RELION, local searches, post-processed": 0,
}


def result(iterations):
    rng = np.random.default_rng(iterations)
    bins = {
        "first": -20.0,
        "width": 0.5,
        "density": rng.uniform(0, 0.05, 80).tolist(),
        "outside": 0.25,
    }
    return {
        "remark": "a remark" if iterations == 2 else "",
        "fsc_aligned": np.linspace(1, rng.uniform(), N // 2 + 1).tolist(),
        "differences": {name: bins for name in ("rot", "tilt", "psi", "x", "y")},
        "history": [
            {
                "iteration": number,
                "mean_fsc": 0.5,
                "rc": 3 + number / 4,
                "angle_error_in_degrees_median": 9.0 / number,
            }
            for number in range(1, iterations + 1)
        ],
    }


@pytest.fixture(scope="module")
def complete(tmp_path_factory):
    """A run of all methods, with the maps that they leave."""
    folder = tmp_path_factory.mktemp("complete")
    io.write_json(folder / "run.json", REPORT)
    results = {name: result(count) for name, count in METHODS.items()}
    io.write_json(folder / "metrics.json", results)
    (folder / "maps").mkdir()
    names = ["truth", "initial_map", "oracle", "unrefined", "joint", "joint_paper"]
    names += ["joint_post-processed", "relion_auto-refine_post-processed"]
    names += ["relion_local_searches_post-processed"]
    names += [f"joint_{number:03d}" for number in range(1, 10)]
    rng = np.random.default_rng(0)
    for name in names:
        volume = rng.uniform(size=(N, N, N)).astype(np.float32)
        io.write_mrc(folder / "maps" / f"{name}.mrc", volume, 5.0)
    images = rng.normal(size=(4, N, N)).astype(np.float32)
    io.write_stack(folder / "maps" / "images.mrcs", images, 5.0)
    return folder


@pytest.fixture
def sparse(complete, tmp_path):
    """A run of few methods, without images."""
    folder = tmp_path / "sparse"
    shutil.copytree(complete, folder)
    (folder / "maps" / "images.mrcs").unlink()
    results = io.read_json(folder / "metrics.json")
    few = {name: results[name] for name in ("joint", "unrefined")}
    io.write_json(folder / "metrics.json", few)
    return folder


@pytest.fixture
def draw(monkeypatch, capsys):
    """Run a script; return its exit code and what it says of an error."""

    def run(script, *words):
        monkeypatch.syspath_prepend(EXPERIMENTS)
        monkeypatch.setattr(sys, "argv", [script.name, *map(str, words)])
        with pytest.raises(SystemExit) as stop:
            runpy.run_path(str(script), run_name="__main__")
        return stop.value.code, capsys.readouterr().err

    return run


def script(number: int) -> Path:
    return next(path for path in SCRIPTS if path.name.startswith(f"fig{number:02d}"))


def test_there_is_a_script_for_each_figure_of_results():
    numbers = [int(path.name[3:5]) for path in SCRIPTS]
    assert numbers == [1, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12]


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_a_figure_is_drawn_of_one_run(path, complete, draw, tmp_path):
    assert draw(path, complete, "--out", tmp_path / "a.png") == (0, "")
    pixels = matplotlib.image.imread(tmp_path / "a.png")[..., :3]
    assert 400 < pixels.shape[1] < 2000 and 250 < pixels.shape[0] < 1500
    inked = pixels.min(axis=-1) < 0.9
    assert inked.mean() > 0.02
    # Nothing is cut off at the sides.
    assert not inked[:, [0, -1]].any() and not inked[[0, -1]].any()


@pytest.mark.parametrize("number", [3, 4, 5, 8])
def test_runs_stand_beside_each_other_and_need_not_have_all(
    number, complete, sparse, draw, tmp_path
):
    sizes = []
    for runs in ([sparse], [complete, sparse]):
        code, said = draw(script(number), *runs, "--out", tmp_path / "a.png")
        assert (code, said) == (0, "")
        sizes.append(matplotlib.image.imread(tmp_path / "a.png").size)
    assert sizes[1] > 1.3 * sizes[0]


def test_captions_say_conditions_and_remarks(complete, load):
    figures, run = load("figures"), load("finished").open_run(complete)
    chart = figures.fsc([run], ["oracle", "RELION auto-refine"])
    caption = chart.get_supxlabel().replace("\n", " ")
    for words in ("random numbers.mrc", "a start", "30 particles", "-5 dB", "seed 0"):
        assert words in caption
    assert "RELION auto-refine: a remark." in caption


def test_surfaces_enclose_equal_volumes(complete, load):
    """The rule for the level does not depend on a map's scale."""
    figures, run = load("figures"), load("finished").open_run(complete)
    truth, other = run.map("truth"), run.map("joint")
    share = figures.surface_share(truth)
    assert share == np.mean(truth >= 0.2 * truth.max())
    for volume in (other, 7 * other - 3):
        level = figures.surface_level(volume, share)
        assert np.mean(volume >= level) == pytest.approx(share, abs=1.5 / N**3)


def test_what_a_figure_cannot_do_is_a_sentence(complete, sparse, draw, tmp_path):
    out = ["--out", tmp_path / "a.png"]
    broken = tmp_path / "broken"
    cases = []

    def case(number, change, sentence, *words):
        cases.append((number, change, sentence, words or (broken, *out)))

    def without_methods():
        io.write_json(broken / "metrics.json", {"another": result(1)})

    def unfinished():
        io.write_json(broken / "run.json", REPORT | {"finished": False})

    def of_another_kind():
        few = {"title": "HJC", "seed": 0}
        io.write_json(broken / "run.json", REPORT | {"settings": few})

    case(4, lambda: shutil.rmtree(broken), "must be the folder of a run")
    case(4, unfinished, f"The run in {broken} is not finished")
    case(4, without_methods, "at least one of oracle, joint")
    case(4, of_another_kind, "run.json lacks particles, snr_db")
    case(3, lambda: shutil.rmtree(broken / "maps"), "needs the maps of the run")
    case(3, (broken / "maps/joint.mrc").unlink, "joint.mrc does not exist")
    case(5, lambda: None, "is not a folder", complete, "--out", tmp_path / "no/a.png")
    for number, change, sentence, words in cases:
        shutil.rmtree(broken, ignore_errors=True)
        shutil.copytree(sparse, broken)
        change()
        code, said = draw(script(number), *words)
        assert code == 2 and sentence in said, said
        assert len(said.strip().splitlines()) == 1
        assert not (tmp_path / "a.png").exists()


RESULTS = sorted(EXPERIMENTS.glob("results/*/done"))


@pytest.mark.parametrize("marker", RESULTS, ids=lambda path: path.parent.name)
def test_committed_results_can_be_read(load, marker):
    """They were written before runs had a ``run.json``."""
    folder, finished = marker.parent, load("finished")
    config = io.read_json(folder / "config.json")
    if "sizes" in config:
        settings = finished.settings_of(load("cost").CostSettings, folder)
        assert settings.sizes == tuple(config["sizes"])
    else:
        run = finished.open_run(folder)
        for entry in ("title", "map", "particles", "snr_db", "seed"):
            value = config[entry]
            text = f"{value:g}" if isinstance(value, float) else str(value)
            assert text in run.caption
        assert run.results
