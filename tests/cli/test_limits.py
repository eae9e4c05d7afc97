"""What is said of how far half sets agree, and what is recommended of it."""

import numpy as np
import pytest

from jaxrefine.cli._particles import shell_of
from jaxrefine.cli._production import _limits, _period
from jaxrefine.data.particles import Particles
from jaxrefine.refinement.config import RefineConfig


def images(size, pixel):
    blank = np.zeros((1, size, size), np.float32)
    return Particles(blank, pixel_size_in_angstroms=pixel)


@pytest.mark.parametrize("pixel", [0.5, 0.66, 0.822, 1.0, 1.06, 1.31, 2.0, 3.54, 12.7])
def test_a_period_is_read_as_its_shell(pixel):
    """Of 50 pixels of 0.66 A, shell 15 has 2.2 A, which is read as shell 14."""
    for size in (*range(16, 130, 2), *range(130, 513, 22)):
        particles = images(size, pixel)
        for shell in range(1, (size - 1) // 2 + 1):
            period = _period(shell, particles)
            assert period == float(f"{period:.4g}") == float(f"{period:g}")
            assert shell_of("--max-resolution", period, particles) == shell
            exact = particles.box_in_angstroms / shell
            assert 0 <= exact - period < 2.1e-3 * exact


SIZE, FIRST = 64, 7
CONFIG = RefineConfig(first_r_max=FIRST)


def limits(last, informed, is_trusted=True):
    """Of half maps that agree up to a shell, and hardly in the next ones."""
    curve = np.where(np.arange(SIZE // 2 + 1) <= last, 0.9, 0.05)
    return _limits(curve, informed, is_trusted, CONFIG, images(SIZE, 1.0))


ADVICE, NOTHING = "--max-resolution", "have told nothing"


def test_what_the_particles_have_told():
    """The correlation falls below 0.143 between two shells."""
    for last in range(2, 20):
        text = limits(last, 9)
        assert (NOTHING in text) == (last <= FIRST)
        assert (ADVICE in text) == (last > FIRST)
    text = limits(SIZE, 9)
    assert "or better" in text and NOTHING not in text and ADVICE in text


def test_no_limit_is_recommended_that_is_refused_or_means_nothing():
    """Neither coarser than the initial map was taken, nor of images of noise."""
    for informed in (1, FIRST - 1, FIRST, 12):
        text = limits(20, informed)
        period = f"{_period(informed, images(SIZE, 1.0)):g}"
        assert f"agree (FSC 0.5), to {period} A" in text
        assert (f"{ADVICE} {period} " in text) == (informed >= FIRST)
        assert ADVICE not in limits(20, informed, is_trusted=False)
