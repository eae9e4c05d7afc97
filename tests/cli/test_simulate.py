"""``jaxrefine simulate``: the images show what the tables say, and RELION agrees."""

import json
import shutil
import subprocess

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrefine import cli
from jaxrefine.cli.commands.simulate import SimulateSettings
from jaxrefine.data import observation
from jaxrefine.io import read_mrc, read_particles, read_star, write_mrc, write_star
from jaxrefine.operators import kbwf, slices
from jaxrefine.operators.gridding import Gridding
from jaxrefine.runs.options import declared
from jaxrefine.runs.progress import Bars

N, VOXEL, COUNT = 20, 2.0, 7
SIZE, PIXEL = 16, 2.5
ERROR = 17.0  # of the initial Euler angles, degrees
FILES = {
    *("particles.star", "truth.star", "init.star", "particles.mrcs"),
    *("truth.mrc", "init.mrc", "simulate.json"),
}


def blob(centre, width, n=N):
    """A Gaussian at ``centre`` (x, y, z), in voxels from the origin."""
    axis = np.arange(n) - n // 2
    x, y, z = (np.exp(-0.5 * ((axis - c) / width) ** 2) for c in centre)
    return (z[:, None, None] * y[:, None] * x).astype(np.float32)


CENTRE, WIDTH = np.array([2.0, -1.0, 1.5]), 1.5  # of the blob, on the map's grid


def simulate(folder, name, *further):
    """Simulate from the folder's map; return the folder of the data set."""
    command = ["simulate", folder / "map.mrc", "--out", folder / name]
    command += ["--particles", COUNT, "--max-shift", 1, "--seed", 5, *further]
    assert cli.main([str(word) for word in command]) == 0
    return folder / name


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Three data sets that differ in their optics and their noise alone."""
    folder = tmp_path_factory.mktemp("simulate")
    write_mrc(folder / "map.mrc", blob(CENTRE, WIDTH), VOXEL)
    size = ["--size", SIZE, "--initial-blur", 1.5, "--max-angle-error", ERROR]
    simulate(folder, "plain", "--sigma", 0, *size)
    simulate(folder, "seen", "--sigma", 0, "--ctf", "--voltage", 200, *size)
    simulate(folder, "noisy", "--snr-db", -3, "--ctf", "--voltage", 200, *size)
    return folder


def images_of(path):
    file = read_particles(path)
    return np.asarray(file.particles.batch(np.arange(len(file)))[0], float), file


def angles_in_radians(path):
    table = read_star(path)["particles"]
    names = ("rlnAngleRot", "rlnAngleTilt", "rlnAnglePsi")
    return np.deg2rad([np.array(table[name], float) for name in names])


@pytest.mark.slow
def test_all_files_are_there(folder):
    for name in ("plain", "seen", "noisy"):
        assert {path.name for path in (folder / name).iterdir()} == FILES
    report = json.loads((folder / "noisy/simulate.json").read_text())
    assert report["finished"] and report["sigma"] > 0
    affecting = {
        option.name for option in declared(SimulateSettings) if option.affects_results
    }
    assert report["settings"].keys() == affecting
    assert report["settings"]["snr_db"] == -3 and report["settings"]["seed"] == 5
    assert report["pixel_size_in_angstroms"] == PIXEL


def test_the_particle_is_where_the_table_says(folder):
    """The centroid of a blob at k is ``M k + t``, through crop, projector and file."""
    images, file = images_of(folder / "plain/truth.star")
    assert file.particles.pixel_size_in_angstroms == PIXEL
    axis = np.arange(SIZE) - SIZE // 2
    mass = images.sum(axis=(1, 2))
    x, y = (np.tensordot(images.sum(axis=i), axis, 1) / mass for i in (1, 2))
    seen = np.asarray(file.poses.rotations)[:, :2] @ (CENTRE * SIZE / N)
    expected = seen + np.asarray(file.poses.shifts)
    assert np.ptp(expected, axis=0).min() > 2
    np.testing.assert_allclose(np.stack([x, y], 1), expected, atol=0.02)
    assert 0.5 < np.abs(file.poses.shifts).max() <= 1


def test_the_mass_is_that_of_the_cropped_map(folder):
    images, _ = images_of(folder / "plain/truth.star")
    truth, voxel = read_mrc(folder / "plain/truth.mrc")
    assert truth.shape == (SIZE,) * 3 and voxel == pytest.approx(PIXEL)
    np.testing.assert_allclose(images.sum(axis=(1, 2)), truth.sum(), rtol=0.01)
    expected = blob(CENTRE * SIZE / N, WIDTH * SIZE / N, SIZE)
    np.testing.assert_allclose(truth, expected, atol=0.01)


def test_the_images_are_seen_through_the_ctf_of_the_table(folder):
    plain, without = images_of(folder / "plain/truth.star")
    seen, file = images_of(folder / "seen/truth.star")
    assert without.particles.ctf is None
    ctf = file.particles.ctf
    assert ctf is not None
    np.testing.assert_array_equal(ctf.voltage, np.full(COUNT, 200.0))
    mean = np.asarray(ctf.defocus_u + ctf.defocus_v) / 2
    astigmatism = np.asarray(ctf.defocus_u - ctf.defocus_v)
    assert (8e3 <= mean).all() and (mean <= 22e3).all() and np.ptp(mean) > 2e3
    assert (0 <= astigmatism).all() and (astigmatism <= 1e3).all()
    rotations = without.poses.rotations
    np.testing.assert_allclose(file.poses.rotations, rotations, atol=1e-8)
    k = np.fft.fftfreq(SIZE, PIXEL)
    points = np.stack(np.meshgrid(k, k), axis=-1)
    inside = (np.abs(points) < 0.49 / PIXEL).all(axis=-1)  # below Nyquist
    transfer = np.asarray(jax.vmap(lambda c: c(jnp.asarray(points[inside])))(ctf))
    before, after = (np.fft.fft2(images)[:, inside] for images in (plain, seen))
    scale = np.abs(after).max()
    np.testing.assert_allclose(after, transfer * before, atol=1e-5 * scale)


def test_the_noise_has_the_level_asked_for(folder):
    seen, _ = images_of(folder / "seen/truth.star")
    noisy, _ = images_of(folder / "noisy/truth.star")
    sigma = json.loads((folder / "noisy/simulate.json").read_text())["sigma"]
    # -3 dB per pixel, of the power behind the CTF.
    assert sigma**2 == pytest.approx(np.mean(seen**2) * 10**0.3, rel=1e-4)
    noise = (noisy - seen) / sigma
    assert np.mean(noise) == pytest.approx(0, abs=5 / noise.size**0.5)
    assert np.mean(noise**2) == pytest.approx(1, abs=5 * (2 / noise.size) ** 0.5)
    between = np.corrcoef(noise.reshape(COUNT, -1)) - np.eye(COUNT)
    assert np.abs(between).max() < 5 / SIZE


def test_the_start_is_off_by_what_was_asked_for(folder):
    start = read_particles(folder / "seen/init.star")
    error = angles_in_radians(folder / "seen/init.star")
    error -= angles_in_radians(folder / "seen/truth.star")
    assert 0.1 < np.abs(error).max() <= np.deg2rad(ERROR) + 1e-6
    np.testing.assert_array_equal(start.poses.shifts, np.zeros((COUNT, 2)))
    blocks = [read_star(folder / f"seen/{name}.star") for name in ("init", "particles")]
    assert blocks[0] == blocks[1]
    # The initial map is wider, by the blur.
    volume, voxel = read_mrc(folder / "seen/init.mrc")
    assert voxel == pytest.approx(PIXEL)
    before = WIDTH * SIZE / N
    width = (before**2 + 1.5**2) ** 0.5
    expected = blob(CENTRE * SIZE / N, width, SIZE) * (before / width) ** 3
    np.testing.assert_allclose(volume, expected, atol=0.01)


def test_the_batch_size_changes_nothing(folder):
    simulate(
        *(folder, "again", "--sigma", 0.25, "--batch-size", 3),
        *("--size", SIZE, "--initial-blur", 1.5, "--max-angle-error", ERROR),
    )
    again, file = images_of(folder / "again/truth.star")
    plain, _ = images_of(folder / "plain/truth.star")
    noisy, _ = images_of(folder / "noisy/truth.star")
    seen, _ = images_of(folder / "seen/truth.star")
    sigma = json.loads((folder / "noisy/simulate.json").read_text())["sigma"]
    # Poses and noise are drawn for each particle by itself.
    np.testing.assert_allclose(
        (again - plain) / 0.25, (noisy - seen) / sigma, atol=2e-4
    )


def test_a_finished_data_set_is_left_alone(folder, run):
    out = folder / "plain"
    before = {path: path.stat().st_mtime_ns for path in out.iterdir()}
    command = ["simulate", folder / "map.mrc", "--out", out, "--particles", COUNT]
    command += ["--max-shift", 1, "--size", SIZE, "--initial-blur", 1.5]
    same = ["--max-angle-error", ERROR, "--sigma", 0]
    code, text, _ = run(*command, *same, "--seed", 5)
    assert code == 0 and "already" in text
    code, text, err = run(*command, *same, "--seed", 6)
    assert code == 2 and "other settings (seed)" in err and not text
    assert before == {path: path.stat().st_mtime_ns for path in out.iterdir()}


def test_an_interruption_leaves_nothing_half_written(folder, run, monkeypatch):
    """When the first images are in the stack, and the bar is to say so."""

    def stop(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(Bars, "next", lambda *_: stop)
    out = folder / "stopped"
    command = ["simulate", folder / "map.mrc", "--out", out, "--particles", COUNT]
    code, _, err = run(*command, "--sigma", 1)
    assert code == 130 and err.endswith("interrupted\n")
    assert [path.name for path in out.iterdir()] == ["simulate.json"]
    assert not json.loads((out / "simulate.json").read_text())["finished"]


@pytest.mark.slow
@pytest.mark.skipif(
    shutil.which("relion_reconstruct") is None,
    reason="relion_reconstruct is not installed",
)
def test_relion_reconstructs_the_truth(folder):
    """From the true poses, signs, units and optics included."""
    out = folder / "relion"
    command = ["simulate", folder / "map.mrc", "--out", out, "--particles", 60]
    command += ["--max-shift", 2, "--size", SIZE, "--snr-db", 20, "--ctf"]
    assert cli.main([str(word) for word in command]) == 0
    for name, further in (("right", ["--ctf"]), ("wrong", [])):
        program = ["relion_reconstruct", "--i", "truth.star", "--o", f"{name}.mrc"]
        subprocess.run([*program, *further], cwd=out, check=True, capture_output=True)
    truth = read_mrc(out / "truth.mrc")[0]

    def likeness(name):
        return np.corrcoef(truth.ravel(), read_mrc(out / f"{name}.mrc")[0].ravel())[
            0, 1
        ]

    assert likeness("right") > 0.97
    assert likeness("wrong") < 0.9


# --- bad input

BAD_OPTIONS = [
    ["--particles", 0],
    ["--sigma", -1],
    ["--sigma", "nan"],
    ["--max-shift", -1],
    ["--max-shift", "inf"],
    ["--max-angle-error", -0.1],
    ["--initial-blur", "nan"],
    ["--size", 4],
    ["--size", N + 1],
    ["--seed", -1],
    ["--seed", 2**31],
    ["--batch-size", 0],
    ["--voltage", 0],
    ["--spherical-aberration", -1],
    ["--amplitude-contrast", 1.5],
]


@pytest.mark.parametrize("bad", BAD_OPTIONS, ids=lambda bad: f"{bad[0]} {bad[1]}")
def test_a_bad_option_is_a_sentence(tmp_path, run, bad):
    write_mrc(tmp_path / "map.mrc", blob(CENTRE, WIDTH), VOXEL)
    command = ["simulate", tmp_path / "map.mrc", "--out", tmp_path / "out"]
    result = run(*command, "--particles", 3, "--sigma", 1, *bad)
    result.assert_refused("" if bad[1] == N + 1 else bad[0])
    assert result.err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_bad_maps_and_folders(tmp_path, run):
    write_mrc(tmp_path / "map.mrc", blob(CENTRE, WIDTH), VOXEL)
    write_mrc(tmp_path / "zero.mrc", np.zeros((N, N, N)), VOXEL)
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis/thesis.tex").write_text("precious")
    for name, out, words in (
        ("absent.mrc", "out", "does not exist"),
        ("zero.mrc", "out", "must not be zero everywhere"),
        ("map.mrc", "thesis", "holds files but no simulate.json"),
        ("map.mrc", "map.mrc", "must be a folder, got a file"),
    ):
        command = ["simulate", tmp_path / name, "--out", tmp_path / out]
        run(*command, "--particles", 3, "--sigma", 1).assert_refused(words)
    assert not (tmp_path / "out").exists()
    assert [path.name for path in (tmp_path / "thesis").iterdir()] == ["thesis.tex"]


@pytest.mark.parametrize(
    ("noise", "words"),
    [
        ([], "--snr-db or --sigma must be given, got neither"),
        (["--sigma", 1, "--snr-db", 0], "--snr-db must not be given with --sigma"),
    ],
    ids=["none", "two"],
)
def test_the_level_of_the_noise_is_given_once(run, noise, words):
    command = ["simulate", "map.mrc", "--out", "x", "--particles", 3]
    run(*command, *noise).assert_refused(words)


# --- a data set like another


# Columns of the images of a table, which those that are simulated like it do not have.
OF_IMAGES = ("rlnNormCorrection", "jaxrefineEvidence", "rlnOriginalParticleName")


def write_table(folder, *, groups=("1", "2"), **columns):
    """A table of twelve particles in two optics groups that differ in everything."""
    rng, count = np.random.default_rng(1), 12
    optics = {
        "rlnOpticsGroup": ["1", "2"],
        "rlnVoltage": ["300", "200"],
        "rlnSphericalAberration": ["2.7", "1.2"],
        "rlnAmplitudeContrast": ["0.1", "0.07"],
        "rlnImagePixelSize": [f"{VOXEL}"] * 2,
        "rlnImageSize": [f"{N}"] * 2,
        "rlnBeamTiltX": ["1.5", "0"],
        "rlnBeamTiltY": ["-0.8", "0.9"],
        "rlnOddZernike": ["[0.3,-0.2,25,40,-60,-15]", "[0,0,90]"],
        "rlnEvenZernike": ["[0.1,0,2,0,60,-40,80,30,-50]", "[]"],
        "rlnMagMat00": ["1.03", "0.98"],
        "rlnMagMat01": ["0.01", "0.02"],
        "rlnMagMat10": ["-0.004", "0.0"],
        "rlnMagMat11": ["0.975", "1.01"],
    }
    drawn = {
        "rlnAngleRot": (-180, 180),
        "rlnAngleTilt": (0, 180),
        "rlnAnglePsi": (-180, 180),
        "rlnOriginXAngst": (-3, 3),
        "rlnOriginYAngst": (-3, 3),
        "rlnDefocusU": (1.2e4, 2e4),
        "rlnDefocusV": (1e4, 1.2e4),
        "rlnDefocusAngle": (0, 180),
        "rlnPhaseShift": (0, 90),
        "rlnCtfBfactor": (0, 40),
        "rlnCtfScalefactor": (0.6, 1.4),
    }
    particles = {
        "rlnImageName": [f"{i}@gone/stack.mrcs" for i in range(1, count + 1)],
        "rlnOpticsGroup": [*groups] * (count // 2),
        "rlnMicrographName": [f"{i % 3}.mrc" for i in range(count)],
        **{name: ["0.7"] * count for name in OF_IMAGES},
        **{
            name: [f"{value:.6f}" for value in rng.uniform(low, high, count)]
            for name, (low, high) in drawn.items()
        },
    }
    blocks = {"optics": optics, "particles": particles}
    for name, texts in columns.items():
        block = optics if name in optics else particles
        block.pop(name) if texts is None else block.update({name: texts})
    path = folder / "like.star"
    write_star(path, blocks)
    return path, blocks


def likeness(folder, out, *further):
    """Simulate like the table of the folder, without noise."""
    command = ["simulate", folder / "map.mrc", "--out", folder / out, "--sigma", 0]
    return [*command, "--like", folder / "like.star", *further]


def test_images_like_a_table_are_those_of_the_engines_model(tmp_path, run):
    """What `reconstruct` compares images with leaves nothing of them, at the truth."""
    write_mrc(tmp_path / "map.mrc", blob(CENTRE, WIDTH), VOXEL)
    _, blocks = write_table(tmp_path)
    result = run(*likeness(tmp_path, "out", "--batch-size", 5))
    assert result.code == 0, result.err
    # The table has what it had, but for the images and what was measured of them.
    written = read_star(tmp_path / "out/truth.star")
    assert written["optics"] == blocks["optics"]
    particles = dict(blocks["particles"])
    names = [f"{i:06d}@particles.mrcs" for i in range(1, 13)]
    particles |= {"rlnImageName": names}
    for name in OF_IMAGES:
        del particles[name]
    assert written["particles"] == particles

    file = read_particles(tmp_path / "out/truth.star")
    data = file.particles
    images, ctf = data.batch(np.arange(len(file)))
    noise = jnp.ones(N // 2 + 1, jnp.float32)
    view = observation.view(data, N // 2 - 1, noise)
    spectra, transfer, matrices = view.seen(images, ctf, jnp.asarray(data.group))
    assert transfer is not None and matrices is not None
    volume = jnp.asarray(read_mrc(tmp_path / "out/truth.mrc")[0])
    basis = kbwf.SIMULATION_BASIS
    spectrum = Gridding(6, 2.0).spectrum(kbwf.expand(basis, volume), N // 2 - 1)
    omega = view.disc.frequencies.astype(jnp.float32)
    points = jnp.einsum("pij,kj->pki", matrices, omega)
    radius = 2 * np.pi / N * jnp.linalg.norm(points, axis=-1)
    envelope = kbwf.fourier_transform(basis, radius).astype(jnp.float32)
    poses = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), file.poses)
    model = slices.project(
        spectrum, view.disc, poses, transfer * envelope, magnification=matrices
    )
    seen = np.asarray(view.weights) > 0
    residual, scale = (spectra - model)[:, seen], np.abs(spectra[:, seen]).max()
    assert np.abs(residual).max() < 1e-5 * scale
    # It is not the model of one optics group for all.
    other = slices.project(spectrum, view.disc, poses, transfer)[:, seen]
    assert np.abs(other - spectra[:, seen]).max() > 0.01 * scale


def test_poses_are_drawn_for_a_table_if_asked(tmp_path, run):
    write_mrc(tmp_path / "map.mrc", blob(CENTRE, WIDTH), VOXEL)
    write_table(tmp_path, rlnAngleRot=None, rlnAngleTilt=None, rlnAnglePsi=None)
    result = run(*likeness(tmp_path, "a", "--draw-poses", "--max-shift", 2))
    assert result.code == 0, result.err
    images, drawn = images_of(tmp_path / "a/truth.star")
    assert 1 < np.abs(drawn.poses.shifts).max() < 2
    # They are in the table: the same images are made from it.
    (tmp_path / "like.star").write_text((tmp_path / "a/truth.star").read_text())
    assert run(*likeness(tmp_path, "b")).code == 0
    again, _ = images_of(tmp_path / "b/truth.star")
    np.testing.assert_allclose(again, images, atol=1e-5 * np.abs(images).max())


@pytest.mark.parametrize(
    ("columns", "options", "words"),
    [
        ({}, ["--particles", 3], "--particles"),
        ({}, ["--ctf"], "--ctf"),
        ({}, ["--voltage", 200], "--voltage"),
        ({}, ["--max-shift", 1], "--draw-poses"),
        ({}, ["--size", 16], "20^3 voxels of 2 A"),
        ({"rlnImageSize": ["32"] * 2}, [], "32^3 voxels"),
        ({"rlnImageSize": ["20", "24"]}, [], "rlnImageSize"),
        ({"rlnImageSize": ["-16"] * 2}, [], "whole numbers from 2 to 100000"),
        ({"rlnImageSize": ["0"] * 2}, [], "whole numbers from 2 to 100000"),
        ({"rlnImageSize": ["1e9"] * 2}, [], "whole numbers from 2 to 100000"),
        ({"rlnOriginXAngst": ["900"] * 12}, [], "at most 10 pixels from the centre"),
        ({"rlnImagePixelSize": ["2.1"] * 2}, [], "voxels of 2.1 A"),
        ({"rlnImagePixelSize": ["2", "2.1"]}, [], "one pixel size"),
        ({"rlnVoltage": None}, [], "rlnVoltage"),
        ({"rlnDefocusU": ["x"] * 12}, [], "rlnDefocusU"),
        ({"rlnAngleRot": None, "rlnAngleTilt": None}, [], "--draw-poses draws them"),
        ({"rlnCtfDataArePhaseFlipped": ["1"] * 12}, [], "phase-flipped"),
        ({"rlnMagMat00": ["2", "1"]}, [], "close to the identity"),
        ({"rlnMagMat11": None}, [], "none of rlnMagMat11"),
        ({"groups": ("1", "3")}, [], "group 3"),
    ],
)
def test_a_table_that_does_not_fit_is_refused(tmp_path, run, columns, options, words):
    write_mrc(tmp_path / "map.mrc", blob(CENTRE, WIDTH), VOXEL)
    write_table(tmp_path, **columns)
    result = run(*likeness(tmp_path, "out", *options))
    result.assert_refused(words)
    assert result.err.count("\n") == 1 and not (tmp_path / "out").exists()


def test_a_table_without_optics_is_refused(tmp_path, run):
    write_mrc(tmp_path / "map.mrc", blob(CENTRE, WIDTH), VOXEL)
    _, blocks = write_table(tmp_path)
    for name in [*blocks["particles"]]:
        if name.startswith(("rlnDefocus", "rlnPhase", "rlnCtf")):
            del blocks["particles"][name]
    write_star(tmp_path / "like.star", blocks)
    run(*likeness(tmp_path, "out")).assert_refused("must give the optics")
    command = ["simulate", tmp_path / "map.mrc", "--out", tmp_path / "out"]
    run(*command, "--sigma", 1).assert_refused("--particles or --like")
    words = ["--sigma", 1, "--particles", 3, "--draw-poses"]
    run(*command, *words).assert_refused("--draw-poses must be given with --like")
