r"""The normal operator: :math:`H^T H` as a convolution, by FFT.

.. math:: H^T H\, c = w(\Theta) * c, \qquad
   w(\Theta)[k] = \sum_p (\psi * \psi^\vee)(M_{\theta_p} k) \quad\text{(eqs. 31, 32)}

The support of each term is a tube of radius ``2a`` around the viewing direction, and
only that tube is visited.

The operator is a convolution by construction. It equals :math:`H^T H` if the sum over
pixels equals the integral and the projections lie inside the images. At unit pixel
spacing the two differ by up to 1.5e-3 of the kernel's peak for the paper's window;
projections beyond the edge of the images count here, although no pixel sees them. The
volume update and the pose update use the same kernel, so they minimise the same joint
cost.

The transfer, the kernel's DFT on the padded grid, is *not* non-negative, although the
operator is positive semi-definite. It must be neither clipped nor divided by.
"""

from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxrefine._types import Rotations, Scalar, Volume
from jaxrefine.operators import _tube
from jaxrefine.operators.radial import RadialSeries
from jaxrefine.operators.spatial import Footprint

_HIGHEST = jax.lax.Precision.HIGHEST


class TubeSamples(eqx.Module):
    """An even lattice function, stored for sums over viewing tubes.

    It is stored as three padded copies in cyclic orders of the axes. Because the
    function is even, only the half space of planes ``w >= 0`` is kept.
    """

    copies: Float[Array, "3 planes side side"]
    padding: int = eqx.field(static=True)


def _half_weights(planes: int, dtype) -> Float[Array, "planes 1 1"]:
    """Return the weights of the planes ``w >= 0``: 2, but 1 for the plane ``w = 0``."""
    return jnp.full((planes, 1, 1), 2.0, dtype).at[0].set(1.0)


@eqx.filter_jit
def tube_samples(even: Float[Array, "k k k"], radius: float) -> TubeSamples:
    """Prepare an even lattice function, of odd side, for sums over viewing tubes."""
    padding = _tube.window_size(radius)
    middle = even.shape[0] // 2
    copies = _tube.cyclic_copies(even)[:, middle:]
    width = ((0, 0), (0, 0), (padding, padding), (padding, padding))
    return TubeSamples(jnp.pad(copies, width), padding)


def _tube_windows(rotation, planes: int, side: int, radius: float):
    """Return the tube's window in every plane, and the image points of its lattice.

    Returns the line, the corners as indices into a padded array of the given side,
    and the coordinates u, v, w and x, y of the window's points.
    """
    window = _tube.window_size(radius)
    line = _tube.viewing_line(rotation)
    zero = jnp.zeros((), rotation.dtype)
    w = jnp.arange(planes, dtype=rotation.dtype)
    centre = side // 2
    corner = _tube.window_corner(line, zero, zero, w, radius)
    first = [jnp.clip(c + centre, 0, side - window) for c in corner]
    u, v = (_tube.window_span(f - centre, window, rotation.dtype) for f in first)
    u, v, w = u[:, None, :], v[:, :, None], w[:, None, None]
    return line, first, (u, v, w), _tube.project_lattice(line.projection, u, v, w)


@eqx.filter_jit
def sum_over_tube(
    samples: TubeSamples, series: RadialSeries, rotation: Float[Array, "3 3"]
) -> Scalar:
    r"""Return :math:`\sum_k A[k] f(\|M k\|^2)` over the tube where ``f`` lives.

    With ``A`` the autocorrelation of ``c`` and ``f`` that of the footprint this is
    :math:`c^T (w(\theta) * c)`, at the cost of O(n a^2) instead of a 3-D convolution.
    """
    (line, values, _, (x, y)) = _gather(samples, series.radius, rotation)
    return jnp.sum(values * series(x**2 + y**2))


@eqx.filter_jit
def sum_over_tube_and_gradient(
    samples: TubeSamples, series: RadialSeries, rotation: Float[Array, "3 3"]
) -> tuple[Scalar, Float[Array, "2 3"]]:
    r"""Return :func:`sum_over_tube` and its derivative with respect to ``M``.

    The derivative, :math:`\sum_k A[k]\, \nabla f(M k)\, k^T`, contracted with
    :math:`\partial M/\partial\theta_i`, is :math:`c^T (r_v * c)` of eqs. (18)-(19).
    """
    line, values, lattice, (x, y) = _gather(samples, series.radius, rotation)
    squared = x**2 + y**2
    slope = 2.0 * values * series.slope(squared)
    moments = _tube_moments(slope[None] * jnp.stack([x, y]), lattice)
    return jnp.sum(values * series(squared)), _tube.uncycle(line, moments)


def _tube_moments(values: Float[Array, "d planes v u"], lattice) -> Float[Array, "d 3"]:
    """Sum functions over a tube's windows, times the coordinates u, v and w.

    The lattice holds the coordinates, to broadcast. Within a window they are those of
    its corner and whole numbers, so one product of matrices makes all sums. (Written as
    several sums, XLA would evaluate the functions anew for each.)
    """
    u, v, w = lattice
    window = values.shape[-1]
    step = jnp.arange(window, dtype=values.dtype)
    by_u, by_v = jnp.broadcast_arrays(step[None, :], step[:, None])
    weights = jnp.stack([jnp.ones_like(by_u), by_u, by_v], axis=-1)
    planes = values.reshape(*values.shape[:2], -1)
    sums = jnp.matmul(planes, weights.reshape(-1, 3), precision=_HIGHEST)
    corners = jnp.stack([u[:, 0, 0], v[:, 0, 0], w[:, 0, 0]])
    of_corners = jnp.matmul(sums[..., 0], corners.T, precision=_HIGHEST)
    within = jnp.sum(sums, axis=1)
    return of_corners + jnp.pad(within[:, 1:], ((0, 0), (0, 1)))


def _gather(samples: TubeSamples, radius: float, rotation):
    """Read a lattice function in the tube's windows, weighted for both half spaces."""
    _, planes, side, _ = samples.copies.shape
    line, (u0, v0), lattice, points = _tube_windows(rotation, planes, side, radius)
    window = _tube.window_size(radius)
    size = (1, 1, window, window)
    read = jax.vmap(
        lambda plane, v, u: jax.lax.dynamic_slice(
            samples.copies, (line.axis, plane, v, u), size
        )[0, 0]
    )
    values = read(jnp.arange(planes, dtype=v0.dtype), v0, u0)
    return line, values * _half_weights(planes, values.dtype), lattice, points


@eqx.filter_jit
def kernel(footprint: Footprint, rotations: Rotations, n: int) -> Float[Array, "k k k"]:
    r"""Return the convolution kernel ``w(Theta)`` of the normal operator, eq. (32).

    .. math:: w(\Theta)[k] = \sum_p (\psi * \psi^\vee)(M_{\theta_p} k)

    Parameters
    ----------
    footprint
        The footprint ``psi`` and its autocorrelation.
    rotations
        Rotations of the particles, shape ``(P, 3, 3)``. The kernel does not depend
        on their shifts.
    n
        Side of the volume in voxels.

    Returns
    -------
    The kernel on ``[-(n-1), n-1]**3``, indexed ``[z, y, x]``; the displacement 0 is at
    the middle.
    """
    series = footprint.autocorrelation
    window = _tube.window_size(series.radius)
    side = 2 * n - 1 + 2 * window

    def add_particle(total, rotation):
        line, (u0, v0), _, (x, y) = _tube_windows(rotation, n, side, series.radius)
        planes = jnp.arange(n, dtype=u0.dtype)

        def add_plane(total, window_of_plane):
            plane, v, u, values = window_of_plane
            start = (line.axis, plane, v, u)
            current = jax.lax.dynamic_slice(total, start, (1, 1, window, window))
            return jax.lax.dynamic_update_slice(total, current + values, start), None

        values = series(x**2 + y**2)[:, None, None]
        return jax.lax.scan(add_plane, total, (planes, v0, u0, values))

    blank = jnp.zeros((3, n, side, side), rotations.dtype)
    half, _ = jax.lax.scan(add_particle, blank, rotations)
    half = half[:, :, window:-window, window:-window]
    full = jnp.concatenate([half[:, :0:-1, ::-1, ::-1], half], axis=1)
    return _tube.merge_copies(full)


def padded_size(n: int) -> int:
    """Return the side of a grid that holds a linear convolution of side ``n``.

    It is an even number of at least ``2n`` for which the FFT is fast.
    """
    from scipy.fft import next_fast_len  # slow to import

    half: int = next_fast_len(n, real=True)  # pyright: ignore[reportAssignmentType]
    return 2 * half


@eqx.filter_jit
def transfer(kernel: Float[Array, "k k k"]) -> Float[Array, "f f h"]:
    """Return the kernel's DFT on a padded grid, real because the kernel is even.

    The grid's side is :func:`padded_size`.
    """
    n = (kernel.shape[0] + 1) // 2
    size = padded_size(n)
    # Moved as a whole: a scatter would need the indices of all voxels.
    grid = jnp.pad(kernel, (0, size - kernel.shape[0]))
    return jnp.fft.rfftn(jnp.roll(grid, 1 - n, axis=(0, 1, 2))).real


@eqx.filter_jit
def apply_normal(transfer: Float[Array, "f f h"], coefficients: Volume) -> Volume:
    """Apply the normal operator, ``H^T H c = w * c``, eq. (31): two FFTs.

    Parameters
    ----------
    transfer
        Transfer of the kernel, from :func:`transfer`.
    coefficients
        Coefficients ``c`` of side ``n``.
    """
    n, size = coefficients.shape[0], transfer.shape[0]
    spectrum = jnp.fft.rfftn(coefficients, s=(size,) * 3)
    # The product is written out, because converting the real transfer to a complex one
    # would move twice the memory.
    spectrum = jax.lax.complex(spectrum.real * transfer, spectrum.imag * transfer)
    return jnp.fft.irfftn(spectrum, s=(size,) * 3)[:n, :n, :n]


@eqx.filter_jit
def autocorrelation(coefficients: Volume) -> Float[Array, "k k k"]:
    r"""Return :math:`(c * c^\vee)[k] = \sum_j c[j + k]\, c[j]` on ``[-(n-1), n-1]**3``.

    With it, every particle's quadratic term is a sum over a tube:
    :math:`c^T (w(\theta) * c) = \sum_k w(\theta)[k]\,(c * c^\vee)[k]`.
    """
    n = coefficients.shape[0]
    size = padded_size(n)
    spectrum = jnp.fft.rfftn(coefficients, s=(size,) * 3)
    power = jnp.real(spectrum) ** 2 + jnp.imag(spectrum) ** 2
    full = jnp.fft.irfftn(power, s=(size,) * 3)
    side = 2 * n - 1
    return jnp.roll(full, n - 1, axis=(0, 1, 2))[:side, :side, :side]


@eqx.filter_jit
def circulant_eigenvalues(kernel: Float[Array, "k k k"]) -> Float[Array, "n n g"]:
    r"""Return the eigenvalues of the circulant nearest to the normal operator.

    This is T. Chan's optimal circulant, nearest in the Frobenius norm (SIAM J. Sci.
    Stat. Comput. 9, 1988), along all three axes. Its kernel is that of the operator
    times the fraction of pairs of voxels that have this displacement, folded to the
    period ``n``:

    .. math:: \tilde w[k] = \sum_{j \in k + n \mathbb{Z}^3} w[j]
       \prod_{i=1}^3 \Bigl(1 - \frac{|j_i|}{n}\Bigr), \qquad |j_i| < n.

    It inherits the positive definiteness of the operator, which the transfer does not
    have.

    Parameters
    ----------
    kernel
        Kernel ``w`` on ``[-(n-1), n-1]**3``.

    Returns
    -------
    The eigenvalues in the layout of ``rfftn``, of shape ``(n, n, n // 2 + 1)``.
    """
    n = (kernel.shape[0] + 1) // 2
    fraction = 1.0 - jnp.abs(jnp.arange(-(n - 1), n, dtype=kernel.dtype)) / n
    overlap = jnp.einsum("z,y,x->zyx", *[fraction] * 3, precision=_HIGHEST)
    folded = kernel * overlap
    for axis in range(3):
        negative, others = jnp.split(folded, [n - 1], axis)
        before = [(int(i == axis), 0) for i in range(3)]
        folded = others + jnp.pad(negative, before)
    return jnp.fft.rfftn(folded).real


def circulant_inverse(
    eigenvalues: Float[Array, "n n g"], rho: Scalar, shift: Scalar
) -> Callable[[Volume], Volume]:
    r"""Return a preconditioner for :math:`H^T H + \rho L^T L + s I`.

    It is the inverse of the circulant approximation of the sum. Eigenvalues below a
    thousandth of the largest one are raised to it, so that the preconditioner does not
    amplify frequencies that hardly any image has measured.

    Parameters
    ----------
    eigenvalues
        Of the circulant nearest to ``H^T H``, see :func:`circulant_eigenvalues`.
    rho, shift
        Weights of ``L^T L``, the discrete Laplacian, and of the identity.
    """
    n = eigenvalues.shape[0]
    phase = 2 * jnp.pi / n * jnp.arange(n, dtype=eigenvalues.dtype)
    wave = 2.0 - 2.0 * jnp.cos(phase)
    half = wave[: n // 2 + 1]
    laplacian = wave[:, None, None] + wave[None, :, None] + half[None, None, :]
    spectrum = eigenvalues + rho * laplacian + shift
    spectrum = jnp.maximum(spectrum, 1e-3 * jnp.max(spectrum))

    def apply(c: Volume) -> Volume:
        transformed = jnp.fft.rfftn(c)
        quotient = transformed / spectrum.astype(transformed.dtype)
        return jnp.fft.irfftn(quotient, s=c.shape)

    return apply
