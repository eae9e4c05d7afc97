"""Accuracy and time of the ways to take slices of a volume's spectrum.

``python benchmarks/slices.py [--json FILE]`` prints one row for each way: the relative
error of projections within 0.9 of Nyquist, against a non-uniform FFT (``finufft``, in
double precision, tolerance 1e-9), and the times for 1000 particles of side 64. The map
is the built-in phantom, in single precision.

Times are minima over rounds that are interleaved, so that all ways see the same
machine. ``cryojax`` is timed if it can be imported; all else needs ``jaxrefine`` alone.
"""

import argparse
import functools
import importlib.util
import json
import time

import finufft
import jax
import jax.numpy as jnp
import numpy as np

from jaxrefine import geometry, simulate
from jaxrefine._batching import map_over_particles
from jaxrefine.operators import slices
from jaxrefine.operators.gridding import Finufft, Gridding
from jaxrefine.poses import likelihood

SIDE, PARTICLES, ROUNDS = 64, 1000, 7
R_MAX = int(0.9 * SIDE / 2)
GRIDDINGS = [
    (width, oversampling)
    for width, ratios in {
        2: (1.25, 1.5, 2.0),
        3: (1.25, 1.5, 2.0),
        4: (1.25, 1.5, 1.75, 2.0),
        5: (1.25, 1.5, 2.0),
    }.items()
    for oversampling in ratios
]


def exact_slices(volume: np.ndarray, poses: geometry.Poses, disc: slices.Disc):
    """Project by a non-uniform FFT in double precision."""
    rotations = np.asarray(poses.rotations, float)
    omega = np.asarray(disc.frequencies, float)
    points = np.einsum("pij,ki->jpk", rotations[:, :2], omega)
    x, y, z = (2 * np.pi / SIDE * axis.ravel() for axis in points)
    values = finufft.nufft3d2(z, y, x, volume.astype(complex), eps=1e-9, isign=-1)
    angle = -2 * np.pi / SIDE * np.asarray(poses.shifts, float) @ omega.T
    return values.reshape(angle.shape) * np.exp(1j * angle)


def batched(function, batch_size: int = 128):
    """Make a driver for all particles of a function of one."""

    @jax.jit
    def driver(spectrum, disc, particles):
        one = functools.partial(function, spectrum, disc)
        return map_over_particles(lambda args: one(*args), particles, batch_size)

    return driver


class Problem:
    """A map, its particles, and what is timed."""

    def __init__(self):
        keys = jax.random.split(jax.random.key(0), 4)
        self.volume = simulate.phantom(keys[0], SIDE)
        self.poses = geometry.Poses(
            geometry.equidistributed_angles(keys[1], PARTICLES),
            2 * jax.random.normal(keys[2], (PARTICLES, 2)),
        )
        self.disc = slices.disc(SIDE, R_MAX)
        self.exact = exact_slices(np.asarray(self.volume), self.poses, self.disc)
        data = jnp.asarray(self.exact, jnp.complex64)
        weights = jnp.broadcast_to(self.disc.quadrature, data.shape)
        self.particles = (
            data,
            self.poses.rotations,
            self.poses.shifts,
            jnp.ones_like(weights),
            weights,
        )
        self.data = data

    def error(self, spectra) -> float:
        """Return the relative error of projections."""
        return float(np.linalg.norm(spectra - self.exact) / np.linalg.norm(self.exact))

    def forward(self, way):
        """Return a call that projects all particles."""
        spectrum = way.spectrum(self.volume, R_MAX)
        return lambda: slices.project(spectrum, self.disc, self.poses)

    def insert(self, way):
        """Return a call that inserts all slices."""
        return lambda: slices.backproject(
            way, self.data, self.disc, self.poses, batch_size=PARTICLES
        )

    def pose(self, way, driver):
        """Return a call that evaluates a function of each particle."""
        spectrum = way.spectrum(self.volume, R_MAX)
        return lambda: driver(spectrum, self.disc, self.particles)


def plain_finufft(problem: Problem, tolerance: float):
    """Return a call that projects by one call of ``jax-finufft``, as anyone would."""
    import jax_finufft

    @jax.jit
    def project(volume, rotations, shifts):
        omega = problem.disc.frequencies
        points = jnp.einsum("pij,ki->jpk", rotations[:, :2], omega)
        x, y, z = (2 * np.pi / SIDE * axis.reshape(-1) for axis in points)
        values = jax_finufft.nufft2(
            volume.astype(jnp.complex64), z, y, x, iflag=-1, eps=tolerance
        )
        angle = -2 * np.pi / SIDE * shifts @ omega.T
        return values.reshape(angle.shape) * jnp.exp(1j * angle)

    poses = problem.poses
    return lambda: project(problem.volume, poses.rotations, poses.shifts)


def cryojax_linear(problem: Problem, padding: int):
    """Return a call that projects by ``cryojax``, linear, as many frequencies.

    It takes whole half planes of the padded side; so it gets as many particles as have
    in all no more frequencies than the rows above. Its time alone is compared.
    """
    import cryojax.ndimage as im

    side = SIDE * padding
    sampled = im.prepare_sampling_fft(jnp.pad(problem.volume, (side - SIDE) // 2))
    plane = im.make_frequency_slice((side, side), fftshifted=True)
    count = problem.data.size // (plane.shape[1] * plane.shape[2])

    @jax.jit
    def project(rotations):
        def one(rotation):
            turned = plane @ rotation
            return im.sample_fft_slice(sampled, turned, interp="linear", unroll=True)

        return jax.lax.map(one, rotations, batch_size=128)

    rotations = problem.poses.rotations[:count]
    return lambda: project(rotations)


def fastest(calls: dict) -> dict[str, float]:
    """Return the least time of each call over interleaved rounds, in milliseconds."""
    for call in calls.values():
        jax.block_until_ready(call())
    times = {name: [] for name in calls}
    for _ in range(ROUNDS):
        for name, call in calls.items():
            start = time.perf_counter()
            jax.block_until_ready(call())
            times[name].append(time.perf_counter() - start)
    return {name: 1e3 * min(values) for name, values in times.items()}


def measure(problem: Problem) -> list[dict]:
    """Measure every way."""
    drivers = {
        "cost": batched(likelihood.cost),
        "cost+gradient": batched(likelihood.cost_and_gradient),
        "normal equations": batched(likelihood.normal_equations),
    }
    rows = []
    for width, oversampling in GRIDDINGS:
        way = Gridding(width, oversampling)
        calls = {"forward": problem.forward(way)}
        calls |= {name: problem.pose(way, d) for name, d in drivers.items()}
        calls["insertion"] = problem.insert(way)
        error = problem.error(calls["forward"]())
        name = f"gridding {width} x {oversampling:g}"
        rows.append({"way": name, "error": error, **fastest(calls)})
        print(line(rows[-1]), flush=True)
    if importlib.util.find_spec("jax_finufft") is None:
        print("jax-finufft is not installed: skipped")
    else:
        for tolerance in (1e-2, 1e-3, 1e-4):
            call = plain_finufft(problem, tolerance)
            calls = {"forward": call, "insertion": problem.insert(Finufft(tolerance))}
            name = f"finufft {tolerance:g}"
            rows.append({"way": name, "error": problem.error(call()), **fastest(calls)})
            print(line(rows[-1]), flush=True)
    if importlib.util.find_spec("cryojax") is None:
        print("cryojax is not installed: skipped")
    else:
        for padding in (1, 2):
            calls = {"forward": cryojax_linear(problem, padding)}
            rows.append({"way": f"cryojax linear, pad {padding}", **fastest(calls)})
            print(line(rows[-1]), flush=True)
    return rows


COLUMNS = ("forward", "cost", "cost+gradient", "normal equations", "insertion")


def line(row: dict) -> str:
    """Format a row of the table."""
    error = f"{row['error']:.1e}" if "error" in row else "-"
    times = (f"{row[c]:17.1f}" if c in row else f"{'-':>17}" for c in COLUMNS)
    return f"{row['way']:24}{error:>8}" + "".join(times)


def main() -> None:
    """Measure, print and store."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", help="write the rows to this file, too")
    arguments = parser.parse_args()
    problem = Problem()
    frequencies = problem.data.shape[1]
    print(f"{PARTICLES} particles, {frequencies} frequencies each; milliseconds")
    print(f"{'way':24}{'error':>8}" + "".join(f"{c:>17}" for c in COLUMNS))
    rows = measure(problem)
    if arguments.json:
        with open(arguments.json, "w") as file:
            json.dump({"device": jax.devices()[0].device_kind, "rows": rows}, file)


if __name__ == "__main__":
    main()
