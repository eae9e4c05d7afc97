r"""The volume update from folds of the particles, and what the folds say of it.

The particles of a refinement are dealt into two folds. Each fold's images are summed
up once (a kernel and a back-projection); its map is made from *the other fold*. Then

- a particle's pose is fitted to a map that its own noise is not in. (Otherwise the map
  pulls every particle to where it was inserted last, by some nats at low SNR.);
- the regression of a fold's images on the other fold's map gives, shell by shell, the
  scale that undoes TV's loss of contrast where the map is right, and shrinks it where
  it is not, and the power spectrum of the noise;
- the weight of the regulariser is the one whose maps best predict the images that they
  were not made from (cross-validation).

With whitened images the noise in a voxel of the back-projection has the standard
deviation :math:`\sqrt{w[0]}`, ``w`` being the normal kernel. The regulariser's weight
is measured in it, :math:`\lambda = \tau \sqrt{w[0]}`: the best ``tau``
then hardly depends on the noise, the number of particles and the contrast (measured by
``benchmarks/regularisation.py``), and that of half the particles serves them all.

An image of a symmetric map is inserted at every pose ``R S`` with its whole weight, as
if the group's order of images had been taken. That scales the data term on symmetric
maps by the order, and the noise with it: a voxel of :math:`b' = \sum_S b(Sx)` has the
variance :math:`\sum_S w'[x - Sx]`, ``w'`` being the kernel of all insertions, which
far from the axes is its first term :math:`w'[0]`, as for so many independent images.
Hence ``tau`` keeps its meaning. (Near an axis the copies' noise is one and adds up.)
"""

from collections.abc import Sequence
from typing import final

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.scipy.sparse.linalg import cg
from jaxtyping import Array, Complex, Float

from jaxrefine import admm, normal, slices, tv
from jaxrefine._fourier import radii
from jaxrefine._types import Scalar, Volume
from jaxrefine.geometry import Poses
from jaxrefine.gridding import Insertion, Spectrum
from jaxrefine.slices import Disc

_HIGHEST = jax.lax.Precision.HIGHEST

FOLDS = 2
"""Number of folds: two, whose maps are independent of each other."""

_UNMEASURED = 1e-3  # of the mean eigenvalue: what least squares take for nothing
_TOLERANCE = 1e-4

_ALIKE = 32.0
"""Frequencies that the common shape of the groups' noise counts for in a shell."""


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


def filter_shells(volume: Volume, gain: Float[Array, "shells"]) -> Volume:
    """Multiply a map's spectrum by a gain per shell, linear between the shells.

    The gain at the last shell also holds beyond it.
    """
    n = volume.shape[0]
    shells = jnp.arange(gain.shape[0], dtype=gain.dtype)
    factor = jnp.interp(jnp.asarray(radii(n), gain.dtype), shells, gain)
    spectrum = jnp.fft.rfftn(volume)
    spectrum = jax.lax.complex(spectrum.real * factor, spectrum.imag * factor)
    return jnp.fft.irfftn(spectrum, s=volume.shape)


@final
class ShellSums(eqx.Module):
    """Sums over images, or groups of them, and the frequencies of a shell; they add up.

    Attributes
    ----------
    data, model
        Powers of the images and of the projections.
    cross
        Their inner product.
    count
        Number of frequencies, both of a pair.
    """

    data: Float[Array, "*groups shells"]
    model: Float[Array, "*groups shells"]
    cross: Float[Array, "*groups shells"]
    count: Float[Array, "*groups shells"]

    def __add__(self, other: "ShellSums") -> "ShellSums":
        return jax.tree.map(jnp.add, self, other)

    def pooled(self, weights: Float[Array, "groups shells"]) -> "ShellSums":
        """Return the sums over all groups, each with its weights."""
        return jax.tree.map(lambda leaf: jnp.sum(weights * leaf, axis=0), self)

    @property
    def gain(self) -> Float[Array, "*groups shells"]:
        r"""Least-squares scale of the projections, :math:`\langle g, S\rangle/|S|^2`.

        From 0 to 2; 0 where the projections have no power.
        """
        known = self.model > 0
        ratio = self.cross / jnp.where(known, self.model, 1.0)
        return jnp.where(known, jnp.clip(ratio, 0.0, 2.0), 0.0)

    def residual(self, gain: Float[Array, "shells"]) -> Float[Array, "*groups shells"]:
        """Return the power of what the scaled projections leave of the images."""
        gain = jnp.broadcast_to(gain, self.data.shape)
        left = self.data - 2 * gain * self.cross + gain**2 * self.model
        return jnp.maximum(left, 0.0)


def shell_sums(
    spectrum: Spectrum | None,
    disc: Disc,
    data: Complex[Array, "particles k"],
    poses: Poses,
    transfer: Float[Array, "particles k"] | None,
    included: Float[Array, "*groups particles"],
) -> ShellSums:
    """Compare images with projections at their poses, shell by shell.

    ``included`` is 1 for a particle that counts, in a group, and 0 for one that does
    not; without a spectrum only the power of the data is found.
    """
    count = disc.image_size // 2 + 1
    times = disc.multiplicity.astype(included.dtype)[None]

    def per_shell(values: Float[Array, "particles k"]):
        total = jnp.matmul(included, values * times, precision=_HIGHEST)
        return jax.ops.segment_sum(total.T, disc.shells, count).T

    power = per_shell(data.real**2 + data.imag**2)
    number = per_shell(jnp.ones_like(data.real))
    if spectrum is None:
        return ShellSums(power, jnp.zeros_like(power), jnp.zeros_like(power), number)
    model = slices.project(spectrum, disc, poses, transfer, len(data))
    cross = model.real * data.real + model.imag * data.imag
    model_power = model.real**2 + model.imag**2
    return ShellSums(power, per_shell(model_power), per_shell(cross), number)


def noise_power(
    residual: Float[Array, "groups shells"], count: Float[Array, "groups shells"]
) -> Float[Array, "groups shells"]:
    r"""Return the mean power of the noise in each group, leaning on what all share.

    Groups are taken to have noise of any level :math:`a_g` and roughly of one shape,
    that of all residuals together, :math:`\bar N_s = \sum_g E_{gs} / \sum_g n_{gs}`:

    .. math:: N_{gs} = \frac{E_{gs} + 32\, a_g \bar N_s}{n_{gs} + 32}, \qquad
       a_g = \frac{1 + \sum_{s>0} E_{gs} / \bar N_s}{1 + \sum_{s>0} n_{gs}}.

    This is the mean of two estimates by the inverse of their variances: a mean of ``n``
    squares has the relative variance ``2 / n``, and a group's own shape is expected to
    be off by a quarter, ``2 / 32``. So a group of few images has the common spectrum at
    its own level, one of none just the common spectrum, and a single group has its own.

    Parameters
    ----------
    residual
        Power :math:`E` of the residuals, summed.
    count
        Number :math:`n` of frequencies in the sums.
    """
    own = residual / jnp.maximum(count, 1.0)
    mean = jnp.sum(residual, axis=0) / jnp.maximum(jnp.sum(count, axis=0), 1.0)
    mean = jnp.broadcast_to(mean, own.shape)
    ratio = jnp.where(mean > 0, own / jnp.where(mean > 0, mean, 1.0), 1.0)
    # The origin is the background's.
    level, total = (
        1.0 + jnp.sum(values[:, 1:], axis=1, keepdims=True)
        for values in (count * ratio, count)
    )
    common = level / total * mean
    # In this order a single group has its own power to the last bit.
    return own + (common - own) * (_ALIKE / (count + _ALIKE))
