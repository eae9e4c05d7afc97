"""Folds of particles: every sum against the dense one, every choice against a scan."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrefine.geometry import Poses
from jaxrefine.maps import admm, folds, tv
from jaxrefine.maps.filters import filter_shells
from jaxrefine.maps.noise import ShellSums, noise_power, shell_sums
from jaxrefine.maps.sums import Sums, data_term, insert, least_squares, solve
from jaxrefine.operators import slices
from jaxrefine.operators.gridding import Gridding

N, R_MAX, P = 16, 7, 6
# Relative error of this on white noise: see test_gridding.
INSERTION, ERROR = Gridding(6, 2.0), 1e-4
DISC = slices.disc(N, R_MAX)
K = len(DISC.shells)
QUADRATURE = np.asarray(DISC.quadrature)
insert = eqx.filter_jit(insert)
shell_sums = eqx.filter_jit(shell_sums)
filter_shells = jax.jit(filter_shells)


def draw(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape))


def draw_poses(count=P, seed=1):
    rng = np.random.default_rng(seed)
    angles, shifts = rng.uniform(-np.pi, np.pi, (count, 3)), rng.normal(size=(count, 2))
    return Poses(jnp.asarray(angles), jnp.asarray(shifts))


def relative(value, exact):
    value, exact = np.asarray(value), np.asarray(exact)
    return np.linalg.norm(value - exact) / np.linalg.norm(exact)


def points_of(poses):
    """The frequencies of all slices, ``(P, k, 3)``."""
    omega = np.asarray(DISC.frequencies)
    return np.einsum("ki,pij->pkj", omega, np.asarray(poses.rotations)[:, :2])


def lattice(last):
    """Points ``(x, y, z)``, indexed ``[z, y, x]``, of integers from ``last``."""
    z, y, x = np.meshgrid(last, last, last, indexing="ij")
    return np.stack([x.ravel(), y.ravel(), z.ravel()])


def dense(poses, transfer):
    """The matrix from voxels to the spectra, ``(P, k, n**3)``: the definition."""
    waves = np.exp(-2j * np.pi / N * points_of(poses) @ lattice(np.arange(N) - N // 2))
    move = np.asarray(poses.shifts) @ np.asarray(DISC.frequencies).T
    gain = np.exp(-2j * np.pi / N * move)
    return (gain if transfer is None else gain * np.asarray(transfer))[
        ..., None
    ] * waves


class Images:
    """Random spectra at random poses, with optics and weights of their own."""

    def __init__(self, with_transfer=True):
        self.poses = draw_poses()
        self.spectra = jax.lax.complex(draw(P, K, seed=2), draw(P, K, seed=3))
        self.transfer = draw(P, K, seed=4) if with_transfer else None
        self.weights = jnp.abs(draw(P, K, seed=5))
        self.matrix = dense(self.poses, self.transfer)
        self.both = QUADRATURE * np.asarray(self.weights)

    def sums(self, some=slice(None)):
        return insert(
            INSERTION,
            DISC,
            self.spectra[some],
            Poses(self.poses.angles[some], self.poses.shifts[some]),
            None if self.transfer is None else self.transfer[some],
            self.weights[some],
        )

    def cost(self, c, data):
        """The weighted sum of squares, with and without the images."""
        residual = self.matrix @ np.asarray(c).ravel() - data
        return 0.5 * np.sum(self.both * np.abs(residual) ** 2)


@pytest.fixture(scope="module")
def images():
    return Images()


@pytest.fixture(scope="module")
def whole(images):
    return images.sums()


# --- Sums


@pytest.mark.parametrize("with_transfer", [True, False])
def test_insert_is_the_dense_sum(with_transfer):
    """Weights once, transfer once in the images and twice in the kernel."""
    images = Images(with_transfer)
    sums = images.sums()
    weighted = images.both * np.asarray(images.spectra)
    backprojection = np.einsum("pkv,pk->v", images.matrix.conj(), weighted).real
    assert relative(np.ravel(sums.backprojection), backprojection) < ERROR
    density = images.both * np.abs(images.matrix[..., 0]) ** 2
    lags = 2 * np.pi / N * lattice(np.arange(1 - N, N))
    kernel = density.ravel() @ np.cos(points_of(images.poses).reshape(-1, 3) @ lags)
    assert sums.kernel.shape == (2 * N - 1,) * 3
    assert relative(np.ravel(sums.kernel), kernel) < ERROR
    assert float(sums.peak) == pytest.approx(density.sum(), rel=ERROR)


def test_sums_add_up(images, whole):
    parts = [images.sums(slice(0, 3)), images.sums(slice(3, 6))]
    total = Sums.zero(N, jnp.float64) + parts[0] + parts[1]
    for value, exact in zip(
        jax.tree.leaves(total), jax.tree.leaves(whole), strict=True
    ):
        assert relative(value, exact) < 1e-12


def test_the_data_term_is_the_sum_of_squares(images, whole):
    """Of the images' residuals, less the energy of the images."""
    data = data_term(whole)
    spectra = np.asarray(images.spectra)
    energy = images.cost(np.zeros((N, N, N)), spectra)
    for seed in range(3):
        c = draw(N, N, N, seed=seed)
        exact = images.cost(c, spectra) - energy
        value = float(folds.prediction_error(data, c))
        assert value == pytest.approx(exact, abs=ERROR * energy, rel=10 * ERROR)
        # And what project() makes of the map has that residual.
        spectrum = INSERTION.spectrum(c, R_MAX)
        seen = slices.project(spectrum, DISC, images.poses, images.transfer)
        residual = np.abs(np.asarray(seen) - spectra) ** 2
        again = 0.5 * np.sum(images.both * residual) - energy
        assert value == pytest.approx(again, abs=ERROR * energy, rel=10 * ERROR)


def test_folds_are_made_of_each_other(noisy):
    """A fold's map is the solution for the other fold's images, to the last bit."""
    tau, penalty = jnp.asarray(1.3), tv.IsotropicTV()
    maps = noisy.solutions(tau)
    for found, other in zip(maps, noisy.sums[::-1], strict=True):
        data = data_term(other)
        alone = solve(data, other.peak, noisy.starts[0], tau, penalty, 10)
        np.testing.assert_array_equal(found.coefficients, alone.coefficients)


def test_no_images_make_an_empty_map(noisy):
    """Nor do they leave anything in the multipliers, whatever the start was."""
    nothing = Sums.zero(N, jnp.float64)
    start = jax.tree.map(lambda leaf: leaf + 1.0, noisy.starts[0])
    one, other = folds.solve_all(
        folds.folds([nothing, noisy.sums[1]]),
        [start] * 2,
        jnp.asarray(1.3),
        tv.IsotropicTV(),
        10,
    )
    assert float(jnp.max(one.coefficients)) > 0.1
    for leaf in jax.tree.leaves(one):
        assert np.isfinite(leaf).all()
    for leaf in jax.tree.leaves(other):
        np.testing.assert_array_equal(leaf, 0)


# --- the volume update and its weight


def blobs():
    """A map without symmetry, well inside its box."""
    rng = np.random.default_rng(3)
    x, y, z = lattice(np.arange(N) - N // 2)
    total = np.zeros(N**3)
    for centre in rng.normal(scale=2.0, size=(6, 3)):
        squared = sum(
            (axis - c) ** 2 for axis, c in zip((x, y, z), centre, strict=True)
        )
        total += rng.uniform(0.5, 1.5) * np.exp(-squared / 2 / 1.2**2)
    return jnp.asarray(total.reshape(N, N, N))


class Noisy:
    """Images of blobs with white noise, of which two halves were summed up."""

    def __init__(self, sigma=1.5, count=24):
        self.poses = draw_poses(count)
        clean = slices.project(
            Gridding(4, 2.0).spectrum(blobs(), R_MAX), DISC, self.poses
        )
        noise = sigma * np.random.default_rng(6).normal(size=(count, N, N))
        noise = slices.image_spectra(jnp.asarray(noise), DISC)
        self.sigma, self.spectra = sigma, clean + noise
        self.clean = clean
        half = count // 2
        weights = jnp.full((half, K), 1 / sigma**2)
        self.sums = []
        for some in (slice(0, half), slice(half, count)):
            poses = Poses(self.poses.angles[some], self.poses.shifts[some])
            spectra = self.spectra[some]
            part = insert(Gridding(4, 2.0), DISC, spectra, poses, None, weights)
            self.sums.append(part)
        self.folds = folds.folds(self.sums)
        self.starts = [admm.init(jnp.zeros((N, N, N)))] * 2

    def solutions(self, tau, iterations=10, starts=None):
        return folds.solve_all(
            self.folds,
            self.starts if starts is None else starts,
            jnp.asarray(tau),
            tv.IsotropicTV(),
            iterations,
        )

    def error(self, states):
        return sum(
            float(folds.prediction_error(own, state.coefficients))
            for own, state in zip(self.folds.own, states, strict=True)
        )


@pytest.fixture(scope="module")
def noisy():
    return Noisy()


def test_the_peak_is_the_variance_of_the_noise(noisy):
    """In a voxel of the back-projection, for whitened images."""
    half, draws = len(noisy.spectra) // 2, 40
    values = []
    weights = jnp.full((half, K), 1 / noisy.sigma**2)
    poses = Poses(noisy.poses.angles[:half], noisy.poses.shifts[:half])
    for seed in range(draws):
        noise = noisy.sigma * draw(half, N, N, seed=100 + seed)
        spectra = slices.image_spectra(noise, DISC)
        part = insert(Gridding(4, 2.0), DISC, spectra, poses, None, weights)
        values.append(np.asarray(part.backprojection)[4:12, 4:12, 4:12])
    variance = np.mean(np.square(values))
    assert variance == pytest.approx(float(noisy.sums[0].peak), rel=0.05)


@pytest.mark.parametrize(("noise", "copies"), [(7.0, 1), (1.0, 9), (0.2, 4)])
def test_tau_serves_any_noise_and_number(noisy, noise, copies):
    """Images ``s`` times as strong, noise included: the same tau, ``s`` times the map.

    With ``q**2`` times as many images the penalty has to count ``q`` times as much.
    """
    first, peak = noisy.folds.own[1], noisy.folds.peaks[1]
    scaled = Sums(
        copies / noise**2 * noisy.sums[1].kernel,
        copies / noise * noisy.sums[1].backprojection,
    )
    start, penalty = noisy.starts[0], tv.IsotropicTV()
    tau = jnp.asarray(1.3)
    one = solve(first, peak, start, tau, penalty, 10)
    other = solve(
        data_term(scaled),
        scaled.peak,
        start,
        tau * np.sqrt(copies),
        penalty,
        10,
    )
    gap = relative(other.coefficients / noise, one.coefficients)
    assert gap < 1e-8


def test_prediction_error_of_held_out_images(noisy):
    """Directly, image by image, of the images that the map was not made of."""
    state = noisy.solutions(1.0)[0]
    half = len(noisy.spectra) // 2
    poses = Poses(noisy.poses.angles[:half], noisy.poses.shifts[:half])
    seen = dense(poses, None) @ np.asarray(state.coefficients).ravel()
    data = np.asarray(noisy.spectra[:half])
    gap = np.abs(seen - data) ** 2 - np.abs(data) ** 2
    exact = 0.5 * np.sum(QUADRATURE * gap) / noisy.sigma**2
    value = float(folds.prediction_error(noisy.folds.own[0], state.coefficients))
    # Inserted with Gridding(4, 2.0), relative error 2e-3 on white noise.
    assert value == pytest.approx(exact, rel=2e-3)


@pytest.fixture(scope="module")
def scan(noisy):
    """Prediction errors on a fine grid of tau, from converged solutions."""
    grid = np.geomspace(0.03, 30, 28)
    errors, states = [], None
    for tau in grid:
        for _ in range(3):
            states = noisy.solutions(tau, starts=states)
        errors.append(noisy.error(states))
    return grid, np.array(errors)


@pytest.mark.parametrize("start", [0.15, 0.5, 2.0, 6.0])
def test_cross_validation_finds_the_minimum_of_a_scan(noisy, scan, start):
    grid, errors = scan
    best = grid[np.argmin(errors)]
    assert grid[3] < best < grid[-4]
    tau, states, table = folds.cross_validate(
        noisy.folds, noisy.starts, jnp.asarray(start), tv.IsotropicTV(), 30, trials=14
    )
    assert 1 / 1.5 < float(tau) / best < 1.5
    # The solutions are those of the best tried, and their error is in the table.
    tried = min(table, key=table.__getitem__)
    assert noisy.error(states) == pytest.approx(table[tried], rel=1e-12)
    assert 1 / 1.4 <= float(tau) / tried <= 1.4
    # And they are near the ones of the scan.
    assert min(table.values()) == pytest.approx(errors.min(), rel=2e-3)
    ratios = np.diff(np.log(sorted(table)))
    np.testing.assert_allclose(ratios, np.log(1.4), rtol=1e-6)


def test_cross_validation_stops_when_its_trials_are_spent(noisy):
    tau, _, table = folds.cross_validate(
        noisy.folds, noisy.starts, jnp.asarray(0.15), tv.IsotropicTV(), 30, trials=3
    )
    assert len(table) <= 4
    assert 0.15 < float(tau) <= 0.15 * 1.4**3


def test_cross_validation_walks_the_right_way_from_a_cold_start(noisy, scan):
    """Far below the best tau it has to go up, though no map has converged yet."""
    assert scan[0][np.argmin(scan[1])] > 0.1
    tau, *_ = folds.cross_validate(
        noisy.folds, noisy.starts, jnp.asarray(0.05), tv.IsotropicTV(), 30
    )
    assert float(tau) > 0.05


# --- shells


@pytest.mark.parametrize("n", [15, 16])
def test_a_gain_of_ones_changes_nothing(n):
    volume = draw(n, n, n)
    value = filter_shells(volume, jnp.ones(n // 2 + 1))
    np.testing.assert_allclose(value, volume, atol=1e-14)


@pytest.mark.parametrize("n", [15, 16])
def test_the_gain_is_a_filter_in_fourier_space(n):
    """Linear between shells, the last one beyond; on the full transform."""
    gain = np.random.default_rng(1).uniform(size=n // 2 + 1)
    axis = np.fft.fftfreq(n, 1 / n)
    radius = np.sqrt(axis[:, None, None] ** 2 + axis[:, None] ** 2 + axis**2)
    low = np.minimum(np.floor(radius).astype(int), n // 2)
    high = np.minimum(low + 1, n // 2)
    between = radius - np.floor(radius)
    factor = (1 - between) * gain[low] + between * gain[high]
    volume = draw(n, n, n)
    exact = np.fft.ifftn(np.fft.fftn(volume) * factor)
    assert np.abs(exact.imag).max() < 1e-14
    value = filter_shells(volume, jnp.asarray(gain))
    np.testing.assert_allclose(value, exact.real, atol=1e-13)


def test_a_band_pass_keeps_its_shells():
    gain = np.zeros(N // 2 + 1)
    gain[3:6] = 1.0
    spectrum = np.fft.fftn(filter_shells(draw(N, N, N), jnp.asarray(gain)))
    before = np.fft.fftn(draw(N, N, N))
    axis = np.fft.fftfreq(N, 1 / N)
    radius = np.sqrt(axis[:, None, None] ** 2 + axis[:, None] ** 2 + axis**2)
    kept, gone = (radius >= 3) & (radius <= 5), (radius <= 2) | (radius >= 6)
    np.testing.assert_allclose(spectrum[kept], before[kept], atol=1e-12)
    np.testing.assert_allclose(spectrum[gone], 0, atol=1e-12)


@pytest.fixture(scope="module")
def compared():
    """Images with a known scale and noise in every shell, compared with their map."""
    count = 400
    poses, transfer = draw_poses(count, seed=8), 1 + 0.3 * draw(count, K, seed=9)
    spectrum = Gridding(4, 2.0).spectrum(blobs(), R_MAX)
    model = slices.project(spectrum, DISC, poses, transfer)
    shells = np.asarray(DISC.shells)
    scale = np.linspace(1.6, 0.3, N // 2 + 1)
    power = np.geomspace(0.5, 20, N // 2 + 1)
    noise = jax.lax.complex(draw(count, K, seed=10), draw(count, K, seed=11))
    noise = np.asarray(noise) * np.sqrt(power / 2)[shells]
    data = jnp.asarray(scale[shells] * np.asarray(model) + noise)
    included = jnp.asarray((np.arange(count) % 4 > 0).astype(float))

    def compare(data, included=included, spectrum=spectrum):
        return shell_sums(spectrum, DISC, data, poses, transfer, included)

    return compare, data, np.asarray(model), scale, power, included


def test_the_gain_recovers_a_known_scale(compared):
    compare, data, model, scale, power, included = compared
    sums = compare(data)
    # The error of a least-squares scale is the noise over the model's norm.
    known = slice(1, R_MAX + 1)
    error = np.sqrt(power / 2 / np.maximum(np.asarray(sums.model), 1e-30) * 2)
    assert (np.abs(sums.gain - scale) < 4 * error + 1e-12)[known].all()
    # Without noise it is exact.
    shells = np.asarray(DISC.shells)
    clean = compare(jnp.asarray(scale[shells] * model))
    np.testing.assert_allclose(clean.gain[known], scale[known], rtol=1e-12)
    rest = np.asarray(clean.residual(clean.gain) / (clean.data + 1e-30))
    np.testing.assert_allclose(rest[known], 0, atol=1e-12)
    assert float(sums.gain[-1]) == 0.0  # a shell that the disc does not have


def test_the_residual_power_recovers_a_known_noise(compared):
    compare, data, *_, power, included = compared
    sums = compare(data)
    known = slice(1, R_MAX + 1)
    # A frequency stands for two in the count, but is one complex number.
    count = np.maximum(np.asarray(sums.count), 1)
    error = power * np.sqrt(2 / count)
    found = np.asarray(sums.residual(sums.gain)) / count
    assert (np.abs(found - power) < 4 * error)[known].all()


def test_shell_sums_are_sums_over_shells(compared):
    """In NumPy; particles that are not included do not count."""
    compare, data, model, *_, included = compared
    sums = compare(data)
    few, y, s = np.asarray(included) > 0, np.asarray(data), model
    times, shells = np.asarray(DISC.multiplicity), np.asarray(DISC.shells)
    for shell in range(N // 2 + 1):
        here = (shells == shell) * times
        assert float(sums.count[shell]) == few.sum() * here.sum()
        for value, terms in (
            (sums.data, np.abs(y) ** 2),
            (sums.model, np.abs(s) ** 2),
            (sums.cross, (s.conj() * y).real),
        ):
            np.testing.assert_allclose(value[shell], np.sum(terms[few] @ here))
    every = jnp.ones(len(y))
    parts = compare(data) + compare(data, every - included)
    for value, exact in zip(
        jax.tree.leaves(parts), jax.tree.leaves(compare(data, every)), strict=True
    ):
        np.testing.assert_allclose(value, exact, rtol=1e-10)
    blind = compare(data, spectrum=None)
    np.testing.assert_allclose(blind.data, sums.data, rtol=1e-12)
    np.testing.assert_array_equal(blind.model, 0)
    np.testing.assert_array_equal(blind.gain, 0)


def test_the_gain_is_bounded():
    """A map of the other sign counts as none; a faint one is not blown up."""
    one = jnp.ones(4)
    cross = jnp.array([-3.0, 0.5, 7.0, 1.0])
    sums = ShellSums(10 * one, one.at[3].set(0.0), cross, one)
    np.testing.assert_allclose(sums.gain, [0.0, 0.5, 2.0, 0.0])
    left = sums.residual(sums.gain)
    np.testing.assert_allclose(left, [10, 9.75, 0, 10], atol=1e-12)


def test_groups_are_summed_apart_and_pooled_by_their_weights(compared):
    """As if each were compared by itself; the scale is that of least squares."""
    compare, data, *_ = compared
    group = np.arange(len(data)) % 5 == 0
    belongs = jnp.asarray(np.stack([~group, group]).astype(float))
    sums = compare(data, belongs)
    parts = [compare(data, one) for one in belongs]
    for value, *exact in zip(*map(jax.tree.leaves, (sums, *parts)), strict=True):
        np.testing.assert_allclose(value, exact, rtol=1e-12)
    weights = jnp.asarray(np.random.default_rng(3).uniform(size=(2, N // 2 + 1)))
    pooled = sums.pooled(weights)
    known = slice(1, R_MAX + 1)
    cross, model = (
        sum(np.asarray(weights[g] * getattr(parts[g], name)) for g in (0, 1))[known]
        for name in ("cross", "model")
    )
    np.testing.assert_allclose(pooled.gain[known], cross / model, rtol=1e-12)


# --- noise of groups of images

SHAPE = np.array([5.0, 3.0, 2.0, 1.5, 1.0, 0.8, 0.9, 1.1])
FREQUENCIES = np.array([1.0, 8, 12, 16, 32, 28, 40, 40])  # of a particle


def draw_residuals(particles, spectra, seed):
    """Sums of squares over the frequencies of so many particles."""
    count = np.asarray(particles)[:, None] * FREQUENCIES
    sums = np.random.default_rng(seed).chisquare(np.maximum(count, 1e-9))
    return jnp.asarray(np.where(count > 0, sums * spectra, 0.0)), jnp.asarray(count)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
def test_a_single_group_has_its_own_noise(dtype):
    """To the last bit, also where there is none or nothing was counted."""
    residual, count = draw_residuals([7], SHAPE, 0)
    residual, count = (leaf.astype(dtype) for leaf in (residual, count))
    residual, count = residual.at[0, 3].set(0.0), count.at[0, 5].set(0.0)
    residual = residual.at[0, 5].set(0.0)
    own = residual / jnp.maximum(count, 1)
    np.testing.assert_array_equal(noise_power(residual, count), own)


def test_large_groups_have_noise_of_their_own():
    """Of any shape and level, to the sampling error."""
    spectra = np.stack([SHAPE, 9 * SHAPE[::-1]])
    residual, count = draw_residuals([3000, 1000], spectra, 1)
    error = np.log(noise_power(residual, count) / spectra)
    assert (np.abs(error) < 4 * np.sqrt(2 / count))[:, 1:].all()


def test_small_groups_have_the_common_shape_at_their_level():
    """Off by much less than by themselves, whatever their level."""
    levels, particles = np.array([1.0, 25.0, 0.1, 1.0]), [1000, 1, 2, 0]
    own, found = [], []
    for seed in range(20):
        residual, count = draw_residuals(particles, levels[:, None] * SHAPE, seed)
        power = np.asarray(noise_power(residual, count))
        found.append(power / (levels[:, None] * SHAPE))
        own.append(residual / np.maximum(count, 1) / (levels[:, None] * SHAPE))
        # Without images it is what all have together.
        common = residual.sum(axis=0) / count.sum(axis=0)
        np.testing.assert_allclose(power[3], common, rtol=1e-12)
    few, inner = slice(1, 3), slice(1, 4)
    worse, better = (
        np.std(np.array(values)[:, few, inner], axis=0) for values in (own, found)
    )
    assert (better < 0.7 * worse).all()
    assert np.abs(np.mean(found, axis=0)[few, inner] - 1).max() < 0.15


def test_least_squares_solve_the_normal_equations(images):
    """Those of the definition, if they have the time; of no images the map is empty."""
    sums = images.sums()
    small = 1e-3 * float(sums.peak)

    def residual(c):
        c = np.asarray(c).ravel()
        misfit = images.both * (images.matrix @ c - np.asarray(images.spectra))
        pull = np.einsum("pkn,pk->n", images.matrix.conj(), misfit).real + small * c
        return np.linalg.norm(pull) / np.linalg.norm(np.asarray(sums.backprojection))

    soon, late = (least_squares(sums, k) for k in (20, 500))
    assert residual(late) < 3e-3 < residual(soon) < 0.3
    assert not jnp.any(least_squares(Sums.zero(N, jnp.float64)))
