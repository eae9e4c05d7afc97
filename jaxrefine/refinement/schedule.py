"""When the band limit grows, and when the refinement ends."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

from jaxrefine._arrays import on_device
from jaxrefine.maps.fsc import crossing
from jaxrefine.operators import slices
from jaxrefine.refinement.config import RefineConfig
from jaxrefine.refinement.sets import ParticleSet
from jaxrefine.refinement.state import SetState

# Images of smaller sides have no smaller maps made first: that would take longer to
# compile (some 3 s) than it saves.
_LEAST_TO_CROP = 96


def supported(
    correlation: Float[np.ndarray, "shells"], config: RefineConfig, last: int
) -> float:
    """Return up to which shell maps are right enough to compare poses with.

    That is where their correlation falls below ``Tuning.supported_fsc``.

    Parameters
    ----------
    correlation
        Of the maps of the half sets or, without half sets, of the folds.
    config
        Parameters.
    last
        Last shell that is read.
    """
    curve = on_device(correlation[: last + 1])
    return float(crossing(curve, config.tuning.supported_fsc))


def next_band_limit(r_max: int, supported: float, particle_set: ParticleSet) -> int:
    """Return the next band limit: what the maps support, at most twice the last.

    In the shells in which poses were compared, the maps of folds agree better than they
    are right, since the poses were fitted to both. The limit therefore grows only if
    the maps agree in the shells beyond it, up to the next radius of `slices.bucket`.

    Parameters
    ----------
    r_max
        Band limit so far, cycles per box.
    supported
        Radius, in shells, up to which the maps are right, see `supported`.
    particle_set
        The particles of any set.
    """
    last, largest = particle_set.last_shell, particle_set.config.max_r_max
    most = last if largest is None else min(largest, last)
    reached = int(min(supported, 2 * r_max, most))
    return max(r_max, slices.bucket(reached, particle_set.particles.image_size))


def map_side(iteration: int, r_max: int, image_size: int, config: RefineConfig) -> int:
    """Return the side of the maps that an iteration makes, of poses at a band limit.

    The next band limit is at most twice this one (`next_band_limit`), and no map needs
    finer voxels before. Where a map of at most half the images' side holds these
    frequencies, it is made at this side, which saves most of a volume update. That is
    so only where another iteration follows for certain: what a run ends with, and what
    decides whether it does, is measured in all shells.

    Parameters
    ----------
    iteration
        Number of the iteration, from 0; before that, maps are as large as the images.
    r_max
        Band limit of the iteration, cycles per box.
    image_size
        Side of the images, pixels.
    config
        Parameters.
    """
    from scipy.fft import next_fast_len  # slow to import

    is_followed = iteration <= config.last_multi_start
    is_followed = is_followed and 0 <= iteration < config.iterations - 1
    half: int = next_fast_len(2 * r_max + 2)  # pyright: ignore[reportAssignmentType]
    is_worth_while = image_size >= _LEAST_TO_CROP and 4 * half <= image_size
    return 2 * half if is_followed and is_worth_while else image_size


def median_error_bar(set_states: Sequence[SetState], config: RefineConfig) -> float:
    """Return the median standard deviation of what is refined.

    This is that of the angle of the rotation, radians, or, if the angles are fixed, of
    the length of the shift, pixels.
    """
    information = np.concatenate(
        [np.asarray(state.information) for state in set_states]
    )
    variances = np.diagonal(np.linalg.inv(information), axis1=1, axis2=2)
    if config.refines_angles:
        return float(np.median(np.sqrt(variances[:, :3].sum(axis=1))))
    return float(np.median(np.sqrt(variances[:, 3:].sum(axis=1))))


def score(correlation: Float[np.ndarray, "shells"], last: int) -> float:
    """Return the mean correlation of two maps over the shells 1 to ``last``."""
    return float(np.mean(correlation[1 : last + 1]))


def is_worth_another(
    change: float,
    change_before: float,
    gold_score: float | None,
    best_gold_score: float,
    set_states: Sequence[SetState],
    config: RefineConfig,
) -> bool:
    """Return whether the last iteration improved so much that another one may.

    With half sets, this is whether the correlation of their maps has grown. Without, it
    is whether the poses still change by more than a fraction of their error bars, and
    by less than before: poses that change as much as before do not converge.

    Parameters
    ----------
    change, change_before
        Median change of the poses, in the unit of `median_error_bar`: radians, or
        pixels if the angles are fixed; in the last iteration and in the one before.
    gold_score, best_gold_score
        Correlation of the maps of the half sets, None without, and the best so far.
    set_states, config
        States and parameters.
    """
    tuning = config.tuning
    if gold_score is not None:
        return gold_score > best_gold_score + tuning.stalled
    least = tuning.settled * median_error_bar(set_states, config)
    return least < change < tuning.progress * change_before
