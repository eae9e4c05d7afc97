r"""The settings of the paper, and those of its authors' released code.

What the paper leaves open is said where it is chosen.
"""

from jaxrefine.errors import InputError
from jaxrefine.maps import tv
from jaxrefine.paper.algorithm1 import Algorithm1Config, Schedule


def paper_preset(
    sigma: float, iterations: int = 20, batch_size: int = 8
) -> Algorithm1Config:
    """Return the settings of the paper's section IV-C.

    ``K_ADMM = 5``, ``K_GD = 3``, ``alpha_theta = 1e-7``, ``alpha_t = 1e-5``,
    ``eta = 0.25``, the volume before the poses, isotropic TV, persistent multipliers.
    The paper says that lambda and rho "grow like sigma" and gives no numbers: the
    constants here are ours.

    Parameters
    ----------
    sigma
        Standard deviation of the noise in a pixel.
    iterations
        Outer iterations; about 20 in Fig. 8.
    batch_size
        Particles at a time.

    Raises
    ------
    InputError
        If sigma is not positive.
    """
    if not sigma > 0:
        raise InputError(f"sigma must be positive, got {sigma}")
    return Algorithm1Config(
        lam=Schedule(3.0 * sigma),
        rho=Schedule(300.0 * sigma),
        angle_step=Schedule(1e-7),
        shift_step=Schedule(1e-5),
        iterations=iterations,
        batch_size=batch_size,
    )


def released_preset(iterations: int = 10, batch_size: int = 8) -> Algorithm1Config:
    """Return the settings of the authors' released demo (noise sigma 0.1).

    Anisotropic TV and non-negativity, geometric schedules of lambda, rho and of the
    steps, the poses before the volume, at most four line-search trials, multipliers
    reset in every outer iteration. Not taken over are its mask, its circular
    differences and its TV-regularised initial coefficients. What it computes by finite
    differences of ``||g - H c||^2`` is here the explicit gradient of half of that, so
    its steps (1e-4 and 1e-3, growing by 1.7) are doubled.
    """
    growth = 1.7 ** (iterations - 1)
    return Algorithm1Config(
        lam=Schedule(2.0, 0.02),
        rho=Schedule(2000.0, 4.0),
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
