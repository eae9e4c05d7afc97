"""``jaxrefine postprocess``: files and figures are the library's."""

import json

import jax
import jax.numpy as jnp
import mrcfile
import numpy as np
import pytest

from jaxrefine.cli.commands.postprocess import PostprocessSettings
from jaxrefine.io import read_mrc, read_mtf, write_mrc, write_star
from jaxrefine.maps.mask import soft_mask
from jaxrefine.maps.postprocess import GuinierFit, postprocess
from jaxrefine.runs.options import declared

N, VOXEL = 24, 2.0
CURVES = ("fsc_unmasked", "fsc_masked", "fsc_randomised", "fsc_true")


def half_maps():
    """Points on a ball, blurred a little, with noise that hides fine detail."""
    rng = np.random.default_rng(0)
    z, y, x = np.indices((N, N, N)) - N // 2
    ball = (z**2 + y**2 + x**2 < 36) * rng.normal(1.0, 1.0, size=(N, N, N))
    k = np.fft.fftfreq(N)
    squared = k[:, None, None] ** 2 + k[:, None] ** 2 + k**2
    signal = np.fft.ifftn(np.fft.fftn(ball) * np.exp(-12 * squared)).real
    noise = rng.normal(0, 0.35 * signal.std(), size=(2, N, N, N))
    return (signal + noise).astype(np.float32)


@pytest.fixture(scope="module")
def maps(tmp_path_factory):
    """A folder with half maps and a mask."""
    folder = tmp_path_factory.mktemp("maps")
    halves = half_maps()
    for number, half in enumerate(halves, start=1):
        write_mrc(folder / f"half{number}.mrc", half, VOXEL)
    mask = soft_mask(jnp.asarray(halves.mean(axis=0)), VOXEL, extend=1.0, edge=2.0)
    write_mrc(folder / "mask.mrc", mask, VOXEL)
    return folder


def write_mtf(path, frequencies=(0, 0.25, 0.5), values=(1, 0.8, 0.4)):
    """Write the transfer function of a detector."""
    names = ("rlnResolutionInversePixel", "rlnMtfValue")
    write_star(path, {"": dict(zip(names, (frequencies, values), strict=True))})
    return path


def halves_of(folder):
    return [jnp.asarray(read_mrc(folder / f"half{i}.mrc")[0]) for i in (1, 2)]


def affecting(settings_class):
    """Names of the options that results depend on."""
    options = declared(settings_class)
    return {option.name for option in options if option.affects_results}


def check_files(out, result, mask):
    content = json.loads((out / "postprocess.json").read_text())
    assert content["finished"] is True
    assert content["settings"].keys() == affecting(PostprocessSettings)
    for name in CURVES:
        np.testing.assert_allclose(content[name], getattr(result, name), atol=1e-6)
    assert content["resolution_in_angstroms"] == result.resolution.in_angstroms
    b_factor = "b_factor_in_square_angstroms"
    assert content[b_factor] == getattr(result, b_factor)
    assert content["randomised_from_shell"] == result.randomised_from
    expected = {"postprocess": result.volume, "mask": mask}
    expected["postprocess_masked"] = result.masked_volume
    for name, volume in expected.items():
        written, voxel = read_mrc(out / f"{name}.mrc")
        np.testing.assert_array_equal(written, volume)
        assert voxel == VOXEL
    assert (out / "fsc.png").read_bytes().startswith(b"\x89PNG")
    return content


@pytest.mark.slow
def test_by_default_the_mask_is_automatic(maps, tmp_path, run):
    out = tmp_path / "out"
    command = [maps / "half1.mrc", maps / "half2.mrc", "--out", out]
    code, text, err = run("postprocess", *command)
    assert (code, err) == (0, "")
    one, two = halves_of(maps)
    mask = soft_mask((one + two) / 2, VOXEL)
    result = postprocess(one, two, mask, VOXEL, key=jax.random.key(0))
    content = check_files(out, result, mask)
    assert content["mask"] is None
    assert content["b_factor_in_square_angstroms"] is None
    assert f"resolution at FSC 0.143: {result.resolution.in_angstroms:.2f} A" in text
    assert "B factor" not in text and "not sharpened" not in text

    # The same command changes nothing; another one is refused.
    stamps = {path: path.stat().st_mtime_ns for path in out.iterdir()}
    code, again, _ = run("postprocess", *command)
    assert code == 0 and "holds this result already" in again and text in again
    code, _, err = run("postprocess", *command, "--b-factor", "-50")
    assert code == 2 and "other settings (b_factor)" in err
    assert {path: path.stat().st_mtime_ns for path in out.iterdir()} == stamps


@pytest.mark.parametrize(
    ("options", "b_factor"),
    [(["--auto-b-factor"], GuinierFit()), (["--b-factor", "-80"], -80.0)],
)
def test_options_reach_the_library(maps, tmp_path, run, options, b_factor):
    command = [maps / "half1.mrc", maps / "half2.mrc", "--out", tmp_path / "out"]
    command += ["--mask", maps / "mask.mrc", "--low-pass", "6", "--seed", "3"]
    code, text, err = run("postprocess", *command, *options)
    assert (code, err) == (0, "")
    mask = jnp.asarray(read_mrc(maps / "mask.mrc")[0])
    one, two = halves_of(maps)
    result = postprocess(
        one,
        two,
        mask,
        VOXEL,
        key=jax.random.key(3),
        b_factor_in_square_angstroms=b_factor,
        low_pass_in_angstroms=6.0,
    )
    content = check_files(tmp_path / "out", result, mask)
    assert content["mask"] == str(maps / "mask.mrc")
    found = result.b_factor_in_square_angstroms
    assert found is not None and found < 0
    assert f"B factor: {found:.1f} A^2" in text


@pytest.mark.parametrize("pixel", [None, 1.25])
def test_the_detectors_function_reaches_the_library(maps, tmp_path, run, pixel):
    path = write_mtf(tmp_path / "mtf.star")
    command = [maps / "half1.mrc", maps / "half2.mrc", "--out", tmp_path / "out"]
    command += ["--mask", maps / "mask.mrc", "--mtf", path, "--low-pass", "3"]
    command += [] if pixel is None else ["--detector-pixel-size", str(pixel)]
    code, text, _ = run("postprocess", *command)
    assert code == 0
    line = f"divided by the transfer function of {path}, for detector pixels of "
    line += "1.25 A\n" if pixel else "2 A (the voxel size of the maps; --detector-"
    assert line in text and "ends at" not in text
    mask = jnp.asarray(read_mrc(maps / "mask.mrc")[0])
    mtf = read_mtf(path, pixel or VOXEL)
    one, two = halves_of(maps)
    key = jax.random.key(0)
    result = postprocess(
        one, two, mask, VOXEL, key=key, low_pass_in_angstroms=3.0, mtf=mtf
    )
    content = check_files(tmp_path / "out", result, mask)
    assert content["mtf"] == str(path)
    assert content["detector_pixel_size_in_angstroms"] == (pixel or VOXEL)


def test_a_table_that_ends_too_early_is_told_of(maps, tmp_path, run):
    """At 8 A; what is beyond the Nyquist frequency, 4 A, is not divided."""
    command = [maps / "half1.mrc", maps / "half2.mrc", "--out", tmp_path / "out"]
    command += ["--mask", maps / "mask.mrc", "--low-pass", "3"]
    path = write_mtf(tmp_path / "mtf.star", frequencies=(0, 0.1, 0.25))
    done = run("postprocess", *command, "--mtf", path)
    assert done.code == 0
    line = f"the table of {path} ends at 8.00 A, and its last value is used from there "
    assert line + "to 4.00 A\n" in done.out


def test_a_b_factor_that_cannot_be_fitted(maps, tmp_path, run):
    """The same maps with voxels of 10 A."""
    for number, half in enumerate(halves_of(maps), start=1):
        write_mrc(tmp_path / f"half{number}.mrc", half, 10.0)
    write_mrc(tmp_path / "mask.mrc", read_mrc(maps / "mask.mrc")[0], 10.0)
    command = [tmp_path / "half1.mrc", tmp_path / "half2.mrc"]
    command += ["--mask", tmp_path / "mask.mrc", "--out", tmp_path / "out"]
    code, text, _ = run("postprocess", *command, "--auto-b-factor")
    assert code == 0 and "not sharpened: There must be at least 3 shells" in text
    content = json.loads((tmp_path / "out/postprocess.json").read_text())
    assert content["not_sharpened_because"] in text


def test_an_unset_voxel_size_is_the_other_maps(maps, tmp_path, run):
    """Of either map, here and for ``fsc``; without any it is 1 A."""
    for half in (1, 2):
        volume, _ = read_mrc(maps / f"half{half}.mrc")
        write_mrc(tmp_path / f"half{half}.mrc", volume, VOXEL)
        with mrcfile.open(tmp_path / f"half{half}.mrc", "r+") as mrc:
            mrc.voxel_size = 0
    given, unset = (
        [folder / f"half{half}.mrc" for half in (1, 2)] for folder in (maps, tmp_path)
    )
    found = tmp_path / "fsc.json"
    for one, two, voxel in (
        (given[0], unset[1], VOXEL),
        (unset[0], given[1], VOXEL),
        (*unset, 1.0),
    ):
        assert run("fsc", one, two, "--json", found).code == 0
        assert json.loads(found.read_text())["voxel_size_in_angstroms"] == voxel
        out = tmp_path / f"{one.parent.name}_{two.parent.name}"
        words = ["--mask", maps / "mask.mrc", "--out", out]
        assert run("postprocess", one, two, *words).code == 0
        report = json.loads((out / "postprocess.json").read_text())
        assert report["voxel_size_in_angstroms"] == voxel
    assert run("fsc", given[0], unset[1]).out == run("fsc", *given).out


def write_wrong(source, target, voxel):
    """Copy a map, with another voxel size in its header: a number, or three."""
    write_mrc(target, read_mrc(source)[0], VOXEL)
    with mrcfile.open(target, "r+") as mrc:
        mrc.voxel_size = voxel
    return target


def test_wrong_headers_can_be_overruled(maps, tmp_path, run):
    """Of maps and mask, here and for ``fsc``, even where they differ."""
    names = ("half1.mrc", "half2.mrc", "mask.mrc")
    right = [maps / name for name in names]
    wrong = [
        write_wrong(maps / name, tmp_path / name, voxel)
        for name, voxel in zip(names, (1.0, (3.0, 3.0, 4.0), 5.5), strict=True)
    ]
    overruled = ["--map-voxel-size", VOXEL]
    known = run("fsc", *right[:2], "--mask", right[2])
    assert known.code == 0
    assert run("fsc", *wrong[:2], "--mask", wrong[2], *overruled) == known
    for folder, words in (("exact", right), ("found", [*wrong, *overruled])):
        words[2:2] = ["--mask"]
        done = run("postprocess", *words, "--out", tmp_path / folder)
        assert (done.code, done.err) == (0, "")
    exact, voxel = read_mrc(tmp_path / "exact/postprocess.mrc")
    found, same = read_mrc(tmp_path / "found/postprocess.mrc")
    np.testing.assert_array_equal(found, exact)
    assert voxel == same == VOXEL
    write_wrong(right[1], wrong[1], 3.0)
    run("fsc", *wrong[:2]).assert_refused("same voxel size", "--map-voxel-size")
    write_wrong(right[1], wrong[1], 1.0)
    assert "--map-voxel-size" in run("fsc", *wrong[:2]).err
    refused = run("fsc", *wrong[:2], "--mask", wrong[2])
    refused.assert_refused("the mask must have the voxel size", "--map-voxel-size")


def test_bad_input_is_a_sentence(maps, tmp_path, run):
    one, two = maps / "half1.mrc", maps / "half2.mrc"
    small, coarse, nan = (tmp_path / f"{x}.mrc" for x in ("small", "coarse", "nan"))
    write_mrc(small, np.ones((12, 12, 12)), VOXEL)
    write_mrc(coarse, half_maps()[1], 2 * VOXEL)
    write_mrc(nan, half_maps()[1], VOXEL)
    with open(nan, "r+b") as file:
        file.seek(1024)
        file.write(np.float32("nan").tobytes())
    full, new = tmp_path / "full", tmp_path / "new"
    full.mkdir()
    (full / "notes.txt").touch()
    out = ("--out", new)
    good = write_mtf(tmp_path / "good.star")
    back = write_mtf(tmp_path / "back.star", frequencies=(0, 0.5, 0.5))
    zero = write_mtf(tmp_path / "zero.star", values=(1, 0.5, 0))
    percent = write_mtf(tmp_path / "percent.star", values=(100, 80, 40))
    write_star(tmp_path / "one.star", {"": {"rlnResolutionInversePixel": (0, 1)}})
    short = write_mtf(tmp_path / "short.star", frequencies=(0,), values=(1,))
    write_star(tmp_path / "fsc.star", {"": {"rlnResolution": (0, 1)}})
    for arguments, words in (
        ((one, maps / "absent.mrc", *out), "does not exist"),
        ((one, small, *out), "same size, got 24^3"),
        ((one, coarse, *out), "same voxel size, got 2 A"),
        ((one, nan, *out), "got 1 that are NaN"),
        ((one, one, *out), "got the same map twice"),
        (
            (one, two, *out, "--mask", small),
            "the mask must have the size of the maps",
        ),
        ((one, two, *out, "--mask", two), "half2.mrc must have values from 0"),
        ((one, two, *out, "--seed", "-1"), "--seed must be from 0 to 2147483647"),
        (
            (one, two, *out, "--low-pass", "0"),
            "--low-pass must be more than 0",
        ),
        ((one, two, *out, "--b-factor", "inf"), "--b-factor must be a finite number"),
        (
            (one, two, *out, "--mtf", back),
            "InversePixel: the value must be at least 0",
        ),
        (
            (one, two, *out, "--mtf", zero),
            "must be above 0 and at most 1.5 (it is 1 at frequency 0), got '0' (row 3)",
        ),
        ((one, two, *out, "--mtf", percent), "and at most 1.5 (it is 1 at frequency"),
        (
            (one, two, *out, "--mtf", tmp_path / "one.star"),
            "got none named rlnMtfValue",
        ),
        (
            (one, two, *out, "--mtf", good, "--detector-pixel-size", "4.5"),
            "at most twice the voxel size of 2 A",
        ),
        ((one, two, *out, "--mtf", short), "must have at least two rows, got 1"),
        ((one, two, *out, "--mtf", tmp_path / "fsc.star"), "have the columns rlnRes"),
        ((one, two, *out, "--detector-pixel-size", "1"), "must be given with --mtf"),
        ((one, two, "--out", full), "holds files but no postprocess.json"),
        ((one, two, "--out", small), "small.mrc must be a folder"),
        ((one, two, "--out", small / "new"), "cannot write"),
    ):
        run("postprocess", *arguments).assert_refused(words)
    assert not new.exists()
    assert [path.name for path in full.iterdir()] == ["notes.txt"]
    both = ("--b-factor", -9, "--auto-b-factor")
    run("postprocess", one, two, *out, *both).assert_refused("--b-factor")
