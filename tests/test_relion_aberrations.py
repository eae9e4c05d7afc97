"""RELION's programs are the referees of aberrations, where they apply them.

In version 3.1.3, ``relion_project --ctf`` has the even Zernike terms, and the CTF at
the frequencies that the magnification maps to; it neither turns phases (beam tilt, odd
Zernike terms) nor reads the slice at those frequencies. ``relion_reconstruct --ctf``
undoes all of them.
"""

import shutil
import subprocess

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrefine import cli
from jaxrefine.ctf import CTF
from jaxrefine.data import observation
from jaxrefine.geometry import Poses, uniform_rotations
from jaxrefine.io import (
    read_mrc,
    read_particles,
    read_stack,
    read_star,
    write_mrc,
    write_new_particles,
    write_stack,
    write_star,
)
from jaxrefine.maps.fsc import fsc

PROGRAMS = ["relion_project", "relion_reconstruct"]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        None in map(shutil.which, PROGRAMS), reason="RELION is not installed"
    ),
]
N, PIXEL = 40, 1.1
ODD = {"rlnOddZernike": "[0.2,-0.1,25,40,-30,-15]"}
EVEN = {"rlnEvenZernike": "[0.1,0,2,0,60,-40,80,30,-50]"}
TILT = {"rlnBeamTiltX": "0.9", "rlnBeamTiltY": "-0.6"}
MATRIX = {
    "rlnMagMat00": "1.02",
    "rlnMagMat01": "0.01",
    "rlnMagMat10": "-0.004",
    "rlnMagMat11": "0.985",
}
# A tilt replaces the terms of coma, 40 and -30, and adds to the first two.
KINDS = {
    "tilt": TILT,
    "odd": ODD,
    "tilt and odd": TILT | ODD,
    "even": EVEN,
    "magnification": MATRIX,
    "all": TILT | ODD | EVEN | MATRIX,
}


def data_set(folder, count, columns):
    """A map of fine detail, and a table of poses and optics, with the columns."""
    rng = np.random.default_rng(0)
    axis, made = np.arange(N) - N // 2, np.zeros((N,) * 3)
    for centre in rng.uniform(-7, 7, (100, 3)):
        x, y, z = (np.exp(-0.5 * (axis - at) ** 2) for at in centre)
        made += z[:, None, None] * y[:, None] * x
    poses = Poses(
        np.asarray(uniform_rotations(jax.random.key(1), count), np.float64),
        rng.uniform(-2, 2, (count, 2)),
    )
    defocus = jnp.asarray(rng.uniform(8e3, 1.6e4, count))
    ctf = CTF(defocus, defocus - 300, jnp.asarray(rng.uniform(0, 3, count)))
    names = [f"{i:06d}@images.mrcs" for i in range(1, count + 1)]
    path = folder / "particles.star"
    write_mrc(folder / "map.mrc", made, PIXEL)
    write_new_particles(path, poses, names, N, PIXEL, CTF(0.0, 0.0), ctf)
    write_stack(folder / "images.mrcs", np.zeros((count, N, N), np.float32), PIXEL)
    blocks = read_star(path)
    blocks["optics"] |= {name: [text] for name, text in columns.items()}
    write_star(path, blocks)
    return made, path


def relion(folder, program, *words):
    command = [f"relion_{program}", *map(str, words)]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("kind", ["even", "magnification"])
def test_projections_have_relions_ctf(tmp_path, kind):
    """The ratio of its projections with and without the CTF."""
    _, path = data_set(tmp_path, 4, KINDS[kind])
    spectra = []
    for name, further in (("without", []), ("with", ["--ctf"])):
        words = ["--i", "map.mrc", "--ang", path, "--o", name, "--angpix", PIXEL]
        relion(tmp_path, "project", *words, *further)
        images, _ = read_stack(tmp_path / f"{name}.mrcs")
        spectra.append(np.fft.rfft2(images.astype(float)))
    file = read_particles(path)
    noise = jnp.ones(N // 2 + 1)
    view = observation.view(file.particles, (N - 1) // 2, noise)
    transfer = np.asarray(view.transfer(file.particles.ctf, jnp.zeros(4, int)))
    disc = view.disc
    at = np.asarray(disc.rows), np.asarray(disc.columns)
    plain, seen = (spectrum[:, *at] for spectrum in spectra)
    chosen = (np.abs(plain) > 1e-3 * np.abs(plain).max()) & (view.weights > 0)[None]
    assert chosen.sum() > 4 * 300
    ratio = seen[chosen] / plain[chosen]
    np.testing.assert_allclose(ratio, transfer[chosen], atol=2e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_relion_reconstructs_simulated_images(tmp_path, kind):
    """It undoes what `simulate --like` does; without the columns it does not."""
    made, path = data_set(tmp_path, 300, KINDS[kind])
    out = tmp_path / "out"
    words = ["simulate", tmp_path / "map.mrc", "--like", path, "--sigma", 0]
    assert cli.main([str(word) for word in [*words, "--out", out]]) == 0
    blocks = read_star(out / "truth.star")
    for name in KINDS[kind]:
        del blocks["optics"][name]
    write_star(out / "plain.star", blocks)
    curves = {}
    for table in ("truth", "plain"):
        words = ["--i", f"{table}.star", "--o", f"{table}_map.mrc", "--ctf"]
        relion(out, "reconstruct", *words)
        found, _ = read_mrc(out / f"{table}_map.mrc")
        found = jnp.asarray(found, jnp.float64)
        curves[table] = np.asarray(fsc(found, jnp.asarray(made)))
    # Up to 0.85 of Nyquist, where a magnification leaves something to be seen.
    last = int(0.85 * N / 2)
    assert curves["truth"][1 : last + 1].min() > 0.98
    assert curves["plain"][last - 2 : last + 1].max() < 0.9
