"""cryoSPARC's two files on the command line: joined, told of, and refused in words."""

from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
from helpers import write_cs

from jaxrefine.cli import reconstruct as implementation
from jaxrefine.cli import refine as refining
from jaxrefine.cli.commands.reconstruct import RECONSTRUCT
from jaxrefine.cli.commands.refine import REFINE
from jaxrefine.cli.engine import Engine
from jaxrefine.io import read_particles, write_particles

COUNT, N, PIXEL = 8, 16, 2.0  # of the data
UIDS = np.arange(COUNT, dtype="<u8") + 2**63
BLOB = {
    "blob/path": np.array([b">particles.mrcs"] * COUNT),
    "blob/idx": np.arange(COUNT, dtype="<u4"),
    "blob/shape": np.full((COUNT, 2), N, "<u4"),
    "blob/psize_A": np.full(COUNT, PIXEL, "<f4"),
}
OPTICS = {
    f"ctf/{name}": np.full(COUNT, value, "<f4")
    for name, value in {
        "accel_kv": 300,
        "cs_mm": 2.7,
        "amp_contrast": 0.1,
        "df1_A": 1e4,
        "df2_A": 1e4,
        "df_angle_rad": 0,
    }.items()
}
POSES = {
    "alignments3D/pose": np.full((COUNT, 3), 0.5, "<f4"),
    "alignments3D/shift": np.zeros((COUNT, 2), "<f4"),
    "alignments3D/class": np.arange(COUNT, dtype="<u4") // 5,
}


def save(path, *groups):
    fields = {"uid": UIDS}
    for group in groups:
        fields |= group
    return write_cs(path, fields)


@pytest.fixture
def files(data):
    """A table without optics, and those of its job elsewhere."""
    (data / "J3").mkdir()
    return SimpleNamespace(
        table=save(data / "particles.cs", BLOB, POSES),
        passthrough=save(data / "J3/J3_passthrough_particles.cs", OPTICS),
        folder=data,
    )


@pytest.fixture
def calls():
    """The particles that the stand-in for the engine was given."""
    return []


@pytest.fixture
def reconstruct(run, files, calls):
    """Run the command with a stand-in."""

    def stand_in(particles, *_, **__):
        calls.append(particles)
        volume = np.ones((N, N, N))
        return SimpleNamespace(volume=volume, half_maps=2 * [volume], lam=1, tau=1)

    engine = Engine(reconstruct=cast(Any, stand_in))
    command = replace(RECONSTRUCT, run=partial(implementation.run, engine=engine))
    words = ["reconstruct", files.table, "--out", files.folder / "map.mrc"]
    return lambda *further: run(*words, *further, commands=[command])


def test_optics_are_never_taken_for_none(files, reconstruct, calls):
    reconstruct().assert_refused("particles.cs must have the fields ctf/...")
    assert not calls and not (files.folder / "map.mrc").exists()
    given = reconstruct("--passthrough", files.passthrough)
    assert given.code == 0 and f"ctf by uid from {files.passthrough}" in given.err
    beside = files.passthrough.rename(files.folder / files.passthrough.name)
    found = reconstruct()
    assert found.code == 0 and f"ctf by uid from {beside}" in found.err
    assert all((each.ctf.defocus_u == 1e4).all() for each in calls)
    assert reconstruct("--no-ctf").code == 0
    assert calls[-1].ctf is None


def test_half_sets_of_another_number_matter_only_where_they_are_used(
    files, reconstruct, calls
):
    third = {"alignments3D/split": np.arange(COUNT, dtype="<u4") % 3}
    save(files.table, BLOB, OPTICS, POSES, third)
    assert reconstruct().code == 0 and len(calls) == 1
    words = "field alignments3D/split: the value must be 0 or 1, got '2' (row 3)"
    reconstruct("--half-sets").assert_refused(words)


def test_optics_that_are_not_used_may_be_bad(files, reconstruct, calls, run):
    bad = {"ctf/df1_A": np.full(COUNT, np.nan, "<f4")}
    save(files.table, BLOB, OPTICS, POSES, bad)
    reconstruct().assert_refused("field ctf/df1_A: values must be finite")
    assert reconstruct("--no-ctf").code == 0 and calls[-1].ctf is None
    assert run("evaluate", files.table, files.table).code == 0


def test_half_sets_that_divide_a_filament_are_named(files, reconstruct):
    """Which rows are of one is in the passthrough file."""
    rows = np.arange(COUNT)
    half = {"alignments3D/split": (rows % 2).astype("<u4")}
    save(files.table, BLOB, POSES, half)
    save(files.passthrough, OPTICS, {"filament/filament_uid": UIDS - UIDS % 4})
    done = reconstruct("--half-sets", "--passthrough", files.passthrough)
    assert "the 8 rows are of 2 helical tubes" in done.err
    assert "(field alignments3D/split) divide 2 of 2 such groups" in done.err


def test_a_damaged_passthrough_file_beside_is_told_of(files, reconstruct, run):
    """It may hold what is not missed, such as which rows are of one filament."""
    damaged = files.folder / "J3_passthrough_particles.cs"
    damaged.write_bytes(files.passthrough.read_bytes()[:-9])
    reconstruct().assert_refused(f"{damaged} must be a cryoSPARC table")
    save(files.table, BLOB, OPTICS, POSES)
    words = f"{damaged} must be a cryoSPARC table in NumPy's format, got a damaged one"
    for done in (reconstruct(), run("evaluate", files.table, files.table)):
        assert done.code == 0 and f"{words}; it is passed over" in done.err
    assert words not in reconstruct("--passthrough", files.passthrough).err


def test_a_passthrough_file_is_not_written_over(files, reconstruct):
    words = ["--passthrough", files.passthrough, "--out", files.passthrough]
    reconstruct(*words).assert_refused("it is an input")


def test_the_sign_of_images_is_not_lost_with_their_optics(files, reconstruct, calls):
    dark = {"blob/sign": np.full(COUNT, -1, "<f4")}
    save(files.table, BLOB, POSES, dark)
    reconstruct("--no-ctf").assert_refused("--no-ctf must be given with --invert")
    assert reconstruct("--no-ctf", "--invert").code == 0
    words = ["--passthrough", files.passthrough]
    reconstruct(*words, "--invert").assert_refused("inverted already")
    assert reconstruct(*words).code == 0
    assert (calls[-1].ctf.scale == -1).all()


def test_a_class_can_be_kept(files, reconstruct, calls):
    words = ["--passthrough", files.passthrough, "--class", 1]
    done = reconstruct(*words)
    assert done.code == 0 and len(calls[-1]) == 3
    assert "particles of several classes (5 of 0, 3 of 1); 3 are kept" in done.err
    reconstruct(*words[:-1], 2).assert_refused("must be one that has particles, 0, 1")
    reconstruct(*words[:-1], -1).assert_refused("--class must be at least 0")


def test_poses_of_a_passthrough_file_are_asked_for(files, reconstruct):
    save(files.table, BLOB, OPTICS)
    reconstruct().assert_refused("alignments3D/...", "--passthrough", "match")


def test_poses_of_both_files_are_compared(files, run):
    whole = save(files.folder / "whole.cs", BLOB, POSES, OPTICS)
    source = read_particles(whole)
    star = files.folder / "result.star"
    write_particles(star, source, source.poses)
    save(files.table, BLOB, OPTICS)
    poses = save(files.folder / "poses.cs", POSES)
    run("evaluate", star, files.table).assert_refused("alignments3D/...")
    done = run("evaluate", star, files.table, "--passthrough", poses)
    assert done.code == 0 and "100.0 % within 5 degrees" in done.out
    words = ("evaluate", star, star, "--passthrough", poses)
    run(*words).assert_refused("must be given with a cryoSPARC table")


def test_a_run_is_that_of_its_passthrough_file(files, run):
    """It counts by its content, whether it is named or found."""
    calls = []

    def stop(*_, **__):
        calls.append(1)
        raise KeyboardInterrupt

    engine = Engine(refine=cast(Any, stop))
    command = replace(REFINE, run=partial(refining.run, engine=engine))
    words = ["refine", files.table, "--map", files.folder / "init.mrc"]
    words += ["--out", files.folder / "out", "--resample"]

    def refine(*further):
        return run(*words, *further, commands=[command])

    assert refine("--passthrough", files.passthrough).code == 130
    beside = files.passthrough.rename(files.folder / files.passthrough.name)
    assert refine().code == 130 and len(calls) == 2
    save(beside, {**OPTICS, "ctf/df1_A": np.full(COUNT, 2e4, "<f4")})
    refine().assert_refused("other settings (passthrough)")
