r"""Bring one map onto another that is nearly in its place, as a rigid body.

Half sets that are refined by themselves drift apart as wholes by a fraction of a
degree, which nothing in the data forbids. Before their maps are compared or joined,
one of them is put into the frame of the other.
"""

import math

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxrefine._types import Volume
from jaxrefine.geometry import rotvec_to_matrix
from jaxrefine.operators._fourier import half_lattice, multiplicity
from jaxrefine.operators.gridding import Gridding

_HIGHEST = jax.lax.Precision.HIGHEST
_ITERATIONS = 6


@eqx.filter_jit
def align_maps(
    volume: Volume, reference: Volume, r_max: int
) -> tuple[Float[Array, "3 3"], Float[Array, "3"]]:
    r"""Find the small rigid motion that takes a map to a reference.

    .. math:: \min_{G, d, s} \sum_{|\xi| \le r} |s\, \hat V(G \xi)\,
       e^{-2\pi i\, \xi\cdot d / n} - \hat V_{ref}(\xi)|^2

    by Gauss-Newton in the tangent space of SO(3) x R^3, from no motion at all: good for
    a few times ``1 / r_max`` radians and as many fractions of the box.

    Parameters
    ----------
    volume, reference
        Maps of one shape.
    r_max
        Band limit, cycles per box.

    Returns
    -------
    rotation, translation
        As in `evaluation.Motion`: the map in its new place is ``V(G (x - d))``, ``d``
        in voxels, and a pose ``R`` becomes ``R G``.
    """
    n, dtype = volume.shape[0], volume.dtype
    places, lattice = _ball(n, r_max, dtype)
    # The sum is over both of each pair of frequencies.
    root = jnp.asarray(np.sqrt(multiplicity(n)[places[-1]]), dtype)
    target = jnp.fft.rfftn(jnp.fft.ifftshift(reference))[places]
    target = target * root.astype(target.dtype)
    spectrum = Gridding().spectrum(volume, r_max)

    def step(now, _):
        rotation, translation = now
        points = jnp.matmul(lattice, rotation.T, precision=_HIGHEST)
        x, y, z = (points[:, i] for i in range(3))
        zero = jnp.zeros_like(x)
        turning = ((zero, -z, y), (z, zero, -x), (-y, x, zero))
        values = spectrum.value_and_slopes((x, y, z), turning)
        angle = -2 * math.pi / n * jnp.matmul(lattice, translation, precision=_HIGHEST)
        phase = jax.lax.complex(root * jnp.cos(angle), root * jnp.sin(angle))
        model, *turned = (value * phase for value in values)
        along = -2 * math.pi / n * lattice
        moving = jax.lax.complex(
            -along * model.imag[:, None], along * model.real[:, None]
        )
        jacobian = jnp.concatenate([jnp.stack(turned, axis=-1), moving], axis=-1)
        power = jnp.sum(model.real**2 + model.imag**2)
        overlap = jnp.sum(model.real * target.real + model.imag * target.imag)
        scale = overlap / jnp.where(power > 0, power, 1.0)
        residual = jax.lax.complex(
            scale * model.real - target.real, scale * model.imag - target.imag
        )
        stacked = scale * jnp.concatenate([jacobian.real, jacobian.imag])
        error = jnp.concatenate([residual.real, residual.imag])
        normal = jnp.matmul(stacked.T, stacked, precision=_HIGHEST)
        slope = jnp.matmul(stacked.T, error, precision=_HIGHEST)
        # An empty map stays where it is.
        move = -jnp.matmul(
            jnp.linalg.pinv(normal, rtol=1e-5, hermitian=True),
            slope,
            precision=_HIGHEST,
        )
        turn = rotvec_to_matrix(move[:3])
        return (
            jnp.matmul(turn, rotation, precision=_HIGHEST),
            translation + move[3:],
        ), None

    start = (jnp.eye(3, dtype=dtype), jnp.zeros(3, dtype))
    return jax.lax.scan(step, start, length=_ITERATIONS)[0]


@eqx.filter_jit
def move_map(
    volume: Volume,
    rotation: Float[Array, "3 3"],
    translation: Float[Array, "3"],
    r_max: int | None = None,
) -> Volume:
    """Return ``V(G (x - d))``, without the frequencies beyond ``r_max`` cycles per box.

    By default that is the last whole shell, ``(n - 1) // 2``; at most, ``n // 2``.
    """
    n, dtype = volume.shape[0], volume.dtype
    last = (n - 1) // 2 if r_max is None else r_max
    places, lattice = _ball(n, last, dtype)
    points = jnp.matmul(lattice, rotation.T, precision=_HIGHEST)
    values = Gridding().spectrum(volume, last)(*(points[:, i] for i in range(3)))
    angle = -2 * math.pi / n * jnp.matmul(lattice, translation, precision=_HIGHEST)
    values = values * jax.lax.complex(jnp.cos(angle), jnp.sin(angle))
    whole = jnp.zeros((n, n, n // 2 + 1), values.dtype).at[places].set(values)
    return jnp.fft.fftshift(jnp.fft.irfftn(whole, s=volume.shape))


def _ball(
    n: int, r_max: int, dtype
) -> tuple[tuple[np.ndarray, ...], Float[Array, "k 3"]]:
    """Return where ``rfftn`` has the frequencies of a ball, and these, (x, y, z)."""
    z, y, x = np.broadcast_arrays(*half_lattice(n))
    places = np.nonzero(x**2 + y**2 + z**2 <= r_max**2)
    frequencies = np.stack([axis[places] for axis in (x, y, z)], axis=-1)
    return places, jnp.asarray(frequencies, dtype)
