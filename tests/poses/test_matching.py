"""Projection matching against brute force, on grid poses, and on RELION's images."""

import math

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrefine import io, simulate
from jaxrefine.ctf import CTF
from jaxrefine.data.particles import Particles
from jaxrefine.errors import InputError
from jaxrefine.euler import euler_to_matrix
from jaxrefine.geometry import Poses, geodesic_distance, uniform_rotations
from jaxrefine.operators import slices
from jaxrefine.operators.gridding import Gridding
from jaxrefine.poses import matching
from jaxrefine.poses.matching import MatchConfig

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
    views = matching.directions(STEP)
    psi = STEP * rng.integers(0, 24, COUNT)
    chosen = views[rng.integers(0, len(views), COUNT)]
    chosen[:2] = views[[0, -1]]  # the poles
    shifts = rng.integers(-1, 2, (COUNT, 2))
    truth = poses_of(np.concatenate([chosen, psi[:, None]], axis=1), shifts)
    return truth, project(volume, truth)


@pytest.mark.parametrize("step", [6.0, 7.0, 15.0, 40.0, 90.0])
def test_directions_cover_the_sphere(step):
    """None is further than 0.75 steps; neighbours are a step apart, more or less."""
    rot, tilt = matching.directions(np.deg2rad(step)).T
    points = np.stack(
        [np.sin(tilt) * np.cos(rot), np.sin(tilt) * np.sin(rot), np.cos(tilt)], axis=1
    )
    probes = np.random.default_rng(1).normal(size=(2000, 3))
    probes /= np.linalg.norm(probes, axis=1, keepdims=True)
    nearest = np.rad2deg(np.arccos(np.clip((probes @ points.T).max(axis=1), -1, 1)))
    assert nearest.max() <= 0.75 * step
    between = points @ points.T - 2 * np.eye(len(points))
    gaps = np.rad2deg(np.arccos(np.clip(between.max(axis=1), -1, 1)))
    assert gaps.max() <= step * (1 + 1e-9)
    assert gaps.min() > 0.7 * step
    assert len(points) == pytest.approx(4 * np.pi / np.deg2rad(step) ** 2, rel=0.5)


def all_scores(volume, images, config, ctf=None):
    """Correlate with `slices.project` at every pose of the grid, one by one."""
    m, pixel = images.shape[-1], np.arange(images.shape[-1]) - images.shape[-1] // 2
    half = math.ceil(math.pi / config.angle_step - 1e-9)
    radii, phi = np.meshgrid(
        np.arange(1, config.r_max + 1), np.pi / half * np.arange(half), indexing="ij"
    )
    radii = radii.ravel()
    omega = radii[:, None] * np.stack([np.cos(phi).ravel(), np.sin(phi).ravel()], -1)
    disc = slices.disc(m, config.r_max)
    disc = eqx.tree_at(
        lambda d: (d.frequencies, d.multiplicity, d.envelope),
        disc,
        (jnp.asarray(omega), 2 * jnp.ones(len(omega)), jnp.ones(len(omega))),
    )
    reach = np.arange(-10, 11) * config.shift_step
    poses = [
        (rot, tilt, np.pi / half * k, x, y)
        for rot, tilt in matching.directions(config.angle_step)
        for k in range(2 * half)
        for x in reach
        for y in reach
        if np.hypot(x, y) <= config.max_shift
    ]
    poses = np.array(poses)
    spectrum = Gridding().spectrum(volume, config.r_max)
    grid = poses_of(poses[:, :3], poses[:, 3:])
    templates = np.asarray(slices.project(spectrum, disc, grid), np.complex128)
    y, x = np.meshgrid(pixel, pixel, indexing="ij")
    kernel = np.exp(-2j * np.pi / m * (omega @ np.stack([x.ravel(), y.ravel()])))
    data = images.reshape(len(images), -1) @ kernel.T
    transfer = np.ones(data.shape)
    if ctf is not None:
        frequencies = jnp.asarray(omega / m / PIXEL, jnp.float32)
        transfer = np.asarray(jax.vmap(lambda one: one(frequencies))(ctf))
    table = []
    for image, gain in zip(data, transfer, strict=True):
        model = templates * gain
        cross = (model.conj() @ (radii * image)).real
        norms = (np.abs(model) ** 2 @ radii) * (np.abs(image) ** 2 @ radii)
        table.append(cross / np.sqrt(norms))
    return grid, np.array(table)


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


@pytest.mark.slow
def test_brute_force_finds_the_same():
    """Every pose of a small grid; images of noise, so that nothing else is near."""
    n, config = (
        17,
        MatchConfig(math.radians(35), 1.5, shift_step=0.75, r_max=4, batch_size=4),
    )
    images = np.random.default_rng(n).normal(size=(6, n, n))
    ctf = optics(6, defocus_u=12000.0, defocus_v=12000.0)
    volume = blurred_noise(n)
    grid, table = all_scores(volume, without_background(images), config, ctf)
    best = table.argmax(axis=1)
    found = matching.match(Particles(images, ctf, PIXEL), volume, config)
    np.testing.assert_allclose(found.scores, table.max(axis=1), atol=1e-5)
    np.testing.assert_allclose(found.poses.rotations, grid.rotations[best], atol=1e-5)
    np.testing.assert_array_equal(found.poses.shifts, grid.shifts[best])


@pytest.mark.slow
def test_poses_of_the_grid_are_found(on_grid, volume):
    """In any batches, read by the way; at the poles too."""
    truth, images = on_grid
    done = []
    found = matching.match(Particles(images), volume, CONFIG, callback=done.append)
    assert done == [COUNT]
    angles, shifts = errors(found.poses, truth)
    assert angles.max() < 0.01 and shifts.max() == 0
    assert 0.995 < float(found.scores.min()) <= float(found.scores.max()) <= 1 + 1e-5

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
    blank = matching.match(Particles(0 * noisy), volume, CONFIG)
    np.testing.assert_array_equal(blank.scores, 0)


def test_poses_between_are_found_within_about_a_step(volume):
    key = jax.random.key(3)
    rotations = uniform_rotations(key, COUNT, jnp.float32)
    truth = Poses(rotations, simulate.random_shifts(key, COUNT, 1.4, jnp.float32))
    found = matching.match(Particles(project(volume, truth)), volume, CONFIG)
    angles, shifts = errors(found.poses, truth)
    step = math.degrees(STEP)
    assert np.median(angles) < 0.75 * step and angles.max() < 1.5 * step
    assert np.median(shifts) < 0.75 and shifts.max() < 1.5
    assert float(found.scores.min()) > 0.9


@pytest.mark.slow
def test_the_optics_are_undone(on_grid, volume):
    """Images of reversed contrast, with astigmatism: those of the optics, or lost."""
    truth, _ = on_grid
    ctf = optics(COUNT, scale=-1.0)
    images = project(volume, truth, ctf)
    found = matching.match(Particles(images, ctf, PIXEL), volume, CONFIG)
    angles, shifts = errors(found.poses, truth)
    assert angles.max() < 0.01 and shifts.max() == 0
    np.testing.assert_allclose(found.scores, 1, atol=0.1)

    blind = matching.match(Particles(images, None, PIXEL), volume, CONFIG)
    assert np.median(errors(blind.poses, truth)[0]) > 2 * math.degrees(STEP)
    assert float(blind.scores.max()) < float(found.scores.min())
    crossed = optics(COUNT, scale=-1.0, defocus_angle=0.6 + np.pi / 2)
    turned = matching.match(Particles(images, crossed, PIXEL), volume, CONFIG)
    assert float(turned.scores.mean()) < float(found.scores.mean()) - 0.03


def test_the_band_follows_the_step(on_grid, volume):
    """1 / 0.25 radians is 4 cycles per box."""
    particles, step = Particles(on_grid[1][:1]), 0.25
    one, other = (
        matching.match(particles, volume, MatchConfig(step, 0.0, r_max=r_max))
        for r_max in (None, 4)
    )
    np.testing.assert_array_equal(one.scores, other.scores)


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
        MatchConfig(math.radians(10), max_shift=12.0),
    )
    truth = jax.tree.map(
        lambda *leaves: jnp.concatenate(leaves).astype(jnp.float32), *poses
    )
    angles, shifts = errors(found.poses, truth)
    assert angles.max() < 10
    assert shifts[:4].max() < 0.1 and shifts[4:].max() < 3
    assert float(found.scores[:4].min()) > 0.95


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: MatchConfig(max_shift=-1.0), "max_shift must be .*, got -1.0$"),
        (lambda: MatchConfig(max_shift=math.inf), "max_shift must be .*, got inf$"),
        (lambda: MatchConfig(shift_step=0.0), "shift_step must be .*, got 0.0$"),
        (lambda: MatchConfig(batch_size=0), "batch_size must be .*, got 0$"),
        (lambda: matching.directions(0.0), "angular step must be .*, got 0.0$"),
        (lambda: matching.directions(7.5), "angular step must be .*, got 7.5$"),
        (lambda: matching.directions(math.nan), "angular step must be .*, got nan$"),
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
    _, table = all_scores(volume, expected, config)
    found = matching.match(Particles(images), volume, config)
    np.testing.assert_allclose(found.scores, table.max(axis=1), atol=1e-5)
