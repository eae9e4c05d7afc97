"""The density of an atomic model at a resolution, by the rules of Chimera's molmap.

    python experiments/molmap.py MODEL.cif --resolution 7 --spacing 2 --out MAP.mrc

Every atom is a Gaussian of standard deviation 0.225 times the resolution whose integral
is its atomic number, so that densities are in electrons per cubic Angstrom.
"""

import argparse
import math
import sys
from pathlib import Path

import harness
import numpy as np
from jaxtyping import Float, Float32

from jaxrefine import io
from jaxrefine.errors import InputError

_WIDTH, _PADDING, _SPACING = 0.225, 3.0, 1 / 3  # of the resolution
_CUT = 5  # standard deviations


def molmap(
    path: str | Path,
    resolution_in_angstroms: float,
    spacing_in_angstroms: float | None = None,
    size: int | None = None,
) -> tuple[Float32[np.ndarray, "n n n"], float]:
    r"""Return the density of an atomic model, and its voxel size in Angstrom.

    .. math:: V(x) = \sum_a \frac{o_a Z_a}{(2\pi s^2)^{3/2}}
       e^{-\|x - x_a\|^2 / 2 s^2}, \quad s = 0.225 \cdot \text{resolution},

    each Gaussian within a cube of five standard deviations. All atoms of the file's
    first model count, waters and hydrogens too, each by its occupancy ``o``, so that
    alternative locations of an atom share it (Chimera's rule names the atomic number
    alone); no symmetry is applied.

    Parameters
    ----------
    path
        PDB or mmCIF file, which may be compressed by gzip.
    resolution_in_angstroms
        Of the map, in Chimera's sense.
    spacing_in_angstroms
        Edge of a voxel; a third of the resolution by default.
    size
        Side of the box, which crops or pads; by default the least odd one that holds
        three times the resolution around the atoms' bounding box.

    Returns
    -------
    volume
        Indexed ``[z, y, x]``; the centre of the atoms' bounding box is at ``n // 2``.
    voxel_size
        The spacing.

    Raises
    ------
    InputError
        If `gemmi` is not installed, the file is missing, unreadable or without atoms,
        or a number is not positive.
    """
    spacing = spacing_in_angstroms
    if spacing is None:
        spacing = _SPACING * resolution_in_angstroms
    for name, value in (("resolution", resolution_in_angstroms), ("spacing", spacing)):
        if not 0 < value < math.inf:
            raise InputError(f"The {name} must be positive, got {value:g} A")
    if size is not None and size < 1:
        raise InputError(f"The size must be at least 1 voxel, got {size}")
    points, weights = _read_atoms(path)
    low, high = points.min(axis=0), points.max(axis=0)
    half = (high - low).max() / 2 + _PADDING * resolution_in_angstroms
    n = 2 * math.ceil(half / spacing) + 1
    places = (points - (low + high) / 2) / spacing + n // 2
    sigma = _WIDTH * resolution_in_angstroms / spacing
    volume = _gaussians(places, weights / spacing**3, sigma, n)
    if size is not None:
        volume = _in_box(volume, size)
    return volume.astype(np.float32), spacing


def _read_atoms(
    path: str | Path,
) -> tuple[Float[np.ndarray, "atoms 3"], Float[np.ndarray, " atoms"]]:
    """Return the atoms' places (x, y, z) in Angstrom, and electrons by occupancy."""
    try:
        import gemmi
    except ImportError:
        raise InputError(
            "Atomic models are read by gemmi, which is not installed; "
            "pip install 'jaxrefine[experiments]' brings it."
        ) from None
    if not Path(path).is_file():
        raise InputError(
            f"The model must be a PDB or mmCIF file, got {path}: there is no such file"
        )
    try:
        structure = gemmi.read_structure(str(path))
    except (RuntimeError, ValueError) as error:
        first = str(error).splitlines()[0]
        raise InputError(
            f"The model must be a PDB or mmCIF file, got {path}: {first}"
        ) from None
    atoms = [a.atom for a in structure[0].all()] if len(structure) else []
    points = np.array([atom.pos.tolist() for atom in atoms]).reshape(-1, 3)
    weights = np.array([atom.occ * atom.element.atomic_number for atom in atoms])
    if not weights.any():
        raise InputError(f"{path} must hold atoms, it has none")
    return points, weights


def _gaussians(
    places: Float[np.ndarray, "atoms 3"],
    weights: Float[np.ndarray, " atoms"],
    sigma: float,
    n: int,
) -> Float[np.ndarray, "{n} {n} {n}"]:
    """Add Gaussians of given integrals; lengths are in voxels."""
    volume = np.zeros((n, n, n))
    reach = math.floor(_CUT * sigma)
    steps = np.arange(-reach, reach + 1)
    nearest = np.rint(places).astype(int)
    offsets = nearest[..., None] + steps - places[..., None]
    profiles = np.exp(-0.5 * (offsets / sigma) ** 2) / math.sqrt(2 * math.pi) / sigma
    for (i, j, k), (x, y, z), weight in zip(nearest, profiles, weights, strict=True):
        window = tuple(slice(c - reach, c + reach + 1) for c in (k, j, i))
        volume[window] += weight * z[:, None, None] * y[:, None] * x
    return volume


def _in_box(
    volume: Float[np.ndarray, "n n n"], size: int
) -> Float[np.ndarray, "{size} {size} {size}"]:
    """Crop or pad a volume about its origin."""
    n = volume.shape[0]
    first = size // 2 - n // 2
    kept = slice(max(first, 0), min(first + n, size))
    taken = slice(kept.start - first, kept.stop - first)
    box = np.zeros((size,) * 3)
    box[kept, kept, kept] = volume[taken, taken, taken]
    return box


def main() -> None:
    """Write the map of a model."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    option = parser.add_argument
    option("model", type=Path, help="PDB or mmCIF file")
    option("--resolution", type=float, required=True, metavar="A", help="Angstrom")
    option("--spacing", type=float, metavar="A", help="voxel (default: a third of it)")
    option("--size", type=int, metavar="N", help="crop or pad to this side, voxels")
    option("--out", type=Path, required=True, metavar="MAP.mrc", help="file to write")
    options = parser.parse_args()
    volume, voxel = molmap(
        options.model, options.resolution, options.spacing, options.size
    )
    io.write_mrc(options.out, volume, voxel)
    print(f"{options.out}: {volume.shape[0]}^3 voxels of {voxel:g} A")


if __name__ == "__main__":
    sys.exit(harness.main(main))
