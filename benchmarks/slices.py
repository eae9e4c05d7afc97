"""Accuracy and speed of the ways to take slices of a volume's spectrum, and to insert.

Projections within 0.9 of Nyquist of the built-in phantom, side 64, single precision,
1000 particles. Errors are relative, against a non-uniform FFT (``finufft``, in double
precision, tolerance 1e-9). Times are minima over interleaved rounds. ``jax-finufft``
and ``cryojax`` are measured if they are installed.
"""

import importlib.util
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from benchmark import Settings, interleaved_times
from records import Record, markdown_table

from jaxrefine import simulate
from jaxrefine._batching import map_over_particles
from jaxrefine.data.observation import Observation
from jaxrefine.geometry import Poses
from jaxrefine.operators import slices
from jaxrefine.operators.gridding import Finufft, Gridding
from jaxrefine.poses import likelihood

CASES = ("gridding", "finufft", "cryojax")
PARTS = ()
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
COLUMNS = ("forward", "cost", "cost+gradient", "normal equations", "insertion")

Call = Callable[[], Any]


class Problem:
    """A map, its particles, and what is timed."""

    def __init__(self):
        keys = jax.random.split(jax.random.key(0), 4)
        self.volume = simulate.phantom(keys[0], SIDE)
        self.poses = Poses(
            simulate.equidistributed_rotations(keys[1], PARTICLES),
            2 * jax.random.normal(keys[2], (PARTICLES, 2)),
        )
        self.disc = slices.disc(SIDE, R_MAX)
        self.exact = exact_slices(np.asarray(self.volume), self.poses, self.disc)
        self.spectra = jnp.asarray(self.exact, jnp.complex64)

    def error(self, spectra) -> float:
        """Return the relative error of projections."""
        return float(np.linalg.norm(spectra - self.exact) / np.linalg.norm(self.exact))

    def forward(self, way: Gridding) -> Call:
        """Return a call that projects all particles."""
        spectrum = way.spectrum(self.volume, R_MAX)
        return lambda: slices.project(spectrum, self.disc, self.poses)

    def insert(self, way: Gridding | Finufft) -> Call:
        """Return a call that inserts all slices."""
        return lambda: slices.backproject(
            way, self.spectra, self.disc, self.poses, batch_size=PARTICLES
        )

    def compare(self, way: Gridding, function, batch_size: int = 128) -> Call:
        """Return a call that evaluates a function of `likelihood` for each particle."""

        @jax.jit
        def of_all(reference, disc, particles):
            def of_particle(particle):
                spectrum, rotation, shift, transfer = particle
                weights = disc.quadrature
                observation = Observation(disc, weights, spectrum, transfer)
                return function(reference, observation, rotation, shift)

            return map_over_particles(of_particle, particles, batch_size)

        reference = way.spectrum(self.volume, R_MAX)
        transfer = jnp.ones(self.spectra.shape, jnp.float32)
        particles = self.spectra, self.poses.rotations, self.poses.shifts, transfer
        return lambda: of_all(reference, self.disc, particles)


def exact_slices(volume: np.ndarray, poses: Poses, disc: slices.Disc) -> np.ndarray:
    """Project by a non-uniform FFT in double precision."""
    import finufft

    rotations = np.asarray(poses.rotations, float)
    omega = np.asarray(disc.frequencies, float)
    points = np.einsum("pij,ki->jpk", rotations[:, :2], omega)
    x, y, z = (2 * np.pi / SIDE * axis.ravel() for axis in points)
    values: Any = finufft.nufft3d2(z, y, x, volume.astype(complex), eps=1e-9, isign=-1)
    angle = -2 * np.pi / SIDE * np.asarray(poses.shifts, float) @ omega.T
    return values.reshape(angle.shape) * np.exp(1j * angle)


def plain_finufft(problem: Problem, tolerance: float) -> Call:
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


def cryojax_linear(problem: Problem, padding: int) -> Call:
    """Return a call that projects by ``cryojax``, linear, as many frequencies.

    It takes whole half planes of the padded side; so it gets as many particles as have
    in all no more frequencies than the rows above. Its time alone is compared.
    """
    # An optional package, which development environments do not have.
    import cryojax.ndimage as im  # pyright: ignore[reportMissingImports]

    side = SIDE * padding
    sampled = im.prepare_sampling_fft(jnp.pad(problem.volume, (side - SIDE) // 2))
    plane = im.make_frequency_slice((side, side), fftshifted=True)
    count = problem.spectra.size // (plane.shape[1] * plane.shape[2])

    @jax.jit
    def project(rotations):
        def project_one(rotation):
            turned = plane @ rotation
            return im.sample_fft_slice(sampled, turned, interp="linear", unroll=True)

        return jax.lax.map(project_one, rotations, batch_size=128)

    rotations = problem.poses.rotations[:count]
    return lambda: project(rotations)


def milliseconds(calls: dict[str, Call]) -> dict[str, float]:
    """Return the least time of each call."""
    times = interleaved_times(calls, ROUNDS)
    return {name: 1e3 * min(values) for name, values in times.items()}


def gridding_rows(problem: Problem) -> list[dict[str, Any]]:
    """Measure every window and oversampling of our own."""
    functions = {
        "cost": likelihood.cost,
        "cost+gradient": likelihood.cost_and_gradient,
        "normal equations": likelihood.normal_equations,
    }
    rows = []
    for width, oversampling in GRIDDINGS:
        way = Gridding(width, oversampling)
        calls = {"forward": problem.forward(way)}
        calls |= {name: problem.compare(way, f) for name, f in functions.items()}
        calls["insertion"] = problem.insert(way)
        error = problem.error(calls["forward"]())
        name = f"gridding {width} x {oversampling:g}"
        rows.append({"way": name, "error": error, **milliseconds(calls)})
    return rows


def finufft_rows(problem: Problem) -> list[dict[str, Any]]:
    """Measure ``jax-finufft``: plain projections, and our insertion by it."""
    rows = []
    for tolerance in (1e-2, 1e-3, 1e-4):
        call = plain_finufft(problem, tolerance)
        calls = {"forward": call, "insertion": problem.insert(Finufft(tolerance))}
        name = f"finufft {tolerance:g}"
        rows.append(
            {"way": name, "error": problem.error(call()), **milliseconds(calls)}
        )
    return rows


def cryojax_rows(problem: Problem) -> list[dict[str, Any]]:
    """Measure ``cryojax``."""
    return [
        {
            "way": f"cryojax linear, pad {padding}",
            **milliseconds({"forward": cryojax_linear(problem, padding)}),
        }
        for padding in (1, 2)
    ]


def measure(case: str, settings: Settings) -> dict[str, Any]:
    """Measure the ways of one kind."""
    package, rows = {
        "gridding": ("jaxrefine", gridding_rows),
        "finufft": ("jax_finufft", finufft_rows),
        "cryojax": ("cryojax", cryojax_rows),
    }[case]
    if importlib.util.find_spec(package) is None:
        return {"rows": []}
    return {"rows": rows(Problem())}


def table(records: Sequence[Record]) -> str:
    """Return one row for each way, times in milliseconds."""
    rows = []
    for row in (row for each in records for row in each["figures"]["rows"]):
        error = f"{row['error']:.1e}" if "error" in row else ""
        times = (f"{row[name]:.0f}" if name in row else "" for name in COLUMNS)
        rows.append((f"`{row['way']}`", error.replace("-", "−"), *times))
    table = markdown_table(("way", "error", *(f"{c} (ms)" for c in COLUMNS)), rows)
    return f"Relative errors, and times for {PARTICLES} particles.\n\n{table}"
