r"""Sums over images, and the maps that are made from them.

A map at fixed poses needs two sums over the images: the convolution kernel ``w`` of the
normal operator and the back-projection ``H^T g``, both weighted by the inverse power of
the noise (:class:`Sums`). Two kinds of maps are made from them: regularised by TV
(:func:`solve`), and by least squares alone (:func:`least_squares`).

With whitened images, the noise in a voxel of the back-projection has the standard
deviation :math:`\sqrt{w[0]}`. The weight of the regulariser is measured in this unit,
:math:`\lambda = \tau \sqrt{w[0]}`. The best ``tau`` then hardly depends on the noise,
the number of particles and the contrast (measured by ``benchmarks/regularisation.py``),
and a ``tau`` chosen on half of the particles is right for all of them.

An image of a symmetric map is inserted at every pose ``R S`` with its full weight, as
if the group's order times as many images had been taken. On symmetric maps, this
multiplies the data term by the order of the group, and the noise with it: a voxel of
:math:`b' = \sum_S b(Sx)` has the variance :math:`\sum_S w'[x - Sx]`, where ``w'`` is
the kernel of all insertions. Far from the axes this is its first term :math:`w'[0]`, as
for that many independent images, so ``tau`` keeps its meaning. (Near an axis the copies
share their noise, which adds up.)
"""

from typing import final

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.sparse.linalg import cg
from jaxtyping import Array, Complex, Float

from jaxrefine._arrays import on_device
from jaxrefine._types import Scalar, Volume
from jaxrefine.geometry import Poses
from jaxrefine.maps import admm, tv
from jaxrefine.operators import normal, slices
from jaxrefine.operators.ball import in_ball
from jaxrefine.operators.gridding import Insertion
from jaxrefine.operators.slices import Disc

# Relative Tikhonov floor of unmeasured frequencies in `least_squares`, in units of the
# mean eigenvalue w[0]: large enough to keep the system well-conditioned, too small to
# change a frequency that an average number of images has measured.
_TIKHONOV_FLOOR = 1e-3

# Relative residual at which `least_squares` stops, if not by its number of iterations.
_TOLERANCE = 1e-4

# The conjugate gradients of an ADMM iteration in `solve`: few and inexact, because each
# starts from the previous iteration's solution, and the next one corrects it.
_CG_ITERATIONS = 4
_CG_TOLERANCE = 1e-3

# The penalty rho of `solve` in units of w[0], the mean eigenvalue of the normal
# operator, so that it does not depend on the noise or the number of images. It changes
# the speed of convergence and not the limit; the factor is a convention that no
# benchmark has set.
_PENALTY = 4.0


@final
class Sums(eqx.Module):
    """The sums over images that a volume update needs.

    Both are weighted by the inverse power of the noise. Sums over different images can
    be added.

    Attributes
    ----------
    kernel
        Convolution kernel ``w`` of the normal operator, of side ``2n - 1``.
    backprojection
        ``H^T g``, of side ``n``.
    """

    kernel: Float[Array, "k k k"]
    backprojection: Volume

    @staticmethod
    def zero(n: int, dtype) -> "Sums":
        """Return the sums over no images."""
        return Sums(
            *(on_device(np.zeros((side,) * 3, dtype)) for side in Sums.sides(n))
        )

    @staticmethod
    def sides(n: int) -> tuple[int, int]:
        """Return the sides of kernel and back-projection, of maps of side ``n``."""
        return 2 * n - 1, n

    def __add__(self, other: "Sums") -> "Sums":
        return _added(self, other)

    @property
    def peak(self) -> Scalar:
        """Variance of the noise in a voxel of the back-projection, ``w[0]``."""
        return _middle(self.kernel)


@eqx.filter_jit
def _added(first: Sums, second: Sums) -> Sums:
    return jax.tree.map(jnp.add, first, second)


@eqx.filter_jit
def _middle(kernel: Float[Array, "k k k"]) -> Scalar:
    middle = kernel.shape[0] // 2
    return kernel[middle, middle, middle]


def insert(
    insertion: Insertion,
    disc: Disc,
    spectra: Complex[Array, "particles k"],
    poses: Poses,
    transfer: Float[Array, "particles k"] | None,
    weights: Float[Array, "particles k"],
    side: int | None = None,
    magnification: Float[Array, "particles 2 2"] | None = None,
) -> Sums:
    """Return the sums over images, each at one pose.

    Parameters
    ----------
    insertion
        The method of inserting slices.
    disc, spectra, poses, transfer, magnification
        The images, as for :func:`jaxrefine.operators.slices.backproject`.
    weights
        Inverse power of the noise at each frequency, times the weight of the pose.
    side
        Side of the map, by default that of the images.
    """
    kernel_weights = weights if transfer is None else weights * transfer**2
    image_weights = weights if transfer is None else weights * transfer
    count = len(spectra)
    return Sums(
        slices.normal_kernel(
            insertion, disc, poses, kernel_weights, count, side, magnification
        ),
        slices.backproject(
            insertion, spectra, disc, poses, image_weights, count, side, magnification
        ),
    )


@eqx.filter_jit
def data_term(sums: Sums) -> admm.DataTerm:
    """Return the data term of images, without the constant ``||g||^2 / 2``."""
    return admm.DataTerm(
        normal.transfer(sums.kernel),
        normal.circulant_eigenvalues(sums.kernel),
        sums.backprojection,
        jnp.zeros_like(sums.peak),
    )


@eqx.filter_jit
def solve(
    data: admm.DataTerm,
    peak: Scalar,
    start: admm.ADMMState,
    tau: Scalar,
    regulariser: tv.Regulariser,
    iterations: int,
) -> admm.ADMMState:
    r"""Make a regularised map by ADMM, with :math:`\lambda = \tau \sqrt{w[0]}`.

    The penalty ``rho = 4 w[0]`` has the units of the normal operator, whose mean
    eigenvalue is ``w[0]``. Without any images, ``w[0]`` is 0 and the map is empty,
    whatever the start.

    Parameters
    ----------
    data, peak
        The data term of whitened images, and their ``w[0]``.
    start
        Map and multipliers to start from, of side ``n``.
    tau
        Weight of the regulariser in units of the noise.
    regulariser
        Prior on the map's gradient.
    iterations
        Number of ADMM iterations.

    Returns
    -------
    The map's coefficients and the multipliers.
    """
    config = admm.ADMMConfig(
        tau * jnp.sqrt(peak),
        _PENALTY * peak,
        iterations=iterations,
        cg_iterations=_CG_ITERATIONS,
        cg_tolerance=_CG_TOLERANCE,
    )
    state, _ = admm.run(start, data, config, regulariser)
    return jax.tree.map(lambda leaf: jnp.where(peak > 0, leaf, 0.0), state)


@eqx.filter_jit
def least_squares(sums: Sums, iterations: int = 20) -> Volume:
    r"""Make a map without a regulariser, as the half maps of other programs are.

    A limited number of conjugate-gradient iterations on
    :math:`(H^T H + \epsilon w[0])\,c = H^T g`, with :math:`\epsilon = 10^{-3}`, start
    from zero, where frequencies that no image has measured remain. They end before
    frequencies that few images have measured are solved for. Maps of different images
    then have only the signal in common, which the Fourier shell correlation assumes;
    regularised maps also agree where their common prior has filled them in.

    The map is zero beyond the ball in the box, and solved for within it: the corners of
    the box are seen from some directions only, and a map would hold little but noise
    there. RELION masks them, too, by a soft edge.

    Parameters
    ----------
    sums
        Sums over whitened images.
    iterations
        Maximum number of conjugate-gradient iterations.

    Returns
    -------
    Coefficients of the map, of side ``n``; zero beyond the ball (`operators.ball`), and
    everywhere if there are no images.
    """
    data, floor = data_term(sums), _TIKHONOV_FLOOR * sums.peak
    inside = in_ball(sums.backprojection.shape[0])

    def cut(volume: Volume) -> Volume:
        return jnp.where(inside, volume, 0.0)

    precondition = normal.circulant_inverse(
        data.preconditioner, jnp.zeros_like(floor), floor
    )
    coefficients, _ = cg(
        lambda c: cut(normal.apply_normal(data.transfer, c)) + floor * c,
        cut(data.backprojection),
        tol=_TOLERANCE,
        maxiter=iterations,
        M=lambda c: cut(precondition(c)),
    )
    return jnp.where(sums.peak > 0, coefficients, 0.0)
