"""Commands that run in this process, and data for them."""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
import pytest

from jaxrefine import cli
from jaxrefine.cli.commands import COMMANDS
from jaxrefine.ctf import CTF
from jaxrefine.euler import euler_to_matrix
from jaxrefine.geometry import Poses
from jaxrefine.io import write_mrc, write_new_particles, write_stack

N, COUNT, PIXEL = 16, 8, 2.0


class Finished(NamedTuple):
    """The exit code of a command, and what it wrote to its streams."""

    code: int
    out: str
    err: str

    def assert_refused(self, *words: str) -> None:
        """One sentence with these words, at the end of the standard error."""
        assert (self.code, self.out) == (2, ""), self
        assert self.err.endswith("\n") and "Traceback" not in self.err
        last = self.err.splitlines()[-1]
        assert last.startswith("jaxrefine ") and len(last) < 400, self.err
        assert all(word in last for word in words), self.err


@pytest.fixture
def run(capsys):
    """Run a command line; words may be numbers and paths."""

    def run(*words, commands=COMMANDS):
        capsys.readouterr()
        code = cli.main([str(word) for word in words], commands)
        return Finished(code, *capsys.readouterr())

    return run


@pytest.fixture
def data(tmp_path):
    """A folder of noisy images with poses and optics, and a map of a round particle."""
    rng = np.random.default_rng(0)
    square = (np.arange(N) - N // 2) ** 2
    shadow = 0.5 * np.exp(-(square[:, None] + square) / 8)
    images = (rng.normal(size=(COUNT, N, N)) + shadow).astype(np.float32)
    write_stack(tmp_path / "particles.mrcs", images, PIXEL)
    particle = np.exp(-(square[:, None, None] + square[:, None] + square) / 8)
    volume = particle + 0.1 * rng.normal(size=(N, N, N))
    write_mrc(tmp_path / "init.mrc", volume, PIXEL)
    rotations = euler_to_matrix(jnp.asarray(rng.uniform(-1, 1, (COUNT, 3))))
    poses = Poses(rotations, rng.uniform(-1, 1, (COUNT, 2)))
    names = [f"{i:06d}@particles.mrcs" for i in range(1, COUNT + 1)]
    defocus = jnp.linspace(1e4, 2e4, COUNT)
    for name, ctf in (("particles", CTF(defocus, defocus)), ("plain", None)):
        path = tmp_path / f"{name}.star"
        write_new_particles(path, poses, names, N, PIXEL, CTF(0.0, 0.0), ctf)
    return tmp_path


@pytest.fixture(scope="session")
def simulated(tmp_path_factory):
    """A small data set with optics, and a start that is off."""
    folder = tmp_path_factory.mktemp("refine")
    rng = np.random.default_rng(1)
    axis = np.arange(N) - N // 2
    volume = np.zeros((N, N, N))
    for centre in rng.uniform(-4, 4, (6, 3)):
        x, y, z = (np.exp(-0.5 * ((axis - c) / 1.2) ** 2) for c in centre)
        volume += rng.uniform(1, 3) * z[:, None, None] * y[:, None] * x
    write_mrc(folder / "map.mrc", volume, 4.0)
    words = ["simulate", folder / "map.mrc", "--out", folder / "data", "--ctf"]
    words += ["--particles", 32, "--snr-db", 6, "--max-shift", 1]
    words += ["--max-angle-error", 14, "--initial-blur", 1]
    assert cli.main([str(word) for word in words]) == 0
    return folder / "data"
