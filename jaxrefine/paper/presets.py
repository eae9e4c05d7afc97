r"""The settings of the paper, and those of its authors' released code.

The paper gives no numbers for lambda and rho, and its steps are those of one data set:
images scaled by ``s`` need ``s`` times the lambda and steps divided by ``s**2``.
:func:`paper_preset` takes all of them from the images, the noise and the initial map.

**w[0]**, the value of the kernel (32) at the displacement 0, is the diagonal of
:math:`H^T H`:

.. math:: w[0] = \sum_p \|\psi_p\|^2 = P\,(\psi * \psi^\vee)(0).

It is how much one coefficient, alone, adds to the energy of all images, and does not
depend on the poses.

**lambda** ends at :math:`\sigma \sqrt{w[0]}`, the noise in one voxel of the
back-projection: :math:`\operatorname{Var}\,(H^T n)[k] = \sigma^2 w[0]` for white noise
``n``. A coefficient that differs from its neighbours by noise alone pulls with about
this force, and TV holds against it with lambda. It grows like sigma, as the paper says,
and like the square root of the number of particles. To begin with, the images differ
from the projections of the map by more than noise, because the poses are wrong. With
their root-mean-square difference in place of sigma, lambda begins four times as high,
and falls geometrically.

**rho** :math:`= 4\, w[0]`: the penalty multiplies :math:`\|L c\|^2` as the data term
multiplies :math:`\|c\|^2`, so it has the units of :math:`H^T H` and not those of the
noise. It decides how fast ADMM converges and not where to.

**The steps** are :math:`1 / (2 \kappa)`, with the mean curvature :math:`\kappa` of the
cost on the initial map (:func:`jaxrefine.paper.algorithm3.curvature`): half of a Newton
step along one coordinate. Later maps are sharper and their curvature is larger; the
line search takes shorter steps there.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from jaxrefine.errors import InputError
from jaxrefine.maps import noise, tv
from jaxrefine.operators import spatial
from jaxrefine.paper import algorithm3
from jaxrefine.paper.algorithm1 import (
    Algorithm1Config,
    Algorithm1State,
    Problem,
    Schedule,
)

_MEASURED = 32  # particles that the start is measured on: means within some 10 %


def paper_preset(
    problem: Problem,
    start: Algorithm1State,
    sigma: float | None = None,
    iterations: int = 20,
    batch_size: int = 8,
) -> Algorithm1Config:
    """Return the settings of the paper's section IV-C, in the units of the images.

    ``K_ADMM = 5``, ``K_GD = 3``, ``eta = 0.25``, isotropic TV, persistent multipliers.
    The numbers that the paper leaves open, or gives for its own images, are derived at
    the head of this module. One thing is not the paper's: an iteration begins with the
    poses. The initial map is better than the first one that the initial poses give, and
    the last map is one of the final poses.

    Parameters
    ----------
    problem
        The data and the imaging model.
    start
        The initial poses and coefficients, from `init`.
    sigma
        Standard deviation of the noise in a pixel; by default it is estimated from the
        images (`jaxrefine.maps.noise.white_noise`).
    iterations
        Outer iterations; about 20 in Fig. 8.
    batch_size
        Particles at a time.

    Raises
    ------
    InputError
        If sigma is not positive, or the initial map is blank.
    """
    if sigma is None:
        sigma = noise.white_noise(problem.images)
    if not sigma > 0:
        raise InputError(f"sigma must be positive, got {sigma}")
    angle, shift, difference = _measure(problem, start)
    diagonal = float(problem.footprint.autocorrelation(jnp.zeros(())))
    diagonal *= problem.images.shape[0]
    return Algorithm1Config(
        lam=Schedule(4.0 * difference * diagonal**0.5, sigma * diagonal**0.5),
        rho=Schedule(4.0 * diagonal),
        angle_step=Schedule(0.5 / angle),
        shift_step=Schedule(0.5 / shift),
        iterations=iterations,
        cg_iterations=10,
        poses_first=True,
        batch_size=batch_size,
    )


def _measure(problem: Problem, start: Algorithm1State) -> tuple[float, float, float]:
    """Compare some images with the initial map at the initial poses.

    Returns
    -------
    The mean curvature of the angles and of the shifts, and the root-mean-square
    difference of a pixel.
    """
    count, c = problem.images.shape[0], start.volume.coefficients
    chosen = np.linspace(0, count - 1, min(count, _MEASURED)).astype(int)
    images = problem.images[chosen]
    poses = jax.tree.map(lambda leaf: leaf[chosen], start.euler_poses)
    footprint, m = problem.footprint, images.shape[-1]
    curvature = algorithm3.curvature(footprint, c, poses, m)
    angle, shift = float(curvature.angles.mean()), float(curvature.shifts.mean())
    if not (angle > 0 and shift > 0):
        raise InputError(
            "the initial map must change its projections when it is turned and moved, "
            "got a blank one"
        )
    difference = images - spatial.project(footprint, c, poses.poses, m)
    return angle, shift, float(jnp.sqrt(jnp.mean(difference**2)))


def printed_preset(
    problem: Problem,
    start: Algorithm1State,
    sigma: float | None = None,
    iterations: int = 20,
    batch_size: int = 8,
) -> Algorithm1Config:
    """Return `paper_preset` with the steps that the paper prints, 1e-7 and 1e-5.

    They fit the units of the paper's images, whatever these were, and no others.
    """
    config = paper_preset(problem, start, sigma, iterations, batch_size)
    return dataclasses.replace(
        config, angle_step=Schedule(1e-7), shift_step=Schedule(1e-5)
    )


_RELEASED_SIGMA = 10.0 ** np.linspace(-1, 2, 5)
_RELEASED_LAMBDA = [1e2, 1e2, 1e2, 1e3, 4e3], 50.0, [1e1, 1e1, 1e1, 5e2, 4e3], 500.0
_RELEASED_RHO = [2e3, 2e3, 2e3, 7e4, 3e5], 2.0, [2e2, 2e2, 2e2, 3.2e4, 3e5], 100.0
"""Values in the first and in the last outer iteration at each of those noise levels,
each with what the code divides them by."""


def released_preset(
    sigma: float = 0.1, iterations: int = 10, batch_size: int = 8
) -> Algorithm1Config:
    """Return the settings of the authors' released code.

    Anisotropic TV and non-negativity, geometric schedules of lambda, rho and of the
    steps, the poses before the volume, at most four line-search trials, multipliers
    reset in every outer iteration. Not taken over are its circular differences and its
    TV-regularised initial coefficients; its mask is `Problem.support`, and all ones in
    its demo. What it computes by finite differences of ``||g - H c||^2`` is here the
    explicit gradient of half of that, so its steps (1e-4 and 1e-3, growing by 1.7) are
    doubled.

    Parameters
    ----------
    sigma
        Standard deviation of the noise in a pixel. The code has tables of lambda and
        rho for five levels from 0.1, that of its demo, to 100; between them, values are
        interpolated on logarithmic axes, and beyond them those of the ends hold. They
        are made for maps in the units of the authors'.
    iterations
        Outer iterations.
    batch_size
        Particles at a time.

    Raises
    ------
    InputError
        If sigma is not positive.
    """
    if not sigma > 0:
        raise InputError(f"sigma must be positive, got {sigma}")

    def at(values: list[float], divisor: float) -> float:
        exponent = np.interp(np.log(sigma), np.log(_RELEASED_SIGMA), np.log(values))
        return float(np.exp(exponent)) / divisor

    def schedule(first: list[float], by: float, last: list[float], finally_by: float):
        return Schedule(at(first, by), at(last, finally_by))

    growth = 1.7 ** (iterations - 1)
    return Algorithm1Config(
        lam=schedule(*_RELEASED_LAMBDA),
        rho=schedule(*_RELEASED_RHO),
        angle_step=Schedule(2e-4, 2e-4 * growth),
        shift_step=Schedule(2e-3, 2e-3 * growth),
        regulariser=tv.AnisotropicTV(),
        rho_nonnegative=1e3,
        iterations=iterations,
        max_trials=4,
        poses_first=True,
        keep_duals=False,
        batch_size=batch_size,
    )
