"""cryoSPARC's tables of particles, converted to RELION's columns.

A ``.cs`` file is a structured array of NumPy. Its poses are rotation vectors ``v``
whose rotation ``exp(v^)`` takes the axes of the image to those of the map, so that
RELION's Euler matrix is the transpose, ``exp(-v^)``. Its shifts are RELION's origins.
(Source: the conversions of pyem and cryoDRGN, which agree.)
"""

import tokenize
import warnings
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float64

from jaxrefine.errors import InputError
from jaxrefine.geometry import Poses, rotvec_to_matrix
from jaxrefine.io.atomic import existing_file
from jaxrefine.io.clusters import SOURCE, UNKNOWN
from jaxrefine.io.columns import fixed, is_single
from jaxrefine.io.poses import pose_columns
from jaxrefine.io.star import Table

_LARGEST_HEADER = 100_000  # bytes; NumPy's default of 10_000 is too small for .cs files
_DAMAGE = (
    ValueError,
    TypeError,
    SyntaxError,
    tokenize.TokenError,
    OSError,
    MemoryError,
)
_DEGREE = np.pi / 180

# RELION's column: cryoSPARC's field, which has the same unit.
_GROUP_OPTICS = {
    "rlnVoltage": "ctf/accel_kv",
    "rlnSphericalAberration": "ctf/cs_mm",
    "rlnAmplitudeContrast": "ctf/amp_contrast",
}
# RELION's column: cryoSPARC's field, and the column's unit in units of the field.
_PARTICLE_OPTICS = {
    "rlnDefocusU": ("ctf/df1_A", 1.0),
    "rlnDefocusV": ("ctf/df2_A", 1.0),
    "rlnDefocusAngle": ("ctf/df_angle_rad", _DEGREE),
    "rlnPhaseShift": ("ctf/phase_shift_rad", _DEGREE),
    "rlnCtfBfactor": ("ctf/bfactor", 1.0),
    "rlnCtfScalefactor": ("ctf/scale", 1.0),
}
_DEFAULTS = {"ctf/phase_shift_rad": 0.0, "ctf/bfactor": 0.0, "ctf/scale": 1.0}


def read_cs(path: str | Path) -> dict[str, Table]:
    """Read a cryoSPARC table of particles as the blocks of a RELION 3.1 file.

    Images are named from ``blob/path`` and ``blob/idx``, with RELION's mark ``:mrcs``
    for a stack with another ending, as cryoSPARC's stacks have; without it RELION takes
    a ``.mrc`` file for one image. A particle whose ``location/micrograph_path`` is
    missing or empty has its stack for a micrograph. Poses are those of
    ``alignments3D``; ``rlnRandomSubset`` is ``alignments3D/split`` plus one, unless all
    particles have the same value. Both may be missing. Particles that share
    ``ctf/exp_group_id``, voltage, spherical aberration, amplitude contrast, pixel size
    and box size form an optics group. ``filament/filament_uid`` becomes
    ``rlnHelicalTubeID``, numbered from 1, and ``sym_expand/src_uid`` the column
    ``jaxrefineSource``. Images in which protein is dark (``blob/sign`` of
    -1) get a negative ``rlnCtfScalefactor``. Beam tilt, higher aberrations, 2-D
    alignments and multiple classes are ignored.

    Parameters
    ----------
    path
        The file as cryoSPARC exports it, which includes the fields of the images.

    Returns
    -------
    blocks
        ``optics`` and ``particles``.

    Raises
    ------
    InputError
        If the file is missing or damaged, if it lacks a required field or a field has
        another type, if a number is not finite in single precision or a pixel size not
        positive, or if protein is dark and there is no CTF to record it in.
    """
    path = existing_file(path)
    fields = _load(path)
    stacks = _paths(fields, "blob/path", path)
    numbers = _numbers(fields, "blob/idx", path)
    pixels = _pixel_sizes(fields, "blob/psize_A", path)
    optics, member = _optics_groups(fields, pixels, path)
    particles = {
        "rlnImageName": [
            f"{int(number) + 1:06d}@{stack}{_format(stack)}"
            for number, stack in zip(numbers, stacks, strict=True)
        ],
        "rlnMicrographName": _micrographs(fields, stacks, path),
        "rlnOpticsGroup": [str(group + 1) for group in member],
        **_poses(fields, pixels, path),
        **_ctf(fields, path),
    }
    if "alignments3D/split" in fields:
        split = _numbers(fields, "alignments3D/split", path)
        if len(np.unique(split)) > 1:  # Otherwise cryoSPARC made no half sets.
            particles["rlnRandomSubset"] = [str(int(half) + 1) for half in split]
    if "sym_expand/src_uid" in fields:
        particles[SOURCE] = _uids(fields, "sym_expand/src_uid", path)
    if "filament/filament_uid" in fields:
        # RELION's numbers of tubes have 32 bits, cryoSPARC's have 64.
        uids = _uids(fields, "filament/filament_uid", path)
        keys = [row if uid == UNKNOWN else uid for row, uid in enumerate(uids)]
        tube = {key: str(i) for i, key in enumerate(dict.fromkeys(keys), start=1)}
        particles["rlnHelicalTubeID"] = [tube[key] for key in keys]
    return {"optics": optics, "particles": particles}


def _load(path: Path) -> dict[str, np.ndarray]:
    """Return the fields of the table, each with a leading axis ``particles``."""
    try:
        with open(path, "rb") as file, warnings.catch_warnings(action="ignore"):
            table = np.lib.format.read_array(
                file, allow_pickle=False, max_header_size=_LARGEST_HEADER
            )
    except _DAMAGE:
        table = None
    if table is None or table.ndim != 1 or table.dtype.names is None:
        raise InputError(
            f"{path} must be a cryoSPARC table in NumPy's format, got another file or "
            "a damaged one"
        )
    return {name: table[name] for name in table.dtype.names}


def _field(fields: dict[str, np.ndarray], name: str, path: Path) -> np.ndarray:
    if name not in fields:
        raise InputError(
            f"{path} must have the field {name}, as tables of particles that "
            "cryoSPARC exports, got none"
        )
    return fields[name]


def _numbers(
    fields: dict[str, np.ndarray], name: str, path: Path, width: int | None = None
) -> Float64[np.ndarray, "particles ..."]:
    """Return a field with one finite number, or `width` of them, for each particle."""
    field = _field(fields, name, path)
    shape = field.shape[:1] if width is None else (len(field), width)
    if field.dtype.kind not in "iuf" or field.shape != shape:
        count = "one number" if width is None else f"{width} numbers"
        raise InputError(
            f"{path}, field {name}: there must be {count} for each particle, got "
            f"values of shape {field.shape[1:]} and type {field.dtype}"
        )
    with np.errstate(invalid="ignore"):
        numbers = field.astype(np.float64)
    if not is_single(numbers).all():
        raise InputError(
            f"{path}, field {name}: values must be finite in single precision, got "
            f"{numbers[~is_single(numbers)][0]:g}"
        )
    return numbers


def _micrographs(
    fields: dict[str, np.ndarray], stacks: list[str], path: Path
) -> list[str]:
    """Return the micrograph of each particle, or a stack in place of one.

    That is the same for all segments of a filament, which RELION looks for in one
    micrograph.
    """
    named, filaments = [""] * len(stacks), [UNKNOWN] * len(stacks)
    if "location/micrograph_path" in fields:
        named = _paths(fields, "location/micrograph_path", path)
    if "filament/filament_uid" in fields:
        filaments = _uids(fields, "filament/filament_uid", path)
    micrograph = dict(zip(filaments, stacks, strict=True))
    micrograph |= {
        uid: name for uid, name in zip(filaments, named, strict=True) if name
    }
    return [
        name or (stack if uid == UNKNOWN else micrograph[uid])
        for name, uid, stack in zip(named, filaments, stacks, strict=True)
    ]


def _format(stack: str) -> str:
    """Return what tells RELION that a file is a stack, unless its ending does."""
    return "" if stack.endswith(".mrcs") else ":mrcs"


def _uids(fields: dict[str, np.ndarray], name: str, path: Path) -> list[str]:
    """Return a field with an identity, of up to 64 bits, for each particle.

    It is unknown where the field has not been set, and is 0.
    """
    field = _field(fields, name, path)
    if field.dtype.kind not in "iu" or field.ndim != 1:
        raise InputError(
            f"{path}, field {name}: there must be one whole number for each particle, "
            f"got values of shape {field.shape[1:]} and type {field.dtype}"
        )
    return [str(uid) if uid else UNKNOWN for uid in field.tolist()]


def _pixel_sizes(
    fields: dict[str, np.ndarray], name: str, path: Path
) -> Float64[np.ndarray, " particles"]:
    sizes = _numbers(fields, name, path)
    if not (sizes > 0).all():
        raise InputError(
            f"{path}, field {name}: values must be positive, got {sizes.min():g}"
        )
    return sizes


def _paths(fields: dict[str, np.ndarray], name: str, path: Path) -> list[str]:
    """Return a field of paths relative to the project's folder.

    A leading ``>``, which cryoSPARC may write for that folder, is removed.
    """
    field = _field(fields, name, path)
    try:
        texts = np.char.decode(field, "utf-8") if field.dtype.kind == "S" else field
    except UnicodeDecodeError:
        texts = None
    if texts is None or texts.dtype.kind != "U" or texts.ndim != 1:
        raise InputError(
            f"{path}, field {name}: values must be text, got the type {field.dtype}"
        )
    if not all(text.isprintable() for text in texts.tolist()):
        raise InputError(
            f"{path}, field {name}: paths must have printable characters only, got "
            "others"
        )
    return [text.removeprefix(">") for text in texts.tolist()]


def _optics_groups(
    fields: dict[str, np.ndarray], pixels: np.ndarray, path: Path
) -> tuple[Table, np.ndarray]:
    """Return the table of optics groups, and the row of each particle's in it."""
    has_ctf = "ctf/df1_A" in fields
    optics = {
        column: _numbers(fields, name, path)
        for column, name in _GROUP_OPTICS.items()
        if has_ctf or name in fields
    }
    box = _numbers(fields, "blob/shape", path, 2)[:, 0]
    keys = [*optics.values(), pixels, box]
    if "ctf/exp_group_id" in fields:
        keys.insert(0, _numbers(fields, "ctf/exp_group_id", path))
    _, first, member = np.unique(
        np.stack(keys, axis=1), axis=0, return_index=True, return_inverse=True
    )
    count = len(first)
    table = {
        "rlnOpticsGroup": [str(group) for group in range(1, count + 1)],
        "rlnOpticsGroupName": [f"opticsGroup{group}" for group in range(1, count + 1)],
        **{column: fixed(values[first]) for column, values in optics.items()},
        "rlnImagePixelSize": fixed(pixels[first]),
        "rlnImageSize": [str(int(size)) for size in box[first]],
        "rlnImageDimensionality": ["2"] * count,
    }
    return table, member.ravel()


def _poses(fields: dict[str, np.ndarray], pixels: np.ndarray, path: Path) -> Table:
    """Return the columns of poses; none if the file has no 3-D alignments."""
    if "alignments3D/pose" not in fields:
        return {}
    vectors = _numbers(fields, "alignments3D/pose", path, 3)
    if "alignments3D/psize_A" in fields:
        pixels = _pixel_sizes(fields, "alignments3D/psize_A", path)
    shifts = -_numbers(fields, "alignments3D/shift", path, 2) * pixels[:, None]
    with jax.enable_x64(True):
        rotations = np.asarray(rotvec_to_matrix(jnp.asarray(-vectors)))
        return pose_columns(Poses(rotations, shifts), 1.0)


def _ctf(fields: dict[str, np.ndarray], path: Path) -> Table:
    """Return the columns of the CTF; none if the file has no defocus."""
    sign = np.ones(len(fields["blob/path"]))
    if "blob/sign" in fields:
        sign = np.sign(_numbers(fields, "blob/sign", path))
    if "ctf/df1_A" not in fields:
        if (sign < 0).any():
            raise InputError(
                f"{path}: protein must be bright in images without a CTF, got "
                "blob/sign -1"
            )
        return {}
    columns = {}
    for column, (name, unit) in _PARTICLE_OPTICS.items():
        if name in fields or name not in _DEFAULTS:
            columns[column] = _numbers(fields, name, path) / unit
        else:
            columns[column] = np.full_like(sign, _DEFAULTS[name])
    columns["rlnCtfScalefactor"] *= np.where(sign < 0, -1.0, 1.0)
    return {column: fixed(values) for column, values in columns.items()}
