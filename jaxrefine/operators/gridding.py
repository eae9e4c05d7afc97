r"""The spectrum of a volume at any frequency, and its adjoint.

.. math:: \hat c(\xi) = \sum_k c[k]\, e^{-2\pi i\, \xi\cdot k / n},

with ``k`` counted from the origin ``n // 2`` and frequencies ``xi = (x, y, z)`` in
cycles per box. :class:`Gridding` is pure XLA and runs on any device: one oversampled
FFT per volume, then a sum over ``width**3`` samples per frequency (Fessler and Sutton,
IEEE Trans. Signal Process. 51, 2003). :class:`Finufft` calls ``jax-finufft``, which is
accurate to a chosen tolerance, and whose adjoint is faster on a CPU.

The structure of the code below is dictated by speed. XLA runs an interpolation as one
parallel loop that writes no intermediates, several times faster than any alternative,
if two conditions hold: the sum over the samples ends in an operation that XLA does not
compute twice, and XLA cannot tell that two such sums read the same samples. See
:meth:`Spectrum._finish` and :meth:`Spectrum._zero`.
"""

import importlib.util
import math
from dataclasses import dataclass

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Complex, Float, Int

from jaxrefine._types import Volume
from jaxrefine.errors import InputError
from jaxrefine.operators import _window

Frequencies = tuple[
    Float[Array, "*points"], Float[Array, "*points"], Float[Array, "*points"]
]
"""The coordinates ``x``, ``y``, ``z`` of frequencies, or of directions among them."""

_MOST_SAMPLES = 2**31 - 1  # Samples of a grid are indexed by 32-bit integers.


@dataclass(frozen=True)
class _Lattice:
    """The samples of an oversampled spectrum that are kept.

    They are those of a half space up to the band limit, with a margin for the window:
    ``x`` runs from ``-below``, ``y`` and ``z`` from ``-reach``, all up to ``reach``.
    """

    box: int
    r_max: int
    width: int
    size: int

    @property
    def ratio(self) -> float:
        return self.size / self.box

    @property
    def below(self) -> int:
        return (self.width - 1) // 2

    @property
    def reach(self) -> int:
        return math.ceil(self.r_max * self.ratio + self.width / 2) + 1

    @property
    def shape(self) -> tuple[int, int, int]:
        side = 2 * self.reach + 1
        return side, side, self.below + self.reach + 1

    def samples(self, volume: Volume) -> Complex[Array, "z y x"]:
        """Return the samples of the corrected volume's spectrum.

        The axes are transformed one by one, so that only samples that are kept are
        transformed along the next axis.
        """
        factor = _window.correction(self.width, self.size, self.box)
        half = self.size // 2 + 1
        side = np.arange(-self.reach, self.reach + 1)
        depth = np.arange(-self.below, self.reach + 1)
        # Frequencies beyond the grid's last one continue at the period's other end.
        wrapped = (depth + self.size // 2) % self.size - self.size // 2
        values = volume
        for axis, frequencies in enumerate((np.arange(half), side, side)):
            values = values * jnp.asarray(factor[None, None], values.dtype)
            transform = jnp.fft.rfft if axis == 0 else jnp.fft.fft
            values = transform(values, n=self.size, axis=-1)
            turn = np.exp(2j * np.pi * frequencies * (self.box // 2) / self.size)
            values = values[..., frequencies % self.size]
            values = values * jnp.asarray(turn[None, None], values.dtype)
            values = jnp.moveaxis(values, -1, 0)
        # For a real volume, the other half space is the conjugate of the mirror image.
        direct = values[..., np.abs(wrapped)]
        mirrored = wrapped[None, None] < 0
        return jnp.where(mirrored, jnp.conj(direct[::-1, ::-1]), direct)

    def locate(self, points: Frequencies):
        """Return the first sample under each point, its positions, and its side.

        The positions, one for each axis, are those of the point between the samples.
        The side is -1 where the point was mirrored into the half space, otherwise 1.
        """
        x, y, z = points
        side = jnp.where(x < 0, -1, 1).astype(x.dtype)
        origins = (self.below, self.reach, self.reach)
        first, positions = [], []
        for coordinate, origin in zip((x, y, z), origins, strict=True):
            sample = coordinate * side * self.ratio + (origin + 1 - self.width / 2)
            cell = jnp.floor(sample)
            first.append(cell.astype(jnp.int32))
            positions.append(sample - cell - 0.5)
        _, rows, columns = self.shape
        index = (first[2] * rows + first[1]) * columns + first[0]
        return index, positions, side

    def offset(self, a: int, b: int, c: int) -> int:
        """Return the offset in memory of the sample ``(z, y, x) = (a, b, c)``."""
        _, rows, columns = self.shape
        return (a * rows + b) * columns + c

    def weights(self, position: Float[Array, "..."]) -> list[Float[Array, "..."]]:
        """Return the weights of the samples along an axis."""
        return _window.weights(self.width, self.ratio, position)

    def slopes(self, position: Float[Array, "..."]) -> list[Float[Array, "..."]]:
        """Return the derivatives of the weights, per cycle per box."""
        slopes = _window.slopes(self.width, self.ratio, position)
        return [self.ratio * slope for slope in slopes]


class Spectrum(eqx.Module):
    """The interpolated spectrum of a volume, made by :meth:`Gridding.spectrum`.

    It is a function of the frequency; its derivatives are exact for the interpolated
    function. Frequencies must lie within ``r_max`` cycles per box.
    """

    _samples: Complex[Array, "z y x"]
    _lattice: _Lattice = eqx.field(static=True)

    @property
    def box(self) -> int:
        """Side of the volume in voxels."""
        return self._lattice.box

    @property
    def r_max(self) -> int:
        """The largest frequency, in cycles per box."""
        return self._lattice.r_max

    @property
    def dtype(self):
        """Type of the frequencies."""
        return self._samples.real.dtype

    def __call__(
        self, x: Float[Array, "*p"], y: Float[Array, "*p"], z: Float[Array, "*p"]
    ) -> Complex[Array, "*p"]:
        """Evaluate the spectrum at frequencies in cycles per box."""
        return self.value_and_slopes((x, y, z), ())[0]

    @eqx.filter_jit
    def value_and_slopes(
        self, points: Frequencies, directions: tuple[Frequencies, ...]
    ) -> tuple[Complex[Array, "*p"], ...]:
        """Evaluate the spectrum and its derivatives along directions.

        Parameters
        ----------
        points
            Frequencies in cycles per box.
        directions
            For each derivative, the direction at every point.

        Returns
        -------
        The values, then the derivatives along each direction.
        """
        index, positions, side = self._lattice.locate(points)
        weights = [self._lattice.weights(position) for position in positions]
        (value,) = self._sum(index + self._zero(0), [_products(weights)])
        results = [self._finish(value.real, side * value.imag)]
        for i, direction in enumerate(directions):
            rows = self._slope_products(positions, side, direction)
            (slope,) = self._sum(index + self._zero(1 + i), [rows])
            results.append(self._finish(slope.real, side * slope.imag))
        return tuple(results)

    @eqx.filter_jit
    def slopes_along(
        self,
        values: Complex[Array, "*p"],
        points: Frequencies,
        directions: tuple[Frequencies, Frequencies],
    ) -> tuple[Float[Array, "*p"], Float[Array, "*p"]]:
        r"""Return :math:`\Re(\bar v\, \partial_d \hat c)` along two directions ``d``.

        Both are computed in one loop over the samples.
        """
        index, positions, side = self._lattice.locate(points)
        rows = [
            self._slope_products(positions, side, direction) for direction in directions
        ]
        slopes = self._sum(index + self._zero(1), rows)
        real, imaginary = values.real, values.imag * side
        products = [real * slope.real + imaginary * slope.imag for slope in slopes]
        packed = self._finish(products[0], products[1])
        return packed.real, packed.imag

    def _zero(self, entry: int) -> Int[Array, ""]:
        """Return a 0 that XLA cannot foresee, computed differently for every entry.

        Otherwise two sums that read the same samples would share the reads, and write
        them all to memory.
        """
        probe = self._samples[0, entry, 0].real
        return (probe != probe).astype(jnp.int32)

    def _finish(self, real, imaginary) -> Complex[Array, "*p"]:
        """Make a complex number by an operation that XLA does not repeat.

        The operation is a division by a 1 that XLA cannot foresee. If the last
        operation was a cheap one, XLA would repeat it for every use of the result, and
        so on backwards to the reads of the samples, which it would write to memory one
        by one.
        """
        probe = self._samples[0, 0, 0].real
        unit = 1 + (probe != probe).astype(self.dtype)
        divisor = jax.lax.complex(unit, jnp.zeros_like(unit))
        return jax.lax.complex(real, imaginary) / divisor

    def _slope_products(self, positions, side, direction: Frequencies):
        """Return the weights of the samples in the derivative along a direction."""
        (wx, wy, wz) = (self._lattice.weights(position) for position in positions)
        (sx, sy, sz) = (self._lattice.slopes(position) for position in positions)
        dx, dy, dz = (side * component for component in direction)

        def row(a, b):
            by_x = wz[a] * wy[b] * dx
            by_yz = wz[a] * (sy[b] * dy) + (sz[a] * dz) * wy[b]
            return [by_x * s + by_yz * w for s, w in zip(sx, wx, strict=True)]

        return row

    def _sum(self, index, rows):
        """Return the sums over the samples, one for each set of weights."""
        width = self._lattice.width
        flat = self._samples.reshape(-1)
        totals = [jnp.zeros(index.shape, flat.dtype) for _ in rows]
        for a in range(width):
            for b in range(width):
                start = self._lattice.offset(a, b, 0)
                taps = [
                    flat.at[index + (start + c)].get(mode="promise_in_bounds")
                    for c in range(width)
                ]
                for i, row in enumerate(rows):
                    for weight, tap in zip(row(a, b), taps, strict=True):
                        totals[i] = totals[i] + weight.astype(tap.dtype) * tap
        return totals


def _products(weights):
    """Return the function of a row's weights: products of the weights of each axis."""

    def row(a, b):
        factor = weights[2][a] * weights[1][b]
        return [factor * weight for weight in weights[0]]

    return row


class Gridding(eqx.Module):
    """Interpolation on an oversampled grid, in pure XLA.

    Relative errors of the spectrum within 0.9 of Nyquist are listed by
    ``benchmarks/slices.py``.

    Parameters
    ----------
    width
        Number of samples along an axis, from 2 to 8.
    oversampling
        Minimum size of the grid over the size of the box, from 1.1 to 4. (The size is
        rounded up to an even number of which the FFT is fast.)

    Raises
    ------
    InputError
        If a parameter is out of range.
    """

    width: int = eqx.field(static=True, default=4)
    oversampling: float = eqx.field(static=True, default=1.75)

    def __check_init__(self):
        valid_width = isinstance(self.width, int) and 2 <= self.width <= 8
        if not (valid_width and 1.1 <= self.oversampling <= 4):
            raise InputError(
                "gridding must have a whole width from 2 to 8 and an oversampling from "
                f"1.1 to 4, got width={self.width}, oversampling={self.oversampling}"
            )

    @eqx.filter_jit
    def spectrum(self, volume: Volume, r_max: int) -> Spectrum:
        """Prepare a volume's spectrum for frequencies up to ``r_max`` cycles per box.

        The shape of the result depends only on ``r_max`` and the box.

        Parameters
        ----------
        volume
            The volume, of side ``n``.
        r_max
            Largest frequency in cycles per box, from 1 to ``n // 2``.

        Raises
        ------
        InputError
            If ``r_max`` is out of range, or the grid has too many samples.
        """
        lattice = self._lattice(volume.shape[0], r_max)
        return Spectrum(lattice.samples(volume), lattice)

    @eqx.filter_jit
    def adjoint(
        self, points: Frequencies, values: Complex[Array, "*p"], n: int, r_max: int
    ) -> Volume:
        r"""Insert values into a volume of side ``n``: the adjoint of the spectrum.

        .. math:: c[k] = \Re \sum_j v_j\, e^{2\pi i\, \xi_j\cdot k / n}

        It is the adjoint of the interpolated spectrum to rounding, for the inner
        product :math:`\Re \sum_j \bar v_j\, \hat c(\xi_j)`.

        Parameters
        ----------
        points
            Frequencies ``xi`` in cycles per box, none beyond ``r_max``.
        values
            Values ``v`` to insert there.
        n, r_max
            Side of the volume, and the largest frequency, as for `spectrum`.

        Raises
        ------
        InputError
            If ``r_max`` is out of range, or the grid has too many samples.
        """
        lattice = self._lattice(n, r_max)
        index, positions, side = lattice.locate(points)
        wx, wy, wz = (jnp.stack(lattice.weights(position)) for position in positions)
        # Real and imaginary parts apart: a GPU cannot add complex numbers at once.
        parts = (values.real, values.imag * side)
        taps = np.indices((self.width,) * 3).reshape(3, -1).T
        offsets = [lattice.offset(*tap) for tap in taps.tolist()]

        def insert(samples, tap):
            (a, b, c), offset = tap
            weight = wz[a] * wy[b] * wx[c]
            added = tuple(
                total.at[index + offset].add(part * weight, mode="promise_in_bounds")
                for total, part in zip(samples, parts, strict=True)
            )
            return added, None

        blank = (jnp.zeros(math.prod(lattice.shape), values.real.dtype),) * 2
        taps = (jnp.asarray(taps, jnp.int32), jnp.asarray(offsets, jnp.int32))
        samples = jax.lax.complex(*jax.lax.scan(insert, blank, taps)[0])
        samples = samples.reshape(lattice.shape)
        volume = jax.ShapeDtypeStruct((n, n, n), values.real.dtype)
        transpose = jax.linear_transpose(lattice.samples, volume)
        return transpose(jnp.conj(samples))[0]

    def _lattice(self, box: int, r_max: int) -> _Lattice:
        from scipy.fft import next_fast_len  # slow to import

        if not 1 <= r_max <= box // 2:
            raise InputError(
                f"r_max must be from 1 to {box // 2} cycles per box for a box of side "
                f"{box}, got {r_max}"
            )
        minimum = math.ceil(self.oversampling * box / 2)
        half: int = next_fast_len(minimum)  # pyright: ignore[reportAssignmentType]
        lattice = _Lattice(box, r_max, self.width, 2 * half)
        if math.prod(lattice.shape) > _MOST_SAMPLES:
            raise InputError(
                f"the grid must have at most {_MOST_SAMPLES} samples, which 32-bit "
                f"integers can index, got {' x '.join(map(str, lattice.shape))} for a "
                f"box of side {box} up to {r_max} cycles per box; crop or bin the "
                "images"
            )
        return lattice


class Finufft(eqx.Module):
    """The adjoint of the spectrum by the non-uniform FFT of ``jax-finufft``.

    It offers no spectrum, because `slices.project` needs ``jax.vmap``, which
    ``jax-finufft`` 1.3 does not support with JAX 0.10.

    Parameters
    ----------
    tolerance
        Relative accuracy, not below the rounding error of the numbers' type.

    Raises
    ------
    InputError
        If the package is not installed.
    """

    tolerance: float = eqx.field(static=True, default=1e-4)

    def __check_init__(self):
        _jax_finufft()

    def adjoint(
        self, points: Frequencies, values: Complex[Array, "*p"], n: int, r_max: int
    ) -> Volume:
        """Insert values into a volume: see :meth:`Gridding.adjoint`."""
        del r_max  # finufft chooses its own grid.
        total = _jax_finufft().nufft1(
            (n, n, n),
            values.reshape(-1),
            *_radians(points, n),
            iflag=1,
            eps=self.tolerance,
            # Several threads would sum in any order, and runs would not be repeatable.
            opts=_jax_finufft().options.Opts(nthreads=1),  # pyright: ignore
        )
        return total.real


def _radians(points: Frequencies, n: int) -> list[Float[Array, "..."]]:
    """Return frequencies in finufft's form: flat, in radians, slowest axis first."""
    return [(2 * math.pi / n) * axis.reshape(-1) for axis in points[::-1]]


def _jax_finufft():
    """Import the package, which is not available on every platform."""
    try:
        import jax_finufft
    except ImportError as error:
        raise InputError(
            "Finufft needs the package jax-finufft, which is not installed; install it "
            "by pip install jax-finufft, or use Gridding, which needs no other package"
        ) from error
    return jax_finufft


Insertion = Gridding | Finufft
"""The methods of inserting slices into a volume."""


def default_insertion() -> Insertion:
    """Return the faster method of inserting slices on the default device.

    It is ``jax-finufft`` on a CPU if that is installed, otherwise gridding.
    """
    installed = importlib.util.find_spec("jax_finufft") is not None
    return Finufft() if installed and jax.default_backend() == "cpu" else Gridding()
