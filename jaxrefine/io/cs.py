"""cryoSPARC's tables of particles, converted to RELION's columns.

A ``.cs`` file is a structured array of NumPy. The fields of a job's particles are in
two such files: what the job has made, and in a *passthrough* file what it was given.
Fields are in groups, ``blob/``, ``ctf/``, ``alignments3D/``; rows of the two files are
those of one particle if they have the same ``uid``.

Poses are rotation vectors ``v`` whose rotation ``exp(v^)`` takes the axes of the image
to those of the map, so that RELION's Euler matrix is the transpose, ``exp(-v^)``.
Shifts are RELION's origins. (Source: the conversions of pyem and cryoDRGN, which
agree.)
"""

import os
import re
import textwrap
import tokenize
import warnings
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NoReturn, final

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float64, Int64, UInt64

from jaxrefine.ctf import electron_wavelength
from jaxrefine.errors import InputError
from jaxrefine.geometry import Poses, rotvec_to_matrix
from jaxrefine.io.atomic import existing_file, reading
from jaxrefine.io.clusters import SOURCE, UNKNOWN
from jaxrefine.io.columns import fixed, is_single
from jaxrefine.io.fields import (
    GROUP_OPTICS,
    MAGNIFICATION,
    PARTICLE_OPTICS,
    TETRAFOIL,
    TILT,
    TREFOIL,
    lack_of,
)
from jaxrefine.io.poses import pose_columns
from jaxrefine.io.star import Table

_LARGEST_HEADER = 2**32  # bytes: what NumPy's format can hold
_LARGEST_WHOLE = 2**31 - 1
_DAMAGE = (
    ValueError,
    TypeError,
    SyntaxError,
    tokenize.TokenError,
    RecursionError,
    MemoryError,
    OverflowError,
)
_NUMPY, _CSDAT = b"\x93NUMPY", b"\x94CSDAT"  # how files of the two formats begin
_DEGREE = np.pi / 180
_UNITS = {"rlnDefocusAngle": _DEGREE, "rlnPhaseShift": _DEGREE}  # of the columns
_DEFAULTS = {"rlnPhaseShift": 0.0, "rlnCtfBfactor": 0.0, "rlnCtfScalefactor": 1.0}
_OPTICS = {*GROUP_OPTICS.values(), *PARTICLE_OPTICS.values()}
_REQUIRED_OPTICS = _OPTICS - {PARTICLE_OPTICS[column] for column in _DEFAULTS}
_EXPOSURE_GROUP = "ctf/exp_group_id"
_ABERRATION = GROUP_OPTICS["rlnSphericalAberration"]
_ANGSTROMS_PER_MILLIMETRE = 1e7
# Fields of aberrations that need the optics, and how many numbers each has.
_WITH_OPTICS = {TILT: 2, TREFOIL: 2, TETRAFOIL: 4}
# RELION has no column for it, and programs that read it do not agree on its sign.
_SHIFT = "ctf/shift_A"
_POSES, _OF_CLASSES = "alignments3D", "alignments3D_multi"
_OF_CLASS = re.compile(r"alignments_class_(\d{1,9})/")
# Fields of a pose, and the shape of each; the last two may be missing.
_POSE_FIELDS = {"pose": (3,), "shift": (2,), "class_posterior": (), "class": ()}
_SHARED_FIELDS = ("psize_A", "split")
_NO_UTF8 = re.compile("[\udc80-\udcff]")
_JOB = re.compile(r"(?<![A-Za-z0-9])J\d+(?![A-Za-z0-9])")
_METAFILE = re.compile(r"""metafile['"]?\s*:\s*['"]?>?([^'"\s,}]+\.cs)\b""")


@final
@dataclass(frozen=True)
class TableFile:
    """The tables of a file of particles, and where they were found.

    Attributes
    ----------
    blocks
        The tables, those of cryoSPARC in RELION's columns.
    joined
        The groups of fields that were taken from each passthrough file.
    classes
        The number of particles in each class of the file, if there are several or one
        was chosen; else empty.
    passed_over
        What is wrong with each passthrough file that could not be read, and that was
        not needed.
    lacking
        What passthrough files beside the table lack that hold some of its particles.
    ignored
        Fields of optics that are in no column of RELION's, and that are not zero.
    """

    blocks: dict[str, Table] = field(repr=False)
    joined: dict[Path, tuple[str, ...]] = field(default_factory=dict)
    classes: dict[int, int] = field(default_factory=dict)
    passed_over: tuple[str, ...] = ()
    ignored: tuple[str, ...] = ()
    lacking: tuple[str, ...] = ()


def read_cs(
    path: str | Path,
    passthrough: str | Path | None = None,
    class_number: int | None = None,
    *,
    with_ctf: bool = True,
) -> TableFile:
    """Read a cryoSPARC table of particles as the blocks of a RELION 3.1 file.

    Images are named from ``blob/path`` and ``blob/idx``, with RELION's mark ``:mrcs``
    for a stack with another ending, as cryoSPARC's stacks have; without it RELION takes
    a ``.mrc`` file for one image. A particle whose ``location/micrograph_path`` is
    missing or empty has its stack for a micrograph. Poses are those of
    ``alignments3D``; ``rlnRandomSubset`` is ``alignments3D/split`` plus one, unless all
    particles have the same value. Both may be missing, as may the optics of ``ctf``.
    Particles that share ``ctf/exp_group_id``, voltage, spherical aberration, amplitude
    contrast, aberrations, pixel size and box size form an optics group.
    The beam tilt is the angle whose sine is ``ctf/tilt_A`` over the spherical
    aberration, and RELION's magnification matrix the identity plus ``ctf/anisomag``, as
    in pyem and in specter. ``ctf/trefoil_A`` and ``ctf/tetra_A`` become Zernike
    coefficients, by the equations of the page "Coming from cryoSPARC" of the
    documentation. All three need the optics. ``filament/filament_uid``
    becomes ``rlnHelicalTubeID``, numbered from 1. ``sym_expand/src_uid``, or ``uid``
    where that is not known, becomes the column ``jaxrefineSource`` if rows have one in
    common or are copies. Images in which protein is dark (``blob/sign`` of -1) get a
    negative ``rlnCtfScalefactor``. ``ctf/shift_A`` and 2-D alignments are ignored. Of
    ``ctf``, what is ignored and not zero is named in `TableFile.ignored`.

    Without ``alignments3D``, each particle has the pose of its most probable class
    (``alignments3D_multi``, or ``alignments_class_0``, ``alignments_class_1``, ...),
    and ``rlnClassNumber`` is the number of that class plus one.

    Groups of fields that the table does not have are taken from its passthrough file,
    whose rows are found by ``uid``. Poses of all kinds are one group.

    Parameters
    ----------
    path
        The file.
    passthrough
        The passthrough file. By default, these are the files ``*passthrough*.cs``
        beside the table that hold all of its particles, unless they are named after
        another job (``J22``).
    class_number
        Keep only the particles of this class, counted from 0 as in cryoSPARC. A
        particle is of its most probable class, or of the one in ``alignments3D/class``.
    with_ctf
        Whether the optics are used. If not, and if they or the aberrations cannot be
        read, they are left out.

    Raises
    ------
    InputError
        If a file is missing, damaged or of another kind, if a particle is not in the
        passthrough file or several such files disagree, if a required field is in none
        of them or has another type, if a number is not finite in single precision or a
        pixel size not positive, or if no particle is of the class.
    """
    path = existing_file(path)
    table = _Fields(path, _load(path))
    if passthrough is None:
        others, passed_over, lacking = _beside(table)
    else:
        others = [_given(table, existing_file(passthrough))]
        passed_over = lacking = ()
    table = replace(_join(table, others), lacking=lacking)
    table.require_group("blob")
    table, classes = _of_class(table, class_number)
    given = table
    if not with_ctf:
        table = _without_bad_optics(table)
    stacks, pixels = table.paths("blob/path"), table.positive("blob/psize_A")
    if not all(stacks):
        raise InputError(
            f"{path}, field blob/path: paths must be text, got an empty one"
        )
    optics, member = _optics_groups(table, pixels)
    particles = {
        "rlnImageName": [
            f"{index + 1:06d}@{stack}{_format(stack)}"
            for index, stack in zip(table.whole("blob/idx"), stacks, strict=True)
        ],
        "rlnMicrographName": _micrographs(table, stacks),
        "rlnOpticsGroup": [str(group + 1) for group in member],
        **_poses(table, pixels),
        **_ctf(table),
    }
    if classes:
        chosen = table.whole(f"{_POSES}/class")
        particles["rlnClassNumber"] = [str(each + 1) for each in chosen]
    if f"{_POSES}/split" in table:
        split = table.values(f"{_POSES}/split")
        if len(np.unique(split)) > 1:  # Otherwise cryoSPARC made no half sets.
            # Whether these are halves matters only where halves are used.
            particles["rlnRandomSubset"] = [f"{half + 1:.15g}" for half in split]
    particles |= _sources(table)
    if "filament/filament_uid" in table:
        # RELION's numbers of tubes have 32 bits, cryoSPARC's have 64.
        tubes = _filaments(table)
        number = {tube: str(i) for i, tube in enumerate(dict.fromkeys(tubes), start=1)}
        particles["rlnHelicalTubeID"] = [number[tube] for tube in tubes]
    blocks = {"optics": optics, "particles": particles}
    ignored = _not_converted(given, table)
    return TableFile(blocks, table.joined, classes, passed_over, ignored, lacking)


def refuse_group_file(path: str | Path) -> NoReturn:
    """Refuse a ``.csg`` file, which lists tables, and name those.

    Raises
    ------
    InputError
        In any case.
    """
    path = existing_file(path)
    with reading(path):
        text = path.read_text(encoding="utf-8", errors="replace")
    listed = dict.fromkeys(_METAFILE.findall(text))
    tables = [name for name in listed if "passthrough" not in name]
    passed = [f"--passthrough {name}" for name in listed if name not in tables]
    words = textwrap.shorten(" ".join(tables + passed), 200)
    raise InputError(
        f"{path} must be a table of particles, got a list of such tables; give the .cs "
        f"file that it names{f': {words}' if listed else ''}"
    )


@final
@dataclass(frozen=True)
class _Fields:
    """The fields of a table, each with a leading axis ``particles``."""

    path: Path
    arrays: dict[str, np.ndarray]
    joined: dict[Path, tuple[str, ...]] = field(default_factory=dict)
    lacking: tuple[str, ...] = ()

    def __contains__(self, name: str) -> bool:
        return name in self.arrays

    def __len__(self) -> int:
        return len(next(iter(self.arrays.values()), ()))

    @property
    def groups(self) -> set[str]:
        """The groups of fields."""
        return {_group(name) for name in self.arrays if "/" in name}

    def identities(self, name: str) -> UInt64[np.ndarray, " particles"]:
        """Return a field with a whole number of up to 64 bits for each particle."""
        uids = self.get(name)
        if uids.dtype.kind not in "iu" or uids.ndim != 1:
            raise InputError(
                f"{self.path}, field {name}: there must be one whole number for each "
                f"particle, got values of shape {uids.shape[1:]} and type {uids.dtype}"
            )
        return uids.astype(np.uint64)

    def require_group(self, group: str) -> None:
        """Raise if there is no field of a group."""
        if group not in self.groups:
            raise InputError(lack_of(group, self.path, self.joined, self.lacking))

    def get(self, name: str) -> np.ndarray:
        """Return a field that must be there."""
        if name not in self:
            raise InputError(
                f"{self.path} must have the field {name}, as tables of particles that "
                "cryoSPARC exports, got none"
            )
        return self.arrays[name]

    def values(self, name: str, *shape: int) -> Float64[np.ndarray, "particles ..."]:
        """Return a field with a number, or an array of them, for each particle."""
        field = self.get(name)
        if field.dtype.kind not in "iuf" or field.shape[1:] != shape:
            count = " x ".join(map(str, shape))
            expected = f"{count} numbers" if shape else "one number"
            raise InputError(
                f"{self.path}, field {name}: there must be {expected} for each "
                f"particle, got values of shape {field.shape[1:]} and type "
                f"{field.dtype}"
            )
        with np.errstate(invalid="ignore", over="ignore"):
            return field.astype(np.float64)

    def numbers(self, name: str, *shape: int) -> Float64[np.ndarray, "particles ..."]:
        """Return a field with a finite number, or an array, for each particle."""
        numbers = self.values(name, *shape)
        good = is_single(numbers)
        if not good.all():
            raise InputError(
                f"{self.path}, field {name}: values must be finite in single "
                f"precision, got {numbers[~good][0]:g}"
            )
        return numbers

    def has_numbers(self, name: str, *shape: int) -> bool:
        """Return whether `numbers` returns a field, and does not refuse it."""
        try:
            self.numbers(name, *shape)
        except InputError:
            return False
        return True

    def positive(self, name: str) -> Float64[np.ndarray, " particles"]:
        """Return a field with a positive number for each particle."""
        numbers = self.numbers(name)
        if not (numbers > 0).all():
            raise InputError(
                f"{self.path}, field {name}: values must be positive, got "
                f"{numbers.min():g}"
            )
        return numbers

    def whole(self, name: str) -> list[int]:
        """Return a field with a whole number from 0 for each particle."""
        numbers = self.numbers(name)
        good = (numbers == np.rint(numbers)) & (numbers >= 0)
        good &= numbers <= _LARGEST_WHOLE
        if not good.all():
            raise InputError(
                f"{self.path}, field {name}: values must be whole numbers from 0 to "
                f"{_LARGEST_WHOLE}, got {numbers[~good][0]:g}"
            )
        return numbers.astype(np.int64).tolist()

    def paths(self, name: str) -> list[str]:
        """Return a field of paths relative to the project's folder.

        A leading ``>``, which cryoSPARC may write for that folder, is removed. Bytes
        that are not UTF-8 are kept (``surrogateescape``), as in STAR files.
        """
        texts = field = self.get(name)
        if field.dtype.kind == "S":
            texts = np.char.decode(field, "utf-8", "surrogateescape")
        if texts.dtype.kind != "U" or texts.ndim != 1:
            raise InputError(
                f"{self.path}, field {name}: values must be text, got the type "
                f"{field.dtype}"
            )
        if not _NO_UTF8.sub("", "".join(texts.tolist())).isprintable():
            raise InputError(
                f"{self.path}, field {name}: paths must have printable characters "
                "only, got others"
            )
        return [text.removeprefix(">") for text in texts.tolist()]

    def take(self, rows: Int64[np.ndarray, " chosen"]) -> "_Fields":
        """Return the fields of some particles."""
        arrays = {name: array[rows] for name, array in self.arrays.items()}
        return replace(self, arrays=arrays)


def _load(path: Path) -> dict[str, np.ndarray]:
    with reading(path), open(path, "rb") as file:
        start = file.read(len(_NUMPY))
        file.seek(0)
        try:
            with warnings.catch_warnings(action="ignore"):
                table = np.lib.format.read_array(
                    file, allow_pickle=False, max_header_size=_LARGEST_HEADER
                )
        except _DAMAGE:
            table = None
    if table is None or table.ndim != 1 or table.dtype.names is None:
        received = "another file"
        if start == _CSDAT:
            received = "one in the format CSDAT, which cryosparc-tools can convert"
        elif start == _NUMPY:
            received = "another array" if table is not None else "a damaged one"
        raise InputError(
            f"{path} must be a cryoSPARC table in NumPy's format, got {received}"
        )
    return {name: table[name] for name in table.dtype.names}


def _group(name: str) -> str:
    """Return the group of a field; all kinds of poses are one."""
    group = name.partition("/")[0]
    return _POSES if group == _OF_CLASSES or _OF_CLASS.match(name) else group


def _given(table: _Fields, path: Path) -> _Fields:
    """Read a passthrough file, in the order of a table's particles."""
    other = _Fields(path, _load(path))
    rows = _places(table, other)
    missing = int((rows < 0).sum())
    if missing:
        raise InputError(
            f"{path} must have the uid of every particle of {table.path}, got "
            f"{missing} of {len(rows)} missing"
        )
    return other.take(rows)


def _beside(
    table: _Fields,
) -> tuple[list[_Fields], tuple[str, ...], tuple[str, ...]]:
    """Read the passthrough files beside a table that hold all of its particles.

    A file that cannot be read is passed over if the table has what is needed by itself;
    what is wrong with it is returned, too, and what those lack that hold some.
    """
    found, passed_over, lacking, job = [], [], [], _job(table.path)
    if "uid" not in table:
        return found, (), ()
    for path in sorted(table.path.parent.glob("*passthrough*.cs")):
        is_other_job = job and _job(path) and _job(path) != job
        if is_other_job or os.path.realpath(path) == os.path.realpath(table.path):
            continue
        try:
            other = _Fields(path, _load(existing_file(path)))
            rows = _places(table, other)
        except InputError as error:
            if table.groups >= {"blob", "ctf", _POSES}:
                passed_over.append(str(error))
                continue
            raise
        missing = int(np.sum(rows < 0))
        if not missing:
            found.append(other.take(rows))
        elif missing < len(rows):
            lacking.append(
                f"{path.name} beside it lacks {missing} of its {len(rows)} particles"
            )
    return found, tuple(passed_over), tuple(lacking)


def _job(path: Path) -> str | None:
    """Return the job that a file or its folder is named after, if any."""
    for name in (path.stem, Path(os.path.abspath(path)).parent.name):
        match = _JOB.search(name)
        if match:
            return match[0]
    return None


def _places(table: _Fields, other: _Fields) -> Int64[np.ndarray, " particles"]:
    """Return the row of each of a table's particles in another table; -1 for none."""
    uids, others = table.identities("uid"), other.identities("uid")
    order = np.argsort(others, kind="stable")
    first = np.searchsorted(others, uids, "left", order)
    count = np.searchsorted(others, uids, "right", order) - first
    if (count > 1).any():
        raise InputError(
            f"{other.path} must have each uid once, got {uids[np.argmax(count)]} "
            f"{count.max()} times"
        )
    places = np.full(len(uids), -1)
    places[count == 1] = order[first[count == 1]]
    return places


def _join(table: _Fields, others: list[_Fields]) -> _Fields:
    """Return a table with the groups of fields that only the others have.

    The others have the rows of the table's particles.
    """
    arrays, source = dict(table.arrays), {}
    for other in others:
        for group in sorted(other.groups - table.groups):
            fields = {
                name: array
                for name, array in other.arrays.items()
                if _group(name) == group
            }
            first = source.setdefault(group, other.path)
            if first is other.path:
                arrays |= fields
            elif any(_differ(arrays.get(name), each) for name, each in fields.items()):
                raise InputError(
                    f"passthrough files of {table.path} must agree, got different "
                    f"fields {group}/... in {first.name} and {other.path.name}; "
                    "--passthrough names the right one"
                )
    joined = {
        other.path: tuple(g for g, path in source.items() if path is other.path)
        for other in others
    }
    return replace(table, arrays=arrays, joined=joined)


def _differ(first: np.ndarray | None, second: np.ndarray) -> bool:
    return first is None or first.tobytes() != second.tobytes()


def _of_class(
    table: _Fields, class_number: int | None
) -> tuple[_Fields, dict[int, int]]:
    """Return a table of one pose for each particle, and the sizes of its classes.

    Parameters
    ----------
    table
        A table with poses of any kind, or without.
    class_number
        The class to keep; None for all of them.
    """
    of_classes = {}
    if not any(name.startswith(f"{_POSES}/") for name in table.arrays):
        of_classes = _poses_of_classes(table)
    class_count = 1
    if of_classes:
        posterior = of_classes["class_posterior"]
        class_count, rows = posterior.shape[1], np.arange(len(posterior))
        if not class_count:
            raise InputError(
                f"{table.path}, field {_OF_CLASSES}/pose: there must be poses of at "
                "least one class, got none"
            )
        best = posterior.argmax(axis=1)
        chosen = {
            f"{_POSES}/{name}": values[rows, best]
            for name, values in of_classes.items()
        }
        table = replace(table, arrays=table.arrays | chosen)
    if class_count == 1 and class_number is None:
        return table, {}
    table.require_group(_POSES)
    number = np.array(table.whole(f"{_POSES}/class"), np.int64)
    sizes = dict(zip(*(x.tolist() for x in np.unique_counts(number)), strict=True))
    if class_number is None:
        return table, sizes
    if class_number not in sizes:
        raise InputError(
            f"the class of {table.path} must be one that has particles, "
            f"{', '.join(map(str, sizes))}, got {class_number}"
        )
    return table.take(np.flatnonzero(number == class_number)), sizes


def _poses_of_classes(table: _Fields) -> dict[str, np.ndarray]:
    """Return the fields of poses in classes, with the axes ``particles, classes``.

    None are returned if the table has no such poses.
    """
    if any(name.startswith(f"{_OF_CLASSES}/") for name in table.arrays):
        classes = table.get(f"{_OF_CLASSES}/pose").shape[1:2]
        fields = {
            name: table.numbers(f"{_OF_CLASSES}/{name}", *classes, *shape)
            for name, shape in _POSE_FIELDS.items()
        }
        for name in _SHARED_FIELDS:
            if f"{_OF_CLASSES}/{name}" in table:
                values = table.values(f"{_OF_CLASSES}/{name}")
                fields[name] = np.repeat(values[:, None], classes[0], axis=1)
        return fields
    numbers = sorted({int(m[1]) for m in map(_OF_CLASS.match, table.arrays) if m})
    groups = [f"alignments_class_{number}" for number in numbers]
    fields = {}
    for name, shape in _POSE_FIELDS.items() if groups else ():
        columns = [table.numbers(f"{group}/{name}", *shape) for group in groups]
        fields[name] = np.stack(columns, axis=1)
    for name in _SHARED_FIELDS:
        if groups and f"{groups[0]}/{name}" in table:
            columns = [table.values(f"{group}/{name}") for group in groups]
            fields[name] = np.stack(columns, axis=1)
    return fields


def _micrographs(table: _Fields, stacks: list[str]) -> list[str]:
    """Return the micrograph of each particle, or a stack in place of one.

    That is the same for all segments of a filament, which RELION looks for in one
    micrograph.
    """
    named = [""] * len(stacks)
    if "location/micrograph_path" in table:
        named = table.paths("location/micrograph_path")
    filaments = _filaments(table)
    micrograph = dict(zip(filaments, stacks, strict=True))
    micrograph |= {
        filament: name for filament, name in zip(filaments, named, strict=True) if name
    }
    return [
        name or micrograph[filament]
        for name, filament in zip(named, filaments, strict=True)
    ]


def _filaments(table: _Fields) -> list[tuple[int, int]]:
    """Return what is equal for segments of one filament, and for them alone.

    A particle whose filament is not known, and 0, is one by itself.
    """
    uids = [0] * len(table)
    if "filament/filament_uid" in table:
        uids = table.identities("filament/filament_uid").tolist()
    return [(uid, 0 if uid else row) for row, uid in enumerate(uids)]


def _sources(table: _Fields) -> Table:
    """Return the column of the particles that rows are of, if rows may share one.

    That is the particle that a row is a copy of, or else its own.
    """
    sources = own = np.zeros(len(table), np.uint64)
    if "sym_expand/src_uid" in table:
        sources = table.identities("sym_expand/src_uid")
    if "uid" in table:
        own = table.identities("uid")
    if len(np.unique(own)) == 1:  # nobody has numbered the particles
        own = np.zeros_like(own)
    if not sources.any() and len(np.unique(own[own > 0])) == np.sum(own > 0):
        return {}
    uids = np.where(sources > 0, sources, own).tolist()
    return {SOURCE: [str(uid) if uid else UNKNOWN for uid in uids]}


def _format(stack: str) -> str:
    """Return what tells RELION that a file is a stack, unless its ending does."""
    return "" if stack.endswith(".mrcs") else ":mrcs"


def _without_bad_optics(table: _Fields) -> _Fields:
    """Return a table without its optics, if they are incomplete or not finite.

    Nor has it aberrations that are not finite, or cannot be converted.
    """
    used = (_OPTICS | {_EXPOSURE_GROUP}) & table.arrays.keys()
    bad = {name for name in used if not table.has_numbers(name)}
    bad |= {
        name
        for name, count in _WITH_OPTICS.items()
        if name in table and not table.has_numbers(name, count)
    }
    if bad & _OPTICS or not used >= _REQUIRED_OPTICS:
        bad |= _OPTICS
    elif (table.numbers(GROUP_OPTICS["rlnVoltage"]) <= 0).any():
        bad |= {TREFOIL, TETRAFOIL}
    kept = {name: array for name, array in table.arrays.items() if name not in bad}
    return replace(table, arrays=kept)


def _optics_groups(table: _Fields, pixels: np.ndarray) -> tuple[Table, np.ndarray]:
    """Return the table of optics groups, and the row of each particle's in it."""
    optics = {}
    if _has_optics(table):
        optics = {column: table.numbers(name) for column, name in GROUP_OPTICS.items()}
        optics |= _beam_tilt(table)
    optics |= _magnification(table)
    terms = _zernike_terms(table) if _has_optics(table) else {}
    box = table.numbers("blob/shape", 2)[:, 0]
    keys = [*optics.values(), *terms.values(), pixels, box]
    if _EXPOSURE_GROUP in table:
        keys.insert(0, table.numbers(_EXPOSURE_GROUP))
    _, first, member = np.unique(
        np.column_stack(keys), axis=0, return_index=True, return_inverse=True
    )
    count = len(first)
    optics_table = {
        "rlnOpticsGroup": [str(group) for group in range(1, count + 1)],
        "rlnOpticsGroupName": [f"opticsGroup{group}" for group in range(1, count + 1)],
        **{column: fixed(values[first]) for column, values in optics.items()},
        **{
            column: [f"[{','.join(fixed(row))}]" for row in values[first]]
            for column, values in terms.items()
        },
        "rlnImagePixelSize": fixed(pixels[first]),
        "rlnImageSize": [str(int(size)) for size in box[first]],
        "rlnImageDimensionality": ["2"] * count,
    }
    return optics_table, member.ravel()


def _beam_tilt(table: _Fields) -> dict[str, np.ndarray]:
    """Return the columns of the beam's tilt, in milliradians; none if it is zero.

    There is none either where the spherical aberration is too small for one.
    """
    sine = _sine_of_tilt(table)
    if sine is None or not sine.any() or np.abs(sine).max() >= 1:
        return {}
    tilt = 1e3 * np.arcsin(sine)
    return {"rlnBeamTiltX": tilt[:, 0], "rlnBeamTiltY": tilt[:, 1]}


def _sine_of_tilt(table: _Fields) -> np.ndarray | None:
    """Return the sines of the beam's tilt, infinite without spherical aberration."""
    if TILT not in table:
        return None
    length = table.numbers(TILT, 2)
    aberration = _ANGSTROMS_PER_MILLIMETRE * table.numbers(_ABERRATION)[:, None]
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(length == 0, 0.0, length / aberration)


def _magnification(table: _Fields) -> dict[str, np.ndarray]:
    """Return the columns of the magnification matrix; none if it is the identity."""
    if MAGNIFICATION not in table:
        return {}
    difference = table.numbers(MAGNIFICATION, 4)
    if not difference.any():
        return {}
    matrix = difference + np.eye(2).ravel()
    return {f"rlnMagMat{i}{j}": matrix[:, 2 * i + j] for i in (0, 1) for j in (0, 1)}


def _zernike_terms(
    table: _Fields,
) -> dict[str, Float64[np.ndarray, "particles _"]]:
    r"""Return the coefficients of trefoil and of fourth order; none if all are zero.

    At the frequency :math:`\omega = k (\cos\phi, \sin\phi)`, cryoSPARC's lengths, in
    angstroms, are those of the wave aberration as correctors of aberrations have it.
    With ``tilt_A`` :math:`b`, ``trefoil_A`` :math:`t`, ``tetra_A``
    :math:`(s_1, s_2, a_1, a_2)` and the spherical aberration, the phases are

    .. math:: \chi = -2\pi \lambda^2 k^3 \bigl(b_1 \cos\phi + b_2 \sin\phi
       + \tfrac13 (t_1 \cos 3\phi + t_2 \sin 3\phi)\bigr),

    .. math:: \gamma = \tfrac{\pi}{2} \lambda^3 k^4 \bigl(C_s
       + 4 (s_1 \cos 2\phi + s_2 \sin 2\phi)
       + a_1 \cos 4\phi + a_2 \sin 4\phi\bigr).

    (Source: specter, which derives the factors and the axes from cryoSPARC's own code.
    The sign of trefoil is that of the beam's tilt, for which pyem has RELION's.)
    """
    trefoil, fourth = _lengths(table, TREFOIL), _lengths(table, TETRAFOIL)
    if not trefoil.any() and not fourth.any():
        return {}
    with jax.enable_x64(True):
        voltage = jnp.asarray(table.positive(GROUP_OPTICS["rlnVoltage"]))
        wavelength = np.asarray(jax.vmap(electron_wavelength)(voltage))
    cos3, sin3 = -2 * np.pi / 3 * wavelength**2 * trefoil.T
    cos2, sin2, cos4, sin4 = np.pi / 2 * wavelength**3 * fourth.T
    terms, none = {}, np.zeros(len(table))
    if trefoil.any():
        odd = [none, none, sin3, none, none, cos3]
        terms["rlnOddZernike"] = np.stack(odd, axis=1)
    if fourth.any():  # 4 k^4 cos(2 phi) = Z_4^2 + 3 Z_2^2
        even = [none, 3 * sin2, none, 3 * cos2, sin4, sin2, none, cos2, cos4]
        terms["rlnEvenZernike"] = np.stack(even, axis=1)
    return terms


def _lengths(table: _Fields, name: str) -> np.ndarray:
    """Return a field of aberrations; zeros if it is missing."""
    count = _WITH_OPTICS[name]
    if name not in table:
        return np.zeros((len(table), count))
    return table.numbers(name, count)


def _not_converted(given: _Fields, kept: _Fields) -> tuple[str, ...]:
    """Return the fields that have an effect, and are in no column of RELION's.

    Parameters
    ----------
    given
        The table as it was read.
    kept
        That without the fields that are left out.
    """
    names = [*_WITH_OPTICS, _SHIFT]
    if _has_optics(kept):
        names = [name for name in names if name not in kept or name == _SHIFT]
        if TILT in kept and not _beam_tilt(kept):
            names.insert(0, TILT)
    return tuple(name for name in names if name in given and given.arrays[name].any())


def _poses(table: _Fields, pixels: np.ndarray) -> Table:
    """Return the columns of poses; none if the file has no 3-D alignments."""
    if _POSES not in table.groups:
        return {}
    vectors = table.numbers(f"{_POSES}/pose", 3)
    if f"{_POSES}/psize_A" in table:
        pixels = table.positive(f"{_POSES}/psize_A")
    shifts = -table.numbers(f"{_POSES}/shift", 2) * pixels[:, None]
    with jax.enable_x64(True):
        rotations = np.asarray(rotvec_to_matrix(jnp.asarray(-vectors)))
        return pose_columns(Poses(rotations, shifts), 1.0)


def _has_optics(table: _Fields) -> bool:
    return not _OPTICS.isdisjoint(table.arrays)


def _ctf(table: _Fields) -> Table:
    """Return the columns of the CTF; at most the sign of the images without optics."""
    sign = np.ones(len(table))
    if "blob/sign" in table:
        sign = np.where(table.numbers("blob/sign") < 0, -1.0, 1.0)
    if not _has_optics(table):
        return {"rlnCtfScalefactor": fixed(sign)} if (sign < 0).any() else {}
    columns = {}
    for column, name in PARTICLE_OPTICS.items():
        if name in table or column not in _DEFAULTS:
            columns[column] = table.numbers(name) / _UNITS.get(column, 1.0)
        else:
            columns[column] = np.full_like(sign, _DEFAULTS[column])
    columns["rlnCtfScalefactor"] *= sign
    return {column: fixed(values) for column, values in columns.items()}
