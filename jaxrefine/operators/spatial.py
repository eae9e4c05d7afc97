r"""The spatial projector: the paper's imaging model, evaluated directly.

.. math:: (H(\theta, t)\,c)[m] = \sum_k c[k]\, \psi(m - M_\theta k - t),
   \qquad \psi = h * P(\varphi) \qquad\text{(eqs. 4-6)}

The projection gathers, for every pixel, the voxels in the tube behind it; the
back-projection gathers, for every voxel, the pixels under its footprint. Both use the
same weights, so they are adjoint to rounding.

The back-projection is eq. (33): it samples the *continuous* function
:math:`g * \psi^\vee` at :math:`M k + t`. An image filter makes that function from an
image: :class:`PixelFilter` sums the footprint over pixels (exact),
:class:`SplineFilter` precomputes the function on a fine grid, as the paper proposes
(fast).
"""

import math
from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Shaped

from jaxrefine._batching import map_over_particles, sum_over_particles
from jaxrefine._types import Image, Images, Volume
from jaxrefine.ctf import IsotropicPSF
from jaxrefine.errors import InputError
from jaxrefine.geometry import Poses
from jaxrefine.operators import _tube, kbwf
from jaxrefine.operators.ball import in_ball
from jaxrefine.operators.radial import RadialSeries, radial_series
from jaxrefine.operators.spline import Spline2D, spline_prefilter


class Footprint(eqx.Module):
    r"""The image of one basis function on the detector, and its autocorrelation.

    Attributes
    ----------
    profile
        :math:`\psi = h * P(\varphi)`, eq. (4).
    autocorrelation
        :math:`\psi * \psi^\vee`, the kernel of eqs. (32) and (35).
    """

    profile: RadialSeries
    autocorrelation: RadialSeries


def footprint(
    basis: kbwf.KBWF, psf: IsotropicPSF | None = None, tolerance: float = 1e-8
) -> Footprint:
    r"""Tabulate a basis function's footprint and its autocorrelation.

    Without a PSF, the footprint is the closed form (23). The other functions have no
    closed form; they are Hankel transforms of the closed-form spectrum,
    :math:`f(r) = \frac1{2\pi} \int \hat f(\omega) J_0(\omega r)\, \omega\, d\omega`,
    computed by Gauss-Legendre quadrature in double precision.

    Parameters
    ----------
    basis
        The window of the reconstruction.
    psf
        Optional isotropic point-spread function ``h``.
    tolerance
        Relative accuracy of the series that represent the two functions.

    Raises
    ------
    InputError
        If the PSF is not negligible at its stated radius.
    """
    from scipy.special import j0  # slow to import

    radius = basis.radius + (psf.radius if psf is not None else 0.0)
    # Beyond the frequency alpha / a the spectrum is a small oscillating tail that falls
    # with the power m + 2; the part that is cut off here is below 1e-10 of the peak.
    limit = 10 * max(basis.taper, 20.0) / basis.radius
    omega, weights = _quadrature(limit, periods=limit * 2 * radius / (2 * np.pi))
    with jax.ensure_compile_time_eval(), jax.enable_x64(True):
        spectrum = np.asarray(kbwf.fourier_transform(basis, jnp.asarray(omega)))
    if psf is not None:
        spectrum = spectrum * psf.transfer(omega)

    def hankel(values: np.ndarray, radii: np.ndarray) -> np.ndarray:
        kernel = j0(np.multiply.outer(radii, omega))
        return kernel @ (values * omega * weights) / (2 * np.pi)

    def closed_form(radii: np.ndarray) -> np.ndarray:
        points = np.stack([radii, np.zeros_like(radii)], axis=-1)
        with jax.ensure_compile_time_eval(), jax.enable_x64(True):
            return np.asarray(kbwf.xray_transform(basis, jnp.asarray(points)))

    profile = closed_form if psf is None else lambda r: hankel(spectrum, r)
    centre, edge = profile(np.array([0.0, radius]))
    if abs(edge) > 1e-4 * abs(centre):
        raise InputError(
            "the PSF's radius must be so large that the footprint has fallen to 1e-4 "
            f"of its centre at its edge, {radius:g} pixels, got "
            f"{abs(edge / centre):.1e}"
        )
    return Footprint(
        radial_series(profile, radius, tolerance),
        radial_series(lambda r: hankel(spectrum**2, r), 2 * radius, tolerance),
    )


def _quadrature(limit: float, periods: float) -> tuple[np.ndarray, np.ndarray]:
    """Return nodes and weights on ``[0, limit]`` for an oscillating integrand.

    These are the 32 nodes of Gauss and Legendre in each of at least 25 panels. A panel
    has at most two of the given periods, those of the Bessel function, and at most as
    many of the PSF's own.
    """
    panels = max(25, int(np.ceil(periods / 2)))
    nodes, weights = np.polynomial.legendre.leggauss(32)
    edges = np.linspace(0.0, limit, panels + 1)
    half = np.diff(edges)[:, None] / 2
    return (edges[:-1, None] + half * (nodes + 1)).ravel(), (half * weights).ravel()


def centred_axis(size: int, dtype) -> Float[Array, "size"]:
    """Return the coordinates of the samples of an axis, zero at ``size // 2``."""
    return jnp.arange(size, dtype=dtype) - size // 2


class Support(eqx.Module):
    """The voxels where the coefficients of a map may differ from zero.

    Attributes
    ----------
    points
        Coordinates ``k`` of these voxels along x, y and z; 0 is the centre.
    index
        Their places in the flattened array of coefficients.
    n
        Side of the array.
    """

    points: Float[Array, "3 voxels"]
    index: Int[Array, "voxels"]
    n: int = eqx.field(static=True)

    @staticmethod
    def of(mask: Shaped[Array | np.ndarray, "..."]) -> "Support":
        """List the voxels where a mask is true.

        Parameters
        ----------
        mask
            Of shape ``(n, n, n)``; known, not traced.

        Raises
        ------
        InputError
            If the mask is not a cube of booleans, or true nowhere.
        """
        inside = np.asarray(mask)
        if inside.dtype != bool:
            raise InputError(
                f"a support must be a mask of booleans, got {inside.dtype}"
            )
        n = _cubic_side(inside)
        index = np.flatnonzero(inside)
        if not len(index):
            raise InputError("a support must hold at least one voxel, got none")
        z, y, x = np.array(np.unravel_index(index, inside.shape)) - n // 2
        points = np.stack([x, y, z]).astype(jnp.asarray(0.0).dtype)
        return Support(jnp.asarray(points), jnp.asarray(index, jnp.int32), n)

    @staticmethod
    def ball(n: int) -> "Support":
        """List the voxels of the ball that fits in a cube of side ``n``.

        A map outside of it would be seen from some directions only.
        """
        return Support.of(in_ball(n))

    def restrict(self, coefficients: Volume) -> Float[Array, "voxels"]:
        """Return the coefficients of these voxels."""
        return coefficients.reshape(-1)[self.index]

    def extend(self, values: Float[Array, "voxels"]) -> Volume:
        """Return an array that has these coefficients, and zeros elsewhere."""
        blank = jnp.zeros(self.n**3, values.dtype)
        return blank.at[self.index].set(values).reshape((self.n,) * 3)


def image_points(
    pose: Poses, points: tuple[Float[Array, "..."], ...] | Float[Array, "3 voxels"]
) -> tuple[Float[Array, "..."], Float[Array, "..."]]:
    """Return the image points ``M k + t`` of voxels ``k``, as x and y."""
    x, y = _tube.project_lattice(pose.rotations[:2], *points)
    return x + pose.shifts[0], y + pose.shifts[1]


def lattice(n: int, dtype) -> tuple[Float[Array, "..."], ...]:
    """Return the coordinates x, y and z of all voxels, to broadcast."""
    k = centred_axis(n, dtype)
    return k[None, None, :], k[None, :, None], k[:, None, None]


@eqx.filter_jit
def project(
    footprint: Footprint,
    coefficients: Volume,
    poses: Poses,
    image_size: int,
    batch_size: int = 8,
) -> Images:
    r"""Project a map: ``H(Theta, T) c``, eqs. (4)-(8).

    .. math:: g_p[m] = \sum_k c[k]\,\psi(m - M_{\theta_p} k - t_p)

    Parameters
    ----------
    footprint
        The footprint ``psi``.
    coefficients
        Coefficients ``c`` of the map, of shape ``(n, n, n)``.
    poses
        Poses of the ``P`` particles.
    image_size
        Side of the images in pixels.
    batch_size
        Number of particles that are processed at a time; each needs the memory of about
        ``image_size**2`` windows of ``(sqrt(8) r)**2`` values.

    Returns
    -------
    Images of shape ``(P, image_size, image_size)``.

    Raises
    ------
    InputError
        If the coefficients are not a cube, or there are no particles.
    """
    n = _cubic_side(coefficients)
    dtype = coefficients.dtype
    radius = footprint.profile.radius
    side = _tube.window_size(radius)
    copies = jnp.pad(
        _tube.cyclic_copies(coefficients), ((0, 0), (0, 0), (side, side), (side, side))
    )
    pixel = centred_axis(image_size, dtype)
    largest = n + side

    def project_one(pose: Poses) -> Image:
        line = _tube.viewing_line(pose.rotations)
        x, y = jnp.broadcast_arrays(
            pixel[None, :] - pose.shifts[0], pixel[:, None] - pose.shifts[1]
        )

        def add_plane(image, index):
            w = index.astype(dtype) - n // 2
            corner = _tube.window_corner(line, x, y, w, radius)
            u, v = (jnp.clip(c + n // 2 + side, 0, largest) for c in corner)
            slab = copies[line.axis, index]
            windows = _windows(slab, v, u, side)
            at_u, at_v = (
                _tube.window_span(first - n // 2 - side, side, dtype)
                for first in (u, v)
            )
            px, py = _tube.project_lattice(
                line.projection, at_u[..., None, :], at_v[..., :, None], w
            )
            weights = footprint.profile(
                (px - x[..., None, None]) ** 2 + (py - y[..., None, None]) ** 2
            )
            return image + jnp.sum(windows * weights, axis=(-2, -1)), None

        blank = jnp.zeros((image_size, image_size), dtype)
        return jax.lax.scan(add_plane, blank, jnp.arange(n))[0]

    return map_over_particles(project_one, poses, batch_size)


def _cubic_side(volume: Shaped[Array | np.ndarray, "..."]) -> int:
    """Return the side of a volume, or raise if it is not cubic."""
    if volume.ndim != 3 or len(set(volume.shape)) != 1:
        raise InputError(f"a volume must have shape (n, n, n), got {volume.shape}")
    return volume.shape[0]


def _windows(array: Float[Array, "h w"], row, column, side: int):
    """Gather square windows of an array, given arrays of their corners."""
    gather = jnp.vectorize(
        lambda r, c: jax.lax.dynamic_slice(array, (r, c), (side, side)),
        signature="(),()->(s,s)",
    )
    return gather(row, column)


class PixelSum(eqx.Module):
    r"""The function :math:`(g * \psi^\vee)(y) = \sum_m g[m]\,\psi(m - y)`, exactly.

    Attributes
    ----------
    padded
        The image ``g``, with a margin of one window.
    profile
        The footprint ``psi``.
    """

    padded: Image
    profile: RadialSeries

    def __call__(self, x: Float[Array, "..."], y: Float[Array, "..."]):
        """Evaluate at points given by their coordinates in pixels."""
        pixels, dx, dy = _neighbours(self.padded, self.profile.radius, x, y)
        return jnp.sum(pixels * self.profile(dx**2 + dy**2), axis=(-2, -1))

    def slopes(self) -> "PixelSlope":
        """Return the derivatives by x and by y, per pixel, stacked for `jax.vmap`."""
        along_x = PixelSlope(self.padded, self.profile)
        along_y = PixelSlope(self.padded.T, self.profile)
        return jax.tree.map(lambda *leaves: jnp.stack(leaves), along_x, along_y)


class PixelSlope(eqx.Module):
    """The derivative of a pixel sum along the first coordinate of its points.

    Attributes
    ----------
    padded
        The image ``g``, with a margin of one window; that coordinate is on its last
        axis.
    profile
        The footprint ``psi``.
    """

    padded: Float[Array, "*axes padded padded"]
    profile: RadialSeries

    def __call__(self, along: Float[Array, "..."], across: Float[Array, "..."]):
        """Evaluate at points given by their coordinates in pixels."""
        window = _neighbours(self.padded, self.profile.radius, along, across)
        pixels, d_along, d_across = window
        slope = -2.0 * pixels * self.profile.slope(d_along**2 + d_across**2)
        return jnp.sum(slope * d_along, axis=(-2, -1))


def _neighbours(padded: Float[Array, "padded padded"], radius: float, x, y):
    """Gather the pixels around points, and their offsets from the points."""
    side = _pixel_window(radius)
    centre = (padded.shape[0] - 2 * side) // 2 + side

    def start(position):
        first = jnp.ceil(position - radius).astype(jnp.int32) + centre
        first = jnp.clip(first, 0, padded.shape[0] - side)
        span = _tube.window_span(first - centre, side, x.dtype)
        return first, span - position[..., None]

    (column, dx), (row, dy) = start(x), start(y)
    pixels = _windows(padded, row, column, side)
    return pixels, dx[..., None, :], dy[..., :, None]


def _pixel_window(radius: float) -> int:
    """Return the number of pixels that an interval of length ``2 radius`` can hold."""
    return math.floor(2 * radius) + 1


class PixelFilter(eqx.Module):
    """The exact image filter, which sums the footprint over the pixels it covers."""

    footprint: Footprint

    def __call__(self, image: Image) -> PixelSum:
        """Return the continuous function of one image."""
        side = _pixel_window(self.footprint.profile.radius)
        return PixelSum(jnp.pad(image, side), self.footprint.profile)


class SplineFilter(eqx.Module):
    """The fast image filter: the filtered image as a cubic spline on a finer grid.

    Made by :func:`spline_filter`. The error of a value falls with the fourth power of
    the grid's spacing.

    Attributes
    ----------
    response
        Factors of the image's spectrum on the finer grid.
    image_size
        Side of the images in pixels.
    nodes_per_pixel
        Nodes of the grid per pixel.
    """

    response: Float[Array, "grid half"]
    image_size: int = eqx.field(static=True)
    nodes_per_pixel: int = eqx.field(static=True)

    def __call__(self, image: Image) -> Spline2D:
        """Return the continuous function of one image.

        Raises
        ------
        InputError
            If the image does not have the side that the filter was made for.
        """
        if image.shape[-1] != self.image_size:
            raise InputError(
                f"images must have the filter's side of {self.image_size} pixels, got "
                f"{image.shape[-1]}"
            )
        grid = self.response.shape[0]
        origin = grid // 2
        nodes = origin + self.nodes_per_pixel * (
            np.arange(self.image_size) - self.image_size // 2
        )
        comb = jnp.zeros((grid, grid), image.dtype).at[np.ix_(nodes, nodes)].set(image)
        spectrum = jnp.fft.rfft2(comb)
        spectrum = spectrum * self.response.astype(spectrum.dtype)
        coefficients = jnp.fft.irfft2(spectrum, s=(grid, grid))
        return Spline2D.of(coefficients, self.nodes_per_pixel, origin)


ImageFilter = Callable[[Image], PixelSum | Spline2D]
"""A filter that makes the continuous function ``g * psi~`` of an image."""


@eqx.filter_jit
def spline_filter(
    footprint: Footprint, image_size: int, nodes_per_pixel: int = 2
) -> SplineFilter:
    """Precompute the response that turns an image into its filtered spline.

    Parameters
    ----------
    footprint
        The footprint ``psi``.
    image_size
        Side of the images in pixels.
    nodes_per_pixel
        Nodes of the grid per pixel. With the paper's window, 2 gives a relative error
        of 1e-3 and 4 of 5e-5 for white noise, the roughest image there is.
    """
    from scipy.fft import next_fast_len  # slow to import

    margin = math.ceil(footprint.profile.radius) + 4
    minimum = nodes_per_pixel * (image_size + 2 * margin)
    grid = 2 * next_fast_len(-(-minimum // 2), real=True)  # pyright: ignore
    offset = centred_axis(grid, footprint.profile.coefficients.dtype) / nodes_per_pixel
    samples = footprint.profile(offset[None, :] ** 2 + offset[:, None] ** 2)
    prefilter = spline_prefilter(grid, offset.dtype)
    spectrum = jnp.fft.rfft2(jnp.fft.ifftshift(samples)).real
    response = spectrum / (prefilter[:, None] * prefilter[None, : grid // 2 + 1])
    return SplineFilter(response, image_size, nodes_per_pixel)


@eqx.filter_jit
def backproject(
    image_filter: ImageFilter,
    images: Images,
    poses: Poses,
    n: int,
    batch_size: int = 8,
) -> Volume:
    r"""Back-project images: ``H(Theta, T)^T g``, eq. (33).

    .. math:: (H^T g)[k] = \sum_p (g_p * \psi^\vee)(M_{\theta_p} k + t_p)

    With a :class:`PixelFilter` this is the adjoint of :func:`project` to rounding.

    Parameters
    ----------
    image_filter
        Makes the continuous function of each image.
    images
        Images of shape ``(P, m, m)``.
    poses
        Poses of the ``P`` particles.
    n
        Side of the volume in voxels.
    batch_size
        Number of particles that are processed at a time.

    Raises
    ------
    InputError
        If there is not one pose for each image, or if there are no images.
    """
    if len(poses) != images.shape[0]:
        raise InputError(
            f"there must be one pose for each of {images.shape[0]} images, got "
            f"{len(poses)}"
        )

    def backproject_one(particle) -> Volume:
        image, pose = particle
        points = lattice(n, pose.rotations.dtype)
        return image_filter(image)(*image_points(pose, points))

    return sum_over_particles(backproject_one, (images, poses), batch_size)
