"""What the step of the poses searches."""

import dataclasses

import numpy as np
import pytest

from jaxrefine.refinement import pose_step
from jaxrefine.refinement.config import RefineConfig

N = 24


@pytest.mark.parametrize("what", ["angle", "shift"])
def test_only_what_is_free_is_searched(what):
    """Of what is fixed one candidate is tried: the given orientation, or no shift."""
    config = dataclasses.replace(RefineConfig(), **{f"max_{what}": 0.0})
    wide = pose_step.wide_search(config, N)
    for search in (wide, pose_step.local_search(config, N, 11, 0.1, 3)):
        assert (search.count == 1) == (what == "angle")
        assert (np.sum(search.tried) == 1) == (what == "shift")
        np.testing.assert_array_equal(search.offsets[0], 0)
