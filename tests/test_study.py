"""Comparisons: what an outcome says does not depend on the map's frame."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrefine import geometry, kbwf, metrics, paper, simulate, study
from jaxrefine.geometry import Poses


@pytest.fixture(scope="module")
def case() -> study.Study:
    truth = simulate.phantom(jax.random.key(0), 20, jnp.float64)
    data = simulate.make_dataset(
        jax.random.key(1), truth, 60, max_shift=1.0, max_angle_error=0.3, sigma=0.05
    )
    return study.prepare(truth, data, simulate.blur(truth, 1.5))


def test_moved_map_is_scored_alike(case):
    """Turn a map with its poses: the aligned curve stays, the raw one falls."""
    rotation = geometry.rotvec_to_matrix(jnp.array([0.1, -0.15, 0.2]))
    offset = jnp.array([0.4, -0.7, 0.2])
    truth = case.dataset.truth
    turned = truth.rotations @ rotation.T
    moved = Poses(
        geometry.matrix_to_euler(turned),
        truth.shifts + jnp.einsum("pix,x->pi", truth.rotations[:, :2], offset),
    )
    config = paper.paper_preset(0.05, iterations=4)
    straight = study.reconstruct_from(case, truth, config)
    crooked = study.reconstruct_from(case, moved, config)
    assert crooked.row()["mean_fsc"] < 0.8 * straight.row()["mean_fsc"]
    # The prior and the lattice are not invariant under rotation, hence the tolerance.
    assert crooked.row()["mean_fsc_aligned"] == pytest.approx(
        straight.row()["mean_fsc"], abs=0.03
    )
    expected = np.rad2deg(np.linalg.norm([0.1, -0.15, 0.2]))
    assert crooked.gauge_rotation_deg == pytest.approx(expected, abs=1e-3)
    assert straight.row()["mean_fsc_aligned"] == pytest.approx(
        straight.row()["mean_fsc"], abs=1e-5
    )


def test_evaluate_moved_moves_the_map():
    """Against the sum over the basis typed out, at every voxel."""
    basis, n = kbwf.KBWF(radius=2.0, taper=10.8), 7
    c = jax.random.normal(jax.random.key(2), (n, n, n))
    rotation = geometry.rotvec_to_matrix(jnp.array([0.4, 1.0, -0.3]))
    d = jnp.array([0.3, -0.2, 0.6])
    k = np.stack(np.meshgrid(*[np.arange(n) - n // 2] * 3, indexing="ij")[::-1], -1)
    k = jnp.asarray(k.reshape(-1, 3), float)
    where = (k - d[None]) @ rotation.T
    dense = kbwf.window(basis, where[:, None] - k[None]) @ c.ravel()
    moved = kbwf.evaluate_moved(basis, c, rotation, d)
    np.testing.assert_allclose(moved.ravel(), dense, atol=1e-5)


def test_outcome_row_is_what_its_parts_say(case):
    outcome = study.refine_from(
        case, study.initial_state(case), paper.released_preset(iterations=2)
    )
    row = outcome.row()
    assert row["mean_fsc"] == pytest.approx(float(np.mean(outcome.curve[1:])))
    assert len(outcome.history) == 2
    assert outcome.history[-1]["mean_fsc"] == pytest.approx(row["mean_fsc"])
    again = metrics.fsc(jnp.asarray(outcome.volume), case.truth)
    np.testing.assert_allclose(again, outcome.curve, atol=1e-12)
