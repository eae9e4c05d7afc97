"""Data sets of the real maps, simulated by a program that shares nothing with ours.

An exact non-uniform FFT of the true map's voxels (``pip install finufft``): uniform
orientations, shifts uniform up to 3 pixels, white noise; initial Euler angles off by up
to 0.7 rad each, initial shifts zero, initial map the truth blurred by 4 pixels.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from jaxrefine.euler import euler_to_matrix
from jaxrefine.geometry import Poses
from jaxrefine.maps import fsc


class Case(NamedTuple):
    """A data set: the map's file, the side it is brought to, particles and noise."""

    file: str
    size: int
    particles: int
    snr_db: float
    seed: int = 0


DATA_SETS = {
    "hjc32": Case("hjc_46.mrc", 32, 300, 0.0),
    "ptch32": Case("ptch1_44.mrc", 32, 300, 0.0),
    "hjc46": Case("hjc_46.mrc", 46, 500, 0.0),
    "hjc46-12": Case("hjc_46.mrc", 46, 1500, -12.0),
    "hjc46-low": Case("hjc_46.mrc", 46, 20000, -15.0),
    "ptch44": Case("ptch1_44.mrc", 44, 500, -10.0),
    "ptch44-low": Case("ptch1_44.mrc", 44, 500, -15.0),
    "hjc64": Case("hjc_90.mrc", 64, 1000, -5.0),
    "hjc64-2000": Case("hjc_90.mrc", 64, 2000, -5.0),
    "hjc64-4000": Case("hjc_90.mrc", 64, 4000, -5.0),
    "hjc64-8000": Case("hjc_90.mrc", 64, 8000, -5.0),
    "hjc64-low": Case("hjc_90.mrc", 64, 3000, -14.2),
    "ptch64": Case("ptch1_84.mrc", 64, 1000, -5.0),
    "ptch64-low": Case("ptch1_84.mrc", 64, 3000, -14.2),
    "hjc90": Case("hjc_90.mrc", 90, 2000, -10.0),
    "hjc128": Case("hjc_90.mrc", 128, 1000, -5.0),
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
    row, column = np.meshgrid(np.fft.fftfreq(n), np.fft.rfftfreq(n), indexing="ij")
    inside = np.hypot(column, row) < 0.5 - 1e-9
    plane = 2 * np.pi * np.stack([column[inside], row[inside]])
    source = np.ascontiguousarray(volume.transpose(2, 1, 0), complex)
    images = np.empty((len(angles), n, n), np.float32)
    for first in range(0, len(angles), 200):
        batch = slice(first, first + 200)
        points = np.einsum("dk,pdc->cpk", plane, matrices(angles[batch])[:, :2])
        x, y, z = (np.ascontiguousarray(axis.ravel()) for axis in points)
        values: Any = finufft.nufft3d2(x, y, z, source, eps=1e-9, isign=-1)
        values = values.reshape(-1, plane.shape[1])
        values *= np.exp(-1j * shifts[batch] @ plane)
        spectra = np.zeros((len(values), n, n // 2 + 1), complex)
        spectra[:, inside] = values
        images[batch] = np.fft.fftshift(np.fft.irfft2(spectra, s=(n, n)), axes=(1, 2))
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
        "sigma": np.asarray(sigma, np.float32),
    }


def describe(name: str, case: Mapping[str, Any]) -> str:
    """Return a data set in words, of its name and the fields of its :class:`Case`."""
    molecule, side = Path(case["file"]).stem.split("_")
    box = f"{case['size']}³"
    if case["size"] > int(side):
        box = f"{side}³ padded to {box}"
    return (
        f"{molecule.upper()} {box}, P={case['particles']}, {case['snr_db']:g} dB "
        f"(`{name}`)"
    )


def poses(angles: np.ndarray, shifts: np.ndarray) -> Poses:
    """Return poses in the form that the package takes."""
    return Poses(euler_to_matrix(jnp.asarray(angles)), jnp.asarray(shifts))


def mean_fsc(a: np.ndarray, b: np.ndarray) -> float:
    """Return the mean FSC over the shells 1 to n / 2."""
    return float(fsc.mean_fsc(fsc.fsc(jnp.asarray(a), jnp.asarray(b))))
