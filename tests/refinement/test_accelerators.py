"""The engine's programs for a GPU and a TPU, as far as that shows without one."""

import re
from functools import partial

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrefine.ctf import CTF
from jaxrefine.data import observation, visit
from jaxrefine.data.particles import Particles
from jaxrefine.geometry import Poses
from jaxrefine.maps import admm, sums, tv
from jaxrefine.maps.fsc import fsc
from jaxrefine.operators.gridding import Gridding
from jaxrefine.poses import uncertainty, update
from jaxrefine.poses.hypotheses import certain
from jaxrefine.poses.prior import priors_about
from jaxrefine.refinement import map_step, pose_step
from jaxrefine.refinement.config import RefineConfig

pytestmark = pytest.mark.slow

N, LAST = 24, 11
CONFIG = RefineConfig(symmetry="C2", insertion=Gridding())


def programs():
    """Every program that an outer iteration runs on a device, with arguments."""
    single = jnp.float32
    count, volume = visit.BLOCK, jnp.ones((N, N, N), single)
    defocus = jnp.full(count, 1e4, single)
    ctf, group = CTF(defocus, defocus + 300), np.arange(count) % 2
    particles = Particles(np.ones((count, N, N), np.float32), ctf, 2.0, group)
    poses = Poses(
        jnp.tile(jnp.eye(3, dtype=single), (count, 1, 1)), jnp.zeros((count, 2), single)
    )
    noise = jnp.ones((2, N // 2 + 1), single)
    view = observation.view(particles, LAST, noise, observation.PART)
    reference = update.Reference(
        CONFIG.search_interpolation.spectrum(volume, LAST),
        CONFIG.interpolation.spectrum(volume, LAST),
        view,
    )
    prior = priors_about(poses, 0.4, 2.0, 3.0, 6.0)
    known = update.Known(
        jnp.arange(count, dtype=jnp.int32),
        prior,
        certain(poses, CONFIG.hypotheses),
        jnp.ones(count, bool),
    )
    steps = pose_step.visit_steps(
        CONFIG, N, 7, LAST, is_wide=True, compared=True, key=jax.random.key(0)
    )
    images, group = jnp.asarray(particles.images), jnp.asarray(group, jnp.int32)
    spectra, transfer = view.spectra(images, group), view.transfer(ctf, group)
    data = sums.insert(
        Gridding(), view.disc, spectra, poses, transfer, jnp.abs(spectra)
    )
    term, state = sums.data_term(data), admm.init(volume)

    exists = jnp.ones(count, bool)
    block = ((steps, reference), images, ctf, group, exists, known)
    information = jnp.tile(jnp.eye(5, dtype=single), (count, 1, 1))
    pose = (poses.rotations, poses.shifts)

    def compared(function, *candidates):
        """A block whose candidates are each compared with an image by a function."""
        shared = (reference.fine, view)
        block = (shared, images, ctf, group, exists, candidates)
        return visit.Comparison(function), block

    return {
        "visit": (update.update_block, block),
        "curvature": compared(uncertainty.mean_curvature, prior, *pose, information),
        "spectrum": (lambda v: Gridding().spectrum(v, LAST), (volume,)),
        "insert": (
            partial(sums.insert, Gridding(), view.disc),
            (spectra, poses, transfer, jnp.abs(spectra)),
        ),
        "data term": (sums.data_term, (data,)),
        "solve": (
            lambda *a: sums.solve(*a, tv.IsotropicTV(), 3),  # pyright: ignore
            (term, data.peak, state, jnp.ones((), single)),
        ),
        "least squares": (sums.least_squares, (data,)),
        "shell sums": compared(map_step.compare_shells, *pose),
        "fsc": (fsc, (volume, volume)),
    }


@pytest.fixture(scope="module")
def lowered():
    """Their StableHLO for each platform, which need not be there."""

    def text(function, arguments, platform):
        arrays, static = eqx.partition(arguments, eqx.is_array)

        def call(arrays):
            result = function(*eqx.combine(arrays, static))
            return eqx.filter(result, eqx.is_array)

        traced = jax.jit(call).trace(arrays)
        return traced.lower(lowering_platforms=(platform,)).as_text()

    # As in use: the tests' double precision is off.
    with jax.enable_x64(False):
        return {
            (name, platform): text(function, arguments, platform)
            for name, (function, arguments) in programs().items()
            for platform in ("cuda", "tpu")
        }


def test_every_program_is_lowered(lowered):
    for key, text in lowered.items():
        assert "func.func public @main" in text, key


def test_no_program_calls_the_host(lowered):
    for key, text in lowered.items():
        assert not re.search(r"callback|infeed|outfeed|send|recv", text), key


def test_no_program_adds_complex_numbers_at_many_points(lowered):
    """A GPU has no such addition, and takes a loop for each of them.

    (The transform of a grid, which adds each of its few columns once, may.)
    """
    sums = 0
    for (name, platform), text in lowered.items():
        for scatter in re.findall(r'"stablehlo.scatter".*?\) -> [^\n]*', text, re.S):
            result = scatter.rpartition("->")[2]
            if "stablehlo.add" in scatter and re.search(r"tensor<\d+x", result):
                is_flat = re.search(r"tensor<\d+x[a-z]", result) is not None
                sums += is_flat
                assert not (is_flat and "complex" in result), (name, platform)
    assert sums  # the insertion is among them


def test_no_program_is_in_double_precision(lowered):
    """Which a TPU has not, and a GPU has little of."""
    for key, text in lowered.items():
        assert not re.search(r"tensor<[\dx]*(f64|complex<f64>)>", text), key
