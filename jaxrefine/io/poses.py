"""Poses in RELION's STAR files: Euler angles in degrees, and origins."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float64

from jaxrefine._arrays import on_device
from jaxrefine.errors import InputError
from jaxrefine.euler import euler_to_matrix, matrix_to_euler
from jaxrefine.geometry import Poses
from jaxrefine.io.columns import (
    fixed,
    is_single,
    numbers,
    particle_table,
    pixel_sizes,
    pixel_sizes_if_any,
)
from jaxrefine.io.fields import is_cs, lack_of
from jaxrefine.io.star import Table, read_star

_ANGLES = ("rlnAngleRot", "rlnAngleTilt", "rlnAnglePsi")


def read_poses(path: str | Path) -> Poses:
    """Read the poses of the particles from a RELION file of any version.

    Returns
    -------
    The poses. Shifts are the positions of the particles in their images, in pixels,
    which is *minus* RELION's origin. An origin that the file lacks is zero. Origins in
    angstroms (``rlnOriginXAngst``) are divided by the pixel size
    (``rlnImagePixelSize`` of the particle or its optics group), and take precedence
    over origins in pixels (``rlnOriginX``).

    Raises
    ------
    InputError
        If the file is not a STAR file with one table of particles, if it lacks an
        angle, if a value is not a number in single precision, or if origins are in
        angstroms and there is no pixel size.
    """
    return _poses_of(read_star(path), path)


def _poses_of(blocks: dict[str, Table], path: str | Path) -> Poses:
    """Return the poses in the blocks of a file, as `read_poses` does."""
    particles = particle_table(blocks, path)
    rotations = rotations_of(blocks, path)
    origins = []
    for axis in "XY":
        if f"rlnOrigin{axis}Angst" in particles:
            in_angstroms = numbers(particles, f"rlnOrigin{axis}Angst", path)
            origins.append(in_angstroms / pixel_sizes(blocks, particles, path))
        elif f"rlnOrigin{axis}" in particles:
            origins.append(numbers(particles, f"rlnOrigin{axis}", path))
        else:
            origins.append(np.zeros(len(rotations)))
    if not is_single(np.array(origins)).all():
        raise InputError(
            f"{path}: origins in pixels must be finite in single precision, got a "
            "number beyond it"
        )
    return Poses(rotations, -np.stack(origins, axis=-1))


def rotations_of(
    blocks: dict[str, Table], path: str | Path
) -> Float64[np.ndarray, "particles 3 3"]:
    """Return the rotation matrices of the particles in the blocks of a file.

    Raises
    ------
    InputError
        If it has not one table of particles, if an angle is missing, or if a value is
        not a number in single precision.
    """
    particles = particle_table(blocks, path)
    missing = [name for name in _ANGLES if name not in particles]
    if missing and is_cs(path):
        raise InputError(lack_of("alignments3D", Path(path)))
    if missing:
        raise InputError(f"{path} must have the columns {', '.join(missing)}, got none")
    angles = [numbers(particles, name, path) for name in _ANGLES]
    with jax.enable_x64(True):
        in_radians = on_device(np.deg2rad(np.stack(angles, axis=-1)))
        return np.asarray(euler_to_matrix(in_radians))


def poses_on_one_grid(
    blocks: dict[str, Table], path: str | Path
) -> tuple[Poses, float | None]:
    """Return the poses of a table, with all shifts in units of its largest pixels.

    Returns
    -------
    poses
        The poses, as `read_poses` returns them.
    pixel_size
        The largest pixel size in angstroms; None if the table gives none.
    """
    poses = _poses_of(blocks, path)
    sizes = pixel_sizes_if_any(blocks, particle_table(blocks, path), path)
    if sizes is None or not len(sizes):
        return poses, None
    shifts = np.asarray(poses.shifts) * (sizes / sizes.max())[:, None]
    return Poses(poses.rotations, shifts), float(sizes.max())


def pose_columns(poses: Poses, pixel_size_in_angstroms: float | None) -> Table:
    """Return RELION's columns for poses.

    Origins are in angstroms (``rlnOriginXAngst``), or in pixels (``rlnOriginX``) if no
    pixel size is given.
    """
    scale = 1.0 if pixel_size_in_angstroms is None else pixel_size_in_angstroms
    suffix = "" if pixel_size_in_angstroms is None else "Angst"
    origins = 0.0 - scale * np.asarray(poses.shifts, dtype=np.float64)
    columns = angle_columns(poses.rotations)
    for i, axis in enumerate("XY"):
        columns[f"rlnOrigin{axis}{suffix}"] = fixed(origins[:, i])
    return columns


def angle_columns(
    rotations: Float[Array | np.ndarray, "particles 3 3"],
) -> Table:
    """Return RELION's columns for the angles, in degrees, of rotation matrices."""
    with jax.enable_x64(True):
        matrices = jnp.asarray(np.asarray(rotations, np.float64))
        degrees = np.asarray(jnp.rad2deg(matrix_to_euler(matrices)))
    return {name: fixed(degrees[:, i]) for i, name in enumerate(_ANGLES)}
