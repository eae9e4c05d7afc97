"""cryoSPARC's words for what RELION's tables have: fields, in groups."""

from collections.abc import Iterable
from pathlib import Path

GROUP_OPTICS = {
    "rlnVoltage": "ctf/accel_kv",
    "rlnSphericalAberration": "ctf/cs_mm",
    "rlnAmplitudeContrast": "ctf/amp_contrast",
}
"""cryoSPARC's field by RELION's column, of an optics group, in the same unit."""

PARTICLE_OPTICS = {
    "rlnDefocusU": "ctf/df1_A",
    "rlnDefocusV": "ctf/df2_A",
    "rlnDefocusAngle": "ctf/df_angle_rad",
    "rlnPhaseShift": "ctf/phase_shift_rad",
    "rlnCtfBfactor": "ctf/bfactor",
    "rlnCtfScalefactor": "ctf/scale",
}
"""cryoSPARC's field by RELION's column, of a particle."""

TILT = "ctf/tilt_A"
"""cryoSPARC's field of a coma: the sine of a beam's tilt times the aberration, in A."""

TREFOIL = "ctf/trefoil_A"
"""cryoSPARC's field of a trefoil: along x and y, in A."""

TETRAFOIL = "ctf/tetra_A"
"""cryoSPARC's field, in A, of the terms of fourth order besides C_s:
cos 2 phi, sin 2 phi, cos 4 phi, sin 4 phi."""

MAGNIFICATION = "ctf/anisomag"
"""cryoSPARC's field of RELION's magnification matrix, minus the identity."""

_FIELDS = {
    **GROUP_OPTICS,
    **dict.fromkeys(("rlnBeamTiltX", "rlnBeamTiltY"), TILT),
    "rlnOddZernike": TREFOIL,
    "rlnEvenZernike": TETRAFOIL,
    **dict.fromkeys(
        (f"rlnMagMat{i}{j}" for i in (0, 1) for j in (0, 1)), MAGNIFICATION
    ),
    **PARTICLE_OPTICS,
    "rlnImageName": "blob/path",
    "rlnImagePixelSize": "blob/psize_A",
    "rlnImageSize": "blob/shape",
    "rlnMicrographName": "location/micrograph_path",
    "rlnOpticsGroup": "ctf/exp_group_id",
    "rlnAngleRot": "alignments3D/pose",
    "rlnAngleTilt": "alignments3D/pose",
    "rlnAnglePsi": "alignments3D/pose",
    "rlnOriginXAngst": "alignments3D/shift",
    "rlnOriginYAngst": "alignments3D/shift",
    "rlnRandomSubset": "alignments3D/split",
    "rlnHelicalTubeID": "filament/filament_uid",
}


def is_cs(path: str | Path) -> bool:
    """Return whether a table is cryoSPARC's, by its name."""
    return Path(path).suffix == ".cs"


def called(column: str, path: str | Path) -> str:
    """Return what a column is called in its file, for a sentence about it.

    Parameters
    ----------
    column
        RELION's name, such as ``rlnVoltage``.
    path
        The table: for one of cryoSPARC, the answer is ``field ctf/accel_kv``.
    """
    if is_cs(path) and column in _FIELDS:
        return f"field {_FIELDS[column]}"
    return f"column {column}"


def lack_of(
    group: str, path: Path, joined: Iterable[Path] = (), lacking: Iterable[str] = ()
) -> str:
    """Return the sentence of a table without a group of fields.

    Parameters
    ----------
    group
        Such as ``ctf``.
    path
        The table.
    joined
        The passthrough files that were read with it.
    lacking
        What passthrough files beside it lack, in a sentence each.
    """
    where = "".join(f", nor in {each.name}" for each in joined)
    hint = (
        "what a job did not make is in its passthrough file (*_passthrough_*.cs), "
        "which --passthrough names"
    )
    if "passthrough" in path.name:
        hint = "this is a passthrough file, so give the table that the job has made"
    if group == "ctf":
        hint += "; --no-ctf does without"
    sentences = [f"{path} must have the fields {group}/..., got none{where}", *lacking]
    return "; ".join([*sentences, hint])
