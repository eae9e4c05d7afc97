"""RELION's programs before and after ours: it simulates, and takes what we write."""

import shutil
import subprocess

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrefine import cli, simulate
from jaxrefine.ctf import CTF
from jaxrefine.geometry import Poses
from jaxrefine.io import (
    read_json,
    read_mrc,
    read_particles,
    read_star,
    write_mrc,
    write_new_particles,
    write_particles,
)
from jaxrefine.maps.fsc import fsc

N, COUNT, PIXEL, ERROR = 32, 300, 5.0, 0.5
PROGRAMS = [f"relion_{name}" for name in ("project", "reconstruct", "postprocess")]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        None in map(shutil.which, PROGRAMS), reason="RELION is not installed"
    ),
]


def relion(folder, program, *options):
    command = [f"relion_{program}", *options]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="module")
def loop(tmp_path_factory):
    """Simulate with RELION; refine from half a radian off, in half sets."""
    folder, rng = tmp_path_factory.mktemp("loop"), np.random.default_rng(0)
    truth = simulate.phantom(jax.random.key(0), N)
    write_mrc(folder / "truth.mrc", truth, PIXEL)
    write_mrc(folder / "init.mrc", simulate.blur(truth, 2.5), PIXEL)
    draw, place, error = jax.random.split(jax.random.key(1), 3)
    poses = Poses(
        simulate.equidistributed_rotations(draw, COUNT),
        simulate.random_shifts(place, COUNT, 1.0),
    )
    u = rng.uniform(8000, 22000, COUNT)
    ctf = CTF(u, u - rng.uniform(0, 1500, COUNT), rng.uniform(0, np.pi, COUNT))
    names = [f"{i}@none.mrcs" for i in range(1, COUNT + 1)]
    write_new_particles(
        folder / "poses.star", poses, names, N, PIXEL, CTF(0.0, 0.0), ctf
    )
    options = "--i truth.mrc --ang poses.star --o true --ctf --add_noise"
    relion(folder, "project", *options.split(), "--white_noise", "1")
    true = read_particles(folder / "true.star")
    off = simulate.init1_poses(error, true.poses, ERROR)
    write_particles(folder / "rough.star", true, off)
    command = "refine {0}/rough.star --map {0}/init.mrc --out {0}/out --half-sets"
    assert cli.main(command.format(folder).split()) == 0
    return folder


def mean_fsc(folder, volume):
    """Mean FSC with the truth, of the whole box."""
    truth = jnp.asarray(read_mrc(folder / "truth.mrc")[0])
    return float(jnp.mean(fsc(jnp.asarray(volume), truth)[1 : N // 2]))


def reconstructed(folder, star):
    """Mean FSC with the truth of ``relion_reconstruct --ctf``."""
    relion(folder, "reconstruct", "--i", star, "--o", "made.mrc", "--ctf")
    return mean_fsc(folder, read_mrc(folder / "made.mrc")[0])


def test_relion_reconstructs_as_well_from_our_poses(loop):
    """From the poses that RELION simulated, nearly; not from those we were given."""
    ours, true, rough = (
        reconstructed(loop, star)
        for star in ("out/particles.star", "true.star", "rough.star")
    )
    assert ours >= 0.95 * true
    assert rough < 0.7 * true


def test_half_maps_are_as_near_to_the_truth_as_relions(loop):
    """Their mean, as RELION's map of the same poses; not with noise in the corners."""
    halves = [read_mrc(loop / "out" / f"half{i}.mrc")[0] for i in (1, 2)]
    ours, theirs = (
        mean_fsc(loop, (halves[0] + halves[1]) / 2),
        reconstructed(loop, "out/particles.star"),
    )
    assert ours >= 0.98 * theirs


def test_relion_postprocesses_our_half_maps(loop):
    """In the mask that our own command makes, and nearly to the same shell."""
    command = "postprocess {0}/out/half1.mrc {0}/out/half2.mrc --out {0}/ours"
    assert cli.main(command.format(loop).split()) == 0
    files = "--i out/half1.mrc --i2 out/half2.mrc --mask ours/mask.mrc --o ./theirs"
    relion(loop, "postprocess", *files.split(), "--angpix", str(PIXEL))
    theirs = float(read_star(loop / "theirs.star")["general"]["rlnFinalResolution"][0])
    ours = read_json(loop / "ours" / "postprocess.json")["resolution_in_angstroms"]
    assert 2 * PIXEL <= theirs < 4 * PIXEL
    # RELION gives the last shell before the FSC falls, we where it falls.
    box = N * PIXEL
    assert -0.5 <= box / ours - box / theirs <= 1.5
