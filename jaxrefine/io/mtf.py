"""Modulation transfer functions of detectors, as RELION has them in STAR files."""

from pathlib import Path

import numpy as np

from jaxrefine.errors import InputError
from jaxrefine.io.columns import numbers, require
from jaxrefine.io.star import read_star
from jaxrefine.maps.detector import ModulationTransfer

_FREQUENCY, _VALUE = "rlnResolutionInversePixel", "rlnMtfValue"
_LEAST, _LARGEST = 1e-10, 1.5  # RELION takes less than the first for 0


def read_mtf(path: str | Path, pixel_size_in_angstroms: float) -> ModulationTransfer:
    """Read the modulation transfer function of a detector.

    Parameters
    ----------
    path
        A STAR file with the columns ``rlnResolutionInversePixel``, in cycles per pixel
        of the detector, and ``rlnMtfValue``, as those that come with detectors.
    pixel_size_in_angstroms
        Edge of a physical pixel of the detector, on the scale of the specimen: that of
        raw micrographs, before binning and not of super-resolution.

    Raises
    ------
    InputError
        If the file is missing or is not a STAR file, if it lacks a column or has fewer
        than two rows, if frequencies do not increase from 0 or more, or if a value is
        more than 1.5 or is 0, as which RELION takes less than 1e-10. Percentages are
        thus refused: the transfer is 1 at frequency 0.
    """
    path = Path(path)
    tables = read_star(path).values()
    table = max(
        tables, key=lambda each: (_FREQUENCY in each) + (_VALUE in each), default={}
    )
    missing = [name for name in (_FREQUENCY, _VALUE) if name not in table]
    if missing:
        raise InputError(
            f"{path} must have the columns {_FREQUENCY} and {_VALUE}, as the transfer "
            f"functions of detectors for RELION, got none named {' or '.join(missing)}"
        )
    frequencies, values = numbers(table, _FREQUENCY, path), numbers(table, _VALUE, path)
    if len(values) < 2:
        raise InputError(f"{path} must have at least two rows, got {len(values)}")
    before = np.concatenate([[-np.inf], frequencies[:-1]])
    good = (frequencies >= 0) & (frequencies > before)
    require(good, table, _FREQUENCY, path, "at least 0 and more than the one before")
    good = (values >= _LEAST) & (values <= _LARGEST)
    range_of_values = f"above 0 and at most {_LARGEST} (it is 1 at frequency 0)"
    require(good, table, _VALUE, path, range_of_values)
    return ModulationTransfer(frequencies, values, pixel_size_in_angstroms)
