"""Post-processing: its curves, masks and filters by definition, and as RELION's."""

import shutil
import subprocess

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.spatial import cKDTree

from jaxrefine import simulate
from jaxrefine.errors import InputError
from jaxrefine.io import read_mrc, read_star, write_mrc
from jaxrefine.maps.filters import low_pass
from jaxrefine.maps.fsc import fsc
from jaxrefine.maps.mask import soft_mask
from jaxrefine.maps.postprocess import GuinierFit, postprocess

N, VOXEL = 32, 2.5
BOX = N * VOXEL
SHELLS = np.arange(N // 2 + 1)
KEY = jax.random.key(0)
ONES = jnp.ones((N, N, N))


def white(seed):
    return np.random.default_rng(seed).normal(size=(N, N, N))


def frequencies():
    k = np.fft.fftfreq(N, 1 / N)
    return np.sqrt(k[:, None, None] ** 2 + k[:, None] ** 2 + k**2)


def filtered(volume, transfer):
    return np.fft.ifftn(np.fft.fftn(volume) * transfer).real


@pytest.fixture(scope="module")
def phantom():
    return simulate.phantom(KEY, N, jnp.float64)


@pytest.fixture(scope="module")
def halves(phantom):
    """Two noisy halves, which agree to somewhere in the middle of the shells."""
    noise = 1.5 * float(phantom.std())
    return tuple(phantom + noise * jnp.asarray(white(seed)) for seed in (1, 2))


@pytest.fixture(scope="module")
def mask(phantom):
    return soft_mask(phantom, VOXEL, extend=2.0, edge=3.0)


# --- the mask


def balls():
    """Two balls of density 1, the larger one off the centre."""
    z, y, x = np.indices((N, N, N))
    large = (z - 14) ** 2 + (y - 17) ** 2 + (x - 13) ** 2 < 5.5**2
    small = (z - 26) ** 2 + (y - 26) ** 2 + (x - 26) ** 2 < 3**2
    return large, small


@pytest.mark.parametrize(("extend", "edge"), [(3.0, 6.0), (0.0, 4.0), (2.0, 0.0)])
def test_a_mask_is_the_largest_part_grown(extend, edge):
    """Distances by brute force; the filter's cut-off is beyond all frequencies."""
    large, small = balls()
    volume = jnp.asarray((large | small).astype(float))
    mask = soft_mask(
        volume,
        VOXEL,
        threshold=0.5,
        low_pass_in_angstroms=0.5,
        extend=extend,
        edge=edge,
    )
    points = np.indices((N, N, N)).reshape(3, -1).T
    distance = cKDTree(points[large.ravel()]).query(points)[0].reshape(N, N, N)
    expected = np.where(distance <= extend, 1.0, 0.0)
    if edge:
        inside = (distance > extend) & (distance < extend + edge)
        angle = np.pi * (distance[inside] - extend) / edge
        expected[inside] = (1 + np.cos(angle)) / 2
    np.testing.assert_allclose(mask, expected, atol=1e-12)


def test_a_mask_is_made_of_the_filtered_map():
    """A voxel of high density is noise, which the filter takes away."""
    large, _ = balls()
    spike = jnp.asarray(large.astype(float)).at[28, 28, 3].set(1.0)
    sharp, smooth = (
        soft_mask(spike, VOXEL, threshold=0.4, low_pass_in_angstroms=a, extend=0.0)
        for a in (0.5, 15.0)
    )
    assert sharp.max() == 1 and np.abs(sharp - smooth).max() > 0.1
    cut = frequencies() - BOX / 15
    transfer = 0.5 + 0.5 * np.cos(np.pi * np.clip((cut + 1) / 2, 0, 1))
    seed = filtered(np.asarray(spike), transfer) > 0.4
    np.testing.assert_array_equal(np.asarray(smooth) == 1, seed)


@pytest.mark.parametrize("noise", [0.0, 1.0, 4.0])
@pytest.mark.parametrize("scale", [1.0, -1e4])
def test_the_automatic_threshold_finds_the_particle(phantom, noise, scale):
    """Whatever the noise, and the scale and level of the map's densities."""
    volume = phantom + noise * float(phantom.std()) * jnp.asarray(white(3))
    mask = np.asarray(soft_mask(abs(scale) * volume + scale, 3.0))
    assert mask.min() == 0 and mask.max() == 1
    assert mask[np.asarray(phantom) > 0.2].min() == 1
    points = np.argwhere(np.asarray(phantom) > 0.02)
    distance = cKDTree(points).query(np.indices((N, N, N)).reshape(3, -1).T)[0]
    far = distance.reshape(N, N, N) > 13  # 9 of extension and edge, 4 of the filter
    assert far.mean() > 0.05 and mask[far].max() < 0.2


@pytest.mark.parametrize("name", ["hjc_90.mrc", "ptch1_84.mrc"])
def test_the_automatic_mask_of_a_real_map(data_dir, name):
    volume, voxel = read_mrc(data_dir / name)
    mask = np.asarray(soft_mask(jnp.asarray(volume), voxel))
    assert mask.dtype == np.float32
    assert volume[mask == 1].sum() > 0.999 * volume.sum()
    assert (mask > 0).mean() < 0.35


def test_a_mask_that_cannot_be_made(phantom):
    for changes, words in (
        ({"threshold": 9.0}, "below the largest density .* got 9"),
        ({"extend": -1.0}, "extend and edge must be at least 0, got -1 and 6"),
        ({"edge": -2.0}, "got 3 and -2"),
        (
            {"low_pass_in_angstroms": 0.0},
            "low-pass resolution must be positive, got 0 A",
        ),
    ):
        with pytest.raises(InputError, match=words):
            soft_mask(phantom, VOXEL, **changes)
    for volume in (ONES, ONES.at[3, 3, 3].set(jnp.nan)):
        with pytest.raises(InputError, match="must be finite and not constant"):
            soft_mask(volume, VOXEL)
    with pytest.raises(InputError, match="pixel size must be positive, got nan A"):
        soft_mask(phantom, float("nan"))


# --- the curves


def test_curves_are_those_of_the_definition(halves, mask):
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
    radius = BOX / result.resolution_in_angstroms
    assert np.interp(radius, SHELLS, true) == pytest.approx(0.143)
    assert (true[1 : int(radius) + 1] >= 0.143).all()


def test_phases_are_random_from_their_shell_on(halves):
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
    common = filtered(np.asarray(phantom), frequencies() <= 5)
    level = 0.3 * common.std()
    sharp = soft_mask(phantom, VOXEL, extend=0.0, edge=0.0)
    means = []
    for seed in range(4):
        noise = level * white(seed), level * white(10 + seed)
        halves = [jnp.asarray(common + part) for part in noise]
        result = postprocess(*halves, sharp, VOXEL, key=jax.random.key(seed))
        assert 5 <= result.randomised_from <= 7
        beyond = slice(9, None)
        curves = result.fsc_unmasked, result.fsc_masked, result.fsc_true
        means.append([np.mean(curve[beyond]) for curve in curves])
    unmasked, masked, true = np.mean(means, axis=0)
    assert abs(unmasked) < 0.02 and abs(true) < 0.05 and masked > 0.2


def test_halves_that_agree_to_the_end(phantom, mask):
    halves = [phantom + 1e-6 * jnp.asarray(white(seed)) for seed in (6, 7)]
    result = postprocess(*halves, mask, VOXEL, key=KEY)
    assert result.randomised_from == N // 2 + 1
    np.testing.assert_array_equal(result.fsc_true, result.fsc_masked)
    assert result.resolution_in_angstroms == pytest.approx(2 * VOXEL)


# --- the filter


@pytest.mark.parametrize(
    ("b_factor", "cut_off"), [(None, 9.0), (-90.0, 7.3), (60.0, None)]
)
def test_the_map_is_the_weighted_mean(halves, mask, b_factor, cut_off):
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
    true, frequency = result.fsc_true, frequencies()
    shell = np.rint(frequency)
    weight = np.where(shell == 0, 1.0, 0.0)
    for r in SHELLS[1:]:
        if true[r] <= 0:
            break
        weight[shell == r] = np.sqrt(2 * true[r] / (1 + true[r]))
    radius = BOX / (cut_off or result.resolution_in_angstroms)
    place = np.clip((frequency - radius + 1) / 2, 0, 1)
    weight *= 0.5 + 0.5 * np.cos(np.pi * place)
    weight *= np.exp(-(b_factor or 0) / 4 * (frequency / BOX) ** 2)
    expected = filtered(np.mean(halves, axis=0), weight)
    np.testing.assert_allclose(result.volume, expected, atol=1e-12)
    np.testing.assert_allclose(result.masked_volume, expected * mask, atol=1e-12)


@pytest.mark.parametrize("b_factor", [150.0, 80.0])
def test_the_b_factor_that_was_applied_is_found(b_factor):
    """White noise under a Gaussian: the sharpened spectrum is flat again."""
    decay = np.exp(-b_factor / 4 * (frequencies() / BOX) ** 2)
    common = filtered(white(8), decay)
    halves = [jnp.asarray(common + 0.01 * white(seed)) for seed in (9, 10)]
    result = postprocess(
        *halves, ONES, VOXEL, key=KEY, b_factor_in_square_angstroms=GuinierFit()
    )
    # Ten shells from 10 A to 5 A, of amplitudes known to 0.5 / sqrt(2 pi r^2): 2 A^2.
    found = result.b_factor_in_square_angstroms
    assert found == pytest.approx(-b_factor, abs=8)
    amplitude = np.abs(np.fft.fftn(result.volume))
    shell = np.rint(frequencies())
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


def test_a_b_factor_is_not_fitted_at_low_resolution(halves, mask):
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


def test_bad_input_is_a_sentence(halves, mask):
    one, two = halves
    nan = one.at[0, 0, 0].set(jnp.nan)
    small = jnp.ones((8, 8, 8))
    for maps, words in (
        ((one, small, mask), "second half map must .* 32 x 32 x 32, got 8 x 8 x 8"),
        ((one, two, small), "The mask must have the size .* got 8 x 8 x 8"),
        ((nan, two, mask), "must be finite"),
        ((one, one, mask), "two sets of particles, got the same map"),
        ((one, two, 2 * mask), "The mask must have values .* got 0 to 2"),
        ((one, two, -mask), "The mask must have values .* got -1 to"),
        ((one, two, 0 * mask), "The mask must have values .* got 0 to 0"),
        ((one, two, nan), "The mask must have values .* got nan"),
        ((one, 0 * two, mask), "The second half map is zero within the mask"),
    ):
        with pytest.raises(InputError, match=words):
            postprocess(*maps, VOXEL, key=KEY)
    for changes, words in (
        (
            {"low_pass_in_angstroms": -3.0},
            "low-pass resolution must be positive, got -3 A",
        ),
        (
            {"b_factor_in_square_angstroms": float("nan")},
            "B factor must be finite .* got nan",
        ),
        ({"b_factor_in_square_angstroms": -1e6}, "less than .* got -1e"),
    ):
        with pytest.raises(InputError, match=words):
            postprocess(*halves, mask, VOXEL, key=KEY, **changes)
    with pytest.raises(InputError, match="pixel size must be positive, got 0 A"):
        postprocess(*halves, mask, 0.0, key=KEY)


# --- RELION

COLUMNS = {
    "unmasked": "rlnFourierShellCorrelationUnmaskedMaps",
    "masked": "rlnFourierShellCorrelationMaskedMaps",
    "randomised": "rlnCorrectedFourierShellCorrelationPhaseRandomizedMaskedMaps",
    "true": "rlnFourierShellCorrelationCorrected",
}


@pytest.fixture(scope="module")
def case(tmp_path_factory, phantom):
    """Files for RELION, and the same arrays."""
    if shutil.which("relion_postprocess") is None:
        pytest.skip("relion_postprocess is not installed")
    folder = tmp_path_factory.mktemp("relion")
    noisy = (phantom + phantom.std() * jnp.asarray(white(seed)) for seed in (1, 2))
    halves = [half.astype(jnp.float32) for half in noisy]
    mask = soft_mask((halves[0] + halves[1]) / 2, VOXEL)
    for name, volume in zip(("half1", "half2", "mask"), (*halves, mask), strict=True):
        write_mrc(folder / f"{name}_class001_unfil.mrc", volume, VOXEL)
    return folder, halves, mask


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


def test_curves_and_resolution_are_relions(case):
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
    end = f"{result.resolution_in_angstroms:.4f}"
    tables, *_ = relion(folder, "--auto_bfac", "--autob_highres", end)
    theirs = {k: np.array(tables["fsc"][v], float) for k, v in COLUMNS.items()}
    once = np.where(np.isin(SHELLS, (0, N // 2)), 0.5, 1.0)
    for name, masking in (("unmasked", 1.0), ("masked", np.asarray(mask, float))):
        pair = [np.asarray(half, float) * masking for half in halves]
        ours = getattr(result, f"fsc_{name}")
        np.testing.assert_allclose(ours, half_space_fsc(*pair, once), atol=1e-5)
        np.testing.assert_allclose(theirs[name], half_space_fsc(*pair, 1.0), atol=2e-5)
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
    assert 0 <= BOX / result.resolution_in_angstroms - last <= 1
    b_factor = float(general["rlnBfactorUsedForSharpening"])
    assert result.b_factor_in_square_angstroms == pytest.approx(b_factor, rel=0.1)


@pytest.mark.parametrize("b_factor", [None, -100.0])
def test_the_filtered_map_is_relions(case, b_factor):
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


def test_low_pass_keeps_what_is_below_and_nothing_beyond():
    volume = jnp.asarray(np.random.default_rng(0).normal(size=(N, N, N)))
    shell = 5
    found = low_pass(volume, VOXEL, N * VOXEL / shell)
    before, after = (np.fft.rfftn(np.asarray(one)) for one in (volume, found))
    axis = np.fft.fftfreq(N, 1 / N)
    radius = np.sqrt(
        axis[:, None, None] ** 2 + axis[:, None] ** 2 + np.arange(N // 2 + 1) ** 2
    )
    inside, beyond = radius <= shell - 1, radius >= shell + 1
    np.testing.assert_allclose(after[inside], before[inside], rtol=1e-4)
    assert np.abs(after[beyond]).max() < 1e-4 * np.abs(before).max()
    at = np.isclose(radius, shell)
    np.testing.assert_allclose(after[at], before[at] / 2, rtol=1e-4)
