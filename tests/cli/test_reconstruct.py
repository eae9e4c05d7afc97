"""``jaxrefine reconstruct``: maps that are written, and what is refused."""

from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from typing import Any, cast

import jax.numpy as jnp
import numpy as np
import pytest

from jaxrefine.cli import reconstruct as implementation
from jaxrefine.cli.commands.reconstruct import RECONSTRUCT
from jaxrefine.cli.engine import Engine
from jaxrefine.io import read_mrc
from jaxrefine.maps.fsc import fsc
from jaxrefine.refinement.sets import deal

COUNT, PIXEL = 8, 2.0  # of the data


@pytest.fixture
def calls():
    """What the stand-in for the engine was given."""
    return []


@pytest.fixture
def reconstruct(run, calls):
    """Run the command with a stand-in, whose maps are constant."""

    def stand_in(particles, poses, config, *, key, subsets, watch):
        watch("sums", 1, len(particles))
        calls.append((particles, poses, config, key, subsets))
        n = particles.image_size
        halves = (np.full((n, n, n), 1.0), np.full((n, n, n), 2.0))
        return SimpleNamespace(volume=halves[0] + 2, half_maps=halves, lam=0.5, tau=2)

    engine = Engine(reconstruct=cast(Any, stand_in))
    command = replace(RECONSTRUCT, run=partial(implementation.run, engine=engine))
    return lambda *words: run("reconstruct", *words, commands=[command])


def test_reconstruct_writes_maps(data, reconstruct, calls):
    words = [data / "particles.star", "--out", data / "map.mrc"]
    assert reconstruct(*words, "--batch-size", 3, "--symmetry", "c4").code == 0
    assert calls[0][2].symmetry == "C4" and calls[0][2].tau is None
    assert not list(data.glob("map_half*"))
    code, out, err = reconstruct(*words, "--half-sets", "--tau", 2)
    assert "8 particles at a time on" in err and "GiB of memory" in err
    assert calls[1][2].tau == 2
    assert code == 0 and "map_half2.mrc" in out and "lambda 0.5" in out
    assert calls[0][4] is None
    np.testing.assert_array_equal(calls[1][4], deal(calls[1][0], calls[1][3]))
    for name, value in (("map", 3), ("map_half1", 1), ("map_half2", 2)):
        volume, voxel = read_mrc(data / f"{name}.mrc")
        assert (volume == value).all() and voxel == PIXEL
    assert calls[0][2].batch_size == 3 and len(calls[0][0]) == COUNT


@pytest.mark.parametrize("sign", [1, -1])
def test_a_map_of_dark_protein_is_told_of(data, run, sign):
    """It is written as it is: nothing is at hand that says what the sign should be."""

    def stand_in(particles, poses, config, *, key, subsets, watch):
        n = particles.image_size
        volume = np.zeros((n, n, n))
        volume[4:8, 4:8, 4:8] = sign
        return SimpleNamespace(volume=volume, half_maps=(), lam=0.5, tau=2)

    engine = Engine(reconstruct=cast(Any, stand_in))
    command = replace(RECONSTRUCT, run=partial(implementation.run, engine=engine))
    words = ["reconstruct", data / "particles.star", "--out", data / "map.mrc"]
    for further, told in (([], "if so, --invert"), (["--trust-contrast"], "")):
        code, _, err = run(*words, *further, commands=[command])
        assert code == 0 and (data / "map.mrc").exists()
        assert ("seems to have dark protein" in err) == (sign < 0 and bool(told))
        assert told in err or sign > 0


def test_reconstruct_refuses(data, reconstruct, calls):
    words = [data / "particles.star", "--out"]
    for further, sentence in (
        ([data / "no/map.mrc"], "is not a folder"),
        ([data], "is a folder"),
        ([data / "particles.mrcs"], "is an input"),
        ([data / "particles.star"], "is an input"),
        ([data / "map.mrc", "--batch-size", 0], "--batch-size"),
        ([data / "map.mrc", "--seed", -1], "--seed"),
        ([data / "map.mrc", "--tau", -1], "--tau"),
        ([data / "map.mrc", "--symmetry", "X"], "symmetry"),
        ([data / "map.mrc", "--memory", 0.001], "the memory must be at least 0."),
    ):
        reconstruct(*words, *further).assert_refused(sentence)
    absent = [data / "absent.star", "--out", data / "map.mrc"]
    reconstruct(*absent).assert_refused("does not exist")
    assert not calls and not (data / "map.mrc").exists()


@pytest.mark.slow
def test_the_map_of_the_true_poses_is_the_truth(simulated, tmp_path, run):
    words = ["reconstruct", simulated / "truth.star", "--half-sets", "--out"]
    assert run(*words, tmp_path / "oracle.mrc").code == 0
    truth = read_mrc(simulated / "truth.mrc")[0]
    found = read_mrc(tmp_path / "oracle.mrc")[0]
    assert np.corrcoef(found.ravel(), truth.ravel())[0, 1] > 0.9
    for half in (1, 2):  # not regularised: noisy beyond the first shells
        found = read_mrc(tmp_path / f"oracle_half{half}.mrc")[0]
        curve = fsc(jnp.asarray(found), jnp.asarray(truth))
        assert float(jnp.min(curve[1:4])) > 0.9
