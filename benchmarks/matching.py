"""First poses of a simulated control like real data: matching, and RELION's iteration.

101 particles: the optics of 101 real ones of beta-galactosidase, at 96^2 pixels of
5.1 angstroms, and Gaussian noise with the spectrum of the background between them
(``real_betagal``). The poses of these are not known, so that the particle is another,
HJC, 0.41 of the box: uniform orientations, shifts of 2 pixels along x and y (standard
deviation). A case is the amplitude of the signal: at 1 it adds as much power to the
background in the shells from 4 to 12 as the real particles have more than it.

- ``matching``: ``jaxrefine match`` with the diameter of the particle, otherwise as it
  is by default;
- ``relion``: the first iteration of ``relion_refine --firstiter_cc``, to the same
  resolution, from a table without poses; all else as its jobs have it.

Both have the true map. Errors are those of the poses as they stand.
"""

import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from benchmark import Settings
from datasets import poses, project
from records import Record, markdown_table

from jaxrefine import io
from jaxrefine.ctf import CTF, apply_ctf
from jaxrefine.evaluation import PoseErrors, summarise
from jaxrefine.geometry import Poses, geodesic_distance
from jaxrefine.operators.resample import resample
from jaxrefine.runs.provenance import available_cores

CASES = {"amplitude-1": 1.0, "amplitude-0.5": 0.5, "amplitude-0.25": 0.25}
PARTS = ("matching", "relion")
DIAMETER, RESOLUTION, SHIFT = 200, 20, 2.0  # angstroms, angstroms, pixels
SEED = 0
SHELLS = slice(4, 13)
JAXREFINE = [sys.executable, "-m", "jaxrefine.cli"]
RELION = """relion_refine --i particles.star --o ./relion --ref map.mrc --firstiter_cc
    --iter 1 --K 1 --sym C1 --ctf --norm --scale --zero_mask --flatten_solvent
    --healpix_order 2 --offset_range 6 --offset_step 2 --oversampling 1 --pool 3 --pad 2
    --dont_combine_weights_via_disc --dont_check_norm --random_seed 1"""


def spectrum(images: np.ndarray) -> np.ndarray:
    """Return the mean power of images in each shell, up to the transform's corners."""
    values = images - images.mean(axis=(1, 2), keepdims=True)
    power = np.mean(np.abs(np.fft.fft2(values)) ** 2, axis=0)
    shells = _shells(len(power)).ravel()
    return np.bincount(shells, power.ravel()) / np.bincount(shells)


def _shells(m: int) -> np.ndarray:
    axis = np.fft.fftfreq(m, 1 / m)
    return np.rint(np.hypot(axis, axis[:, None])).astype(int)


def simulate(amplitude: float, data: Path, folder: Path) -> tuple[Poses, float]:
    """Write ``particles.star`` and ``map.mrc``.

    Returns the true poses, and the signal-to-noise ratio per pixel in decibels.
    """
    random = np.random.default_rng(SEED)
    name = "betagal_emd2984_{}_101_96px"
    table = data / "real_betagal" / f"{name.format('particles')}.star"
    source = io.read_particles(table)
    background = table.with_name(f"{name.format('background')}.mrcs")
    count, m = len(source), source.particles.image_size
    pixel, optics = source.particles.pixel_size_in_angstroms, source.particles.ctf
    assert optics is not None
    optics = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), optics)
    real = np.asarray(source.particles.images[np.arange(count)], float)
    noise_power = spectrum(np.asarray(io.read_stack(background)[0], float))
    excess = spectrum(real) - noise_power

    given, voxel = io.read_mrc(data / "hjc_90.mrc")
    volume = np.asarray(resample(jnp.asarray(given, jnp.float32), voxel, m, pixel))
    angles = random.uniform(0, 2 * np.pi, (count, 3))
    angles[:, 1] = np.arccos(random.uniform(-1, 1, count))
    shifts = SHIFT * random.standard_normal((count, 2))
    clean = jnp.asarray(project(volume.astype(float), angles, shifts), jnp.float32)
    clean = np.asarray(apply_ctf(optics, clean, pixel), float)
    level = np.sqrt(excess[SHELLS].sum() / spectrum(clean)[SHELLS].sum())
    white = np.fft.fft2(random.standard_normal((count, m, m)))
    noise = np.fft.ifft2(white * np.sqrt(noise_power[_shells(m)]) / m).real
    signal = amplitude * level * clean
    images = (signal + noise) / noise.std()

    truth = poses(angles.astype(np.float32), shifts.astype(np.float32))
    unknown = Poses(jnp.tile(jnp.eye(3), (count, 1, 1)), jnp.zeros((count, 2)))
    names = [f"{i:06d}@particles.mrcs" for i in range(1, count + 1)]
    group = CTF(0.0, 0.0, amplitude_contrast=float(optics.amplitude_contrast[0]))
    io.write_stack(folder / "particles.mrcs", images.astype(np.float32), pixel)
    star = folder / "particles.star"
    io.write_new_particles(star, unknown, names, m, pixel, group, optics)
    io.write_mrc(folder / "map.mrc", volume, pixel)
    return truth, float(10 * np.log10(signal.var() / noise.var()))


def matching(folder: Path) -> Path:
    """Match the particles; the table that was written."""
    words = ["match", "particles.star", "--map", "map.mrc", "--out", "matched.star"]
    diameter = ["--particle-diameter", str(DIAMETER)]
    subprocess.run([*JAXREFINE, *words, *diameter], cwd=folder, check=True)
    return folder / "matched.star"


def relion(folder: Path) -> Path:
    """Run RELION's first iteration; the table that it wrote."""
    limits = f"--particle_diameter {DIAMETER} --ini_high {RESOLUTION}"
    threads = f"--j {available_cores()}"
    subprocess.run(
        f"{RELION} {limits} {threads}".split(),
        cwd=folder,
        check=True,
        stdout=subprocess.DEVNULL,
    )
    return folder / "relion_it001_data.star"


def measure(case: str, settings: Settings) -> dict[str, Any]:
    """Measure the parts of a case."""
    figures: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        truth, figures["snr_db"] = simulate(CASES[case], settings.data, folder)
        for part, function in (("matching", matching), ("relion", relion)):
            if not settings.measures(part):
                continue
            begin = time.perf_counter()
            table = function(folder)
            wall = time.perf_counter() - begin
            found = io.read_particles(table).poses
            rotations = jnp.asarray(found.rotations, jnp.float32)
            moved = np.asarray(found.shifts) - np.asarray(truth.shifts)
            errors = PoseErrors(
                jnp.rad2deg(geodesic_distance(rotations, truth.rotations)),
                jnp.linalg.norm(jnp.asarray(moved, jnp.float32), axis=1),
            )
            figures[part] = {**summarise(errors), "wall_s": wall}
            if part == "matching":
                figures[part] |= _said(table, errors)
    return figures


def _said(table: Path, errors: PoseErrors) -> dict[str, float]:
    """Return how the errors compare with what the table says of them."""
    columns = io.read_star(table)["particles"]
    said = np.array(columns["jaxrefineAngleStd"], float)
    ratio = np.asarray(errors.angle_in_degrees) / said
    evidence = np.array(columns["jaxrefineEvidence"], float)
    return {
        "angle_std_in_degrees_median": float(np.median(said)),
        "rms_error_over_std": float(np.sqrt(np.mean(ratio**2))),
        "log_likelihood_median": float(np.median(evidence)),
    }


def table(records: Sequence[Record]) -> str:
    """Return the fractions within 10 degrees, and the median errors."""
    header = ("amplitude", "SNR (dB)", "match: within 10 degrees", "median (degrees)")
    header += ("shift (pixels)", "RMS of error / error bar", "median evidence")
    header += ("RELION, first iteration: within 10 degrees", "median (degrees)")
    header += ("shift (pixels)",)
    rows = []
    for each in records:
        figures = each["figures"]
        row = [f"{CASES[each['case']]:g}", f"{figures['snr_db']:.1f}"]
        for part in PARTS:
            found = figures.get(part)
            if found is None:
                row += [""] * (5 if part == "matching" else 3)
                continue
            row += [
                f"{100 * found['fraction_within_10_degrees']:.0f} %",
                f"{found['angle_error_in_degrees_median']:.1f}",
                f"{found['shift_error_in_pixels_median']:.2f}",
            ]
            if part == "matching":
                row += [
                    f"{found['rms_error_over_std']:.2f}",
                    f"{found['log_likelihood_median']:.1f}",
                ]
        rows.append(row)
    return markdown_table(header, rows)
