"""``jaxrefine fsc``: figures for good input, one sentence for bad input."""

import json
import math
import os
import warnings

import mrcfile
import numpy as np
import pytest

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


def test_a_map_agrees_with_itself(maps, run):
    code, out, err = run("fsc", maps / "a.mrc", maps / "a.mrc")
    assert (code, err) == (0, "")
    rows = table(out)
    np.testing.assert_array_equal(rows[:, 0], np.arange(N // 2 + 1))
    assert rows[0, 1] == math.inf
    # Printed with three and six decimals.
    np.testing.assert_allclose(rows[1:, 1], N * VOXEL / rows[1:, 0], atol=6e-4)
    np.testing.assert_allclose(rows[:, 2], 1.0, atol=2e-6)
    # A curve that never falls reaches the last complete shell.
    for threshold in ("0.5", "0.143"):
        words = f"{N * VOXEL / (N // 2 - 1):.2f} A or better"
        assert f"# resolution at FSC {threshold}: {words}" in out


def test_the_curve_is_the_definition(maps, run):
    code, out, _ = run("fsc", maps / "a.mrc", maps / "b.mrc")
    assert code == 0
    exact = shell_correlation(*(read_mrc(maps / f"{x}.mrc")[0] for x in "ab"))
    # Maps are read in single precision; six decimals are printed.
    np.testing.assert_allclose(table(out)[:, 2], exact, atol=5e-6)
    assert exact[1] > 0.9 and exact[-1] < 0.5, "the maps must agree in part"


def test_json_and_png(maps, run):
    files = ["--json", maps / "out.json", "--png", maps / "out.png"]
    code, out, _ = run("fsc", maps / "a.mrc", maps / "b.mrc", *files)
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
    assert content["resolution_is_a_bound"] == {"0.5": False, "0.143": False}
    assert (maps / "out.png").read_bytes().startswith(b"\x89PNG")


def test_maps_that_agree_nowhere_have_no_resolution(maps, run):
    write_mrc(maps / "b.mrc", -smooth(noise()), VOXEL)
    code, out, _ = run("fsc", maps / "a.mrc", maps / "b.mrc", "--json", maps / "o.json")
    assert code == 0 and "# resolution at FSC 0.143: none\n" in out
    content = json.loads((maps / "o.json").read_text())
    assert content["resolution_in_angstroms"] == {"0.5": None, "0.143": None}


def test_a_map_of_a_hot_voxel_is_not_compared(maps, run):
    hot = noise()
    hot[3, 4, 5] = 3e38
    write_mrc(maps / "b.mrc", hot, VOXEL)
    with warnings.catch_warnings(action="error"):
        refused = run("fsc", maps / "a.mrc", maps / "b.mrc")
    refused.assert_refused(
        "b.mrc must be the map of a particle", "voxels of up to 3e+38"
    )


def test_a_curve_may_cross_one_threshold_only(maps, run):
    c = smooth(noise(), 0.5) + 0.8 * noise(seed=2)
    write_mrc(maps / "c.mrc", c, VOXEL)
    pair = [maps / "a.mrc", maps / "c.mrc"]
    code, out, _ = run("fsc", *pair, "--json", maps / "out.json")
    assert code == 0
    bounds = json.loads((maps / "out.json").read_text())["resolution_is_a_bound"]
    curve = table(out)[1:-1, 2]  # the last shell is not complete
    assert bounds == {str(t): bool((curve >= t).all()) for t in (0.5, 0.143)}
    assert bounds == {"0.5": False, "0.143": True}
    assert out.count("or better") == 1


def test_mask(maps, run):
    command = ["fsc", maps / "a.mrc", maps / "b.mrc", "--mask", maps / "mask.mrc"]
    code, out, _ = run(*command, "--json", maps / "out.json")
    assert code == 0
    a, b, mask = (read_mrc(maps / f"{x}.mrc")[0] for x in ("a", "b", "mask"))
    exact = shell_correlation(a * mask, b * mask)
    np.testing.assert_allclose(table(out)[:, 2], exact, atol=5e-6)
    content = json.loads((maps / "out.json").read_text())
    assert content["mask"] == str(maps / "mask.mrc")
    assert np.abs(exact - shell_correlation(a, b)).max() > 1e-2


def test_a_voxel_size_may_differ_by_rounding(maps, run):
    write_mrc(maps / "c.mrc", noise(), VOXEL * (1 + 1e-4))
    code, _, _ = run("fsc", maps / "a.mrc", maps / "c.mrc")
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


@pytest.mark.parametrize("place", ["first", "second"])
@pytest.mark.parametrize("bad", BAD_MAPS)
def test_a_bad_map_is_refused(maps, run, bad, place):
    path = maps / "bad.mrc"
    BAD_MAPS[bad](path)
    before = snapshot(maps)
    pair = [maps / "a.mrc", path]
    pair = pair if place == "second" else pair[::-1]
    files = ["--json", maps / "out.json", "--png", maps / "out.png"]
    run("fsc", *pair, *files).assert_refused("bad.mrc")
    assert snapshot(maps) == before


@pytest.mark.parametrize("n", [1, 3])
def test_maps_of_less_than_two_shells_are_refused(tmp_path, run, n):
    path = tmp_path / "tiny.mrc"
    write_mrc(path, noise(n), VOXEL)
    run("fsc", path, path).assert_refused("at least 4^3 voxels", f"got {n}^3 ({path})")
    write_mrc(path, noise(4), VOXEL)
    assert run("fsc", path, path).code == 0


@pytest.mark.parametrize("bad", [bad for bad in BAD_MAPS if "voxel" not in bad])
def test_a_bad_mask_is_refused(maps, run, bad):
    BAD_MAPS[bad](maps / "bad.mrc")
    before = snapshot(maps)
    pair = [maps / "a.mrc", maps / "b.mrc"]
    run("fsc", *pair, "--mask", maps / "bad.mrc").assert_refused("bad.mrc")
    assert snapshot(maps) == before


@pytest.mark.parametrize("option", ["--json", "--png"])
@pytest.mark.parametrize("place", ["absent/out", "a.mrc/out"])
def test_a_place_that_cannot_be_written_is_refused(maps, run, option, place):
    before = snapshot(maps)
    target = (maps / place).with_suffix(".png" if option == "--png" else ".json")
    pair = [maps / "a.mrc", maps / "b.mrc"]
    run("fsc", *pair, option, target).assert_refused(str(target))
    assert snapshot(maps) == before


@pytest.mark.parametrize("option", ["--json", "--png"])
def test_a_folder_is_not_written_over(maps, run, option):
    pair = [maps / "a.mrc", maps / "b.mrc"]
    run("fsc", *pair, option, maps).assert_refused("it is a folder")


@pytest.mark.parametrize("option", ["--json", "--png"])
def test_an_input_is_not_written_over(maps, run, option):
    """Nor anything that is no file."""
    before = snapshot(maps)
    link = maps / "link"
    link.symlink_to(os.devnull)
    pair = [maps / "a.mrc", maps / "b.mrc"]
    for target, words in ((pair[1], "it is an input"), (link, "not a regular file")):
        run("fsc", *pair, option, target).assert_refused(words)
    link.unlink()
    assert snapshot(maps) == before


def test_an_empty_map_has_no_resolution(maps, run):
    write_mrc(maps / "zero.mrc", np.zeros_like(noise()), VOXEL)
    empty = maps / "zero.mrc"
    for words in (
        [maps / "a.mrc", empty],
        [maps / "a.mrc", maps / "b.mrc", "--mask", empty],
    ):
        run("fsc", *words).assert_refused("zero.mrc")
    write_mrc(maps / "mask.mrc", np.ones_like(noise()), 1.01 * VOXEL)
    pair = [maps / "a.mrc", maps / "b.mrc"]
    run("fsc", *pair, "--mask", maps / "mask.mrc").assert_refused("voxel size")


def test_one_file_cannot_hold_both(maps, run):
    files = ["--json", maps / "out", "--png", maps / "out"]
    run("fsc", maps / "a.mrc", maps / "b.mrc", *files).assert_refused("--json and")
    assert not (maps / "out").exists()


NAMES = ["a$b$c_{", r"x$\frac$y", "^_{$", "日本", os.fsdecode(b"caf\xe9")]


@pytest.mark.parametrize("name", NAMES, ids=ascii)
def test_files_may_have_any_name(tmp_path, run, name):
    """Dollars are no formulas, and bytes that are not UTF-8 are no reason to end."""
    folder = tmp_path / name
    folder.mkdir()
    path, other, mask = (folder / f"{name}{x}.mrc" for x in ("", "2", "mask"))
    write_mrc(path, noise(), VOXEL)
    write_mrc(other, noise() + noise(seed=1), VOXEL)
    write_mrc(mask, np.ones((N, N, N)), VOXEL)
    png, report = folder / f"{name}.png", folder / f"{name}.json"
    words = [path, other, "--mask", mask]
    done = run("fsc", *words, "--png", png, "--json", report)
    assert done.code == 0 and not done.err
    assert png.read_bytes().startswith(b"\x89PNG")
    assert json.loads(report.read_text())["mask"] == str(mask)
    assert run("postprocess", *words, "--out", folder / "post").code == 0
    assert (folder / "post/fsc.png").read_bytes().startswith(b"\x89PNG")
    # What is printed is text, too.
    run("fsc", path, folder).assert_refused("must be a file, got a folder")
