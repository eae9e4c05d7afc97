"""Modulation transfer functions of detectors, as RELION has them in STAR files."""

from pathlib import Path

import numpy as np

from jaxrefine.errors import InputError
from jaxrefine.io.columns import numbers, require
from jaxrefine.io.star import read_star
from jaxrefine.maps.detector import ModulationTransfer

_FREQUENCY, _VALUE = "rlnResolutionInversePixel", "rlnMtfValue"
_LEAST = 1e-10  # RELION's limit


def read_mtf(path: str | Path, pixel_size_in_angstroms: float) -> ModulationTransfer:
    """Read the modulation transfer function of a detector.

    Parameters
    ----------
    path
        A STAR file with the columns ``rlnResolutionInversePixel``, in cycles per pixel
        of the detector, and ``rlnMtfValue``, as those that come with detectors.
    pixel_size_in_angstroms
        Edge of a pixel of the detector, on the scale of the specimen.

    Raises
    ------
    InputError
        If the file is missing or is not a STAR file, if it has no such columns or fewer
        than two rows, if frequencies do not increase from 0 or more, or if a value is
        not at least 1e-10.
    """
    for table in read_star(path).values():
        if _FREQUENCY in table and _VALUE in table:
            break
    else:
        raise InputError(
            f"{path} must have the columns {_FREQUENCY} and {_VALUE}, as the transfer "
            "functions of detectors for RELION, got none"
        )
    path = Path(path)
    frequencies, values = numbers(table, _FREQUENCY, path), numbers(table, _VALUE, path)
    if len(values) < 2:
        raise InputError(f"{path} must have at least two rows, got {len(values)}")
    before = np.concatenate([[-np.inf], frequencies[:-1]])
    good = (frequencies >= 0) & (frequencies > before)
    require(good, table, _FREQUENCY, path, "at least 0 and more than the one before")
    require(values >= _LEAST, table, _VALUE, path, f"at least {_LEAST:g}")
    return ModulationTransfer(frequencies, values, pixel_size_in_angstroms)
