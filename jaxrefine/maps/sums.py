r"""Sums over images, and the maps that are made of them.

A map at fixed poses needs two sums over the images: the convolution kernel ``w`` of the
normal operator and the back-projection ``H^T g``, both weighted by the inverse power of
the noise (:class:`Sums`). Two maps are made of them: one regularised by TV
(:func:`solve`), and one by least squares alone (:func:`least_squares`).

With whitened images the noise in a voxel of the back-projection has the standard
deviation :math:`\sqrt{w[0]}`. The regulariser's weight is measured in it,
:math:`\lambda = \tau \sqrt{w[0]}`: the best ``tau`` then hardly depends on the noise,
the number of particles and the contrast (measured by ``benchmarks/regularisation.py``),
and the ``tau`` that suits half of the particles suits all of them.

An image of a symmetric map is inserted at every pose ``R S`` with its whole weight, as
if as many images had been taken as the group has operators. That scales the data term
on symmetric maps by the order of the group, and the noise with it: a voxel of
:math:`b' = \sum_S b(Sx)` has the variance :math:`\sum_S w'[x - Sx]`, where ``w'`` is
the kernel of all insertions. Far from the axes this is its first term :math:`w'[0]`, as
for so many independent images, so ``tau`` keeps its meaning. (Near an axis the copies
share their noise, which adds up.)
"""

from typing import final

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.scipy.sparse.linalg import cg
from jaxtyping import Array, Complex, Float

from jaxrefine._types import Scalar, Volume
from jaxrefine.geometry import Poses
from jaxrefine.maps import admm, tv
from jaxrefine.operators import normal, slices
from jaxrefine.operators.gridding import Insertion
from jaxrefine.operators.slices import Disc

_HIGHEST = jax.lax.Precision.HIGHEST


_UNMEASURED = 1e-3  # of the mean eigenvalue: what least squares take for nothing

_TOLERANCE = 1e-4


@final
class Sums(eqx.Module):
    """What the volume update needs to know of some images; sums add up.

    Attributes
    ----------
    kernel
        Convolution kernel of the normal operator, of side ``2n - 1``.
    backprojection
        ``H^T g``, both weighted by the inverse power of the noise.
    """

    kernel: Float[Array, "k k k"]
    backprojection: Volume

    @staticmethod
    def zero(n: int, dtype) -> "Sums":
        """Return the sums of no image."""
        return Sums(jnp.zeros((2 * n - 1,) * 3, dtype), jnp.zeros((n,) * 3, dtype))

    def __add__(self, other: "Sums") -> "Sums":
        return jax.tree.map(jnp.add, self, other)

    @property
    def peak(self) -> Scalar:
        """Variance of the noise in a voxel of the back-projection, ``w[0]``."""
        middle = self.kernel.shape[0] // 2
        return self.kernel[middle, middle, middle]


def insert(
    insertion: Insertion,
    disc: Disc,
    spectra: Complex[Array, "particles k"],
    poses: Poses,
    transfer: Float[Array, "particles k"] | None,
    weights: Float[Array, "particles k"],
) -> Sums:
    """Sum up images, each at one pose.

    Parameters
    ----------
    insertion
        The way to insert slices.
    disc, spectra, poses, transfer
        The images, as for `slices.backproject`.
    weights
        Inverse power of the noise times the weight of the pose.
    """
    squared = weights if transfer is None else weights * transfer**2
    single = weights if transfer is None else weights * transfer
    count = len(spectra)
    return Sums(
        slices.normal_kernel(insertion, disc, poses, squared, count),
        slices.backproject(insertion, spectra, disc, poses, single, count),
    )


@eqx.filter_jit
def data_term(sums: Sums) -> admm.DataTerm:
    """Return the quadratic of some images (without the constant of their energy)."""
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
    r"""Make ADMM iterations with :math:`\lambda = \tau \sqrt{w[0]}`.

    The penalty ``rho = 4 w[0]`` has the units of the normal operator, whose mean
    eigenvalue is ``w[0]``. A factor from 2 to 8 makes little difference to the speed.
    Of no images, whose ``w[0]`` is 0, it makes an empty map, whatever the start.

    Parameters
    ----------
    data, peak
        The data term of some images, whitened, and their ``w[0]``.
    start
        Map and multipliers to start from, of side ``n``.
    tau
        Weight of the regulariser in units of the noise.
    regulariser
        Prior on the map's gradient.
    iterations
        ADMM iterations.
    """
    config = admm.ADMMConfig(
        tau * jnp.sqrt(peak),
        4.0 * peak,
        iterations=iterations,
        cg_iterations=4,
        cg_tolerance=1e-3,
    )
    state, _ = admm.run(start, data, config, regulariser)
    return jax.tree.map(lambda leaf: jnp.where(peak > 0, leaf, 0.0), state)


@eqx.filter_jit
def least_squares(sums: Sums, iterations: int = 20) -> Volume:
    r"""Make a map of some images without a regulariser, as other programs' half maps.

    Some conjugate gradients on :math:`(H^T H + \epsilon w[0])\,c = H^T g`, from zero,
    where what no image has measured stays; they end before frequencies that few images
    have measured are solved for. Maps of different images then share the signal alone,
    as a Fourier shell correlation between them takes for granted: regularised ones
    agree beyond it, since their prior fills in alike.

    Parameters
    ----------
    sums
        Of the images, whitened.
    iterations
        Of the conjugate gradients, at most.
    """
    data, small = data_term(sums), _UNMEASURED * sums.peak
    found, _ = cg(
        lambda c: normal.apply_normal(data.transfer, c) + small * c,
        data.backprojection,
        tol=_TOLERANCE,
        maxiter=iterations,
        M=normal.circulant_inverse(data.preconditioner, jnp.zeros_like(small), small),
    )
    return jnp.where(sums.peak > 0, found, 0.0)
