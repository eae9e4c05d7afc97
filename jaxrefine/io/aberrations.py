"""Aberrations in RELION's tables, one row for each optics group.

Beam tilt (``rlnBeamTiltX``, ``rlnBeamTiltY``, in milliradians), the coefficients of
Zernike polynomials (``rlnOddZernike``, ``rlnEvenZernike``, in brackets) and the
magnification matrix (``rlnMagMat00``, ...) are columns of the optics table from RELION
3.1 on. Its programs read them nowhere else, and neither does this module, but for the
beam tilt in tables of RELION 3.0, which have no optics table: there particles of the
same tilt, voltage and spherical aberration are a group.
"""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float64, Int

from jaxrefine.aberrations import Aberrations, with_beam_tilt
from jaxrefine.ctf import electron_wavelength
from jaxrefine.errors import InputError
from jaxrefine.io.columns import (
    is_single,
    numbers,
    of_each,
    optics_rows,
    parsed,
    particle_table,
    require,
)
from jaxrefine.io.fields import called, is_cs
from jaxrefine.io.star import Table

_TILT = ("rlnBeamTiltX", "rlnBeamTiltY")
_ODD, _EVEN = "rlnOddZernike", "rlnEvenZernike"
_MATRIX = tuple(f"rlnMagMat{i}{j}" for i in (0, 1) for j in (0, 1))
_OF_CTF = (*_TILT, _ODD, _EVEN)
_MTF = "rlnMtfFileName"
# What RELION does to the images or the map of a particle, and the number for nothing.
_CORRECTIONS = {
    "rlnNormCorrection": 1.0,
    "rlnGroupScaleCorrection": 1.0,
    "rlnIsFlip": 0.0,
}
# The number of a column that is no aberration.
_NONE = _CORRECTIONS | dict(
    zip((*_OF_CTF, *_MATRIX), (0.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 1.0), strict=True)
)
# Beam tilts of RELION 3.0's tables, one for each class of micrographs. More of them are
# those of single particles, which no noise could be measured for.
_MOST_TILTS = 1000
_LARGEST_STRETCH = 1.25  # Pixel sizes may differ by as much.


def read_aberrations(
    blocks: dict[str, Table],
    path: Path,
    optics_group: Int[np.ndarray, " particles"] | None,
    *,
    with_ctf: bool,
    pixel_size: float,
) -> Aberrations | None:
    """Return the aberrations of each optics group that has particles, in their order.

    Parameters
    ----------
    blocks, path
        The tables, and the file that they are from.
    optics_group
        ``rlnOpticsGroup`` of each particle, if the file has any.
    with_ctf
        Whether the particles have a contrast-transfer function. If not, they have no
        aberration but the magnification.
    pixel_size
        Edge of a pixel in angstroms, up to whose Nyquist frequency phases are used.

    Returns
    -------
    The aberrations; None if there are none. A matrix of zeros is none, as other
    programs write it.

    Raises
    ------
    InputError
        If a value is not a number, if phases are not finite in single precision, if a
        column of the magnification matrix is missing, or if a magnification is not
        within a quarter of 1 in every direction.
    """
    optics = blocks.get("optics", {})
    known = [name for name in (*_OF_CTF, *_MATRIX) if name in optics]
    if optics_group is None or not known:
        return None
    particles = particle_table(blocks, path)
    _, first = np.unique(optics_group, return_index=True)
    rows = optics_rows(blocks, particles, path)[first]
    odd = even = np.zeros((len(rows), 0))
    if with_ctf:
        odd, even = (_vectors(optics, name, path)[rows] for name in (_ODD, _EVEN))
    if with_ctf and not {*_TILT}.isdisjoint(known):
        tilt = [
            numbers(optics, name, path)[rows] if name in optics else np.zeros(len(rows))
            for name in _TILT
        ]
        odd = _with_tilt(odd, np.stack(tilt, axis=1), blocks, path, first)
    matrix = _matrices(optics, path)[rows]
    aberrations = Aberrations(
        jnp.asarray(odd) if odd.any() else None,
        jnp.asarray(even) if even.any() else None,
        jnp.asarray(matrix) if (matrix != np.eye(2)).any() else None,
    )
    _require_finite(aberrations, pixel_size, path)
    return aberrations if aberrations.groups else None


def tilt_groups(
    blocks: dict[str, Table], path: Path, *, with_ctf: bool
) -> Int[np.ndarray, " particles"] | None:
    """Return the group of each particle by its beam tilt, in a table of RELION 3.0.

    Particles with the same tilt, voltage and spherical aberration are one. There are no
    groups, and the result is None, in tables that have optics groups, have no beam tilt
    but 0 or more than a thousand different ones, and where there is no
    contrast-transfer function.

    Raises
    ------
    InputError
        If a value is not a number.
    """
    particles = particle_table(blocks, path)
    if not with_ctf or "rlnOpticsGroup" in particles or "optics" in blocks:
        return None
    if not any(name in particles and _has_effect(particles, name) for name in _TILT):
        return None
    names = (*_TILT, "rlnVoltage", "rlnSphericalAberration")
    count = len(particles["rlnImageName"])
    values = [
        numbers(particles, name, path) if name in particles else np.zeros(count)
        for name in names
    ]
    found, group = np.unique(np.stack(values, axis=1), axis=0, return_inverse=True)
    return None if len(found) > _MOST_TILTS else group.ravel()


def read_tilts(
    blocks: dict[str, Table],
    path: Path,
    group: Int[np.ndarray, " particles"],
    *,
    pixel_size: float,
) -> Aberrations:
    """Return the beam tilt of each of the groups of `tilt_groups`.

    Parameters and errors as for `read_aberrations`.
    """
    particles = particle_table(blocks, path)
    _, first = np.unique(group, return_index=True)
    tilt = [
        numbers(particles, name, path)[first] if name in particles else 0.0 * first
        for name in _TILT
    ]
    none = np.zeros((len(first), 0))
    odd = _with_tilt(none, np.stack(tilt, axis=1), blocks, path, first)
    aberrations = Aberrations(jnp.asarray(odd), None, None)
    _require_finite(aberrations, pixel_size, path)
    return aberrations


def _with_tilt(
    odd: Float64[np.ndarray, "groups _"],
    tilt: Float64[np.ndarray, "groups 2"],
    blocks: dict[str, Table],
    path: Path,
    first: Int[np.ndarray, " groups"],
) -> Float64[np.ndarray, "groups _"]:
    """Return the odd coefficients of groups, of which a particle each is given."""
    particles = particle_table(blocks, path)
    voltage, aberration = (
        of_each(blocks, particles, name, path)[first]
        for name in ("rlnVoltage", "rlnSphericalAberration")
    )
    wavelength = np.asarray(jax.vmap(electron_wavelength)(jnp.asarray(voltage)))
    return with_beam_tilt(odd, tilt, aberration, wavelength)


def ignored(
    blocks: dict[str, Table],
    path: Path,
    tilt_group: Int[np.ndarray, " particles"] | None,
    *,
    with_ctf: bool,
) -> list[str]:
    """Return the columns or fields that RELION uses and this package does not.

    They are aberrations of single particles, those of groups without a
    contrast-transfer function, the transfer function of the detector, and corrections
    of the scale of images and whether they are mirrored.

    Parameters
    ----------
    blocks, path, with_ctf
        As for `read_aberrations`.
    tilt_group
        The groups of `tilt_groups`, whose beam tilt is used.
    """
    optics, particles = blocks.get("optics", {}), particle_table(blocks, path)
    used = () if tilt_group is None else _TILT
    names = (*_OF_CTF, *_MATRIX, *_CORRECTIONS)
    unused = [(particles, name) for name in names if name not in used]
    if not with_ctf:
        unused += [(optics, name) for name in _OF_CTF]
    names = [
        name for table, name in unused if name in table and _has_effect(table, name)
    ]
    if any(text not in ("", "None") for text in optics.get(_MTF, ())):
        names.append(_MTF)
    if is_cs(path):
        names = [called(name, path).removeprefix("field ") for name in names]
    return list(dict.fromkeys(names))


def _require_finite(aberrations: Aberrations, pixel_size: float, path: Path) -> None:
    """Raise if a phase is not finite at some frequency, in single precision."""
    corners = np.array([[0, 0], [1, 0], [0, 1], [1, 1], [1, -1]]) * (0.5 / pixel_size)
    corners = jnp.asarray(corners, jnp.float32)
    for values in (aberrations.phase(corners), aberrations.gamma(corners)):
        if values is not None and not np.isfinite(values).all():
            group = int(np.argmin(np.isfinite(values).all(axis=1)))
            raise InputError(
                f"{path}: the phases of aberrations must be finite, got some that are "
                f"out of range in optics group {group + 1} of those that have particles"
            )


def _has_effect(table: Table, name: str) -> bool:
    """Return whether a column has a number that is not that of no aberration."""
    texts = [text.strip("[]") for text in table[name]]
    values = parsed([value for text in texts for value in text.split(",") if value])
    return bool(((values != 0) & (values != _NONE[name])).any())


def _vectors(optics: Table, name: str, path: Path) -> Float64[np.ndarray, "rows _"]:
    """Return a column of numbers in brackets, filled up by zeros to the same length."""
    texts = optics.get(name, ["[]"] * len(optics["rlnOpticsGroup"]))
    closed = [text[:1] + text[-1:] in ("", "[]") for text in texts]
    rows = [
        parsed([value for value in text[1:-1].split(",") if value]) for text in texts
    ]
    good = np.array([bool(is_single(row).all()) for row in rows]) & closed
    require(good, optics, name, path, "numbers in brackets, such as [0.1,0.2]")
    length = max(map(len, rows), default=0)
    return np.array([np.pad(row, (0, length - len(row))) for row in rows])


def _matrices(optics: Table, path: Path) -> Float64[np.ndarray, "rows 2 2"]:
    """Return the magnifications, and the identity for what is not there or zero.

    Raises
    ------
    InputError
        If only some of the columns are there, or a matrix is far from the identity.
    """
    count = len(optics["rlnOpticsGroup"])
    lacking = [name for name in _MATRIX if name not in optics]
    if len(lacking) == len(_MATRIX):
        return np.tile(np.eye(2), (count, 1, 1))
    if lacking:
        raise InputError(
            f"{path} must have all four columns of a magnification matrix or none, "
            f"got none of {', '.join(lacking)}"
        )
    values = [numbers(optics, name, path) for name in _MATRIX]
    matrices = np.stack(values, axis=1).reshape(-1, 2, 2)
    matrices = np.where(matrices.any(axis=(1, 2), keepdims=True), matrices, np.eye(2))
    stretches = np.linalg.svd(matrices, compute_uv=False)
    good = (stretches <= _LARGEST_STRETCH) & (stretches >= 1 / _LARGEST_STRETCH)
    good &= np.linalg.det(matrices)[:, None] > 0
    if not good.all():
        row = int(np.argmin(good.all(axis=1)))
        text = " ".join(f"{value:g}" for value in matrices[row].ravel())
        raise InputError(
            f"{path}, {called(_MATRIX[0], path)} and the other three: the matrix must "
            f"be close to the identity, 1 0 0 1, got {text} (row {row + 1})"
        )
    return matrices
