"""Stages of computations, as they are told of."""

from concurrent.futures import ThreadPoolExecutor

import jax
import numpy as np

from jaxrefine import RefineConfig, reconstruct, refine, simulate
from jaxrefine._watch import Stage
from jaxrefine.data.particles import Particles


def test_threads_count_together():
    told = []
    stage = Stage(lambda *words: told.append(words), "sums", 400)
    with ThreadPoolExecutor(4) as threads:
        list(threads.map(lambda _: stage.advance(2), range(200)))
    assert told == [("sums", done, 400) for done in range(0, 401, 2)]


def test_every_stage_begins_at_zero_and_ends_where_it_said(tmp_path):
    n, count = 16, 40
    truth = simulate.phantom(jax.random.key(0), n)
    data = simulate.make_dataset(
        jax.random.key(1), truth, count, max_shift=1.0, max_angle_error=0.1, snr_db=10.0
    )
    particles, told = Particles(np.asarray(data.images)), []

    def watch(*words):
        told.append(words)

    config = RefineConfig(iterations=1, multi_start=(), admm_iterations=2)
    key = jax.random.key(2)
    reconstruct(particles, data.initial, config, key=key, watch=watch)
    refine(particles, data.initial, truth, config, key=key, watch=watch)
    stages = []
    for name, done, total in told:
        if done == 0:
            stages.append([name, done, total])
        assert stages[-1][0] == name and stages[-1][2] == total
        assert stages[-1][1] <= done <= total
        stages[-1][1] = done
    assert [name for name, *_ in stages] == [
        *("noise", "sums", "maps", "noise", "sums", "weight of the prior", "final map"),
        *("noise", "poses", "sums", "maps", "noise"),
        *("error bars", "sums", "weight of the prior", "final map"),
    ]
    for name, done, total in stages:
        assert done == total or name == "weight of the prior"
