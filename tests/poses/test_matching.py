"""Projection matching against brute force, on grid poses, and on RELION's images."""

import math
from dataclasses import replace
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrefine import io, simulate, symmetry
from jaxrefine.ctf import CTF
from jaxrefine.data.particles import Particles
from jaxrefine.errors import InputError
from jaxrefine.euler import euler_to_matrix
from jaxrefine.evaluation import pose_errors
from jaxrefine.geometry import Poses, geodesic_distance, uniform_rotations
from jaxrefine.operators import slices
from jaxrefine.operators.gridding import Gridding
from jaxrefine.poses import grid, matching
from jaxrefine.poses.matching import MatchConfig
from jaxrefine.poses.search import half_period_turn

N, PIXEL, COUNT = 32, 4.0, 24
STEP = math.radians(15)
CONFIG = MatchConfig(STEP, max_shift=2.0, r_max=8)


def project(volume, poses, ctf=None):
    """The images of a map, without noise, up to Nyquist."""
    n = volume.shape[0]
    disc = slices.disc(n, (n - 1) // 2)
    transfer = None
    if ctf is not None:
        frequencies = disc.frequencies.astype(jnp.float32) / (n * PIXEL)
        transfer = jax.vmap(lambda one: one(frequencies))(ctf)
    spectrum = Gridding().spectrum(volume, disc.r_max)
    spectra = slices.project(spectrum, disc, poses, transfer)
    return np.asarray(slices.to_images(spectra, disc))


def poses_of(angles, shifts):
    """Poses, of single precision, from Euler angles."""
    rotations = euler_to_matrix(jnp.asarray(angles, jnp.float32))
    return Poses(rotations, jnp.asarray(shifts, jnp.float32))


def errors(poses, truth):
    """Angles in degrees, and distances in pixels."""
    pair = poses.rotations, truth.rotations.astype(poses.rotations.dtype)
    angles = np.rad2deg(np.asarray(geodesic_distance(*pair)))
    gap = np.asarray(poses.shifts, np.float64) - np.asarray(truth.shifts)
    return angles, np.linalg.norm(gap, axis=1)


def random_poses(count):
    key = jax.random.key(3)
    rotations = uniform_rotations(key, count, jnp.float32)
    return Poses(rotations, simulate.random_shifts(key, count, 1.4, jnp.float32))


def optics(count, **changes):
    """Defocus whose sign changes within the band, and astigmatism."""
    leaves = {"defocus_u": 16000.0, "defocus_v": 10000.0, "defocus_angle": 0.6}
    ctf = CTF(**{k: jnp.full(count, v) for k, v in (leaves | changes).items()})
    return jax.tree.map(lambda leaf: leaf.astype(jnp.float32), ctf)


@pytest.fixture(scope="module")
def volume():
    return simulate.phantom(jax.random.key(0), N)


@pytest.fixture(scope="module")
def on_grid(volume):
    """Poses of the grid, and the images that they make."""
    rng = np.random.default_rng(0)
    views = grid.directions(STEP)
    psi = STEP * rng.integers(0, 24, COUNT)
    chosen = views[rng.integers(0, len(views), COUNT)]
    chosen[:2] = views[[0, -1]]  # the poles
    shifts = rng.integers(-1, 2, (COUNT, 2))
    truth = poses_of(np.concatenate([chosen, psi[:, None]], axis=1), shifts)
    return truth, project(volume, truth)


def around_rings(values, half_turn):
    """The Hartley transform around rings, without what the in-plane step skips."""
    ring = np.concatenate([values.real + values.imag, values.real - values.imag], -1)
    series = np.fft.fft(ring)
    frequency = np.abs(np.fft.fftfreq(ring.shape[-1], 1 / ring.shape[-1]))
    return np.fft.ifft(np.where(frequency <= half_turn, series, 0)).real


def mean_power(images):
    """The mean power of images in each shell."""
    m = images.shape[-1]
    axis = np.fft.fftfreq(m, 1 / m)
    shells = np.rint(np.hypot(axis, axis[:, None])).astype(int)
    power = np.mean(np.abs(np.fft.fft2(images)) ** 2, axis=0)
    return np.array([power[shells == s].mean() for s in range((m - 1) // 2 + 1)])


class Dense:
    """The correlations of images with projections at every pose of a grid, one by one.

    Attributes
    ----------
    poses, shift_places
        The poses, and the numbers of their shifts.
    pull
        Correlations in units of their standard deviations without a particle.
    scores
        Normalised correlations.
    log_posterior
        Without its normalisation.
    """

    def __init__(self, volume, images, config, ctf=None):
        m = images.shape[-1]
        pixel = np.arange(m) - m // 2
        search = matching.search_of(config, m)
        half, ring = search.grid.half_turn, search.ring
        radii = np.arange(1, config.r_max + 1)
        weights = 2 * np.pi * radii / mean_power(images)[radii]
        phi = np.pi / ring * np.arange(ring)
        circle = np.stack([np.cos(phi), np.sin(phi)], axis=-1)
        omega = (radii[:, None, None] * circle).reshape(-1, 2)
        disc = slices.disc(m, config.r_max)
        disc = eqx.tree_at(
            lambda d: (d.frequencies, d.multiplicity, d.envelope),
            disc,
            (jnp.asarray(omega), 2 * jnp.ones(len(omega)), jnp.ones(len(omega))),
        )
        views, shifts = search.grid.directions(), search.grid.shifts()
        angles = [
            (rot, tilt, np.pi / half * k)
            for rot, tilt in views
            for k in range(2 * half)
        ]
        spectrum = Gridding().spectrum(volume, config.r_max)
        unmoved = poses_of(angles, np.zeros((len(angles), 2)))
        templates = np.asarray(slices.project(spectrum, disc, unmoved), np.complex128)
        templates = templates.reshape(len(angles), len(radii), ring)
        y, x = np.meshgrid(pixel, pixel, indexing="ij")
        kernel = np.exp(-2j * np.pi / m * (omega @ np.stack([x.ravel(), y.ravel()])))
        data = without_background(images).reshape(len(images), -1) @ kernel.T
        transfer = np.ones(data.shape)
        if ctf is not None:
            frequencies = jnp.asarray(omega / m / PIXEL, jnp.float32)
            transfer = np.asarray(jax.vmap(lambda one: one(frequencies))(ctf))
        moves = np.exp(2j * np.pi / m * shifts @ omega.T)
        model = around_rings(templates, ring)
        norms = np.mean(np.abs(templates) ** 2, axis=-1)
        tables = []
        for image, gain in zip(data, transfer, strict=True):
            moved = (gain * image * moves).reshape(len(shifts), len(radii), ring)
            moved = around_rings(moved, half) * weights[:, None] / (2 * ring)
            cross = np.einsum("trh,arh->at", moved, model)
            gains = np.mean(gain.reshape(len(radii), ring) ** 2, axis=-1)
            pull = cross / np.sqrt(norms @ (weights * gains))[:, None]
            power = np.mean(np.abs(image.reshape(len(radii), ring)) ** 2, axis=-1)
            tables.append((pull.ravel(), pull.ravel() / np.sqrt(weights @ power)))
        self.pull, self.scores = (np.array(x) for x in zip(*tables, strict=True))
        self.shift_places = np.tile(np.arange(len(shifts)), len(angles))
        angles = np.repeat(angles, len(shifts), axis=0)
        self.poses = poses_of(angles, shifts[self.shift_places])
        spread = search.grid.shift_spread
        prior = np.exp(-np.sum(shifts**2, axis=1) / (2 * spread**2))
        prior = np.log(prior / prior.sum() / (len(angles) / len(shifts)))
        gains = np.maximum(self.pull, 0) ** 2 / 2
        self.log_posterior = gains + prior[self.shift_places]


def without_background(images):
    """Subtract the mean outside of the inscribed circle."""
    m = images.shape[-1]
    k = np.arange(m) - m // 2
    outside = np.hypot(*np.meshgrid(k, k)) > m / 2
    return images - images[:, outside].mean(axis=1)[:, None, None]


def blurred_noise(n):
    """A map of noise about the origin, which looks different from everywhere."""
    k = np.arange(n) - n // 2
    window = np.exp(-(k[:, None, None] ** 2 + k[:, None] ** 2 + k**2) / 18)
    noise = np.random.default_rng(1).normal(size=(n, n, n))
    return jnp.asarray(window * noise, jnp.float32)


BRUTE = MatchConfig(
    math.radians(35), 1.5, shift_step=0.75, r_max=4, batch_size=4, shift_spread=0.8
)


@pytest.fixture(scope="module")
def brute():
    """What is found in images of noise, so that no pose is near, and every pose."""
    n = 17
    images = np.random.default_rng(n).normal(size=(6, n, n))
    images += 0.3 * np.random.default_rng(1).normal(size=n)  # coloured
    ctf = optics(6, defocus_u=12000.0, defocus_v=12000.0)
    volume = blurred_noise(n)
    found = matching.match(Particles(images, ctf, PIXEL), volume, BRUTE)
    return found, Dense(volume, images, BRUTE, ctf)


@pytest.mark.slow
def test_brute_force_finds_the_same(brute):
    """Every pose of a small grid."""
    found, dense = brute
    best, rows = dense.log_posterior.argmax(axis=1), np.arange(6)
    np.testing.assert_allclose(found.scores, dense.scores[rows, best], atol=1e-5)
    rotations = dense.poses.rotations[best]
    np.testing.assert_allclose(found.poses.rotations, rotations, atol=1e-5)
    np.testing.assert_array_equal(found.poses.shifts, dense.poses.shifts[best])


@pytest.mark.slow
def test_evidence_and_errors_are_sums_over_all_poses(brute):
    found, dense = brute
    likely = np.exp(dense.log_posterior)
    total = likely.sum(axis=1)
    np.testing.assert_allclose(found.log_likelihood, np.log(total), atol=1e-4)
    angle, shift = found.search.grid.cell_variances()
    for index, posterior in enumerate(likely / total[:, None]):
        own = found.poses.rotations[index], np.asarray(found.poses.shifts[index])
        traces = np.einsum("pij,ij->p", dense.poses.rotations, own[0])
        expected = np.sqrt(posterior @ (3 - traces) + angle)
        np.testing.assert_allclose(found.angle_std[index], expected, rtol=1e-4)
        moved = np.sum((np.asarray(dense.poses.shifts) - own[1]) ** 2, axis=1)
        expected = np.sqrt(posterior @ moved + shift)
        np.testing.assert_allclose(found.shift_std[index], expected, rtol=1e-4)


@pytest.mark.slow
def test_poses_of_the_grid_are_found(on_grid, volume):
    """In any batches, read by the way; at the poles too."""
    truth, images = on_grid
    done = []
    found = matching.match(Particles(images), volume, CONFIG, callback=done.append)
    assert done == [COUNT]
    angles, shifts = errors(found.poses, truth)
    assert angles.max() < 0.01 and shifts.max() == 0
    assert 0.98 < float(found.scores.min()) <= float(found.scores.max()) <= 1 + 1e-5

    config = MatchConfig(STEP, max_shift=2.0, r_max=8, batch_size=7)
    done = []
    again = matching.match(Particles(images), volume, config, callback=done.append)
    assert done == [7, 14, 21, 24]
    np.testing.assert_array_equal(again.poses.rotations, found.poses.rotations)
    np.testing.assert_array_equal(again.poses.shifts, found.poses.shifts)
    np.testing.assert_allclose(again.scores, found.scores, atol=1e-5)


@pytest.mark.slow
def test_background_and_scale_do_not_matter(on_grid, volume):
    truth, images = on_grid
    noise = np.random.default_rng(1).normal(size=images.shape)
    noisy = images + images.std() * noise
    found = matching.match(Particles(noisy), volume, CONFIG)
    again = matching.match(Particles(1e3 * noisy + 5e3), 1e-2 * volume, CONFIG)
    np.testing.assert_array_equal(again.poses.rotations, found.poses.rotations)
    np.testing.assert_array_equal(again.poses.shifts, found.poses.shifts)
    np.testing.assert_allclose(again.scores, found.scores, atol=1e-4)
    noisy[3] = 0
    scores = np.asarray(matching.match(Particles(noisy), volume, CONFIG).scores)
    np.testing.assert_array_equal(scores == 0, np.arange(COUNT) == 3)


@pytest.mark.parametrize("scale", [0.0, 1e-20, 1e-18, 1e18])
def test_images_that_cannot_be_whitened_are_refused(volume, scale):
    """Not given a score of 0, all of them."""
    images = scale * np.random.default_rng(0).normal(size=(6, N, N))
    words = "mean power of the images must be from 1e-30 to 1e[+]30 up to 8 cycles"
    with pytest.raises(InputError, match=words):
        matching.match(Particles(images.astype(np.float32)), volume, CONFIG)


@pytest.mark.slow
@pytest.mark.parametrize("scale", [1e-15, 1e12])
def test_images_of_almost_any_scale_are_matched(on_grid, volume, scale):
    images = on_grid[1][:4]
    found, again = (
        matching.match(Particles((s * images).astype(np.float32)), volume, CONFIG)
        for s in (1 / images.std(), scale / images.std())
    )
    np.testing.assert_array_equal(again.poses.rotations, found.poses.rotations)
    np.testing.assert_allclose(again.scores, found.scores, atol=1e-4)


def test_poses_between_are_found_within_about_a_step(volume):
    truth = random_poses(COUNT)
    found = matching.match(Particles(project(volume, truth)), volume, CONFIG)
    angles, shifts = errors(found.poses, truth)
    step = math.degrees(STEP)
    assert np.median(angles) < 0.75 * step and angles.max() < 1.5 * step
    assert np.median(shifts) < 0.75 and shifts.max() < 1.5
    assert float(found.scores.min()) > 0.7


@pytest.mark.slow
def test_the_optics_are_undone(on_grid, volume):
    """Images of reversed contrast, with astigmatism: those of the optics, or lost."""
    truth, _ = on_grid
    ctf = optics(COUNT, scale=-1.0)
    images = project(volume, truth, ctf)
    found = matching.match(Particles(images, ctf, PIXEL), volume, CONFIG)
    angles, shifts = errors(found.poses, truth)
    assert angles.max() < 0.01 and shifts.max() == 0
    np.testing.assert_allclose(found.scores, 1, atol=0.12)

    blind = matching.match(Particles(images, None, PIXEL), volume, CONFIG)
    assert np.median(errors(blind.poses, truth)[0]) > 2 * math.degrees(STEP)
    assert float(blind.scores.max()) < float(found.scores.min())
    crossed = optics(COUNT, scale=-1.0, defocus_angle=0.6 + np.pi / 2)
    turned = matching.match(Particles(images, crossed, PIXEL), volume, CONFIG)
    assert float(turned.scores.mean()) < float(found.scores.mean()) - 0.03


def test_the_band_follows_the_step(on_grid, volume):
    """The rim of two thirds of the box moves by 0.75 of a step: 8 cycles per box."""
    particles, step = Particles(on_grid[1][:1]), 0.25
    one, other = (
        matching.match(particles, volume, MatchConfig(step, 0.0, r_max=r_max))
        for r_max in (None, 8)
    )
    np.testing.assert_array_equal(one.scores, other.scores)


def test_a_smaller_particle_is_compared_in_finer_detail():
    """Its rim moves by half a period between the grid's poses and those farthest."""
    for diameter in (0.25, 0.4, 1.0):
        config = MatchConfig(0.2, particle_diameter=diameter)
        search = matching.search_of(config, 128)
        turn = half_period_turn(diameter, search.r_max)
        assert turn >= 0.75 * 0.2 > half_period_turn(diameter, search.r_max + 1)
        period = 128 / search.r_max
        assert search.grid.shift_step == pytest.approx(period / 4)
        assert search.grid.shift_spread == pytest.approx(diameter * 128 / 20)
        assert search.grid.max_shift == pytest.approx(diameter * 128 * 3 / 20)
    limited = matching.search_of(MatchConfig(max_shift=5.0), 64).grid
    assert (limited.max_shift, limited.shift_spread) == (5.0, 2.5)
    spread = matching.search_of(MatchConfig(shift_spread=2.5), 64).grid
    assert (spread.max_shift, spread.shift_spread) == (7.5, 2.5)


@pytest.mark.parametrize("radius", [0.01, 1.0, 4.0, 4.3, 9.0])
def test_shifts_are_tried_wherever_any_are_allowed(radius):
    """Of 256 pixels, where a quarter of the finest period is more than four."""
    limited = matching.search_of(MatchConfig(max_shift=radius), 256)
    spread = matching.search_of(MatchConfig(shift_spread=radius / 3), 256)
    assert 256 / (4 * limited.r_max) > 4
    for grid_of_poses in (limited.grid, spread.grid):
        lengths = np.linalg.norm(grid_of_poses.shifts(), axis=1)
        assert len(lengths) >= 5
        assert radius / 2 < lengths.max() <= radius * (1 + 1e-6)
    assert len(matching.search_of(MatchConfig(max_shift=0.0), 256).grid.shifts()) == 1
    for allowed in ({"max_shift": radius}, {"shift_spread": radius / 3}):
        config = MatchConfig(shift_step=1.1 * radius, **allowed)
        words = f"step between shifts must be .*, {radius:g} pixels, got"
        with pytest.raises(InputError, match=words):
            matching.search_of(config, 256)


@pytest.mark.slow
def test_the_memory_is_what_the_compiler_says(volume):
    """Without JAX and the programs."""
    search = matching.search_of(MatchConfig(0.1, max_shift=2.0, r_max=8), N)
    views = jnp.asarray(search.grid.directions(), jnp.float32)
    points = matching._rings(search.r_max, search.ring)
    tried, group = matching._Tried.of(search.grid), jnp.zeros(COUNT, jnp.int32)
    make: Any = matching._templates
    chunks = search.chunks(len(views), len(tried.shifts), COUNT)
    arguments = (volume, points, views, chunks, search.grid.half_turn)
    making = make.lower(*arguments).compile().compiled.memory_analysis()
    templates = make(*arguments)
    images = jnp.zeros((COUNT, N, N), jnp.float32)
    precision = jnp.ones((COUNT, search.r_max), jnp.float32)
    best: Any = matching._best
    program = best.lower(
        images, None, templates, points, tried, 1.0, None, group, precision
    )
    finding = program.compile().compiled.memory_analysis()
    needed = max(
        making.temp_size_in_bytes + making.output_size_in_bytes,
        finding.temp_size_in_bytes + finding.argument_size_in_bytes,
    )
    estimated = search.estimate_bytes(COUNT) - matching._PROGRAMS
    assert needed < estimated
    # Scores are counted for whole chunks.
    whole = matching._SCORES_HELD * 4 * matching._SCORES_AT_ONCE
    assert estimated - whole < 4 * needed


@pytest.mark.slow
def test_a_filter_of_images_and_map_does_not_matter(volume):
    """Whitening takes it out of both, as far as it is the same in a whole shell."""
    truth = random_poses(COUNT)
    images = project(volume, truth)
    images = images + images.std() * np.random.default_rng(2).normal(size=images.shape)

    def filtered(values):
        axes = [np.fft.fftfreq(N, 1 / N)] * (values.ndim if values.ndim == 3 else 2)
        square = sum(x**2 for x in np.meshgrid(*axes, indexing="ij"))
        return np.fft.ifftn(
            np.fft.fftn(values) / (1 + square / 64), axes=range(values.ndim)
        ).real

    found = matching.match(Particles(images), volume, CONFIG)
    coloured = np.stack([filtered(image) for image in images])
    blurred = jnp.asarray(filtered(np.asarray(volume)), jnp.float32)
    again = matching.match(Particles(coloured), blurred, CONFIG)
    # A shell of the disc is a little wider than the ring that it whitens.
    assert np.mean(errors(again.poses, found.poses)[0] < 0.01) > 0.9
    np.testing.assert_allclose(again.scores, found.scores, atol=0.02)
    np.testing.assert_allclose(again.log_likelihood, found.log_likelihood, rtol=0.05)
    unfit = matching.match(Particles(coloured), volume, CONFIG)
    assert float(unfit.scores.mean()) < float(found.scores.mean()) - 0.01


@pytest.mark.slow
def test_groups_are_whitened_by_their_own_noise(on_grid, volume):
    """One of images at another scale, and of other noise, finds what it finds alone."""
    truth, images = on_grid
    rng = np.random.default_rng(3)
    noisy = images + images.std() * rng.normal(size=images.shape)
    scale = np.where(np.arange(COUNT) < COUNT // 2, 1.0, 7.0)[:, None, None]
    group = (scale[:, 0, 0] > 1).astype(int)
    together = matching.match(Particles(scale * noisy, group=group), volume, CONFIG)
    for each in (0, 1):
        alone = matching.match(Particles(noisy[group == each]), volume, CONFIG)
        np.testing.assert_array_equal(
            together.poses.rotations[group == each], alone.poses.rotations
        )
        np.testing.assert_allclose(
            together.log_likelihood[group == each], alone.log_likelihood, rtol=0.1
        )


@pytest.mark.slow
def test_errors_are_as_large_as_they_are_said_to_be(volume):
    """Of poses between those of the grid, in noise."""
    truth = random_poses(96)
    images = project(volume, truth)
    rng = np.random.default_rng(4)
    noisy = images + 1.5 * images.std() * rng.normal(size=images.shape)
    found = matching.match(Particles(noisy), volume, CONFIG)
    angles, shifts = errors(found.poses, truth)
    sure = np.rad2deg(np.asarray(found.angle_std)) < 2 * math.degrees(STEP)
    assert sure.mean() > 0.8
    for error, said in (
        (angles, np.rad2deg(np.asarray(found.angle_std))),
        (shifts, np.asarray(found.shift_std)),
    ):
        assert 0.7 < np.sqrt(np.mean((error / said)[sure] ** 2)) < 1.25
    nothing = rng.normal(size=images.shape)
    empty = matching.match(Particles(nothing), volume, CONFIG)
    assert float(jnp.median(empty.log_likelihood)) < 3
    assert float(jnp.median(found.log_likelihood)) > 15


@pytest.mark.slow
def test_the_prior_on_shifts_decides_where_images_say_nothing(on_grid, volume):
    truth, images = on_grid
    centred = MatchConfig(STEP, max_shift=2.0, r_max=8, shift_spread=0.1)
    nothing = np.random.default_rng(5).normal(size=images.shape)
    for config, least, most in ((centred, 0, 0), (CONFIG, 1, 2)):
        found = matching.match(Particles(nothing), volume, config)
        moved = np.linalg.norm(np.asarray(found.poses.shifts), axis=1).max()
        assert least <= moved <= most
    known = matching.match(Particles(images), volume, CONFIG)
    assert errors(known.poses, truth)[1].max() == 0


@pytest.mark.slow
@pytest.mark.parametrize("group", ["C4", "D2"])
def test_symmetry_leaves_out_what_is_equivalent(volume, group):
    """Of a map that has it: poses, evidence and errors are those without."""
    operators = symmetry.operators(group)
    axis = np.arange(N) - N // 2
    z, y, x = np.meshgrid(axis, axis, axis, indexing="ij")
    points = np.stack([x, y, z], axis=-1)
    total = np.zeros((N,) * 3)
    inside = np.abs(points).max(axis=-1) < N // 2
    for operator in operators:
        x, y, z = np.moveaxis(np.rint(points[inside] @ operator.T).astype(int), -1, 0)
        total[inside] += np.asarray(volume)[z + N // 2, y + N // 2, x + N // 2]
    both = jnp.asarray(total, jnp.float32)
    truth = random_poses(12)
    images = project(both, truth)
    noisy = images + images.std() * np.random.default_rng(6).normal(size=images.shape)
    plain = matching.match(Particles(noisy), both, CONFIG)
    config = replace(CONFIG, symmetry=group)
    found = matching.match(Particles(noisy), both, config)
    assert found.search.grid.direction_count < plain.search.grid.direction_count / 2.5
    angles = np.asarray(pose_errors(found.poses, truth, operators).angle_in_degrees)
    assert np.median(angles) < 0.75 * math.degrees(STEP)
    np.testing.assert_allclose(
        found.log_likelihood, plain.log_likelihood, atol=0.5, rtol=0.1
    )
    assert np.median(np.asarray(found.angle_std)) < 2 * STEP
    assert np.median(np.asarray(plain.angle_std)) > 3 * STEP


@pytest.mark.slow
def test_relions_projections(data_dir):
    """Of a ribosome, centred, and shifted by up to 12 pixels.

    It fills its box, and RELION shifts cyclically: what comes back on the other side
    disturbs, by up to 2.3 pixels. A wrong sign would be off by 16 or more.
    """
    folder = data_dir / "relion_oracle"
    volume, _ = io.read_mrc(folder / "clean70SRibosome_vol_65p.mrc")
    spectrum = np.fft.fftshift(np.fft.fftn(np.fft.ifftshift(volume)))[:64, :64, :64]
    cropped = np.fft.fftshift(np.fft.ifftn(np.fft.ifftshift(spectrum))).real
    names = [folder / f"rln_proj_64_{name}" for name in ("centered", "shifted")]
    images = [io.read_stack(f"{name}.mrcs")[0] for name in names]
    poses = [io.read_poses(f"{name}.star") for name in names]
    found = matching.match(
        Particles(np.concatenate(images)),
        jnp.asarray(cropped),
        MatchConfig(math.radians(10), max_shift=12.0, particle_diameter=1.0),
    )
    truth = jax.tree.map(
        lambda *leaves: jnp.concatenate(leaves).astype(jnp.float32), *poses
    )
    angles, shifts = errors(found.poses, truth)
    assert angles.max() < 10
    assert shifts[:4].max() < 0.1 and shifts[4:].max() < 3
    assert float(found.scores[:4].min()) > 0.9


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: MatchConfig(max_shift=-1.0), "max_shift must be .*, got -1.0$"),
        (lambda: MatchConfig(max_shift=math.inf), "max_shift must be .*, got inf$"),
        (lambda: MatchConfig(shift_step=0.0), "shift_step must be .*, got 0.0$"),
        (lambda: MatchConfig(batch_size=0), "batch_size must be .*, got 0$"),
        (lambda: MatchConfig(shift_spread=0.0), "shift_spread must be .*, got 0.0$"),
        (lambda: MatchConfig(particle_diameter=1.5), "particle_diameter .* got 1.5$"),
        (lambda: MatchConfig(symmetry="X3"), "symmetry must be .*, got 'X3'$"),
    ],
)
def test_parameters_out_of_range_are_refused(make, words):
    with pytest.raises(InputError, match=words):
        make()


def test_what_does_not_fit_is_refused(volume):
    particles = Particles(np.zeros((2, N, N)))
    small = volume[1:, 1:, 1:]
    for reference, config, words in (
        (small, CONFIG, "map must have .*, 32 pixels, got 31 x 31 x 31"),
        (volume, MatchConfig(r_max=16), "band limit .* from 1 to 15 .*, got 16$"),
        (volume, MatchConfig(r_max=0), "band limit .* from 1 to 15 .*, got 0$"),
        (volume, MatchConfig(-1.0), "angular step must be .*, got -1.0$"),
    ):
        with pytest.raises(InputError, match=words):
            matching.match(particles, reference, config)


@pytest.mark.slow
@pytest.mark.parametrize("m", [16, 17])
def test_the_background_is_what_lies_outside_of_the_inscribed_circle(m):
    """A pixel on the circle, or within it, is none of it; the next one beyond is."""
    places = [(0, -8), (0, 8 - (m % 2 == 0)), (-5, 5), (-3, -8), (-7, -5)]
    images = np.zeros((len(places), m, m))
    for image, (y, x) in zip(images, places, strict=True):
        image[y + m // 2, x + m // 2] = 1
    expected = without_background(images)
    np.testing.assert_array_equal(expected[:3], images[:3])
    assert (expected[3:] < images[3:]).all()
    volume, config = blurred_noise(m), MatchConfig(math.radians(45), 0.0, r_max=3)
    dense = Dense(volume, images, config)
    found = matching.match(Particles(images), volume, config)
    np.testing.assert_allclose(found.scores, dense.scores.max(axis=1), atol=1e-5)
