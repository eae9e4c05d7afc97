"""The production engine against the truth, the oracle and RELION.

    python benchmarks/refinement.py CASE [--data FOLDER] [--json FILE]

CASE is one of the rows of the README's table, or ``all``. Every case is simulated by an
exact non-uniform FFT of the true map's voxels (``pip install finufft``), which shares
no code with the package: uniform orientations, shifts uniform up to 3 pixels, white
noise, initial Euler angles off by up to 0.7 rad each, initial shifts zero, initial map
the truth blurred by 4 pixels. FSC is against the truth, without a mask, as it stands.

- ``joint`` refines from there; ``oracle`` is our volume update from the true poses;
- ``relion`` is ``relion_reconstruct`` from the true STAR file, where it is installed;
- ``bound`` polishes the true poses against the true map at the known noise: RMS errors,
  the Cramer-Rao bound, and how many true poses lie in the 95 % ellipsoids.

Every joint refinement is timed in a process of its own, compilation included.
"""

import argparse
import json
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np


class Case(NamedTuple):
    """A data set: the map's file, the side it is brought to, particles and noise."""

    file: str
    size: int
    particles: int
    snr_db: float
    seed: int = 0


CASES = {
    "hjc64": Case("hjc_90.mrc", 64, 1000, -5.0),
    "ptch64": Case("ptch1_84.mrc", 64, 1000, -5.0),
    "hjc64-low": Case("hjc_90.mrc", 64, 3000, -14.2),
    "hjc90": Case("hjc_90.mrc", 90, 2000, -10.0),
    "hjc128": Case("hjc_90.mrc", 128, 1000, -5.0),
    "hjc64-2000": Case("hjc_90.mrc", 64, 2000, -5.0),
    "hjc64-4000": Case("hjc_90.mrc", 64, 4000, -5.0),
    "hjc64-8000": Case("hjc_90.mrc", 64, 8000, -5.0),
}
MAX_ANGLE_ERROR, MAX_SHIFT, BLUR = 0.7, 3.0, 4.0


def fourier_crop(volume: np.ndarray, n: int) -> np.ndarray:
    """Keep the lowest ``n`` frequencies along each axis; the intensity stays.

    A box of ``n`` larger than the volume's is filled up with zeros instead.
    """
    m = volume.shape[0]
    if n > m:
        before = n // 2 - m // 2
        return np.pad(volume, (before, n - m - before))
    spectrum = np.fft.fftshift(np.fft.fftn(np.fft.ifftshift(volume)))
    low = m // 2 - n // 2
    spectrum = spectrum[low : low + n, low : low + n, low : low + n]
    cropped = np.fft.fftshift(np.fft.ifftn(np.fft.ifftshift(spectrum))).real
    return cropped * (n / m) ** 3


def matrices(angles: np.ndarray) -> np.ndarray:
    """Return RELION's Euler matrices, written out anew."""
    (ca, cb, cg), (sa, sb, sg) = np.cos(angles.T), np.sin(angles.T)
    rows = [
        [cg * cb * ca - sg * sa, cg * cb * sa + sg * ca, -cg * sb],
        [-sg * cb * ca - cg * sa, -sg * cb * sa + cg * ca, sg * sb],
        [sb * ca, sb * sa, cb],
    ]
    return np.moveaxis(np.array(rows), -1, 0)


def project(volume: np.ndarray, angles: np.ndarray, shifts: np.ndarray) -> np.ndarray:
    """Project by central slices of the voxels' exact spectrum."""
    import finufft

    n = volume.shape[0]
    y, x = np.meshgrid(np.fft.fftfreq(n), np.fft.rfftfreq(n), indexing="ij")
    inside = np.hypot(x, y) < 0.5 - 1e-9
    plane = 2 * np.pi * np.stack([x[inside], y[inside]])
    source = np.ascontiguousarray(volume.transpose(2, 1, 0), complex)
    images = np.empty((len(angles), n, n), np.float32)
    for first in range(0, len(angles), 200):
        some = slice(first, first + 200)
        points = np.einsum("dk,pdc->cpk", plane, matrices(angles[some])[:, :2])
        flat = [np.ascontiguousarray(axis.ravel()) for axis in points]
        values = finufft.nufft3d2(*flat, source, eps=1e-9, isign=-1)
        values = values.reshape(-1, plane.shape[1])
        values *= np.exp(-1j * shifts[some] @ plane)
        spectra = np.zeros((len(values), n, n // 2 + 1), complex)
        spectra[:, inside] = values
        images[some] = np.fft.fftshift(np.fft.irfft2(spectra, s=(n, n)), axes=(1, 2))
    return images


def simulate(case: Case, data: Path) -> dict[str, np.ndarray]:
    """Make a data set and where to start from."""
    import mrcfile

    random = np.random.default_rng(case.seed)
    with mrcfile.open(data / case.file, permissive=True) as file:
        volume = fourier_crop(np.asarray(file.data, float), case.size)
    count = case.particles
    angles = np.stack(
        [
            random.uniform(0, 2 * np.pi, count),
            np.arccos(random.uniform(-1, 1, count)),
            random.uniform(0, 2 * np.pi, count),
        ],
        axis=1,
    )
    shifts = random.uniform(-MAX_SHIFT, MAX_SHIFT, (count, 2))
    images = project(volume, angles, shifts)
    sigma = np.sqrt(np.mean(images**2)) * 10 ** (-case.snr_db / 20)
    images += sigma * random.standard_normal(images.shape, np.float32)
    start = angles + random.uniform(-MAX_ANGLE_ERROR, MAX_ANGLE_ERROR, angles.shape)
    frequency = 2 * np.pi * np.fft.fftfreq(case.size)
    line = np.exp(-0.5 * (BLUR * frequency) ** 2)
    filtered = np.fft.fftn(volume) * line[:, None, None] * line[:, None] * line
    return {
        "volume": volume.astype(np.float32),
        "initial": np.fft.ifftn(filtered).real.astype(np.float32),
        "angles": angles.astype(np.float32),
        "shifts": shifts.astype(np.float32),
        "start": start.astype(np.float32),
        "images": images,
        "sigma": np.float32(sigma),
    }


def relion(data: dict[str, np.ndarray]) -> float | None:
    """Reconstruct from the true poses with RELION; the mean FSC with the truth."""
    program = shutil.which("relion_reconstruct")
    if program is None:
        return None
    import mrcfile

    n, poses = data["volume"].shape[0], []
    for i, (angles, shift) in enumerate(
        zip(np.rad2deg(data["angles"]), -data["shifts"], strict=True), start=1
    ):
        numbers = " ".join(f"{value:.6f}" for value in (*angles, *shift))
        poses.append(f"{i:06d}@particles.mrcs {numbers} 1")
    optics = ["OpticsGroup", "OpticsGroupName", "ImagePixelSize", "ImageSize"]
    optics += ["ImageDimensionality", "Voltage", "SphericalAberration"]
    optics += ["AmplitudeContrast"]
    columns = ["ImageName", "AngleRot", "AngleTilt", "AnglePsi", "OriginXAngst"]
    columns += ["OriginYAngst", "OpticsGroup"]
    lines = ["data_optics", "", "loop_", *(f"_rln{name}" for name in optics)]
    lines += [f"1 group1 1.0 {n} 2 300 2.7 0.1", "", "data_particles", "", "loop_"]
    lines += [*(f"_rln{name}" for name in columns), *poses, ""]
    with tempfile.TemporaryDirectory() as folder:
        with mrcfile.new(Path(folder) / "particles.mrcs") as file:
            file.set_data(data["images"])
            file.voxel_size = 1.0
        (Path(folder) / "true.star").write_text("\n".join(lines))
        command = [program, "--i", "true.star", "--o", "map.mrc"]
        subprocess.run(command, cwd=folder, check=True, capture_output=True)
        with mrcfile.open(Path(folder) / "map.mrc") as file:
            return mean_fsc(np.asarray(file.data), data["volume"])


def mean_fsc(a: np.ndarray, b: np.ndarray) -> float:
    """Return the mean FSC over the shells 1 to n / 2."""
    import jax.numpy as jnp

    from jaxrefine.maps.fsc import fsc, mean_fsc

    return float(mean_fsc(fsc(jnp.asarray(a), jnp.asarray(b))))


def joint(path: Path) -> dict[str, Any]:
    """Refine a data set from the start; run in a process of its own."""
    begin = time.perf_counter()
    import jax
    import jax.numpy as jnp

    from jaxrefine import evaluation
    from jaxrefine.data.particles import Particles
    from jaxrefine.euler import euler_to_matrix
    from jaxrefine.geometry import Poses
    from jaxrefine.refinement import loop

    with np.load(path) as file:
        data = {name: file[name] for name in file.files}
    images = data.pop("images")
    rotations = euler_to_matrix(jnp.asarray(data["start"]))
    poses = Poses(rotations, jnp.zeros((len(images), 2), jnp.float32))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
    rows = []
    result = loop.refine(
        Particles(images),
        poses,
        jnp.asarray(data["initial"]),
        key=jax.random.key(0),
        callback=lambda state, info: rows.append(info.row()),
    )
    wall = time.perf_counter() - begin
    truth = Poses(euler_to_matrix(jnp.asarray(data["angles"])), data["shifts"])
    errors = evaluation.pose_errors(result.poses, truth)
    return {
        "mean_fsc": mean_fsc(result.volume, data["volume"]),
        "tau": result.tau,
        "undetermined": int(result.undetermined.sum()),
        **evaluation.summarise(errors),
        "r_max": [row["r_max"] for row in rows],
        "wall_s": wall,
        "images_mib": images.nbytes / 2**20,
        "rss_before_mib": before,
        "peak_rss_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10,
    }


def oracle(data: dict[str, np.ndarray]) -> dict[str, Any]:
    """Reconstruct from the true poses by our volume update."""
    import jax
    import jax.numpy as jnp

    from jaxrefine.data.particles import Particles
    from jaxrefine.euler import euler_to_matrix
    from jaxrefine.geometry import Poses
    from jaxrefine.refinement.reconstruction import reconstruct

    poses = Poses(euler_to_matrix(jnp.asarray(data["angles"])), data["shifts"])
    begin = time.perf_counter()
    made = reconstruct(Particles(data["images"]), poses, key=jax.random.key(1))
    return {
        "mean_fsc": mean_fsc(made.volume, data["volume"]),
        "tau": made.tau,
        "tau_errors": made.errors,
        "wall_s": time.perf_counter() - begin,
    }


def bound(data: dict[str, np.ndarray]) -> dict[str, float]:
    """Polish the true poses against the true map; compare with the Cramer-Rao bound."""
    import jax.numpy as jnp

    from jaxrefine.data import observation
    from jaxrefine.data.particles import Particles
    from jaxrefine.euler import euler_to_matrix
    from jaxrefine.geometry import Poses, matrix_to_rotvec
    from jaxrefine.operators.gridding import Gridding
    from jaxrefine.poses import polish, uncertainty
    from jaxrefine.poses.prior import priors_about
    from jaxrefine.poses.solvers import LevenbergMarquardt

    particles = Particles(data["images"])
    n, last = particles.image_size, (particles.image_size - 1) // 2
    truth = Poses(euler_to_matrix(jnp.asarray(data["angles"])), data["shifts"])
    noise = jnp.full(n // 2 + 1, data["sigma"] ** 2 * n**2, jnp.float32)
    spectrum = Gridding().spectrum(jnp.asarray(data["volume"]), last)
    view = observation.view(particles, last, noise)
    known = priors_about(truth, 10.0, 1000.0, np.pi, 1000.0)
    everyone = np.arange(len(particles))
    done = polish.polish_poses(
        particles,
        everyone,
        spectrum,
        view,
        known,
        np.asarray(truth.rotations),
        np.asarray(truth.shifts),
        LevenbergMarquardt(6),
        256,
    )
    pose = done.rotations, done.shifts, done.information
    curvature = uncertainty.mean_curvatures(
        particles, everyone, spectrum, view, known, *pose, 256
    )
    turned = np.einsum("pij,pkj->pik", done.rotations, np.asarray(truth.rotations))
    vector = np.asarray(matrix_to_rotvec(jnp.asarray(turned)))
    error = np.concatenate([vector, done.shifts - data["shifts"]], axis=1)
    covariance = np.linalg.inv(done.information.astype(float))
    distance = np.einsum("pi,pij,pj->p", error, curvature, error)
    expected = np.einsum("pii->pi", covariance)
    return {
        "rms_angle_deg": float(np.rad2deg(np.sqrt((error[:, :3] ** 2).sum(1).mean()))),
        "bound_angle_deg": float(np.rad2deg(np.sqrt(expected[:, :3].sum(1).mean()))),
        "rms_shift_px": float(np.sqrt((error[:, 3:] ** 2).sum(1).mean())),
        "bound_shift_px": float(np.sqrt(expected[:, 3:].sum(1).mean())),
        # The 95 % quantile of chi squared with five degrees of freedom.
        "covered_by_95": float(np.mean(distance < 11.0705)),
    }


def run(name: str, folder: Path, parts: list[str]) -> dict[str, Any]:
    """Run the parts of a case."""
    case = CASES[name]
    data = simulate(case, folder)
    found: dict[str, Any] = {"case": name, **case._asdict()}
    if "relion" in parts:
        found["relion"] = relion(data)
    if "joint" in parts:
        with tempfile.TemporaryDirectory() as scratch:
            path = Path(scratch) / "data.npz"
            np.savez(path, **data)
            begin = time.perf_counter()
            command = [sys.executable, __file__, "--joint", str(path)]
            output = subprocess.run(command, check=True, capture_output=True).stdout
            found["joint"] = json.loads(output)
            found["joint"]["process_s"] = time.perf_counter() - begin
    if "oracle" in parts:
        found["oracle"] = oracle(data)
    if "bound" in parts:
        found["bound"] = bound(data)
    return found


def main() -> None:
    """Run cases and print what they come to."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("cases", nargs="*", metavar="CASE", help="or: all")
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--json", type=Path, help="append results to this file")
    parser.add_argument("--parts", default="relion,joint,oracle,bound")
    parser.add_argument("--joint", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.joint is not None:
        print(json.dumps(joint(options.joint)))
        return
    cases = list(CASES) if "all" in options.cases else options.cases
    for name in cases:
        found = run(name, options.data, options.parts.split(","))
        print(json.dumps(found, indent=2), flush=True)
        if options.json is not None:
            table = (
                json.loads(options.json.read_text()) if options.json.exists() else {}
            )
            table[name] = {**table.get(name, {}), **found}
            options.json.write_text(json.dumps(table, indent=2) + "\n")


if __name__ == "__main__":
    main()
