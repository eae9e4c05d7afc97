"""What brings two sets together, where the map is symmetric."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxrefine import half_sets, symmetry
from jaxrefine.geometry import matrix_to_rotvec, rotvec_to_matrix

TURN, OFFSET = jnp.array([0.05, -0.04, 0.06]), jnp.array([0.4, 0.3, -0.5])


@pytest.mark.parametrize(
    ("group", "free"),
    [("C1", (1, 1, 1)), ("C3", (0, 0, 1)), ("D2", (0, 0, 0)), ("I", (0, 0, 0))],
)
def test_a_symmetric_map_stays_on_its_axes(group, free):
    """What is kept of a motion commutes with the group; without one all is kept."""
    operators = symmetry.operators(group)
    rotation, translation = half_sets.on_axes(rotvec_to_matrix(TURN), OFFSET, operators)
    kept = jnp.asarray(free, float)
    np.testing.assert_allclose(matrix_to_rotvec(rotation), kept * TURN, atol=1e-12)
    np.testing.assert_allclose(translation, kept * OFFSET, atol=1e-12)
    for operator in operators:
        np.testing.assert_allclose(rotation @ operator, operator @ rotation, atol=1e-12)
        np.testing.assert_allclose(operator @ translation, translation, atol=1e-12)
