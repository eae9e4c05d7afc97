r"""The settings of the paper, and those of its authors' released code.

The paper gives no numbers for lambda and rho, and its steps are those of one data set:
images scaled by ``s`` need ``s`` times the lambda and steps divided by ``s**2``.
:func:`paper_preset` takes lambda and rho from the images, the noise and the initial
map, and the steps from the current one.

**w[0]**, the value of the kernel (32) at the displacement 0, is the diagonal of
:math:`H^T H`:

.. math:: w[0] = \sum_p \|\psi_p\|^2 = P\,(\psi * \psi^\vee)(0).

It is how much one coefficient, alone, adds to the energy of all images, and does not
depend on the poses.

**lambda** ends at :math:`\sigma \sqrt{w[0]}`, the noise in one voxel of the
back-projection: :math:`\operatorname{Var}\,(H^T n)[k] = \sigma^2 w[0]` for white noise
``n``. A coefficient that differs from its neighbours by noise alone pulls with about
this force, and TV holds against it with lambda. It grows like sigma, as the paper says,
and like the square root of the number of particles. Lambda begins at
:math:`4\, d \sqrt{w[0]}`, where ``d`` is the root-mean-square difference of some of
the images from the projections of the initial map, or sigma if that is more, and falls
geometrically: while the poses are wrong the images differ by more than noise, and the
maps should be smooth.

**rho** is :math:`16\, w[0]` at first: the penalty multiplies :math:`\|L c\|^2` as the
data term multiplies :math:`\|c\|^2`, so it has the units of :math:`H^T H`. It falls in
proportion to lambda, as in the paper both grow like sigma, so that the threshold of
(28) stays the same, :math:`\lambda / \rho = d / (4 \sqrt{w[0]})`, and rho ends at
:math:`4\, w[0]\, \sigma / d`. At convergence the map does not depend on rho. But where
there is little noise, lambda falls far, and with a constant rho the threshold would
become so small that the iterations of a run end long before convergence.

**The steps** are :math:`1 / (2 \kappa)` in the first iteration, where :math:`\kappa` is
the mean over some of the poses of :math:`\|\partial (H c)/\partial\theta_i\|^2`, once
over the three angles and once over the two shifts
(:func:`jaxrefine.paper.steps.mean_curvatures`). This is the curvature of the cost where
projection and image agree. Along a coordinate whose curvature is the mean, that is half
of a Newton step; where two angles turn the image alike, near a tilt of zero, it is a
whole one along both. In the last iteration they are twice as long, :math:`1 / \kappa`:
a longer step is worth a try where the cost is nearly quadratic. Kappa is measured on
the current map, so the steps become shorter as the map becomes sharper.

The factors 4, 16, 1/2 and 1 were chosen with HJC and PTCH1 at 46 and 44 voxels, 200 or
300 particles, -5 and 25 dB, and are the same for all of them.
"""

import dataclasses

import equinox as eqx
import jax.numpy as jnp
import numpy as np

from jaxrefine.errors import InputError
from jaxrefine.maps import noise, tv
from jaxrefine.paper import algorithm1
from jaxrefine.paper.algorithm1 import (
    Algorithm1Config,
    Algorithm1State,
    Problem,
    Schedule,
)
from jaxrefine.paper.steps import (
    GivenSteps,
    NewtonSteps,
    Sample,
    mean_curvatures,
    sample,
)


def paper_preset(
    problem: Problem,
    start: Algorithm1State,
    sigma: float | None = None,
    iterations: int = 20,
    batch_size: int = 4,
) -> Algorithm1Config:
    """Return the settings of the paper's section IV-C, in the units of the images.

    ``K_ADMM = 5``, ``K_GD = 3``, ``eta = 0.25``, isotropic TV. The numbers that the
    paper leaves open, or gives for its own images, are derived at the head of this
    module; the multipliers, of which it says nothing, persist. Not the paper's are
    three things: lambda and rho fall, as in the released code; the coefficients are
    those of the support; and an iteration begins with the poses, because the initial
    map is better than the first one that the initial poses give and says where the
    molecule stands, and because the last map is then one of the final poses.

    Parameters
    ----------
    problem
        The data and the imaging model.
    start
        The initial poses and coefficients, from `init`. The map must have the contrast
        of the images, see `match_contrast`.
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
        If images and start do not fit each other, or are not finite; if sigma is not
        positive, or cannot be estimated; if the initial map is blank or looks the same
        from everywhere, or its contrast differs from that of the images by more than a
        factor of ten.
    """
    algorithm1.check(start, problem)
    sigma = _noise(problem) if sigma is None else sigma
    if not sigma > 0:
        raise InputError(f"sigma must be positive, got {sigma}")
    measured = sample(problem, start)
    gain = _gain(measured)
    if not 0.1 < gain < 10:
        raise InputError(
            "the initial map must have the contrast of the images (see "
            f"match_contrast), got one that fits best when multiplied by {gain:.3g}"
        )
    angle, shift = (float(each) for each in mean_curvatures(problem, start))
    # Of a map that extends to a tenth of the radius, at least.
    if not angle > shift * (0.05 * measured.images.shape[-1]) ** 2 * 1e-2:
        raise InputError(
            "the initial map must change with its orientation, got one whose "
            f"projections change by {angle:.3g} per square radian"
        )
    difference = float(
        jnp.sqrt(jnp.mean((measured.images - measured.projections) ** 2))
    )
    diagonal = float(problem.footprint.autocorrelation(jnp.zeros(())))
    diagonal *= problem.images.shape[0]
    # No less than their noise, of which a map that was not made of them knows nothing.
    difference = max(difference, sigma)
    return Algorithm1Config(
        lam=Schedule(4.0 * difference * diagonal**0.5, sigma * diagonal**0.5),
        rho=Schedule(16.0 * diagonal, 4.0 * diagonal * sigma / difference),
        steps=NewtonSteps(Schedule(0.5, 1.0)),
        iterations=iterations,
        cg_iterations=10,
        poses_first=True,
        batch_size=batch_size,
    )


def match_contrast(problem: Problem, start: Algorithm1State) -> Algorithm1State:
    """Scale the initial map to the contrast of the images.

    By the factor that fits its projections at the initial poses to the images, by least
    squares. The poses need not be good, since a map is smooth at the start; the worse
    they are, the lower is the factor.

    Raises
    ------
    InputError
        If images and start do not fit each other, or are not finite; if the initial map
        is blank, or resembles the negative of the images.
    """
    algorithm1.check(start, problem)
    gain = _gain(sample(problem, start))
    if not gain > 0:
        raise InputError(
            "the initial map must have the sign of the images, and poses that have to "
            f"do with them, got one that fits best when multiplied by {gain:.3g}"
        )
    scaled = gain * start.volume.coefficients
    return eqx.tree_at(lambda s: s.volume.coefficients, start, scaled)


def _gain(measured: Sample) -> float:
    """Return the factor by which projections fit images best."""
    power = float(jnp.sum(measured.projections**2))
    if not power > 0:
        raise InputError("the initial map must not be blank, got one without density")
    return float(jnp.sum(measured.images * measured.projections)) / power


def _noise(problem: Problem) -> float:
    """Estimate the noise in the images."""
    sigma = noise.white_noise(problem.images)
    if not sigma > 0:
        raise InputError(
            "images must show noise outside of the particle where sigma is not given, "
            "got none"
        )
    return sigma


def printed_preset(
    problem: Problem,
    start: Algorithm1State,
    sigma: float | None = None,
    iterations: int = 20,
    batch_size: int = 4,
) -> Algorithm1Config:
    """Return `paper_preset` with the steps that the paper prints, 1e-7 and 1e-5.

    They fit the units of the paper's images, whatever these were, and no others.
    Parameters and errors are those of `paper_preset`.
    """
    config = paper_preset(problem, start, sigma, iterations, batch_size)
    steps = GivenSteps(Schedule(1e-7), Schedule(1e-5))
    return dataclasses.replace(config, steps=steps)


# Noise levels of the released code, and lambda and rho in the first and in the last
# outer iteration at each of them, each with what the code divides them by.
_RELEASED_SIGMA = 10.0 ** np.linspace(-1, 2, 5)
_RELEASED_LAMBDA = [1e2, 1e2, 1e2, 1e3, 4e3], 50.0, [1e1, 1e1, 1e1, 5e2, 4e3], 500.0
_RELEASED_RHO = [2e3, 2e3, 2e3, 7e4, 3e5], 2.0, [2e2, 2e2, 2e2, 3.2e4, 3e5], 100.0


def released_preset(
    sigma: float = 0.1, iterations: int = 10, batch_size: int = 4
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
        steps=GivenSteps(Schedule(2e-4, 2e-4 * growth), Schedule(2e-3, 2e-3 * growth)),
        regulariser=tv.AnisotropicTV(),
        rho_nonnegative=1e3,
        iterations=iterations,
        max_trials=4,
        poses_first=True,
        keep_duals=False,
        batch_size=batch_size,
    )
