"""RELION as a baseline: conventions, order, time limits and resuming."""

import importlib.util
import shutil
import subprocess
import sys
import textwrap
import time
from contextlib import suppress
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrefine import io, simulate
from jaxrefine.errors import InputError
from jaxrefine.geometry import Poses

EXPERIMENTS = Path(__file__).resolve().parents[2] / "experiments"
N, COUNT, PIXEL = 32, 60, 8.0


def load(name):
    spec = importlib.util.spec_from_file_location(name, EXPERIMENTS / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


load("relion_program")
relion = load("relion")
needs_relion = pytest.mark.skipif(
    not relion.available(), reason="RELION is not installed"
)


@pytest.fixture(scope="module")
def truth():
    return simulate.phantom(jax.random.key(0), N)


@pytest.fixture(scope="module")
def data(truth):
    return simulate.make_dataset(
        jax.random.key(1), truth, COUNT, max_shift=1.0, max_angle_error=0.3, snr_db=5.0
    )


@pytest.fixture
def star(tmp_path, data):
    return relion.write_particles(tmp_path, data.images, data.truth, PIXEL)


def correlation(a, b) -> float:
    return float(np.corrcoef(np.ravel(a), np.ravel(b))[0, 1])


# --- what needs no RELION


@pytest.mark.slow
def test_rows_are_told_by_name(tmp_path, star, data):
    order = np.random.default_rng(0).permutation(COUNT)
    blocks = io.read_star(star)
    table = blocks["particles"]
    shuffled = {name: [column[i] for i in order] for name, column in table.items()}
    io.write_star(tmp_path / "data.star", blocks | {"particles": shuffled})
    original = io.read_particles(star)
    poses = relion.poses_in_order(tmp_path / "data.star", original)
    np.testing.assert_allclose(poses.rotations, data.truth.rotations, atol=1e-6)
    np.testing.assert_allclose(poses.shifts, data.truth.shifts, atol=1e-6)

    fewer = {name: column[1:] for name, column in shuffled.items()}
    io.write_star(tmp_path / "data.star", blocks | {"particles": fewer})
    with pytest.raises(InputError, match="same particles"):
        relion.poses_in_order(tmp_path / "data.star", original)


def test_a_file_elsewhere_is_refused(tmp_path, star):
    with pytest.raises(InputError, match="must be in the folder"):
        relion.reconstruct(tmp_path / "other", star)


FAKE = """
    #!{python}
    import shutil, subprocess, sys, time

    root = sys.argv[sys.argv.index("--o") + 1]

    def write(number, parts=("optimiser.star", "data.star", "sampling.star",
                             "model.star", "class001.mrc")):
        for part in parts:
            shutil.copy(f"template_{{part}}", f"{{root}}_it{{number:03d}}_{{part}}")

    {body}
"""
# The first run stops dead while it writes its second iteration, with a child.
STALLS = """
    if "--continue" in sys.argv:
        write(2)
        write(3)
    else:
        write(1)
        write(2, ["optimiser.star"])
        subprocess.Popen(["sleep", "60"])
        time.sleep(60)
"""
FAILS = """
    print("in: ml_optimiser.cpp", "ERROR: ", "the box is odd", "=====", sep="\\n")
    sys.exit(1)
"""
SILENT = "time.sleep(60)"


@pytest.fixture
def fake(tmp_path, star, truth, put_on_path):
    """Put a ``relion_refine`` first on the path, and what it writes in its folder."""
    shutil.copy(star, tmp_path / "template_data.star")
    io.write_mrc(tmp_path / "template_class001.mrc", truth, PIXEL)
    for name, values in {
        "model": {"rlnCurrentResolution": ["20.5"]},
        "sampling": {"rlnPsiStep": ["15"]},
        "optimiser": {
            "rlnOverallAccuracyRotations": ["1.5"],
            "rlnOverallAccuracyTranslationsAngst": ["999.000000"],
        },
    }.items():
        io.write_star(tmp_path / f"template_{name}.star", {f"{name}_general": values})

    def install(body: str) -> None:
        text = textwrap.dedent(FAKE).format(
            python=sys.executable, body=textwrap.dedent(body)
        )
        put_on_path("relion_refine", text.lstrip())

    return install


def ab_initio(star, limit_s, seed=0, **options):
    return relion.ab_initio(
        star.parent,
        star,
        diameter_in_angstroms=200,
        seed=seed,
        limit_s=limit_s,
        **options,
    )


def auto_refine(star, truth, **options):
    return relion.auto_refine(
        star.parent,
        star,
        simulate.blur(truth, 2.0),
        diameter_in_angstroms=220,
        offset_range=1,
        offset_step=0.5,
        initial_low_pass_in_angstroms=30,
        seed=0,
        limit_s=300.0,
        **options,
    )


def programs_in(folder: Path) -> list[str]:
    """Return what still runs in a folder, but for what has ended and is not reaped."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if process.joinpath("cwd").readlink() == folder.resolve():
                found.append(process.joinpath("comm").read_text())
    return found


@pytest.mark.slow
def test_a_run_stops_at_its_limit_and_is_resumed(star, fake, data, truth):
    fake(STALLS)
    seen = []
    stopped = ab_initio(star, 4.0, callback=seen.append)
    assert (stopped.iterations, stopped.finished) == (1, False)
    assert 4.0 <= stopped.wall_s < 20
    assert not programs_in(star.parent)
    np.testing.assert_allclose(stopped.poses.rotations, data.truth.rotations, atol=1e-6)
    np.testing.assert_array_equal(stopped.volume, truth)
    assert stopped.report == {
        "resolution_in_angstroms": 20.5,
        "angle_accuracy_in_degrees": 1.5,
        "angle_step_in_degrees": 7.5,
    }

    log = star.parent / "ab_initio.log"
    said = log.read_text()
    again = ab_initio(star, 4.0, callback=seen.append)
    assert (again.iterations, again.wall_s) == (1, stopped.wall_s)
    assert log.read_text() == said

    done = ab_initio(star, 30.0, callback=seen.append)
    assert (done.iterations, done.finished) == (3, True)
    assert stopped.wall_s < done.wall_s < 30
    assert "--continue ab_initio_it001_optimiser.star" in log.read_text()
    # What may not have been told before the stop is told again.
    assert [state.iterations for state in seen] == [1, 1, 2, 3]
    assert ab_initio(star, 30.0).wall_s == done.wall_s

    with pytest.raises(InputError, match="other inputs"):
        ab_initio(star, 30.0, seed=1)
    images, said = star.with_suffix(".mrcs"), log.read_text()
    content, pixels = images.read_bytes(), io.read_stack(images)[0].copy()
    while images.read_bytes() == content:  # the header tells the second
        time.sleep(0.1)
        io.write_stack(images, pixels, PIXEL)
    assert ab_initio(star, 30.0).wall_s == done.wall_s
    assert log.read_text() == said
    io.write_stack(images, -pixels, PIXEL)
    with pytest.raises(InputError, match="other inputs"):
        ab_initio(star, 30.0)


def test_an_error_is_told_in_relions_words(star, fake):
    fake(FAILS)
    with pytest.raises(InputError, match=r"the box is odd.*ab_initio\.log"):
        ab_initio(star, 10.0)


def test_a_run_without_an_iteration_is_an_error(star, fake):
    fake(SILENT)
    with pytest.raises(InputError, match="no iteration"):
        ab_initio(star, 0.3)


# --- RELION itself


def at_low_resolution(a, b) -> tuple[float, float]:
    """Return correlation and scale of maps at the resolution that few images give."""
    a, b = (np.ravel(simulate.blur(jnp.asarray(x), 1.0)) for x in (a, b))
    return correlation(a, b), float(np.polyfit(b, a, 1)[0])


@needs_relion
def test_true_poses_reconstruct_the_truth(tmp_path, data, truth):
    """Angles, shifts and the scale of maps mean the same to RELION."""
    star = relion.write_particles(tmp_path, data.images, data.truth, PIXEL)
    agreement, scale = at_low_resolution(relion.reconstruct(tmp_path, star), truth)
    assert agreement > 0.99
    assert scale == pytest.approx(1, abs=0.02)

    mirrored = Poses(data.truth.rotations, -data.truth.shifts)
    star = relion.write_particles(tmp_path, data.images, mirrored, PIXEL)
    assert at_low_resolution(relion.reconstruct(tmp_path, star), truth)[0] < 0.95


@needs_relion
def test_postprocessing_masks_and_denoises(tmp_path, truth):
    keys = jax.random.split(jax.random.key(2))
    halves = [
        truth + 0.1 * jax.random.normal(key, truth.shape, truth.dtype) for key in keys
    ]
    axis = np.arange(N) - N // 2
    radius = np.sqrt(sum(a**2 for a in np.meshgrid(axis, axis, axis)))
    mask = np.clip((15 - radius) / 3, 0, 1)
    volume = relion.postprocess(tmp_path, *halves, mask, PIXEL)
    assert not volume[mask == 0].any()
    mean = mask * np.asarray(halves[0] + halves[1]) / 2
    assert correlation(volume, truth) > correlation(mean, truth)


@pytest.mark.slow
@needs_relion
def test_ab_initio_runs(tmp_path, data):
    few = data.truth.take(np.arange(6))
    star = relion.write_particles(tmp_path, data.images[:6], few, PIXEL)
    made = ab_initio(star, 60.0, iterations=(1, 1, 0))
    assert (made.iterations, made.finished, made.half_maps) == (2, True, None)
    assert made.volume.shape == (N, N, N) and made.volume.any()
    assert made.poses.rotations.shape == (6, 3, 3)
    assert made.poses.shifts.shape == (6, 2)


CONVERGES = """#!/bin/sh
case "$*" in *--continue*) set -- "$@" --force_converge ;; esac
exec {program} "$@"
"""


@needs_relion
@pytest.mark.slow
def test_auto_refinement_survives_an_interruption(tmp_path, data, truth, put_on_path):
    """RELION's final iteration is made to follow at once; its poses make its map."""
    images, poses = jax.tree.map(lambda leaf: leaf[:20], (data.images, data.truth))
    star = relion.write_particles(tmp_path, images, poses, PIXEL)
    seen = []

    def refine(callback):
        return auto_refine(star, truth, healpix_order=1, callback=callback)

    def interrupt(state):
        seen.append(state)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        refine(interrupt)
    assert not programs_in(tmp_path)

    program = shutil.which("relion_refine_mpi")
    put_on_path("relion_refine_mpi", CONVERGES.format(program=program))
    done = refine(seen.append)
    assert [state.iterations for state in seen] == [1, 1]
    assert (done.iterations, done.finished) == (2, True)
    assert seen[0].wall_s < done.wall_s
    assert done.report["angle_step_in_degrees"] == 15

    def agreement(poses):
        star = relion.write_particles(tmp_path, images, poses, PIXEL)
        return at_low_resolution(relion.reconstruct(tmp_path, star), done.volume)[0]

    of_others = jax.tree.map(lambda leaf: jnp.roll(leaf, 1, axis=0), done.poses)
    assert agreement(done.poses) > 0.9 > agreement(of_others) + 0.1
    assert 0.5 < at_low_resolution(*done.half_maps)[0] < 0.999


@needs_relion
@pytest.mark.slow
def test_a_local_search_stays_near_the_poses_of_the_file(tmp_path, data, truth):
    """From 120 degrees off: directions move by no more than the range of the search."""
    images, true = jax.tree.map(lambda leaf: leaf[:10], (data.images, data.truth))
    third = jnp.array([[0, 0, 1], [1, 0, 0], [0, 1, 0]], true.rotations.dtype)
    start = Poses(true.rotations @ third, true.shifts)
    star = relion.write_particles(tmp_path, images, start, PIXEL)
    order, seen = 2, []

    def interrupt(state):
        seen.append(state)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        auto_refine(
            star,
            truth,
            healpix_order=order,
            local_from_order=order,
            callback=interrupt,
        )
    found, given = (np.asarray(p.rotations)[:, 2] for p in (seen[0].poses, start))
    moved = np.rad2deg(np.arccos(np.clip((found * given).sum(axis=1), -1, 1)))
    step = 30 / 2**order
    within = relion.local_range_in_degrees(order)
    assert within == 45
    assert moved.max() < within + 2 * step  # of the coarse grid, which is perturbed
    assert np.median(moved) > within / 3  # the prior alone would keep them in place


KILLED = """
import sys
from pathlib import Path

sys.path.insert(0, sys.argv[1])
import relion_program

command = ["sh", "-c", "echo $$ > pid; exec sleep 300"]
relion_program.run(Path(sys.argv[2]), "sleep", command, 300, lambda: None)
"""


@pytest.mark.skipif(shutil.which("setpriv") is None, reason="setpriv is absent")
def test_a_program_does_not_outlive_a_killed_study(tmp_path):
    """It would go on writing the files that the next call deletes."""
    words = [sys.executable, "-c", KILLED, str(EXPERIMENTS), str(tmp_path)]
    with subprocess.Popen(words) as study:
        pid = tmp_path / "pid"
        while not (pid.exists() and pid.read_text()):
            assert study.poll() is None
            time.sleep(0.05)
        study.kill()
    number, end = int(pid.read_text()), time.monotonic() + 10
    while Path(f"/proc/{number}/cmdline").exists() and time.monotonic() < end:
        if not Path(f"/proc/{number}/cmdline").read_bytes():  # a zombie
            break
        time.sleep(0.05)
    else:
        assert time.monotonic() < end
