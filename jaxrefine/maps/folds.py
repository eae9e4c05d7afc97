"""Two folds of the particles, whose maps are independent of each other.

The particles of a refinement are dealt into two folds. Each fold's images are summed
up once (:mod:`jaxrefine.maps.sums`); its map is made from *the other fold*. Then

- a particle's pose is fitted to a map that its own noise is not in. (Otherwise the map
  pulls every particle to where it was inserted last, by some nats at low SNR.)
- the regression of a fold's images on the other fold's map gives the scale of the map
  and the power of the noise, shell by shell (:mod:`jaxrefine.maps.noise`);
- the weight of the regulariser is the one whose maps best predict the images that they
  were not made from (:func:`cross_validate`).
"""

from collections.abc import Sequence
from typing import final

import equinox as eqx

from jaxrefine._types import Scalar, Volume
from jaxrefine.maps import admm, tv
from jaxrefine.maps.sums import Sums, data_term, solve
from jaxrefine.operators import normal

FOLDS = 2
"""Number of folds: two, whose maps are independent of each other."""


@eqx.filter_jit
def prediction_error(held_out: admm.DataTerm, coefficients: Volume) -> Scalar:
    r"""Return :math:`\tfrac12\|g - Hc\|^2 - \tfrac12\|g\|^2` of images not used."""
    product = normal.apply_normal(held_out.transfer, coefficients)
    return held_out.value(coefficients, product)


@final
class Folds(eqx.Module):
    """The data terms of a refinement's folds, ready for any number of solutions.

    Attributes
    ----------
    own, peaks
        For each fold the data term of its images, and their ``w[0]``.
    """

    own: tuple[admm.DataTerm, admm.DataTerm]
    peaks: tuple[Scalar, Scalar]


def folds(sums: Sequence[Sums]) -> Folds:
    """Prepare the sums of both folds."""
    one, two = sums
    return Folds((data_term(one), data_term(two)), (one.peak, two.peak))


def solve_all(
    data: Folds,
    starts: Sequence[admm.ADMMState],
    tau: Scalar,
    regulariser: tv.Regulariser,
    iterations: int,
) -> tuple[admm.ADMMState, ...]:
    """Solve for each fold's map, which is made from the other fold.

    Parameters
    ----------
    data
        The data terms of both folds.
    starts
        For each fold, map and multipliers to start from.
    tau, regulariser, iterations
        As for `solve`.
    """
    others = zip(data.own[::-1], data.peaks[::-1], starts, strict=True)
    return tuple(
        solve(term, peak, start, tau, regulariser, iterations)
        for term, peak, start in others
    )


def cross_validate(
    data: Folds,
    starts: Sequence[admm.ADMMState],
    tau: Scalar,
    regulariser: tv.Regulariser,
    iterations: int,
    trials: int = 8,
    factor: float = 1.4,
) -> tuple[Scalar, tuple[admm.ADMMState, ...], dict[float, float]]:
    r"""Choose :math:`\tau` by how well the folds predict each other.

    Walks from the given ``tau`` by a factor to where the error of prediction no longer
    falls, and ends at the vertex of the parabola, in ``log tau``, through the last
    three errors.

    Parameters
    ----------
    data, starts, regulariser, iterations
        As for `solve_all`.
    tau
        Weight to begin with, in units of the noise.
    trials
        Weights to try; one more if the first step was the wrong way.
    factor
        Between neighbouring weights, above 1.

    Returns
    -------
    The chosen ``tau``, the solutions of the best one tried, and the errors found.
    """
    errors: dict[float, float] = {}
    # Solutions are compared warm: one that is made from cold is smoother than its tau.
    warm = best = solve_all(data, starts, tau, regulariser, iterations)

    def error(power: int) -> float:
        nonlocal warm, best
        if power not in errors:
            warm = solve_all(data, warm, tau * factor**power, regulariser, iterations)
            parts = [
                prediction_error(own, state.coefficients)
                for own, state in zip(data.own, warm, strict=True)
            ]
            value = float(sum(parts))
            best = warm if value <= min(errors.values(), default=value) else best
            errors[power] = value
        return errors[power]

    here = error(0)
    down = error(-1) < here
    step, power = (-1, -1) if down else (1, 0)
    while len(errors) < trials and error(power + step) < error(power):
        power += step
    vertex = float(power)
    if power - 1 in errors and power + 1 in errors:
        left, middle, right = (errors[power + i] for i in (-1, 0, 1))
        curvature = left - 2 * middle + right
        vertex += 0.5 * (left - right) / curvature if curvature > 0 else 0.0
    table = {float(tau) * factor**p: value for p, value in sorted(errors.items())}
    return tau * factor**vertex, best, table
