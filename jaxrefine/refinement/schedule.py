"""When the band limit grows, and when the refinement ends."""

from collections.abc import Sequence

import numpy as np

from jaxrefine.operators import slices
from jaxrefine.refinement.config import RefineConfig
from jaxrefine.refinement.sets import ParticleSet
from jaxrefine.refinement.state import SetState


def next_band_limit(r_max: int, supported: float, members: ParticleSet) -> int:
    """Grow the band limit to what the folds' maps support, at most twofold at a time.

    Shells that poses were compared in agree better than the maps are good, since the
    poses have adapted to both. The limit grows only if the maps agree in the shells
    beyond it, up to the next radius of `slices.bucket`.

    Parameters
    ----------
    r_max
        Band limit so far, cycles per box.
    supported
        Radius, in shells, at which the correlation of the folds' maps falls below
        ``Tuning.supported_fsc``.
    members
        The particles of any set.
    """
    last, largest = members.last_shell, members.config.max_r_max
    most = last if largest is None else min(largest, last)
    reached = int(min(supported, 2 * r_max, most))
    return max(r_max, slices.bucket(reached, members.particles.image_size))


def median_error_bar(sets: Sequence[SetState], config: RefineConfig) -> float:
    """Return the median standard deviation of what is refined.

    Of the angle of the rotation, in degrees, or, if the angles are fixed, of the length
    of the shift, in pixels.
    """
    information = np.concatenate([np.asarray(state.information) for state in sets])
    variances = np.diagonal(np.linalg.inv(information), axis1=1, axis2=2)
    if config.refines_angles:
        return float(np.rad2deg(np.median(np.sqrt(variances[:, :3].sum(axis=1)))))
    return float(np.median(np.sqrt(variances[:, 3:].sum(axis=1))))


def is_worth_another(
    change: float,
    change_before: float,
    gold_score: float | None,
    best_gold_score: float,
    sets: Sequence[SetState],
    config: RefineConfig,
) -> bool:
    """Whether the last iteration was worth it, so that another one may be.

    With half sets, whether the correlation of their maps has grown. Without, whether
    the poses still change by more than a share of their error bars, and by less than
    before: poses that change as much as before wander about.

    Parameters
    ----------
    change, change_before
        Median change of the poses, in the unit of `median_error_bar`, in the last
        iteration and in the one before.
    gold_score, best_gold_score
        Correlation of the maps of the half sets, None without, and the best so far.
    sets, config
        States and parameters.
    """
    tuning = config.tuning
    if gold_score is not None:
        return gold_score > best_gold_score + tuning.stalled
    least = tuning.settled * median_error_bar(sets, config)
    return least < change < tuning.progress * change_before
