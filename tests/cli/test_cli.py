"""The command line: figures for good input, one sentence for bad input."""

import json
import math
import os
import shutil
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import mrcfile
import numpy as np
import pytest

from jaxrefine import cli, io, simulate
from jaxrefine import demo as demo_module
from jaxrefine.io import read_mrc, write_mrc

N, VOXEL = 12, 2.5


def noise(n=N, seed=0):
    return np.random.default_rng(seed).normal(size=(n, n, n)).astype(np.float32)


def smooth(volume, width=1.5):
    k = np.fft.fftfreq(volume.shape[0])
    z, y, x = np.meshgrid(k, k, k, indexing="ij")
    response = np.exp(-2 * (np.pi * width) ** 2 * (x**2 + y**2 + z**2))
    return np.fft.ifftn(np.fft.fftn(volume) * response).real.astype(np.float32)


@pytest.fixture
def maps(tmp_path):
    """A folder with two maps that agree at low frequencies only, and a mask."""
    a = noise()
    b = smooth(a) + 0.05 * noise(seed=1)
    mask = np.zeros_like(a)
    mask[2:-2, 2:-2, 2:-2] = 1.0
    for name, volume in (("a", a), ("b", b), ("mask", mask)):
        write_mrc(tmp_path / f"{name}.mrc", volume, VOXEL)
    return tmp_path


def run(capsys, *arguments):
    code = cli.main([str(argument) for argument in arguments])
    output = capsys.readouterr()
    return code, output.out, output.err


def table(text):
    rows = [line.split() for line in text.splitlines() if not line.startswith("#")]
    return np.array(rows, float)


def shell_correlation(a, b):
    """The definition, shell by shell, in NumPy."""
    n = a.shape[0]
    k = np.fft.fftfreq(n, 1 / n)
    z, y, x = np.meshgrid(k, k, k, indexing="ij")
    shell = np.rint(np.sqrt(x**2 + y**2 + z**2)).astype(int)
    fa, fb = np.fft.fftn(np.asarray(a, float)), np.fft.fftn(np.asarray(b, float))
    curve = []
    for r in range(n // 2 + 1):
        u, v = fa[shell == r], fb[shell == r]
        curve.append(np.vdot(u, v).real / np.linalg.norm(u) / np.linalg.norm(v))
    return np.array(curve)


# --- fsc


def test_a_map_agrees_with_itself(maps, capsys):
    code, out, err = run(capsys, "fsc", maps / "a.mrc", maps / "a.mrc")
    assert (code, err) == (0, "")
    rows = table(out)
    np.testing.assert_array_equal(rows[:, 0], np.arange(N // 2 + 1))
    assert rows[0, 1] == math.inf
    # Printed with three and six decimals.
    np.testing.assert_allclose(rows[1:, 1], N * VOXEL / rows[1:, 0], atol=6e-4)
    np.testing.assert_allclose(rows[:, 2], 1.0, atol=2e-6)
    # A curve that never falls reaches the Nyquist period, two voxels.
    for threshold in ("0.5", "0.143"):
        words = f"better than {2 * VOXEL:.2f} A (Nyquist)"
        assert f"# resolution at FSC {threshold}: {words}" in out


def test_the_curve_is_the_definition(maps, capsys):
    code, out, _ = run(capsys, "fsc", maps / "a.mrc", maps / "b.mrc")
    assert code == 0
    exact = shell_correlation(*(read_mrc(maps / f"{x}.mrc")[0] for x in "ab"))
    # Maps are read in single precision; six decimals are printed.
    np.testing.assert_allclose(table(out)[:, 2], exact, atol=5e-6)
    assert exact[1] > 0.9 and exact[-1] < 0.5, "the maps must agree in part"


def test_json_and_png(maps, capsys):
    files = ["--json", maps / "out.json", "--png", maps / "out.png"]
    code, out, _ = run(capsys, "fsc", maps / "a.mrc", maps / "b.mrc", *files)
    assert code == 0
    content = json.loads((maps / "out.json").read_text())
    np.testing.assert_allclose(content["fsc"], table(out)[:, 2], atol=6e-7)
    assert content["mean_fsc"] == pytest.approx(np.mean(content["fsc"][1:]), rel=1e-5)
    assert content["voxel_size_in_angstroms"] == pytest.approx(VOXEL)
    assert content["mask"] is None
    resolution = content["resolution_in_angstroms"]
    assert resolution["0.5"] >= resolution["0.143"] >= 2 * VOXEL * (1 - 1e-6)
    for threshold, value in resolution.items():
        assert f"# resolution at FSC {threshold}: {value:.2f} A" in out
    assert content["reaches_nyquist"] == {"0.5": False, "0.143": False}
    assert (maps / "out.png").read_bytes().startswith(b"\x89PNG")


def test_a_curve_may_cross_one_threshold_only(maps, capsys):
    c = smooth(noise(), 0.5) + 0.8 * noise(seed=2)
    write_mrc(maps / "c.mrc", c, VOXEL)
    pair = [maps / "a.mrc", maps / "c.mrc"]
    code, out, _ = run(capsys, "fsc", *pair, "--json", maps / "out.json")
    assert code == 0
    reaches = json.loads((maps / "out.json").read_text())["reaches_nyquist"]
    curve = table(out)[1:, 2]
    assert reaches == {str(t): bool((curve >= t).all()) for t in (0.5, 0.143)}
    assert reaches == {"0.5": False, "0.143": True}
    assert out.count("better than") == 1


def test_mask(maps, capsys):
    command = ["fsc", maps / "a.mrc", maps / "b.mrc", "--mask", maps / "mask.mrc"]
    code, out, _ = run(capsys, *command, "--json", maps / "out.json")
    assert code == 0
    a, b, mask = (read_mrc(maps / f"{x}.mrc")[0] for x in ("a", "b", "mask"))
    exact = shell_correlation(a * mask, b * mask)
    np.testing.assert_allclose(table(out)[:, 2], exact, atol=5e-6)
    content = json.loads((maps / "out.json").read_text())
    assert content["mask"] == str(maps / "mask.mrc")
    assert np.abs(exact - shell_correlation(a, b)).max() > 1e-2


def test_a_voxel_size_may_differ_by_rounding(maps, capsys):
    write_mrc(maps / "c.mrc", noise(), VOXEL * (1 + 1e-4))
    code, _, _ = run(capsys, "fsc", maps / "a.mrc", maps / "c.mrc")
    assert code == 0


# --- bad input


def truncated(path):
    write_mrc(path, noise(), VOXEL)
    path.write_bytes(path.read_bytes()[:1500])


def not_cubic(path):
    with mrcfile.new(path) as mrc:
        mrc.set_data(noise()[1:])
        mrc.voxel_size = VOXEL


def with_nan(path):
    ignored = warnings.catch_warnings(action="ignore")
    with ignored, mrcfile.new(path) as mrc:
        values = noise()
        values[1, 2, 3] = np.nan
        mrc.set_data(values)
        mrc.voxel_size = VOXEL


BAD_MAPS = {
    "missing": lambda path: None,
    "folder": lambda path: path.mkdir(),
    "empty": lambda path: path.write_bytes(b""),
    "not MRC": lambda path: path.write_text("Not a map, but a text.\n" * 100),
    "truncated": truncated,
    "not cubic": not_cubic,
    "of another size": lambda path: write_mrc(path, noise(10), VOXEL),
    "of another voxel size": lambda path: write_mrc(path, noise(), 1.01 * VOXEL),
    "NaN": with_nan,
}


def snapshot(folder):
    return {path: path.stat().st_size for path in sorted(folder.rglob("*"))}


def assert_refused(code, out, err):
    assert code == 2
    assert out == ""
    assert err.endswith("\n") and err.count("\n") == 1, err
    assert err.startswith("jaxrefine ") and "Traceback" not in err
    assert len(err) < 400


@pytest.mark.parametrize("place", ["first", "second"])
@pytest.mark.parametrize("bad", BAD_MAPS)
def test_a_bad_map_is_refused(maps, capsys, bad, place):
    path = maps / "bad.mrc"
    BAD_MAPS[bad](path)
    before = snapshot(maps)
    pair = [maps / "a.mrc", path]
    pair = pair if place == "second" else pair[::-1]
    files = ["--json", maps / "out.json", "--png", maps / "out.png"]
    code, out, err = run(capsys, "fsc", *pair, *files)
    assert_refused(code, out, err)
    assert "bad.mrc" in err
    assert snapshot(maps) == before


@pytest.mark.parametrize("bad", [bad for bad in BAD_MAPS if "voxel" not in bad])
def test_a_bad_mask_is_refused(maps, capsys, bad):
    BAD_MAPS[bad](maps / "bad.mrc")
    before = snapshot(maps)
    pair = [maps / "a.mrc", maps / "b.mrc"]
    code, out, err = run(capsys, "fsc", *pair, "--mask", maps / "bad.mrc")
    assert_refused(code, out, err)
    assert "bad.mrc" in err
    assert snapshot(maps) == before


@pytest.mark.parametrize("option", ["--json", "--png"])
@pytest.mark.parametrize("place", ["absent/out", "a.mrc/out"])
def test_a_place_that_cannot_be_written_is_refused(maps, capsys, option, place):
    before = snapshot(maps)
    target = (maps / place).with_suffix(".png" if option == "--png" else ".json")
    pair = [maps / "a.mrc", maps / "b.mrc"]
    code, out, err = run(capsys, "fsc", *pair, option, target)
    assert_refused(code, out, err)
    assert str(target) in err
    assert snapshot(maps) == before


@pytest.mark.parametrize("option", ["--json", "--png"])
def test_a_folder_is_not_written_over(maps, capsys, option):
    pair = [maps / "a.mrc", maps / "b.mrc"]
    code, out, err = run(capsys, "fsc", *pair, option, maps)
    assert_refused(code, out, err)


@pytest.mark.parametrize("option", ["--json", "--png"])
def test_an_input_is_not_written_over(maps, capsys, option):
    """Nor anything that is no file."""
    before = snapshot(maps)
    link = maps / "link"
    link.symlink_to(os.devnull)
    pair = [maps / "a.mrc", maps / "b.mrc"]
    for target, words in ((pair[1], "it is an input"), (link, "not a regular file")):
        code, out, err = run(capsys, "fsc", *pair, option, target)
        assert_refused(code, out, err)
        assert words in err
    link.unlink()
    assert snapshot(maps) == before


def test_an_empty_map_has_no_resolution(maps, capsys):
    write_mrc(maps / "zero.mrc", np.zeros_like(noise()), VOXEL)
    empty = maps / "zero.mrc"
    for words in (
        [maps / "a.mrc", empty],
        [maps / "a.mrc", maps / "b.mrc", "--mask", empty],
    ):
        code, out, err = run(capsys, "fsc", *words)
        assert_refused(code, out, err)
        assert "zero.mrc" in err
    write_mrc(maps / "mask.mrc", np.ones_like(noise()), 1.01 * VOXEL)
    pair = [maps / "a.mrc", maps / "b.mrc"]
    code, out, err = run(capsys, "fsc", *pair, "--mask", maps / "mask.mrc")
    assert_refused(code, out, err)
    assert "voxel size" in err


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (KeyboardInterrupt(), 130, "interrupted"),
        (OSError(28, "No space left on device"), 2, "No space left on device"),
        (OSError("nobody knows"), 2, "nobody knows"),
    ],
)
def test_interruptions_and_refusals_are_a_sentence(
    maps, capsys, monkeypatch, error, code, words
):
    def fail(path):
        raise error

    monkeypatch.setattr(io, "read_mrc", fail)
    result, out, err = run(capsys, "fsc", maps / "a.mrc", maps / "b.mrc")
    assert (result, out) == (code, "")
    assert err.count("\n") == 1 and words in err and "None" not in err


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["reconcile"],
        ["fsc"],
        ["fsc", "a.mrc"],
        ["fsc", "a.mrc", "b.mrc", "--colour"],
        ["demo"],
        ["demo", "--out", "x", "--size", "big"],
        ["demo", "--out", "x", "--preset", "other"],
    ],
)
def test_usage_errors_exit_with_2(arguments, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        cli.main(arguments)
    assert stop.value.code == 2
    assert "usage: jaxrefine" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_version_and_help(capsys):
    for arguments, word in ((["--version"], "jaxrefine 0"), (["--help"], "demo")):
        with pytest.raises(SystemExit) as stop:
            cli.main(arguments)
        assert stop.value.code == 0
        assert word in capsys.readouterr().out


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
def test_a_demo_with_bad_numbers_is_refused(capsys, tmp_path, name, value):
    out = tmp_path / "demo"
    small = ["--size", 16, "--particles", 4]
    code, text, err = run(capsys, "demo", "--out", out, *small, f"--{name}={value}")
    assert_refused(code, text, err)
    assert not out.exists()


def test_a_demo_does_not_write_among_other_files(capsys, tmp_path):
    (tmp_path / "thesis.tex").write_text("precious")
    code, text, err = run(capsys, "demo", "--out", tmp_path)
    assert_refused(code, text, err)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


@pytest.mark.parametrize("inside", ["", "demo", "deep/demo"])
def test_a_demo_does_not_write_into_a_file(capsys, tmp_path, inside):
    (tmp_path / "file").write_text("precious")
    code, text, err = run(capsys, "demo", "--out", tmp_path / "file" / inside)
    assert_refused(code, text, err)
    assert (tmp_path / "file").read_text() == "precious"


def test_an_interrupted_demo_can_be_repeated(capsys, tmp_path, monkeypatch):
    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(simulate, "phantom", stop)
    out = tmp_path / "demo"
    for seed in (1, 2):
        code, text, err = run(capsys, "demo", "--out", out, "--seed", seed)
        assert (code, text, err) == (130, "", "interrupted\n")
        assert [path.name for path in out.iterdir()] == ["demo.json"]
        assert json.loads((out / "demo.json").read_text())["seed"] == seed
        (out / "summary.json").write_text("of an earlier demo")


def test_the_batch_size_arrives_everywhere(tmp_path, monkeypatch):
    def look(*_, batch_size, **__):
        raise KeyboardInterrupt(batch_size)

    few = SimpleNamespace(images=np.zeros((4, 16, 16)))
    monkeypatch.setattr(simulate, "make_dataset", lambda *_, **__: few)
    monkeypatch.setattr(demo_module, "RefineConfig", look)
    config = demo_module.DemoConfig(size=16, particles=4, batch_size=3)
    with pytest.raises(KeyboardInterrupt, match="3"):
        demo_module.run(config, tmp_path)


def test_a_report_without_the_memory_and_beyond_the_last_shell(monkeypatch):
    monkeypatch.setitem(sys.modules, "resource", None)
    assert demo_module.peak_rss_mib() is None
    summary = dict.fromkeys(FIGURES, 1.0)
    summary |= {"rc_oracle": 8.0, "rc_joint": 7.9, "gauge_rotation_deg_joint": 4.25}
    summary |= {"mean_fsc_aligned_joint": 0.625, "mean_fsc_joint": 0.5}
    summary |= {"peak_rss_mib": None, "settings": {"size": 17}}
    text = demo_module.report(summary)
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
    | {"gauge_rotation_deg_joint"}
    | {f"angle_error_deg_{x}_{y}" for x in ("median", "p90") for y in ("init", "joint")}
    | {"fraction_within_10_deg", "shift_error_px_median", "wall_s", "peak_rss_mib"}
)
# A process of its own: in this one, settings and the type checker are those of tests.
DEMO = [sys.executable, "-m", "jaxrefine.cli", "demo", *TINY]


def start(command, **options):
    return subprocess.run(
        list(map(str, command)), capture_output=True, text=True, check=False, **options
    )


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """The output folder of a tiny demo, and what was printed."""
    out = tmp_path_factory.mktemp("demo") / "new" / "folder"
    return out, start([*DEMO, "--out", out])


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
        mean = shell_correlation(truth, volume)[1:].mean()
        assert summary[f"mean_fsc_{way}"] == pytest.approx(mean, abs=1e-4)
    for when in ("init", "joint"):
        median, p90 = (
            summary[f"angle_error_deg_{figure}_{when}"] for figure in ("median", "p90")
        )
        assert 0 < median <= p90 <= 180
    assert 0 <= summary["fraction_within_10_deg"] <= 1
    assert summary["shift_error_px_median"] >= 0
    assert summary["wall_s"] > 0 and summary["peak_rss_mib"] > 10
    assert summary["settings"] == json.loads((out / "demo.json").read_text())
    assert summary["settings"]["size"] == 16
    assert summary["settings"]["seed"] == 3


@pytest.mark.slow
def test_a_demo_repeats_itself(demo, tmp_path):
    """Into a copy of its own folder, too, which it may overwrite."""
    out, _ = demo
    again = tmp_path / "again"
    shutil.copytree(out, again)
    assert start([*DEMO, "--out", again]).returncode == 0
    first, second = (
        json.loads((folder / "summary.json").read_text()) for folder in (out, again)
    )
    # Sums over particles in threads differ from run to run, by rounding.
    for name in FIGURES - {"wall_s", "peak_rss_mib"}:
        assert first[name] == pytest.approx(second[name], rel=1e-2, abs=1e-2), name
    for name in MAPS:
        maps = [read_mrc(folder / f"{name}.mrc")[0] for folder in (out, again)]
        np.testing.assert_allclose(*maps, atol=1e-2 * np.abs(maps[0]).max())


@pytest.mark.slow
def test_a_process_of_its_own(maps):
    """Exit codes and streams as a shell sees them."""
    command = [sys.executable, "-m", "jaxrefine.cli", "fsc", maps / "a.mrc"]
    good = start([*command, maps / "a.mrc"])
    assert good.returncode == 0
    np.testing.assert_allclose(table(good.stdout)[:, 2], 1.0, atol=2e-6)
    bad = start([*command, maps / "absent.mrc"])
    assert_refused(bad.returncode, bad.stdout, bad.stderr)


def test_a_reader_that_leaves_is_no_error(maps):
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "-m", "jaxrefine.cli", "fsc"]
    files = map(str, [maps / "a.mrc", maps / "b.mrc", "--json", maps / "out.json"])
    finished = subprocess.run(
        [*command, *files], stdout=writing, stderr=subprocess.PIPE, check=False
    )
    os.close(writing)
    assert (finished.returncode, finished.stderr) == (141, b"")
    assert (maps / "out.json").exists()


def test_the_installed_command(maps):
    program = Path(sys.executable).parent / "jaxrefine"
    if not program.exists():
        pytest.skip("the package is not installed as a command")
    finished = start([program, "fsc", maps / "a.mrc", maps / "absent.mrc"])
    assert_refused(finished.returncode, finished.stdout, finished.stderr)
