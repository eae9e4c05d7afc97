"""What tests of several modules draw, how they compare arrays and interrupt a run.

Every draw is a pure function of its arguments: a test that fails fails again.
"""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrefine.euler import euler_to_matrix
from jaxrefine.geometry import Poses
from jaxrefine.operators.gridding import Gridding
from jaxrefine.refinement.config import RefineConfig

COARSE = RefineConfig(
    interpolation=Gridding(2, 2.0),
    search_interpolation=Gridding(2, 2.0),
    insertion=Gridding(2, 2.0),
)
"""Refinements that interpolate coarsely, of which less is compiled."""


def there(value):
    """A value that may be None, but is not."""
    assert value is not None
    return value


def draw(*shape, seed=0, dtype=jnp.float64):
    """Standard normal numbers."""
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def draw_complex(*shape, seed=0, dtype=jnp.float64):
    """Complex numbers whose real and imaginary parts are standard normal."""
    return jax.lax.complex(
        draw(*shape, seed=seed, dtype=dtype), draw(*shape, seed=seed + 1, dtype=dtype)
    )


def draw_angles(count, seed=1):
    """Euler angles (rot, tilt, psi), each from ``-pi`` to ``pi``."""
    rng = np.random.default_rng(seed)
    return jnp.asarray(rng.uniform(-np.pi, np.pi, (count, 3)))


def draw_rotations(count, seed=1, dtype=jnp.float64):
    """Matrices of the angles that `draw_angles` draws."""
    return euler_to_matrix(draw_angles(count, seed)).astype(dtype)


def draw_poses(count, spread=2.0, seed=1, dtype=jnp.float64):
    """Poses in any direction, shifted by at most ``spread`` pixels along each axis."""
    shifts = np.random.default_rng([seed, 1]).uniform(-spread, spread, (count, 2))
    return Poses(draw_rotations(count, seed, dtype), jnp.asarray(shifts, dtype))


def centred(size):
    """Integer places along an axis, the origin at ``size // 2``."""
    return np.arange(size) - size // 2


def lattice_points(axis):
    """Points ``(x, y, z)`` of a cubic lattice, ``(3, points)``, ``x`` the fastest."""
    z, y, x = np.meshgrid(axis, axis, axis, indexing="ij")
    return np.stack([x.ravel(), y.ravel(), z.ravel()])


def fft_radii(n):
    """Lengths of the frequencies of ``fftn``, in cycles per box."""
    k = np.fft.fftfreq(n, 1 / n)
    return np.sqrt(k[:, None, None] ** 2 + k[:, None] ** 2 + k**2)


def gaussian(n, centre, width, voxel=1.0, dtype=jnp.float64):
    """A Gaussian of height 1, centre ``(x, y, z)`` and width in the unit of a voxel."""
    at = centred(n) * voxel
    x, y, z = (np.exp(-0.5 * ((at - c) / width) ** 2) for c in centre)
    return jnp.asarray(z[:, None, None] * y[:, None] * x, dtype)


def blobs(n, width=1.2, seed=3, dtype=jnp.float64):
    """Six Gaussians near the middle of the box: smooth, without any symmetry."""
    rng = np.random.default_rng(seed)
    centres, heights = rng.normal(scale=2.0, size=(6, 3)), rng.uniform(0.5, 1.5, 6)
    each = [
        height * gaussian(n, centre, width)
        for centre, height in zip(centres, heights, strict=True)
    ]
    return sum(each, jnp.zeros((n, n, n))).astype(dtype)


def toeplitz(kernel):
    """The dense matrix of ``c -> w * c``, of a kernel ``w`` of side ``2n - 1``."""
    n = (kernel.shape[0] + 1) // 2
    x, y, z = lattice_points(np.arange(n))
    lag_z, lag_y, lag_x = (axis[:, None] - axis + n - 1 for axis in (z, y, x))
    return np.asarray(kernel, float)[lag_z, lag_y, lag_x]


def slice_frequencies(disc, poses):
    """Where the slices of a disc lie in the volume's Fourier space, ``(P, k, 3)``."""
    omega, rows = np.asarray(disc.frequencies), np.asarray(poses.rotations)[:, :2]
    return np.einsum("ki,pij->pkj", omega, rows)


def slice_matrix(disc, poses, transfer=None):
    """The dense matrix from voxels to the images' spectra, ``(P, k, n**3)``."""
    n = disc.image_size
    voxels = lattice_points(centred(n))
    waves = np.exp(-2j * np.pi / n * slice_frequencies(disc, poses) @ voxels)
    moves = np.asarray(poses.shifts) @ np.asarray(disc.frequencies).T
    gain = np.exp(-2j * np.pi / n * moves)
    if transfer is not None:
        gain = gain * np.asarray(transfer)
    return gain[..., None] * waves


def cryosparc_fields(count, side, pixel):
    """The fields of a table of cryoSPARC, with poses of 0."""
    optics = {"accel_kv": 300, "cs_mm": 2.7, "amp_contrast": 0.1}
    optics |= {"df1_A": 1e4, "df2_A": 1e4, "df_angle_rad": 0}
    return {
        "blob/path": np.full(count, b"images.mrcs"),
        "blob/idx": np.arange(count, dtype="<u4"),
        "blob/shape": np.full((count, 2), side, "<u4"),
        "blob/psize_A": np.full(count, pixel, "<f4"),
        **{
            f"ctf/{name}": np.full(count, value, "<f4")
            for name, value in optics.items()
        },
        "alignments3D/pose": np.zeros((count, 3), "<f4"),
        "alignments3D/shift": np.zeros((count, 2), "<f4"),
    }


def write_cs(path, columns):
    """Write a table of cryoSPARC, from an array of each field, a row a particle."""
    kinds = [(name, each.dtype, each.shape[1:]) for name, each in columns.items()]
    table = np.zeros(len(next(iter(columns.values()))), kinds)
    for name, values in columns.items():
        table[name] = values
    with open(path, "wb") as file:
        np.save(file, table)
    return path


_ON_DEVICES = """
import hashlib, sys
import jax
import numpy as np
sys.path[:0] = {paths!r}
{program}
data = b"".join(np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(found))
print(jax.device_count(), hashlib.sha256(data).hexdigest())
"""


def digest_on(devices, test_file, program, *words):
    """Return a digest of the pytree ``found`` that a program makes on so many devices.

    The program finds the tests beside a file, and the words in ``sys.argv[1:]``.
    """
    here = Path(test_file).resolve().parent
    whole = _ON_DEVICES.format(paths=[str(here), str(here.parent)], program=program)
    count, digest = subprocess.run(
        [sys.executable, "-c", whole, *map(str, words)],
        env=os.environ | {"JAX_NUM_CPU_DEVICES": str(devices)},
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    ).stdout.split()
    assert count == str(devices)
    return digest


def relative_error(value, exact):
    """Norm of the difference over the norm of the exact value."""
    value, exact = np.asarray(value), np.asarray(exact)
    return np.linalg.norm(value - exact) / np.linalg.norm(exact)


def assert_close(value, exact, relative):
    """No element may be off by more than ``relative`` of the largest one."""
    scale = np.abs(exact).max()
    np.testing.assert_allclose(value, exact, rtol=0, atol=relative * scale)


@contextmanager
def interrupted_after(is_last: Callable[[Path], bool]) -> Iterator[None]:
    """Interrupt this process when a file has come into its place that is the last."""
    replace = os.replace

    def stopping(source, target):
        replace(source, target)
        if is_last(Path(target)):
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "replace", stopping)
        yield
