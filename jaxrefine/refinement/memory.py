r"""How much memory a refinement will need, and what to do when there is too little.

The estimate counts the arrays that :mod:`jaxrefine.refinement.loop` holds at once, in
the stage that needs most of them:

- the *pose update* holds a batch of images, and what one block of particles takes on
  each device, whatever the number of particles;
- *sums over images* are made by several threads: each has a sum of its own and some
  that wait for others (few, of few images), finufft's grid, and the slices that are
  inserted at a time, whose number grows with the box, not with that of the particles;
- the *choice of the regulariser's weight* holds sums, data terms and several maps of
  both folds, and what the solvers of both take at the same time.

All other stages, such as the final map and automatic masks (some 20 maps on the host),
hold fewer: they have some of these arrays, or one solver instead of two.

The multiples of ``n**3`` numbers are counted in the code, and the compiler's own
(``memory_analysis`` of the compiled programs on a CPU, n = 32 and 48, JAX 0.10) for
what programs take in between; finufft's are those of its grid. What is not ours is
fitted to peaks that were measured on a CPU, of programs that were compiled anew: the
compiled programs themselves, with constants that are as large as maps, and what the
allocator keeps of arrays that were freed. Programs that are found in the cache take
some 300 MiB less. The page on results has the measured peaks and the estimates. On
accelerators, and with more than two devices, none of this has been checked; what
gridding takes was compared with the compiler's figures only. Images are read from where
they are kept, and not counted; neither is what each optics group takes: a level of the
noise, and phases if it has aberrations, for every pixel of the spectrum.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar, final

import jax

from jaxrefine._limits import memory_limits
from jaxrefine.data.visit import BLOCK, whole_batch
from jaxrefine.errors import InputError
from jaxrefine.maps.folds import FOLDS
from jaxrefine.operators import normal, slices
from jaxrefine.operators.gridding import Finufft, default_insertion
from jaxrefine.refinement.config import RefineConfig
from jaxrefine.refinement.insertion import LANES, images_at_once, inserting

_T = TypeVar("_T")

LEAST_BATCH = whole_batch(1, 1)
"""Least number of particles at a time, see `data.visit`."""

_GIB = 2**30
_EXHAUSTED = "RESOURCE_EXHAUSTED"
_RECLAIMABLE = ("active_file", "inactive_file")  # files that were read

# What is not ours, on a CPU: fitted to the peaks of programs that were compiled anew.
_PROGRAMS = 600 * 2**20  # JAX, and the programs that make maps
_POSE_PROGRAMS = 375 * 2**20  # those that update poses
_CONSTANTS = 20  # constants of programs and what the allocator keeps, n**3 numbers

# Arrays of n**3 single-precision numbers.
_GIVEN = 1  # the map to start from
_MAPS = 10  # maps and multipliers of two folds
_REFERENCE = 21  # two folds' filtered maps, and an oversampled spectrum, being made
_COPY = 6  # the spectra, on every further device
_SUMS = 18  # kernels and back-projections of two folds
_SUM = 9  # a kernel and a back-projection
_FINUFFT = 47  # a grid of 1.25 times 2n, and the complex result
_GRIDDING = 39  # the same, over the cube of the oversampling
_DATA_TERMS = 10  # of two folds
_SOLVER = 44  # a map with its multipliers, what ADMM takes, and a transform of its FFT

# Bytes.
_CURVATURE = 85  # a frequency of a particle whose error bars are measured
_PIXEL = 12  # of its image, on the host, on the device and transformed
_VISITED = 16 * 2**20  # a block of particles on one device, see `poses.update`
# A sample of an inserted slice: of its image, twice, its value and its position.
_FINUFFT_SAMPLE = 65
_GRIDDING_SAMPLE = 155
_HYPOTHESIS = 400  # a hypothesis of a particle, before and after


@final
@dataclass(frozen=True)
class Plan:
    """The size of a refinement, or of a map, and the batch and memory that it needs.

    Attributes
    ----------
    particles, image_size, half_sets
        Number of particles, side of their images in pixels, and whether two half sets
        are refined.
    r_max
        First and largest band limit of the poses, cycles per box; None if they are
        kept.
    device
        Kind of the default device.
    batch_size
        Number of particles at a time.
    estimated_bytes, available_bytes
        Estimated peak memory, and the memory that is available; None if unknown.
    """

    particles: int
    image_size: int
    half_sets: bool
    r_max: tuple[int, int] | None
    device: str
    batch_size: int
    estimated_bytes: int
    available_bytes: int | None

    def describe(self) -> str:
        """Return the plan as lines for a reader."""
        n, free = self.image_size, self.available_bytes
        halves = ", in two half sets" if self.half_sets else ""
        there = "" if free is None else f" of {free / _GIB:.1f} GiB that are free"
        lines = [f"{self.particles} particles of {n} x {n} pixels{halves}"]
        if self.r_max is not None:
            first, last = self.r_max
            lines.append(
                f"poses compared up to {first} cycles per box at first, to {last} at "
                "most"
            )
        lines += [
            f"{self.batch_size} particles at a time on {self.device}",
            f"about {self.estimated_bytes / _GIB:.1f} GiB of memory{there}",
        ]
        return "\n".join(lines)


def available_bytes(root: Path = Path("/")) -> int | None:
    """Return the memory available on the default device; None if it is not known.

    On a CPU it is what the system has available (Linux), but no more than the limits of
    the job or container (cgroup v2) and of the process (``ulimit``) leave. JAX's
    threads map memory that they never use, 1 GiB or more, before it asks for any: call
    this after JAX's first use. On other devices it is what JAX may take.

    Parameters
    ----------
    root
        Folder that holds the system's ``proc`` and ``sys``.
    """
    if jax.default_backend() != "cpu":
        return (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit")
    path = root / "proc/meminfo"
    lines = path.read_text().splitlines() if path.exists() else []
    sizes = (line.split()[1] for line in lines if line.startswith("MemAvailable:"))
    left = [int(size) * 1024 for size in sizes] + _left_by_groups(root)
    left += [limit.left for limit in memory_limits(root)]
    return min(left, default=None)


def _left_by_groups(root: Path) -> list[int]:
    """Return the memory that the limits of this process's control groups leave."""
    left, groups = [], root / "sys/fs/cgroup"
    with suppress(OSError):
        own = (root / "proc/self/cgroup").read_text().strip().rpartition("::/")[2]
        here = groups / own
        for folder in (here, *here.parents):
            if not folder.is_relative_to(groups):
                break
            with suppress(OSError, ValueError):  # no limit, or no such file
                limit = int((folder / "memory.max").read_text())
                used = int((folder / "memory.current").read_text())
                stat = (folder / "memory.stat").read_text().split()
                cached = (stat.index(name) + 1 for name in _RECLAIMABLE)
                used -= sum(int(stat[place]) for place in cached)
                left.append(max(limit - used, 0))
    return left


def estimate_bytes(particles: int, image_size: int, config: RefineConfig) -> int:
    """Estimate the most memory that a refinement holds, without the images.

    On an accelerator it is the device's memory.

    Parameters
    ----------
    particles
        Their number.
    image_size
        Side of their images in pixels.
    config
        Parameters of the refinement.
    """
    sets = 2 if config.half_sets else 1
    cube = _cube(image_size)
    # The state before; of the other set its maps, also turned, and its sums.
    held = (_GIVEN + _MAPS * sets + (2 * _MAPS + _SUMS) * (sets - 1)) * cube
    held += _HYPOTHESIS * (config.places + 1) * particles
    inserted = -(-particles // (FOLDS * sets)) * config.places
    stage = _largest_stage_bytes(particles, inserted, image_size, config)
    return int(_programs(cube, _PROGRAMS + _POSE_PROGRAMS) + held + stage)


def estimate_map_bytes(particles: int, image_size: int, config: RefineConfig) -> int:
    """Estimate the most memory that a map at given poses takes, without the images.

    This is what `reconstruction.reconstruct` holds; parameters as of `estimate_bytes`.
    """
    cube = _cube(image_size)
    held = (_GIVEN + _MAPS) * cube + _HYPOTHESIS * particles
    inserted = -(-particles // FOLDS)
    stage = _largest_stage_bytes(particles, inserted, image_size, config)
    return int(_programs(cube, _PROGRAMS) + held + stage)


def _largest_stage_bytes(
    particles: int, inserted: int, image_size: int, config: RefineConfig
) -> int:
    """Return what the stage takes that needs most, for so many hypotheses in a fold."""
    return max(
        _visit_bytes(particles, image_size, config),
        _insertion_bytes(inserted, image_size, config),
        _choice_bytes(image_size),
    )


def _cube(image_size: int) -> int:
    """Return the bytes of a map, with the sides that its transforms have."""
    return 4 * (normal.padded_size(image_size) // 2) ** 3


def _frequencies(image_size: int) -> int:
    """Return how many frequencies of an image are read."""
    return len(slices.disc(image_size, (image_size - 1) // 2).shells)


def _programs(cube: int, compiled: int) -> int:
    """Return what is not ours: compiled programs, and what the allocator keeps."""
    return compiled + _CONSTANTS * cube if jax.default_backend() == "cpu" else 0


def _visit_bytes(particles: int, image_size: int, config: RefineConfig) -> int:
    """Return what a visit of the particles takes, with the maps they are compared to.

    The devices of a CPU share its memory.
    """
    devices = jax.local_device_count() if jax.default_backend() == "cpu" else 1
    size = whole_batch(min(config.batch_size, particles), jax.local_device_count())
    block = max(_VISITED, BLOCK * _CURVATURE * _frequencies(image_size))
    spectra = (_REFERENCE + _COPY * (devices - 1)) * _cube(image_size)
    return spectra + size * _PIXEL * image_size**2 + devices * block


def _insertion_bytes(hypotheses: int, image_size: int, config: RefineConfig) -> int:
    """Return what is held while the sums of both folds are made.

    Parameters
    ----------
    hypotheses
        The most that are inserted in a fold.
    image_size, config
        As for `estimate_bytes`.
    """
    cube, operators = _cube(image_size), len(config.operators)
    frequencies = _frequencies(image_size)
    size = images_at_once(image_size, frequencies, operators, hypotheses)
    insertion = config.insertion or default_insertion()
    if isinstance(insertion, Finufft):
        grid, sample = _FINUFFT, _FINUFFT_SAMPLE
    else:
        grid, sample = _GRIDDING * insertion.oversampling**3, _GRIDDING_SAMPLE
    # Two threads insert images if there is only one device.
    inserts = inserting(jax.local_device_count())
    on_cpu = jax.default_backend() == "cpu"
    threads = max(FOLDS, inserts) if on_cpu or inserts < FOLDS else 1
    # A lane's sum, and those of lanes that wait for others: see `pairwise_sum`.
    lanes = min(-(-hypotheses // size), FOLDS * LANES // max(FOLDS, inserts))
    sums = _SUM * max(lanes, 1).bit_length()
    slices_of_batch = sample * size * operators * frequencies
    return threads * (int((sums + grid) * cube) + slices_of_batch)


def _choice_bytes(image_size: int) -> int:
    """Return what the choice of the regulariser's weight takes.

    These are the sums, the data terms, the best maps and the last, and the solvers of
    both folds, see `folds.cross_validate`.
    """
    held = _SUMS + _DATA_TERMS + 2 * _MAPS
    return (held + FOLDS * _SOLVER) * _cube(image_size)


def plan(
    particles: int,
    image_size: int,
    config: RefineConfig,
    available_bytes: int | None,
) -> Plan:
    """Choose the largest batch with which a refinement fits into memory.

    This is the requested batch size, but at most the number of particles; if it does
    not fit, it is the largest power of two that does, from `LEAST_BATCH`.

    Parameters
    ----------
    particles, image_size, config
        As for :func:`estimate_bytes`.
    available_bytes
        Memory that may be used, see :func:`available_bytes`; None for no limit.

    Raises
    ------
    InputError
        If not even the smallest batch fits.
    """
    last = config.max_r_max or (image_size - 1) // 2
    r_max = (slices.bucket(config.first_r_max, image_size), last)
    arguments = (particles, image_size, config, available_bytes)
    return _plan(estimate_bytes, r_max, *arguments)


def plan_map(
    particles: int,
    image_size: int,
    config: RefineConfig,
    available_bytes: int | None,
) -> Plan:
    """Choose the largest batch with which a map at given poses fits into memory.

    Parameters, and errors raised, are those of `plan`.
    """
    arguments = (particles, image_size, config, available_bytes)
    return _plan(estimate_map_bytes, None, *arguments)


def _plan(
    estimate_of: Callable[[int, int, RefineConfig], int],
    r_max: tuple[int, int] | None,
    particles: int,
    image_size: int,
    config: RefineConfig,
    available_bytes: int | None,
) -> Plan:
    """Return the plan of what takes the memory that is estimated; see `plan`."""

    def estimate(size: int) -> int:
        return estimate_of(particles, image_size, replace(config, batch_size=size))

    size = fitting_batch(
        estimate, min(config.batch_size, particles), LEAST_BATCH, available_bytes
    )
    needed = estimate(size)
    if available_bytes is not None and needed > available_bytes:
        raise InputError(
            f"the memory must be at least {needed / _GIB:.1f} GiB for {particles} "
            f"images of side {image_size}, {size} at a time, got "
            f"{available_bytes / _GIB:.3g} GiB"
        )
    return Plan(
        particles,
        image_size,
        config.half_sets,
        r_max,
        jax.local_devices()[0].device_kind,
        size,
        needed,
        available_bytes,
    )


def fitting_batch(
    estimate: Callable[[int], float],
    batch_size: int,
    least: int,
    available_bytes: int | None,
) -> int:
    """Return the largest batch with which a job fits into memory.

    This is the requested batch size; if it does not fit, it is the largest power of two
    that does, from the least batch on; if none fits, it is the last one tried.

    Parameters
    ----------
    estimate
        Returns the bytes that are needed with a batch size.
    batch_size, least
        Requested and least number of particles at a time.
    available_bytes
        Memory that may be used; None for no limit.
    """
    limit = math.inf if available_bytes is None else available_bytes
    while batch_size > least and estimate(batch_size) > limit:
        batch_size = 2 ** ((batch_size - 1).bit_length() - 1)
    return batch_size


def with_batch(plan: Plan, config: RefineConfig, batch_size: int) -> Plan:
    """Return a plan with another batch size and its memory, whether it fits or not."""
    needed = estimate_bytes(
        plan.particles, plan.image_size, replace(config, batch_size=batch_size)
    )
    return replace(plan, batch_size=batch_size, estimated_bytes=needed)


def ran_out(error: Exception) -> bool:
    """Return whether an error says that the host or the device is out of memory."""
    return isinstance(error, MemoryError) or _EXHAUSTED in str(error)


@contextmanager
def explained(sentence: str) -> Iterator[None]:
    """Raise an InputError with a sentence where memory runs out within."""
    try:
        yield
    except (jax.errors.JaxRuntimeError, MemoryError) as error:
        if not ran_out(error):
            raise
        raise InputError(sentence) from error


def retry_on_out_of_memory(
    function: Callable[[int], _T],
    batch_size: int,
    say: Callable[[str], None],
    least: int = LEAST_BATCH,
) -> _T:
    """Call a function of the batch size, with half of it whenever memory runs out.

    Parameters
    ----------
    function
        Called with a batch size; another call should continue where the last failed.
    batch_size
        Number of particles at a time in the first call.
    say
        Called with a message before every further attempt.
    least
        Least number of particles at a time.

    Raises
    ------
    InputError
        If memory runs out with the least number of particles at a time, or fewer.
    """
    while True:
        try:
            return function(batch_size)
        except (jax.errors.JaxRuntimeError, MemoryError) as error:
            if not ran_out(error):
                raise
            if batch_size <= least:
                raise InputError(
                    "the memory must hold at least a batch of particles, got too "
                    f"little for {batch_size}"
                ) from error
        # The failed attempt's arrays are freed only here, outside of the handler.
        half = max(batch_size // 2, least)
        say(f"Out of memory with {batch_size} particles at a time; trying {half}.")
        batch_size = half
