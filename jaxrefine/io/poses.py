"""The poses that RELION keeps in STAR files."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Array, Float, Float64

from jaxrefine.errors import InputError
from jaxrefine.io.columns import (
    fixed,
    is_single,
    numbers,
    particle_table,
    pixel_sizes,
    pixel_sizes_if_any,
)
from jaxrefine.io.star import Table, read_star, write_star

_ANGLES = ("rlnAngleRot", "rlnAngleTilt", "rlnAnglePsi")


def read_poses(
    path: str | Path,
) -> tuple[Float64[np.ndarray, "particles 3"], Float64[np.ndarray, "particles 2"]]:
    """Read the poses of the particles from a RELION file, old or 3.1.

    Returns
    -------
    angles
        (rot, tilt, psi) in radians.
    shifts
        (x, y) in pixels: the position of the particle in the image, which is *minus*
        RELION's origin. An origin that the file lacks is zero; one in Angstrom
        (``rlnOriginXAngst``) is divided by the pixel size (``rlnImagePixelSize`` of
        the particle or its optics group), and takes precedence over one in pixels
        (``rlnOriginX``).

    Raises
    ------
    InputError
        If the file is not a STAR file with one table of particles, lacks an angle,
        holds something that is not a number in single precision, or gives origins in
        Angstrom without the pixel size.
    """
    return poses_of(read_star(path), path)


def poses_of(
    blocks: dict[str, Table], path: str | Path
) -> tuple[Float64[np.ndarray, "particles 3"], Float64[np.ndarray, "particles 2"]]:
    """Return the poses in the blocks of a file, as `read_poses` does."""
    particles = particle_table(blocks, path)
    missing = [name for name in _ANGLES if name not in particles]
    if missing:
        raise InputError(f"{path} lacks the columns {', '.join(missing)}.")
    angles = [numbers(particles, name, path) for name in _ANGLES]
    origins = []
    for axis in "XY":
        if f"rlnOrigin{axis}Angst" in particles:
            in_angstroms = numbers(particles, f"rlnOrigin{axis}Angst", path)
            origins.append(in_angstroms / pixel_sizes(blocks, particles, path))
        elif f"rlnOrigin{axis}" in particles:
            origins.append(numbers(particles, f"rlnOrigin{axis}", path))
        else:
            origins.append(np.zeros_like(angles[0]))
    if not is_single(np.array(origins)).all():
        raise InputError(
            f"{path} has origins that are not finite in pixels, in single precision."
        )
    return np.deg2rad(np.stack(angles, axis=-1)), -np.stack(origins, axis=-1)


def poses_on_one_grid(
    blocks: dict[str, Table], path: str | Path
) -> tuple[
    Float64[np.ndarray, "particles 3"],
    Float64[np.ndarray, "particles 2"],
    float | None,
]:
    """Return poses as `poses_of` does, with all shifts in the largest pixels.

    And how large these are, in Angstrom; None if the file does not say.
    """
    angles, shifts = poses_of(blocks, path)
    sizes = pixel_sizes_if_any(blocks, particle_table(blocks, path), path)
    if sizes is None or not len(sizes):
        return angles, shifts, None
    return angles, shifts * (sizes / sizes.max())[:, None], float(sizes.max())


def write_poses(
    path: str | Path,
    angles: Float[Array | np.ndarray, "particles 3"],
    shifts: Float[Array | np.ndarray, "particles 2"],
    pixel_size_in_angstroms: float,
    image_names: Sequence[str],
    image_size: int,
) -> None:
    """Write a RELION 3.1 file of particles that share one optics group.

    Parameters
    ----------
    path
        The file, which appears complete or not at all.
    angles
        (rot, tilt, psi) in radians.
    shifts
        (x, y) in pixels; minus these, in Angstrom, are RELION's origins.
    pixel_size_in_angstroms
        The pixel size of the images.
    image_names
        ``rlnImageName`` of each particle, such as ``000001@particles.mrcs``.
    image_size
        The edge of the images in pixels.

    Raises
    ------
    InputError
        If there is not one name for each pose, or the file cannot be written.
    """
    if len(image_names) != len(angles):
        raise InputError(
            f"Cannot write {path}: {len(image_names)} image names came "
            f"with {len(angles)} poses."
        )
    optics = {
        "rlnOpticsGroup": ["1"],
        "rlnOpticsGroupName": ["opticsGroup1"],
        "rlnImagePixelSize": [f"{pixel_size_in_angstroms:.6f}"],
        "rlnImageSize": [str(image_size)],
        "rlnImageDimensionality": ["2"],
    }
    particles = {
        "rlnImageName": list(image_names),
        **pose_columns(angles, shifts, pixel_size_in_angstroms),
        "rlnOpticsGroup": ["1"] * len(image_names),
    }
    write_star(path, {"optics": optics, "particles": particles})


def pose_columns(
    angles: Float[Array | np.ndarray, "particles 3"],
    shifts: Float[Array | np.ndarray, "particles 2"],
    pixel_size_in_angstroms: float | None,
) -> Table:
    """Return RELION's columns of poses.

    Origins are in Angstrom (``rlnOriginXAngst``), or without a pixel size in pixels
    (``rlnOriginX``).
    """
    degrees = np.rad2deg(np.asarray(angles, dtype=np.float64))
    scale = 1.0 if pixel_size_in_angstroms is None else pixel_size_in_angstroms
    suffix = "" if pixel_size_in_angstroms is None else "Angst"
    origins = 0.0 - scale * np.asarray(shifts, dtype=np.float64)
    columns = {name: fixed(degrees[:, i]) for i, name in enumerate(_ANGLES)}
    for i, axis in enumerate("XY"):
        columns[f"rlnOrigin{axis}{suffix}"] = fixed(origins[:, i])
    return columns
