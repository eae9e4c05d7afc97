"""RELION reads the tables that are written, started in the project's folder."""

import shutil
import subprocess
from pathlib import Path

import jax
import numpy as np
import pytest
from helpers import cryosparc_fields, write_cs

from jaxrefine.ctf import CTF
from jaxrefine.geometry import Poses, matrix_to_rotvec, uniform_rotations
from jaxrefine.io import (
    read_mrc,
    read_particles,
    write_mrc,
    write_new_particles,
    write_particles,
    write_stack,
)

N, COUNT, PIXEL = 24, 60, 3.0
PROGRAMS = ["relion_reconstruct", "relion_refine"]

pytestmark = pytest.mark.skipif(
    None in map(shutil.which, PROGRAMS), reason="RELION is not installed"
)


def relion(program, *options):
    command = [f"relion_{program}", *map(str, options)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def assert_read(table, truth):
    """RELION makes the map of its images, and refines them for an iteration."""
    relion("reconstruct", "--i", table, "--o", "made.mrc")
    made, _ = read_mrc("made.mrc")
    assert np.corrcoef(made.ravel(), np.ravel(truth))[0, 1] > 0.9
    options = "--ref truth.mrc --ini_high 15 --iter 1 --particle_diameter 60 "
    options += "--healpix_order 0 --offset_range 1 --offset_step 1 --pad 1 --K 1"
    Path("Refine3D").mkdir()
    relion("refine", "--i", table, "--o", "Refine3D/run", *options.split())
    assert read_mrc("Refine3D/run_it001_class001.mrc")[0].any()


@pytest.fixture(scope="module")
def data():
    """A map of Gaussians, and its projections at random poses, which are Gaussians."""
    rng = np.random.default_rng(0)
    axis, centres = np.arange(N) - N // 2, rng.uniform(-5, 5, (8, 3))
    rotations = np.asarray(uniform_rotations(jax.random.key(1), COUNT), np.float64)
    shifts = rng.uniform(-1, 1, (COUNT, 2))

    def gaussian(at):
        return np.exp(-0.5 * ((axis - np.asarray(at)[..., None]) / 1.5) ** 2)

    x, y, z = (gaussian(centres[:, i]) for i in range(3))
    truth = np.einsum("cz,cy,cx->zyx", z, y, x)
    seen = centres @ rotations.transpose(0, 2, 1)[..., :2] + shifts[:, None]
    images = np.einsum("pcy,pcx->pyx", gaussian(seen[..., 1]), gaussian(seen[..., 0]))
    images += 0.02 * rng.normal(size=images.shape)
    return truth, images.astype(np.float32), Poses(rotations, shifts)


@pytest.fixture
def project(tmp_path, monkeypatch, data):
    folder = tmp_path / "project"
    folder.mkdir()
    monkeypatch.chdir(folder)
    write_mrc("truth.mrc", data[0], PIXEL)
    return folder


def cryosparc_table(path, poses: Poses):
    """Of images in a stack that ends in ``.mrc``; some know no micrograph."""
    rows = np.arange(COUNT)
    columns = cryosparc_fields(COUNT, N, PIXEL) | {
        "uid": rows.astype("<u8"),
        "blob/path": np.full(COUNT, b">J1/extract/batch_000000_particles.mrc"),
        "blob/sign": np.ones(COUNT, "<f4"),
        "alignments3D/pose": -np.asarray(matrix_to_rotvec(poses.rotations), "<f4"),
        "alignments3D/shift": -np.asarray(poses.shifts, "<f4"),
        "alignments3D/split": (rows % 2).astype("<u4"),
        "location/micrograph_path": np.where(rows % 2, b"J0/mic 1.mrc", b""),
        "filament/filament_uid": np.uint64(2**63) + (rows // 10).astype("<u8"),
        "sym_expand/src_uid": np.uint64(2**63) + rows.astype("<u8"),
    }
    path.parent.mkdir(parents=True)
    write_cs(path, columns)


def test_a_table_of_cryosparc(project, data):
    truth, images, poses = data
    cryosparc_table(project / "J2/J2_003_particles.cs", poses)
    (project / "J1/extract").mkdir(parents=True)
    write_stack("J1/extract/batch_000000_particles.mrc", images, PIXEL)
    file = read_particles("J2/J2_003_particles.cs")
    (project / "out").mkdir()
    write_particles("out/particles.star", file, file.poses)
    assert_read("out/particles.star", truth)


def test_a_table_that_is_written_outside_of_the_project(project, tmp_path, data):
    truth, images, poses = data
    (project / "Extract").mkdir()
    write_stack("Extract/particles.mrcs", images, PIXEL)
    names = [f"{i:06d}@Extract/particles.mrcs" for i in range(1, COUNT + 1)]
    write_new_particles("p.star", poses, names, N, PIXEL, CTF(0.0, 0.0))
    file = read_particles("p.star")
    (tmp_path / "elsewhere/deep").mkdir(parents=True)
    out = tmp_path / "elsewhere/deep/particles.star"
    write_particles(out, file, file.poses)
    assert_read(out, truth)
