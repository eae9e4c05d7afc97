"""Two folds of the particles, each with a map that is made from the other fold.

The particles of a refinement are split into two folds. Each fold's images are summed
once (:mod:`jaxrefine.maps.sums`); its map is made from *the other fold*. Therefore

- a particle's pose is fitted to a map that does not contain its own noise. (Otherwise
  the map attracts every particle to the pose at which it was last inserted, by some
  nats of log-likelihood at low SNR.)
- the regression of a fold's images on the fold's map gives the scale of the map and the
  power of the noise in each shell (:mod:`jaxrefine.maps.noise`);
- the weight of the regulariser is the one with which the maps best predict the images
  that they were not made from (:func:`cross_validate`).
"""

from collections.abc import Sequence
from typing import final

import equinox as eqx
import jax

from jaxrefine._batching import side_by_side
from jaxrefine._types import Scalar, Volume
from jaxrefine._watch import Stage, Watch, unwatched
from jaxrefine.maps import admm, tv
from jaxrefine.maps.sums import Sums, data_term, solve
from jaxrefine.operators import normal

FOLDS = 2
"""Number of folds: two by construction, as each one's map is made from the other."""


@eqx.filter_jit
def prediction_error(held_out: admm.DataTerm, coefficients: Volume) -> Scalar:
    r"""Return :math:`\tfrac12\|g - Hc\|^2 - \tfrac12\|g\|^2` of held-out images.

    Parameters
    ----------
    held_out
        The data term of images that the map was not made from.
    coefficients
        Coefficients ``c`` of the map, of side ``n``.
    """
    product = normal.apply_normal(held_out.transfer, coefficients)
    return held_out.value(coefficients, product)


@final
class Folds(eqx.Module):
    """The data terms of a refinement's folds.

    Attributes
    ----------
    own, peaks
        For each fold, the data term of its own images, and their ``w[0]``.
    """

    own: tuple[admm.DataTerm, admm.DataTerm]
    peaks: tuple[Scalar, Scalar]


def folds(sums: Sequence[Sums]) -> Folds:
    """Return the data terms of both folds, from the sums over their images."""
    first, second = sums
    return Folds((data_term(first), data_term(second)), (first.peak, second.peak))


def solve_all(
    data: Folds,
    starts: Sequence[admm.ADMMState],
    tau: Scalar,
    regulariser: tv.Regulariser,
    iterations: int,
    stage: Stage | None = None,
) -> tuple[admm.ADMMState, ...]:
    """Solve for each fold's map, which is made from the images of the other fold.

    Parameters
    ----------
    data
        The data terms of both folds.
    starts
        For each fold, the map and multipliers to start from.
    tau, regulariser, iterations
        As for :func:`jaxrefine.maps.sums.solve`.
    stage
        Told of each map that is made.

    Returns
    -------
    For each fold, its map and multipliers.
    """
    (first, second), (first_peak, second_peak) = data.own, data.peaks
    first_start, second_start = starts

    def of(data: admm.DataTerm, peak: Scalar, start: admm.ADMMState):
        solution = solve(data, peak, start, tau, regulariser, iterations)
        solution = jax.block_until_ready(solution)
        if stage is not None:
            stage.advance()
        return solution

    return tuple(
        side_by_side(
            [
                lambda: of(second, second_peak, first_start),
                lambda: of(first, first_peak, second_start),
            ]
        )
    )


def cross_validate(
    data: Folds,
    starts: Sequence[admm.ADMMState],
    tau: Scalar,
    regulariser: tv.Regulariser,
    iterations: int,
    trials: int = 8,
    factor: float = 1.4,
    watch: Watch = unwatched,
) -> tuple[Scalar, tuple[admm.ADMMState, ...], dict[float, float]]:
    r"""Choose :math:`\tau` by two-fold cross-validation.

    The search walks from the given ``tau`` in steps of a constant factor until the
    prediction error no longer falls, and ends at the vertex of the parabola, in
    ``log tau``, through the last three errors. (``benchmarks/regularisation.py``
    compares this choice with others, and with the best possible one.)

    Parameters
    ----------
    data, starts, regulariser, iterations
        As for `solve_all`.
    tau
        Weight to start from, in units of the noise.
    trials
        Maximum number of weights to try, at least 2. With the default factor, 8 weights
        span a factor of 10.
    factor
        Ratio of neighbouring weights, above 1. The default is about half an octave,
        over which the parabola interpolates.
    watch
        Told how many maps have been made, of the most that are.

    Returns
    -------
    tau
        The chosen weight.
    solutions
        For each fold, map and multipliers at the best of the weights that were tried.
    errors
        Prediction error at each weight that was tried.
    """
    errors: dict[float, float] = {}
    # Compare solutions that start from a similar one: after a cold start and few
    # iterations, a map is still smoother than its tau implies.
    stage = Stage(watch, "weight of the prior", FOLDS * (1 + trials))
    warm = best = solve_all(data, starts, tau, regulariser, iterations, stage)

    def error(power: int) -> float:
        nonlocal warm, best
        if power not in errors:
            trial = tau * factor**power
            warm = solve_all(data, warm, trial, regulariser, iterations, stage)
            fold_errors = [
                prediction_error(own, state.coefficients)
                for own, state in zip(data.own, warm, strict=True)
            ]
            value = float(sum(fold_errors))
            best = warm if value <= min(errors.values(), default=value) else best
            errors[power] = value
        return errors[power]

    initial = error(0)
    falls_downwards = error(-1) < initial
    step, power = (-1, -1) if falls_downwards else (1, 0)
    while len(errors) < trials and error(power + step) < error(power):
        power += step
    vertex = float(power)
    if power - 1 in errors and power + 1 in errors:
        left, middle, right = (errors[power + i] for i in (-1, 0, 1))
        curvature = left - 2 * middle + right
        vertex += 0.5 * (left - right) / curvature if curvature > 0 else 0.0
    table = {float(tau) * factor**p: value for p, value in sorted(errors.items())}
    return tau * factor**vertex, best, table
