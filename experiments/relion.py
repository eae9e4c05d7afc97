"""RELION 3.1 as a baseline: its own programs, run on the data that our methods get.

The programs run in a working folder that the caller names, with paths relative to it,
so that the folder can be moved. What they print goes to ``NAME.log`` there. The options
are those of RELION's own jobs (``pipeline_jobs.cpp`` of 3.1.3) unless an argument
changes them. The images are simulated and not normalised; maps are on their scale.

A refinement survives interruptions: ``NAME.json`` holds its options, the time spent
and its last finished iteration, from which the same call carries on.
"""

import hashlib
import re
import shutil
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, final

import numpy as np
from jaxtyping import Array, Float, Float32
from relion_program import complete, mpirun, run

from jaxrefine import io
from jaxrefine.ctf import CTF
from jaxrefine.errors import InputError
from jaxrefine.geometry import Poses
from jaxrefine.runs.provenance import available_cores

_PROGRAMS = ("mpirun",) + tuple(
    f"relion_{name}" for name in ("refine", "refine_mpi", "reconstruct", "postprocess")
)
_SETTLED_S = 1.0  # a file unchanged for so long is complete

_SHARED = "--oversampling 1 --flatten_solvent --zero_mask --dont_check_norm"
_HALVING = 2  # oversampling 1: RELION halves the steps that it is given
_COMPUTING = "--dont_combine_weights_via_disc --pool 3 --pad 2 --skip_gridding"

_NO_ESTIMATE = 999.0  # what RELION writes for a number that it does not know
_REPORTED = {
    "resolution_in_angstroms": "rlnCurrentResolution",
    "angle_accuracy_in_degrees": "rlnOverallAccuracyRotations",
    "shift_accuracy_in_angstroms": "rlnOverallAccuracyTranslationsAngst",
    "angle_change_in_degrees": "rlnChangesOptimalOrientations",
    "shift_change_in_angstroms": "rlnChangesOptimalOffsets",
}


@final
@dataclass(frozen=True)
class Refined:
    """The state of a refinement, at its end or after an iteration.

    Attributes
    ----------
    volume
        RELION's map; the mean of the half maps until the end.
    poses
        In the order of the particles' file.
    iterations, wall_s
        How many are finished, and the seconds that all calls have taken.
    finished
        Whether RELION came to its end before the time limit.
    report
        What RELION reports of the iteration: resolution, angular step and, except in
        the last iteration of `auto_refine`, estimated accuracies and changes of poses.
    half_maps
        The maps of the two halves, unregularised at the end; None where the particles
        are not halved.
    """

    volume: Float32[np.ndarray, "n n n"]
    poses: Poses
    iterations: int
    wall_s: float
    finished: bool
    report: dict[str, float]
    half_maps: tuple[np.ndarray, np.ndarray] | None = None


Callback = Callable[[Refined], None]


def available() -> bool:
    """Return whether all programs that are needed are installed."""
    return all(shutil.which(program) for program in _PROGRAMS)


def version() -> str | None:
    """Return the version of ``relion_refine``, such as 3.1.3; None without it."""
    if shutil.which("relion_refine") is None:
        return None
    command = ["relion_refine", "--version"]
    text = subprocess.run(command, capture_output=True, text=True, check=False).stdout
    match = re.search(r"version:\s*(\S+)", text)
    return match and match[1]


def write_particles(
    folder: Path,
    images: Float[Array | np.ndarray, "particles m m"],
    poses: Poses,
    pixel_size_in_angstroms: float,
) -> Path:
    """Write ``particles.star`` and ``particles.mrcs``; return the former's path.

    The images have no CTF. Raises `InputError` if a file cannot be written.
    """
    star, pixel = folder / "particles.star", pixel_size_in_angstroms
    names = [f"{i:06d}@particles.mrcs" for i in range(1, len(images) + 1)]
    io.write_stack(star.with_suffix(".mrcs"), images, pixel)
    optics = CTF(0.0, 0.0)
    io.write_new_particles(star, poses, names, images.shape[1], pixel, optics)
    return star


def reconstruct(folder: Path, star: Path) -> Float32[np.ndarray, "n n n"]:
    """Make a map from the poses of a file, by ``relion_reconstruct``.

    Raises `InputError` if the file is not in the folder, or RELION fails or takes more
    than an hour.
    """
    _open(folder, star)
    complete(folder, "reconstruct", ["--i", star.name, "--o", "reconstruct.mrc"])
    return io.read_mrc(folder / "reconstruct.mrc")[0]


def postprocess(
    folder: Path,
    half1: Float[Array | np.ndarray, "n n n"],
    half2: Float[Array | np.ndarray, "n n n"],
    mask: Float[Array | np.ndarray, "n n n"],
    voxel_size_in_angstroms: float,
) -> Float32[np.ndarray, "n n n"]:
    """Join two half maps, masked and low-passed, by ``relion_postprocess``.

    As in section IV-E, the cut-off is where the gold-standard FSC, here within the mask
    and corrected for it, falls below 0.143. RELION also weights the shells by the FSC.
    Nothing is sharpened. Raises `InputError` if a map cannot be written, or RELION
    fails or takes more than an hour.
    """
    volumes = {"half1": half1, "half2": half2, "mask": mask}
    for name, volume in volumes.items():
        io.write_mrc(folder / f"{name}.mrc", volume, voxel_size_in_angstroms)
    pixel = ["--angpix", f"{voxel_size_in_angstroms:.6f}", "--low_pass", "-1"]
    options = "--i half1.mrc --i2 half2.mrc --mask mask.mrc --o ./postprocess".split()
    complete(folder, "postprocess", [*options, *pixel])
    return io.read_mrc(folder / "postprocess_masked.mrc")[0]


def ab_initio(
    folder: Path,
    star: Path,
    *,
    diameter_in_angstroms: float,
    seed: int,
    limit_s: float,
    iterations: tuple[int, int, int] = (50, 200, 50),
    resolutions: tuple[float, float] = (35.0, 15.0),
    most_poses: int | None = None,
    callback: Callback | None = None,
) -> Refined:
    """Make a first map and poses from the images alone, by stochastic gradients.

    RELION's "3D initial model" with one class; the file's angles are not used. A
    particle's pose is from the last iteration that drew it; the final ones draw 500.
    Raises `InputError` if the file is not in the folder, the folder holds a run of
    other inputs, there is no iteration yet at the time limit, or RELION fails.

    Parameters
    ----------
    folder, star
        Working folder, and the particles in it.
    diameter_in_angstroms
        Of the soft circular mask of the images, and of the spherical one of the map.
    seed
        Of RELION's random numbers, from 0 (RELION's own, for which 0 is none, plus 1).
    limit_s
        Seconds that all calls together may take; see `Refined.finished`.
    iterations
        How many at the first resolution, between, and at the last one.
    resolutions
        These two, angstroms; not beyond Nyquist. The finer the last one, the more
        densely RELION searches, and time grows with the cube of that and more.
    most_poses
        Of the coarse grid, that are looked at more finely for a particle; None for all
        that are not negligible, which in strong noise are all.
    callback
        Called with the state that RELION writes after every ten iterations; when a run
        is carried on, first with the last one again.
    """
    data = _open(folder, star)
    pixel = data.particles.pixel_size_in_angstroms
    coarse, fine = (max(resolution, 2 * pixel) for resolution in resolutions)
    initial, between, last = iterations
    first = f"""--sgd --denovo_3dref --K 1 --sym C1 --sgd_write_iter 10
        --sgd_ini_iter {initial} --sgd_inbetween_iter {between} --sgd_fin_iter {last}
        --sgd_ini_resol {coarse:g} --sgd_fin_resol {fine:g}
        --sgd_ini_subset 100 --sgd_fin_subset 500
        --healpix_order 1 --offset_range 6 --offset_step {2 * _HALVING}
        {_SHARED} --random_seed {seed + 1}"""
    always = _always(diameter_in_angstroms, most_poses)
    program = ["relion_refine", "--j", str(available_cores())]
    job = _Job(folder, "ab_initio", data, program, first, always)
    return _refine(job, _digest(data), limit_s, callback)


def auto_refine(
    folder: Path,
    star: Path,
    reference: Float[Array | np.ndarray, "n n n"],
    *,
    diameter_in_angstroms: float,
    offset_range: float,
    offset_step: float,
    initial_low_pass_in_angstroms: float,
    seed: int,
    limit_s: float,
    healpix_order: int = 2,
    local_from_order: int = 4,
    most_poses: int | None = None,
    callback: Callback | None = None,
) -> Refined:
    """Refine the maps of two halves of the particles, and their poses.

    RELION's "3D auto-refine". It searches all orientations, whatever the angles of the
    file, unless its searches are local from the first one; the file's shifts are where
    its search for shifts begins. One process leads, and one for each half has a half of
    the cores. Raises `InputError` where `ab_initio` does.

    Parameters
    ----------
    folder, star, diameter_in_angstroms, seed, limit_s, most_poses
        As for `ab_initio`; the seed draws the halves too.
    reference
        The map to start from, on the images' scale.
    offset_range, offset_step
        Of the first search for shifts, in pixels, as RELION's window asks for them: the
        step is the finest (``--offset_step`` is the double). RELION adapts them later.
    initial_low_pass_in_angstroms
        Resolution of the reference.
    healpix_order
        Of the first angular search, whose finest step is 30 degrees over
        ``2**healpix_order``.
    local_from_order
        Order from which searches are local, within `local_range_in_degrees` of the pose
        that the last iteration found, or the file in the first iteration.
    callback
        Called after each iteration but the last one, which uses all frequencies; when a
        run is carried on, first with the last state again.
    """
    data = _open(folder, star)
    first = f"""--ref auto_refine_reference.mrc --auto_refine --split_random_halves
        --low_resol_join_halves 40 --sym C1 --norm --scale
        --ini_high {initial_low_pass_in_angstroms:g} --healpix_order {healpix_order}
        --auto_local_healpix_order {local_from_order} --offset_range {offset_range:g}
        --offset_step {_HALVING * offset_step:g} {_SHARED} --random_seed {seed + 1}"""
    always = _always(diameter_in_angstroms, most_poses)
    threads = max(1, available_cores() // 2)
    program = [*mpirun(3), "relion_refine_mpi", "--j", str(threads)]
    job = _Job(folder, "auto_refine", data, program, first, always, halves=True)
    start = np.asarray(reference, np.float32)
    if not job.state_path.exists():
        pixel = data.particles.pixel_size_in_angstroms
        io.write_mrc(folder / "auto_refine_reference.mrc", start, pixel)
    return _refine(job, _digest(data, start.tobytes()), limit_s, callback)


def local_range_in_degrees(healpix_order: int) -> float:
    """Return how far a local search of `auto_refine` goes in direction and in plane.

    Three standard deviations of its Gaussian prior, each of two of the finest steps.
    Auto-refine of 3.1 sets the prior so itself, whatever ``--sigma_ang`` says
    (``MlOptimiser::initialiseGeneral`` and ``updateAngularSampling``).
    """
    return 3 * 2 * 30 / 2**healpix_order


def _open(folder: Path, star: Path) -> io.ParticleFile:
    if star.parent.resolve() != folder.resolve():
        raise InputError(f"{star} must be in the folder that RELION runs in, {folder}")
    return io.read_particles(star)


def _always(diameter_in_angstroms: float, most_poses: int | None) -> str:
    """Return the options that a continuation must be given again."""
    options = f"{_COMPUTING} --particle_diameter {diameter_in_angstroms:g}"
    return options if most_poses is None else f"{options} --maxsig {most_poses}"


def _digest(data: io.ParticleFile, more: bytes = b"") -> str:
    """Return a digest of a table, of its images and of further bytes.

    Of the images the values count alone, since the files hold the time of writing.
    """
    digest = hashlib.sha256(data.path.read_bytes() + more)
    for path in data.stacks.values():
        digest.update(io.read_stack(path)[0].tobytes())
    return digest.hexdigest()


def poses_in_order(path: Path, order: io.ParticleFile) -> Poses:
    """Read poses in the order of another file's particles.

    RELION may sort its particles; they are identified by the names of their images.
    Raises `InputError` if the files do not hold the same particles.
    """
    particles = io.read_particles(path)
    names, ordered_names = (
        io.image_identities(file.blocks, file.path) or [] for file in (particles, order)
    )
    if sorted(names) != sorted(ordered_names):
        raise InputError(f"{path} and {order.path} must hold the same particles")
    place = {name: i for i, name in enumerate(names)}
    return particles.poses.take(np.array([place[name] for name in ordered_names]))


# --- refinements, which can be interrupted


@dataclass(frozen=True)
class _State:
    """The state of a run on disk; ``prefix`` begins the names of the last files."""

    inputs: list[str]
    wall_s: float = 0.0
    prefix: str | None = None
    iterations: int = 0
    finished: bool = False


@dataclass(frozen=True)
class _Job:
    """A refinement: the options of its start, and those of every continuation too."""

    folder: Path
    name: str
    data: io.ParticleFile
    program: list[str]
    first: str
    always: str
    halves: bool = False

    @property
    def state_path(self) -> Path:
        return self.folder / f"{self.name}.json"

    def new(self, root: str, done: int, settled_s: float) -> list[tuple[int, str]]:
        """Return the number and prefix of iterations whose files are all there.

        Files that have changed lately may still be written.
        """
        endings = ["optimiser.star", "data.star", "sampling.star"]
        for half in ("half1_", "half2_") if self.halves else ("",):
            endings += [f"{half}model.star", f"{half}class001.mrc"]
        iterations, now = [], time.time()
        for path in self.folder.glob(f"{root}_it*_optimiser.star"):
            prefix = path.name.removesuffix("_optimiser.star")
            number = int(prefix.rpartition("_it")[2])
            paths = [self.folder / f"{prefix}_{ending}" for ending in endings]
            ages = [now - path.stat().st_mtime for path in paths if path.exists()]
            if number > done and len(ages) == len(endings) and min(ages) >= settled_s:
                iterations.append((number, prefix))
        return sorted(iterations)

    def read(self, state: _State) -> Refined:
        """Return the last iteration of a run."""

        def file(name: str) -> Path:
            return self.folder / f"{state.prefix}_{name}"

        poses = poses_in_order(file("data.star"), self.data)
        split = self.halves and not state.finished
        half_maps = None
        if self.halves:
            end = "class001.mrc" if split else "class001_unfil.mrc"
            half1, half2 = (io.read_mrc(file(f"half{i}_{end}"))[0] for i in (1, 2))
            half_maps = (half1, half2)
        if split and half_maps is not None:
            volume = (half_maps[0] + half_maps[1]) / 2
        else:
            volume = io.read_mrc(file("class001.mrc"))[0]
        general: dict[str, Any] = {}
        for name in ("half1_model" if split else "model", "sampling", "optimiser"):
            if (path := file(f"{name}.star")).exists():
                general |= next(iter(io.read_star(path).values()))  # the first block
        report = {
            name: float(general[label][0])
            for name, label in _REPORTED.items()
            if label in general
        }
        report = {k: value for k, value in report.items() if value != _NO_ESTIMATE}
        report["angle_step_in_degrees"] = float(general["rlnPsiStep"][0]) / _HALVING
        done = state.iterations, state.wall_s, state.finished
        return Refined(volume, poses, *done, report, half_maps)


def _refine(
    job: _Job, digest: str, limit_s: float, callback: Callback | None
) -> Refined:
    """Carry a run on until it ends or has taken its time."""
    state = _State([*job.first.split(), *job.always.split(), digest])
    if job.state_path.exists():
        saved = _State(**io.read_json(job.state_path))
        if saved.inputs != state.inputs:
            raise InputError(
                f"{job.state_path} is of a run with other inputs; name another folder"
            )
        state = saved
    if not state.finished and state.wall_s < limit_s:
        state = _carry_on(job, state, limit_s, callback)
    if state.prefix is None:
        log = job.folder / f"{job.name}.log"
        raise InputError(f"RELION finished no iteration in {limit_s:g} s; see {log}")
    return job.read(state)


def _carry_on(
    job: _Job, state: _State, limit_s: float, callback: Callback | None
) -> _State:
    """Run RELION from the last state; keep and return the new one."""
    root = job.name
    start = ["--i", job.data.path.name, *job.first.split()]
    if state.prefix is not None:
        root = f"{job.name}_ct{state.iterations}"
        start = ["--continue", f"{state.prefix}_optimiser.star"]
    for path in job.folder.glob(f"{root}_it*"):
        path.unlink()
    begin, earlier = time.perf_counter(), state.wall_s

    def keep(**changes) -> None:
        nonlocal state
        wall_s = earlier + time.perf_counter() - begin
        state = replace(state, wall_s=wall_s, **changes)
        io.write_json(job.state_path, vars(state))

    def tell() -> None:
        if callback is not None:
            callback(job.read(state))

    def watch(settled_s: float = _SETTLED_S) -> None:
        for number, prefix in job.new(root, state.iterations, settled_s):
            keep(iterations=number, prefix=prefix)
            tell()

    command = [*job.program, *start, *job.always.split(), "--o", f"./{root}"]
    try:
        keep()
        # The last call may have been stopped before it told this.
        if state.prefix is not None:
            tell()
        if run(job.folder, job.name, command, limit_s - earlier, watch):
            watch(0.0)
            last = dict(iterations=state.iterations + 1, prefix=root)
            keep(finished=True, **(last if job.halves else {}))
    finally:
        keep()
    return state
