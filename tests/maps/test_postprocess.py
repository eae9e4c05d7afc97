"""Post-processing: its curves, its filter and its B factor by definition.

The correction by random phases takes away what a mask adds, and curves, resolution and
maps are RELION's, where it is installed.
"""

import shutil
import subprocess
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import fft_radii, there
from jaxtyping import Array

from jaxrefine import simulate
from jaxrefine.errors import InputError
from jaxrefine.io import read_mrc, read_mtf, read_star, write_mrc, write_star
from jaxrefine.maps.detector import ModulationTransfer
from jaxrefine.maps.fsc import fsc, resolution
from jaxrefine.maps.mask import soft_mask
from jaxrefine.maps.postprocess import GuinierFit, postprocess

N, VOXEL = 32, 2.5
BOX = N * VOXEL
SHELLS = np.arange(N // 2 + 1)
KEY = jax.random.key(0)
ONES = jnp.ones((N, N, N))

Halves = tuple[Array, Array]


def white(seed):
    return np.random.default_rng(seed).normal(size=(N, N, N))


def filtered(volume, transfer):
    return np.fft.ifftn(np.fft.fftn(volume) * transfer).real


def noisy_halves(volume, level: float, seed1: int, seed2: int) -> Halves:
    """A volume twice, each time with white noise of its own."""
    half1, half2 = (jnp.asarray(volume + level * white(s)) for s in (seed1, seed2))
    return half1, half2


@pytest.fixture(scope="module")
def phantom():
    return simulate.phantom(KEY, N, jnp.float64)


@pytest.fixture(scope="module")
def halves(phantom) -> Halves:
    """Two noisy halves, which agree to somewhere in the middle of the shells."""
    return noisy_halves(phantom, 1.5 * float(phantom.std()), 1, 2)


@pytest.fixture(scope="module")
def mask(phantom):
    return soft_mask(phantom, VOXEL, extend=2.0, edge=3.0)


# --- the curves


@pytest.mark.slow
def test_curves_are_those_of_the_definition(halves: Halves, mask):
    result = postprocess(*halves, mask, VOXEL, key=KEY)
    np.testing.assert_allclose(result.fsc_unmasked, fsc(*halves), atol=1e-12)
    masked = fsc(*(half * mask for half in halves))
    np.testing.assert_allclose(result.fsc_masked, masked, atol=1e-12)
    first = result.randomised_from
    assert 2 < first < N // 2 - 3, "the case must have both kinds of shells"
    assert (result.fsc_unmasked[1:first] >= 0.8).all()
    assert result.fsc_unmasked[first] < 0.8
    true, noise = result.fsc_true, result.fsc_randomised
    np.testing.assert_array_equal(true[: first + 2], result.fsc_masked[: first + 2])
    # Chen et al. (2013): what remains of the masked curve, on the scale of what could.
    remains = (result.fsc_masked - noise)[first + 2 :] / (1 - noise[first + 2 :])
    np.testing.assert_allclose(true[first + 2 :], remains, atol=1e-12)
    radius = BOX / result.resolution.in_angstroms
    assert np.interp(radius, SHELLS, true) == pytest.approx(0.143)
    assert (true[1 : int(radius) + 1] >= 0.143).all()


def test_phases_are_random_from_their_shell_on(halves: Halves):
    """Without a mask the curve is as it was, then zero but for its spread."""
    result = postprocess(*halves, ONES, VOXEL, key=KEY)
    first = result.randomised_from
    # A shell's edge is a frequency's length, so that of the shell before is mixed.
    kept = slice(0, first - 1)
    np.testing.assert_allclose(
        result.fsc_randomised[kept], result.fsc_unmasked[kept], atol=1e-12
    )
    beyond = result.fsc_randomised[first + 1 :]
    spread = 1 / np.sqrt(2 * np.pi * SHELLS[first + 1 :] ** 2)
    assert (np.abs(beyond) < 5 * spread).all()
    assert np.abs(beyond / spread).max() > 0.1
    other = postprocess(*halves, ONES, VOXEL, key=jax.random.key(1))
    assert np.abs(other.fsc_randomised - result.fsc_randomised)[first:].max() > 1e-3
    np.testing.assert_array_equal(other.fsc_masked, result.fsc_masked)


def test_the_correction_takes_away_what_the_mask_adds(phantom):
    """A sharp mask makes halves agree where they share no signal at all."""
    common = filtered(np.asarray(phantom), fft_radii(N) <= 5)
    level = 0.3 * common.std()
    sharp = soft_mask(phantom, VOXEL, extend=0.0, edge=0.0)
    means = []
    for seed in range(4):
        halves = noisy_halves(common, level, seed, 10 + seed)
        result = postprocess(*halves, sharp, VOXEL, key=jax.random.key(seed))
        assert 5 <= result.randomised_from <= 7
        beyond = slice(9, None)
        curves = result.fsc_unmasked, result.fsc_masked, result.fsc_true
        means.append([np.mean(curve[beyond]) for curve in curves])
    unmasked, masked, true = np.mean(means, axis=0)
    assert abs(unmasked) < 0.02 and abs(true) < 0.05 and masked > 0.2


def test_halves_that_agree_to_the_end_have_a_bound_for_their_resolution(phantom, mask):
    """The period of the last complete shell, in the row as in the text."""
    halves = noisy_halves(phantom, 1e-6, 6, 7)
    result = postprocess(*halves, mask, VOXEL, key=KEY)
    assert result.randomised_from == N // 2 + 1
    np.testing.assert_array_equal(result.fsc_true, result.fsc_masked)
    assert result.resolution == resolution(result.fsc_true, N, VOXEL)
    assert result.resolution.in_angstroms == pytest.approx(BOX / (N // 2 - 1))
    row = result.row()
    assert row["resolution_in_angstroms"] == result.resolution.in_angstroms
    assert row["resolution_is_a_bound"] is True
    text = f"{row['resolution_in_angstroms']:.2f} A or better"
    assert result.resolution.text() == text


# --- the filter


@pytest.mark.parametrize(
    ("b_factor", "cut_off"), [(None, 9.0), (-90.0, 7.3), (60.0, None)]
)
def test_the_map_is_the_weighted_mean(halves: Halves, mask, b_factor, cut_off):
    result = postprocess(
        *halves,
        mask,
        VOXEL,
        key=KEY,
        b_factor_in_square_angstroms=b_factor,
        low_pass_in_angstroms=cut_off,
    )
    assert result.b_factor_in_square_angstroms == b_factor
    assert result.not_sharpened_because is None
    # Shell by shell; the curve falls to zero before the last shells.
    true, frequency = result.fsc_true, fft_radii(N)
    shell = np.rint(frequency)
    weight = np.where(shell == 0, 1.0, 0.0)
    for r in SHELLS[1:]:
        if true[r] <= 0:
            break
        weight[shell == r] = np.sqrt(2 * true[r] / (1 + true[r]))
    radius = BOX / (cut_off or result.resolution.in_angstroms)
    place = np.clip((frequency - radius + 1) / 2, 0, 1)
    weight *= 0.5 + 0.5 * np.cos(np.pi * place)
    weight *= np.exp(-(b_factor or 0) / 4 * (frequency / BOX) ** 2)
    expected = filtered(np.mean(halves, axis=0), weight)
    np.testing.assert_allclose(result.volume, expected, atol=1e-12)
    np.testing.assert_allclose(result.masked_volume, expected * mask, atol=1e-12)


@pytest.mark.parametrize("b_factor", [150.0, 80.0])
def test_the_b_factor_that_was_applied_is_found(b_factor):
    """White noise under a Gaussian: the sharpened spectrum is flat again."""
    decay = np.exp(-b_factor / 4 * (fft_radii(N) / BOX) ** 2)
    common = filtered(white(8), decay)
    halves = noisy_halves(common, 0.01, 9, 10)
    result = postprocess(
        *halves, ONES, VOXEL, key=KEY, b_factor_in_square_angstroms=GuinierFit()
    )
    # Ten shells from 10 A to 5 A, of amplitudes known to 0.5 / sqrt(2 pi r^2): 2 A^2.
    found = result.b_factor_in_square_angstroms
    assert found == pytest.approx(-b_factor, abs=8)
    amplitude = np.abs(np.fft.fftn(result.volume))
    shell = np.rint(fft_radii(N))
    means = [amplitude[shell == r].mean() for r in range(4, N // 2 - 1)]
    flat = np.mean(
        [np.abs(np.fft.fftn(white(8)))[shell == r].mean() for r in range(4, 12)]
    )
    np.testing.assert_allclose(means, flat, rtol=0.1)
    # The fit begins where it is told to.
    narrow = GuinierFit(from_in_angstroms=7.0)
    other = postprocess(
        *halves, ONES, VOXEL, key=KEY, b_factor_in_square_angstroms=narrow
    )
    assert other.b_factor_in_square_angstroms != found
    assert other.b_factor_in_square_angstroms == pytest.approx(-b_factor, abs=30)


def test_a_b_factor_is_not_fitted_at_low_resolution(halves: Halves, mask):
    """The same maps with voxels of 8 A: all is coarser than 10 A."""
    result, plain = (
        postprocess(*halves, mask, 8.0, key=KEY, b_factor_in_square_angstroms=b)
        for b in (GuinierFit(), None)
    )
    assert result.b_factor_in_square_angstroms is None
    sentence = result.not_sharpened_because
    assert sentence is not None and "from 10 A to the resolution of" in sentence
    assert "at least 3 shells to fit a B factor to, got 0" in sentence
    np.testing.assert_array_equal(result.volume, plain.volume)


def test_bad_input_is_a_sentence(halves: Halves, mask):
    one, two = halves
    nan = one.at[0, 0, 0].set(jnp.nan)
    small = jnp.ones((8, 8, 8))
    for maps, words in (
        ((one, small, mask), "second half map must .* 32 x 32 x 32, got 8 x 8 x 8"),
        ((one, two, small), "the mask must have the size .* got 8 x 8 x 8"),
        ((nan, two, mask), "must be finite"),
        ((one, one, mask), "two sets of particles, got the same map"),
        ((one, two, 2 * mask), "the mask must have values .* got 0 to 2"),
        ((one, two, -mask), "the mask must have values .* got -1 to"),
        ((one, two, 0 * mask), "the mask must have values .* got 0 to 0"),
        ((one, two, nan), "the mask must have values .* got nan"),
        ((one, 0 * two, mask), "the second half map must not be zero within the mask"),
    ):
        with pytest.raises(InputError, match=words):
            postprocess(*maps, VOXEL, key=KEY)
    cases: tuple[tuple[dict[str, Any], str], ...] = (
        (
            {"low_pass_in_angstroms": -3.0},
            "low-pass resolution must be positive, got -3 A",
        ),
        (
            {"b_factor_in_square_angstroms": float("nan")},
            "B factor must be finite .* got nan",
        ),
        ({"b_factor_in_square_angstroms": -1e6}, "less than .* got -1e"),
        (
            {"mtf": ModulationTransfer(np.arange(2.0), np.ones(2), 0.0)},
            "the detector's pixel size must be positive, got 0 A",
        ),
        (
            {"mtf": ModulationTransfer(np.arange(2.0), np.ones(2), 5.2)},
            "at most twice the voxel size of 2.5 A, .*super-resolution.*, got 5.2 A",
        ),
    )
    for changes, words in cases:
        with pytest.raises(InputError, match=words):
            postprocess(*halves, mask, VOXEL, key=KEY, **changes)
    with pytest.raises(InputError, match="voxel size must be positive, got 0 A"):
        postprocess(*halves, mask, 0.0, key=KEY)


def test_the_map_is_divided_by_the_detectors_function(halves: Halves, mask):
    """Like any filter of the mean; the fit of a B factor sees it, and no curve does."""
    decay, pixel, rows = 100.0, 1.5, np.linspace(0, 0.5, 301)
    mtf = ModulationTransfer(rows, np.exp(-decay / 4 * (rows / pixel) ** 2), pixel)
    fit = GuinierFit(from_in_angstroms=20.0)
    plain, divided = (
        postprocess(
            *halves, mask, VOXEL, key=KEY, b_factor_in_square_angstroms=fit, mtf=given
        )
        for given in (None, mtf)
    )
    before, after = (
        there(result.b_factor_in_square_angstroms) for result in (plain, divided)
    )
    assert after - before == pytest.approx(decay, abs=2)
    gain = np.exp((decay - (after - before)) / 4 * (fft_radii(N) / BOX) ** 2)
    exact = filtered(np.asarray(plain.volume), gain)
    np.testing.assert_allclose(divided.volume, exact, atol=1e-4 * np.abs(exact).max())
    np.testing.assert_array_equal(divided.fsc_true, plain.fsc_true)


@pytest.mark.parametrize(
    ("cut_off", "pixel"), [(8.0, 1.25 * VOXEL), (1.6 * VOXEL, VOXEL)]
)
def test_a_division_by_almost_nothing_spoils_no_other_frequency(
    phantom, cut_off, pixel
):
    """In single precision: beyond the low pass, and from the Nyquist frequency on."""
    halves = noisy_halves(phantom, 1e-6, 6, 7)
    one, two, ones = (each.astype(jnp.float32) for each in (*halves, ONES))
    mtf = ModulationTransfer(
        np.array([0, 0.499, 0.5]), np.array([1, 0.3, 1e-10]), pixel
    )
    plain, divided = (
        postprocess(
            one, two, ones, VOXEL, key=KEY, low_pass_in_angstroms=cut_off, mtf=given
        ).volume
        for given in (None, mtf)
    )
    frequency = fft_radii(N)
    gain = np.where(frequency < N / 2, 1 / mtf(frequency / BOX), 1.0)
    gain *= frequency < BOX / cut_off + 1
    exact = filtered(np.asarray(plain, float), gain)
    np.testing.assert_allclose(divided, exact, atol=1e-5 * np.abs(exact).max())


def test_the_detectors_function_is_constant_beyond_its_table():
    mtf = ModulationTransfer(np.array([0.1, 0.2, 0.4]), np.array([0.9, 0.7, 0.3]), 2.0)
    found = mtf(np.array([0, 0.02, 0.05, 0.075, 0.15, 0.2, 0.21, 9]))
    exact = [0.9, 0.9, 0.9, 0.8, 0.5, 0.3, 0.3, 0.3]
    np.testing.assert_allclose(found, exact, rtol=1e-12)


# --- RELION

COLUMNS = {
    "unmasked": "rlnFourierShellCorrelationUnmaskedMaps",
    "masked": "rlnFourierShellCorrelationMaskedMaps",
    "randomised": "rlnCorrectedFourierShellCorrelationPhaseRandomizedMaskedMaps",
    "true": "rlnFourierShellCorrelationCorrected",
}


Case = tuple[Path, Halves, Array]


@pytest.fixture(scope="module")
def case(tmp_path_factory, phantom) -> Case:
    """Files for RELION, and the same arrays."""
    if shutil.which("relion_postprocess") is None:
        pytest.skip("relion_postprocess is not installed")
    folder = tmp_path_factory.mktemp("relion")
    halves = noisy_halves(phantom, float(phantom.std()), 1, 2)
    half1, half2 = (half.astype(jnp.float32) for half in halves)
    mask = soft_mask((half1 + half2) / 2, VOXEL)
    for name, volume in (("half1", half1), ("half2", half2), ("mask", mask)):
        write_mrc(folder / f"{name}_class001_unfil.mrc", volume, VOXEL)
    return folder, (half1, half2), mask


def relion(folder, *options):
    """Run it; return its tables, its map and its masked map."""
    out = folder / "out"
    out.mkdir(exist_ok=True)
    # It leaves a report alone that is there, and would need Ghostscript to make one.
    (out / "logfile.pdf").touch()
    names = [f"{name}_class001_unfil.mrc" for name in ("half1", "half2", "mask")]
    command = ["relion_postprocess", "--i", names[0], "--i2", names[1]]
    command += ["--mask", names[2], "--o", "out/post", "--angpix", f"{VOXEL}"]
    done = subprocess.run(
        [*command, *options], cwd=folder, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    maps = [read_mrc(out / f"{name}.mrc")[0] for name in ("post", "post_masked")]
    return read_star(out / "post.star"), *maps


def half_space_fsc(a, b, weights):
    """FSC over the half space of ``rfftn``, each column with a weight."""
    k, half = np.fft.fftfreq(N, 1 / N), np.arange(N // 2 + 1)
    radius = np.sqrt(k[:, None, None] ** 2 + k[:, None] ** 2 + half**2)
    shell = np.rint(radius).astype(int).ravel()
    fa, fb = (np.fft.rfftn(np.asarray(v, float), axes=(0, 1, 2)) for v in (a, b))
    cross, pa, pb = (
        np.bincount(shell, (weights * v).ravel())[: N // 2 + 1]
        for v in ((fa * fb.conj()).real, abs(fa) ** 2, abs(fb) ** 2)
    )
    return cross / np.sqrt(pa * pb)


def test_curves_and_resolution_are_relions(case: Case):
    """RELION counts the plane x = 0 twice; but for this the curves are the same."""
    folder, halves, mask = case
    result = postprocess(
        *halves,
        mask,
        VOXEL,
        key=KEY,
        b_factor_in_square_angstroms=GuinierFit(),
    )
    # Their fit has no end unless it is told; ours ends at the resolution.
    end = f"{result.resolution.in_angstroms:.4f}"
    tables, *_ = relion(folder, "--auto_bfac", "--autob_highres", end)
    theirs = {k: np.array(tables["fsc"][v], float) for k, v in COLUMNS.items()}
    once = np.where(np.isin(SHELLS, (0, N // 2)), 0.5, 1.0)
    for name, masking in (("unmasked", 1.0), ("masked", np.asarray(mask, float))):
        a, b = (np.asarray(half, float) * masking for half in halves)
        ours = getattr(result, f"fsc_{name}")
        np.testing.assert_allclose(ours, half_space_fsc(a, b, once), atol=1e-5)
        np.testing.assert_allclose(theirs[name], half_space_fsc(a, b, 1.0), atol=2e-5)
        np.testing.assert_allclose(ours, theirs[name], atol=0.02)
    # Their phases are others.
    assert np.abs(result.fsc_randomised - theirs["randomised"]).mean() < 0.04
    assert np.abs(result.fsc_true - theirs["true"]).mean() < 0.02
    general = {k: v[0] for k, v in tables["general"].items()}
    assert BOX / result.randomised_from == pytest.approx(
        float(general["rlnRandomiseFrom"]), rel=1e-5
    )
    # Theirs is the last shell before the crossing.
    last = BOX / float(general["rlnFinalResolution"])
    assert 0 <= BOX / result.resolution.in_angstroms - last <= 1
    b_factor = float(general["rlnBfactorUsedForSharpening"])
    assert result.b_factor_in_square_angstroms == pytest.approx(b_factor, rel=0.1)


@pytest.mark.parametrize("b_factor", [None, -100.0])
def test_the_filtered_map_is_relions(case: Case, b_factor):
    folder, halves, mask = case
    options = [] if b_factor is None else ["--adhoc_bfac", f"{b_factor}"]
    _, volume, masked = relion(folder, *options, "--low_pass", "8")
    result = postprocess(
        *halves,
        mask,
        VOXEL,
        key=KEY,
        b_factor_in_square_angstroms=b_factor,
        low_pass_in_angstroms=8.0,
    )
    for theirs, ours in ((volume, result.volume), (masked, result.masked_volume)):
        ours = np.asarray(ours)
        assert np.corrcoef(theirs.ravel(), ours.ravel())[0, 1] > 0.99999
        assert np.vdot(theirs, ours) / np.vdot(ours, ours) == pytest.approx(1, abs=1e-3)


def test_the_division_by_the_detectors_function_is_relions(case: Case):
    """Its map without it, divided by ours; voxels are twice the detector's pixels.

    For many evenly spaced rows: its lookup in others is not linear interpolation. It
    divides by nothing from the Nyquist frequency on, of which the second map has some.
    """
    folder, halves, mask = case
    rows = np.linspace(0, 0.5, 501)
    values = 1 - 1.6 * rows + 0.4 * rows**2
    columns = {"rlnResolutionInversePixel": rows, "rlnMtfValue": values}
    write_star(folder / "mtf.star", {"": columns})
    mtf = read_mtf(folder / "mtf.star", VOXEL / 2)
    frequency = fft_radii(N)
    gain = np.where(frequency < N / 2, 1 / mtf(frequency / BOX), 1.0)
    division = ["--mtf", "mtf.star", "--mtf_angpix", f"{VOXEL / 2}"]

    def difference(other, exact):
        return np.linalg.norm(exact - other) / np.linalg.norm(exact)

    for options in (
        ["--low_pass", "4", "--skip_fsc_weighting"],
        ["--adhoc_bfac", "-100", "--low_pass", "8"],
    ):
        _, plain, _ = relion(folder, *options)
        _, divided, _ = relion(folder, *options, *division)
        assert difference(filtered(plain.astype(float), gain), divided) < 1e-6
        assert difference(plain, divided) > 0.1
    ours = postprocess(
        *halves,
        mask,
        VOXEL,
        key=KEY,
        b_factor_in_square_angstroms=-100.0,
        low_pass_in_angstroms=8.0,
        mtf=mtf,
    ).volume
    assert difference(np.asarray(ours), divided) < 5e-3  # their phases are others


@pytest.mark.parametrize("which", [0, 1])
def test_a_half_map_of_one_hot_voxel_is_refused(which):
    first, second = (jnp.asarray(white(seed)).astype(jnp.float32) for seed in (1, 2))
    first = first.at[3, 4, 5].set(3e38 if which == 0 else first[3, 4, 5])
    second = second.at[3, 4, 5].set(3e38 if which == 1 else second[3, 4, 5])
    name = ("first", "second")[which]
    with pytest.raises(
        InputError, match=f"the {name} half map .* voxels of up to 3e.38"
    ):
        postprocess(first, second, ONES.astype(jnp.float32), VOXEL, key=KEY)
