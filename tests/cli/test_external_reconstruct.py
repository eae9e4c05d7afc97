"""``jaxrefine external-reconstruct``: run by RELION itself, and against its own map."""

import os
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import mrcfile
import numpy as np
import pytest
from jax.scipy.sparse.linalg import cg

from jaxrefine import cli, io, simulate
from jaxrefine.maps import padded
from jaxrefine.maps.fsc import fsc, mean_fsc
from jaxrefine.maps.sums import data_term
from jaxrefine.maps.tv import IsotropicTV
from jaxrefine.operators import normal

N, PIXEL = 16, 5.0
SIZE = 2 * N  # of RELION's grids
GENERAL, TAU2 = "external_reconstruct_general", "external_reconstruct_tau2"
COMMAND = [sys.executable, "-m", "jaxrefine.cli", "external-reconstruct"]
VARIABLE = "RELION_EXTERNAL_RECONSTRUCT_EXECUTABLE"


def needs(*programs):
    missing = None in map(shutil.which, programs)
    return pytest.mark.skipif(missing, reason=f"there is no {' or '.join(programs)}")


def relion(folder, *words, hook=COMMAND):
    """Run one of RELION's programs, which runs ours."""
    environment = os.environ | {VARIABLE: " ".join(map(str, hook))}
    return subprocess.run(
        [str(word) for word in words],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
    )


def simulated(folder, count, snr_db, error=10):
    """Images of a phantom, their poses off by some degrees, in a new folder."""
    truth = simulate.phantom(jax.random.key(0), N)
    io.write_mrc(folder / "map.mrc", truth, PIXEL)
    words = ["simulate", folder / "map.mrc", "--out", folder / "data"]
    words += ["--particles", count, "--snr-db", snr_db, "--max-shift", 1]
    words += ["--max-angle-error", error, "--initial-blur", 2]
    assert cli.main([str(word) for word in words]) == 0
    return folder / "data"


@pytest.fixture(scope="module")
def reconstructed(tmp_path_factory):
    """A folder in which ``relion_reconstruct`` has our command make its map."""
    data = simulated(tmp_path_factory.mktemp("door"), 60, 10)
    # It takes the noise for 1 in RELION's units: a component of transforms over N^2.
    noise = io.read_json(data / "simulate.json")["sigma"] / (N * np.sqrt(2))
    words = "relion_reconstruct --i truth.star --o made.mrc --external_reconstruct"
    done = relion(data, *words.split(), hook=[*COMMAND, "--tau", noise])
    assert done.returncode == 0, done.stderr
    return data


def ball(n):
    """The inside of the sphere that RELION leaves as it is."""
    line = np.arange(n) - n // 2
    return line[:, None, None] ** 2 + line[:, None] ** 2 + line**2 < (n / 2 - 4) ** 2


def relative_error(found, expected):
    inside = ball(N)
    difference = np.linalg.norm((found - expected)[inside])
    return difference / np.linalg.norm(expected[inside])


@pytest.mark.slow
@needs("relion_reconstruct")
def test_relion_takes_our_map_for_its_own(reconstructed):
    """It is written in RELION's scale, sign and place, and is the map of the truth."""
    made, truth = (
        io.read_mrc(reconstructed / f"{name}.mrc")[0] for name in ("made", "truth")
    )
    ours = mrcfile.read(reconstructed / "made_external_reconstruct.mrc")
    np.testing.assert_array_equal(made, ours)
    curve = np.asarray(fsc(jnp.asarray(made), jnp.asarray(truth)))
    assert curve[1 : N // 2 - 2].min() > 0.98
    # relion_reconstruct takes every image's mean for zero.
    inside = ball(N)
    made, truth = (volume - volume[inside].mean() for volume in (made, truth))
    assert relative_error(made, truth) < 0.2
    size = io.voxel_size_in_angstroms(reconstructed / "made_external_reconstruct.mrc")
    assert size is None, "RELION 3.1 does not say it"


@pytest.mark.slow
@needs("relion_reconstruct", "relion_external_reconstruct")
def test_without_a_regulariser_the_map_is_relions(reconstructed, monkeypatch):
    """The same Wiener filter, in our data term and by RELION's own program."""
    path = reconstructed / "made_external_reconstruct.star"
    tau2 = np.geomspace(1e-2, 1e-4, N // 2 + 1)
    blocks = io.read_star(path)
    blocks[TAU2] = {
        "rlnSpectralIndex": [str(i) for i in range(len(tau2))],
        "rlnReferenceTau2": [f"{value:.9g}" for value in tau2],
    }
    io.write_star(reconstructed / "wiener.star", blocks)
    words = "relion_external_reconstruct wiener.star --skip_gridding --o wiener.mrc"
    done = relion(reconstructed, *words.split())
    assert done.returncode == 0, done.stderr
    theirs = mrcfile.read(reconstructed / "wiener.mrc")

    monkeypatch.chdir(reconstructed)  # where the names hold
    source = io.read_external_reconstruction(path.name)
    z, y, x = (np.fft.fftfreq(SIZE, 1 / SIZE),) * 2 + (np.fft.rfftfreq(SIZE, 1 / SIZE),)
    radius = np.sqrt(z[:, None, None] ** 2 + y[:, None] ** 2 + x**2)
    shell = np.minimum(np.rint(radius / 2).astype(int), N // 2)
    prior = np.where(radius < N, 1 / (8 * tau2[shell]), 0)
    weight = jnp.asarray(source.weight + prior)
    images = jnp.asarray(source.data.astype(complex))
    data = data_term(padded.sums_of_grid(images, weight, N))
    zero = jnp.zeros_like(data.energy)
    u, _ = cg(
        lambda u: normal.apply_normal(data.transfer, u),
        data.backprojection,
        tol=1e-6,
        maxiter=300,
        M=normal.circulant_inverse(data.preconditioner, zero, zero),
    )
    line = padded.envelope(N, SIZE)
    envelope = line[:, None, None] * line[:, None] * line
    ours = np.asarray(u) / envelope
    # Theirs is cropped after the division, ours is found within the box.
    assert relative_error(ours, theirs) < 0.08
    # The same division, and nothing else, but for our envelope along each axis.
    quotient = np.where(radius < N, source.data / np.where(weight > 0, weight, 1), 0)
    whole = N**2 * np.fft.irfftn(quotient, s=(SIZE,) * 3, axes=(0, 1, 2))
    place = (np.arange(N) - N // 2) % SIZE
    divided = whole[np.ix_(place, place, place)] / envelope
    assert relative_error(divided, theirs) < 0.01


@pytest.mark.slow
@needs("relion_reconstruct")
def test_relion_ends_when_we_refuse(reconstructed):
    words = "relion_reconstruct --i truth.star --o none.mrc --external_reconstruct"
    done = relion(reconstructed, *words.split(), hook=[*COMMAND, "--tau", "0"])
    assert done.returncode != 0
    assert "--tau must be more than 0, got 0\n" in done.stderr
    assert not (reconstructed / "none.mrc").exists()


def asked(folder, seed=0):
    """What RELION writes, of random images' size, as its names are: to the folder."""
    rng, shape = np.random.default_rng(seed), (SIZE, SIZE, N + 1)
    spectrum = np.fft.rfftn(rng.normal(size=(SIZE,) * 3)).astype(np.complex64)
    weight = rng.uniform(0, 1e4, shape)
    grids = {"data_real": spectrum.real, "data_imag": spectrum.imag, "weight": weight}
    for name, values in grids.items():
        with mrcfile.new(folder / f"run_external_reconstruct_{name}.mrc") as mrc:
            mrc.set_data(values.astype(np.float32))
    table = io.Pairs(
        rlnExtReconsDataReal=["run_external_reconstruct_data_real.mrc"],
        rlnExtReconsDataImag=["run_external_reconstruct_data_imag.mrc"],
        rlnExtReconsWeight=["run_external_reconstruct_weight.mrc"],
        rlnExtReconsResult=["run_external_reconstruct.mrc"],
        rlnReferenceDimensionality=["3"],
        rlnOriginalImageSize=[str(N)],
        rlnPixelSize=[str(PIXEL)],
    )
    io.write_star(folder / "run_external_reconstruct.star", {GENERAL: table})
    return folder / "run_external_reconstruct.mrc"


def test_the_map_has_the_voxels_that_relion_tells(tmp_path, run, monkeypatch):
    result = asked(tmp_path)
    monkeypatch.chdir(tmp_path)
    code, out, err = run("external-reconstruct", "run_external_reconstruct.star")
    assert (code, err) == (0, "")
    assert out.startswith("tau 1, lambda ") and out.endswith(f": {result.name}\n")
    volume, voxel = io.read_mrc(result)
    assert volume.shape == (N, N, N) and voxel == PIXEL
    source = io.read_external_reconstruction("run_external_reconstruct.star")
    expected, _ = padded.reconstruct(
        jnp.asarray(source.data),
        jnp.asarray(source.weight),
        N,
        jnp.float32(1),
        IsotropicTV(),
        30,
    )
    np.testing.assert_allclose(volume, expected, atol=1e-4 * np.abs(expected).max())


def test_bad_input_is_refused_and_no_map_written(tmp_path, run, monkeypatch):
    result = asked(tmp_path)
    monkeypatch.chdir(tmp_path)
    star = "run_external_reconstruct.star"
    (tmp_path / "run_external_reconstruct_weight.mrc").unlink()
    refused = run("external-reconstruct", star)
    refused.assert_refused("run_external_reconstruct_weight.mrc does not exist")
    run("external-reconstruct", "none.star").assert_refused("none.star does not exist")
    assert not result.exists()
    blocks = io.read_star(star)
    blocks[GENERAL]["rlnExtReconsWeight"] = blocks[GENERAL]["rlnExtReconsDataReal"]
    blocks[GENERAL]["rlnExtReconsResult"] = ["nowhere/map.mrc"]
    io.write_star("elsewhere.star", blocks)
    refused = run("external-reconstruct", "elsewhere.star")
    refused.assert_refused("weights of at least 0")


@pytest.mark.slow
def test_two_at_once_make_what_each_makes_alone(tmp_path):
    """Within an MPI program, as RELION's two ranks call it, and without any cache."""
    environment = os.environ | {
        "OMPI_COMM_WORLD_SIZE": "3",
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path / "cache"),
    }
    folders = [tmp_path / f"half{i}" for i in (1, 2)]

    def start(folder, rank):
        return subprocess.Popen(
            [*COMMAND, "run_external_reconstruct.star"],
            cwd=folder,
            env=environment | {"OMPI_COMM_WORLD_RANK": str(rank)},
        )

    for seed, folder in enumerate(folders):
        folder.mkdir()
        asked(folder, seed)
    together = [start(folder, rank) for rank, folder in enumerate(folders, start=1)]
    assert [process.wait() for process in together] == [0, 0]
    for rank, folder in enumerate(folders, start=1):
        result = folder / "run_external_reconstruct.mrc"
        first = mrcfile.read(result)
        result.unlink()
        assert start(folder, rank).wait() == 0
        np.testing.assert_array_equal(mrcfile.read(result), first)


REFINE = """mpirun --allow-run-as-root --oversubscribe -n 3 relion_refine_mpi --o ./run
    --i particles.star --ref init.mrc --ini_high 25 --particle_diameter 70 --sym C1
    --auto_refine --split_random_halves --low_resol_join_halves 40 --norm --scale
    --healpix_order 2 --auto_local_healpix_order 2 --sigma_ang 5 --oversampling 1
    --offset_range 2 --offset_step 2 --flatten_solvent --zero_mask --dont_check_norm
    --dont_combine_weights_via_disc --pool 10 --pad 2 --j 1 --random_seed 1"""


@pytest.mark.slow
@needs("relion_refine_mpi", "mpirun")
def test_a_whole_refinement_by_relion(tmp_path):
    """It converges with our maps, to one nearer to the truth than where it began."""
    data = simulated(tmp_path, 60, 5)
    done = relion(data, *REFINE.split(), "--external_reconstruct")
    assert done.returncode == 0, done.stderr
    numbers = [
        path.name.split("_")[1]
        for path in data.glob("run_it*_half1_class001_external_reconstruct.mrc")
    ]
    assert len(numbers) >= 3
    assert (data / "run_class001.mrc").exists(), "it came to its end"
    truth = jnp.asarray(io.read_mrc(data / "truth.mrc")[0])
    score = [
        float(mean_fsc(fsc(jnp.asarray(io.read_densities(data / name)), truth)))
        for name in ("init.mrc", "run_class001.mrc")
    ]
    assert score[1] > score[0] + 0.1
