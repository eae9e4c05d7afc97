r"""Rigid alignment of a map to another one that is nearly in the same place.

Half sets that are refined independently drift apart by a rigid motion of a fraction of
a degree, because the data do not determine it. Before their maps are compared or
combined, one of them is moved into the frame of the other.
"""

import math

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxrefine._types import Volume
from jaxrefine.geometry import rotvec_to_matrix
from jaxrefine.operators.fourier import half_lattice, multiplicity
from jaxrefine.operators.gridding import Gridding

_HIGHEST = jax.lax.Precision.HIGHEST
# From a motion of 0.1 rad, six steps end within 1e-5 rad of the minimum.
_ITERATIONS = 6


@eqx.filter_jit
def align_maps(
    volume: Volume, reference: Volume, r_max: int
) -> tuple[Float[Array, "3 3"], Float[Array, "3"]]:
    r"""Find the small rigid motion that aligns a map to a reference.

    .. math:: \min_{G, d, s} \sum_{|\xi| \le r} |s\, \hat V(G \xi)\,
       e^{-2\pi i\, \xi\cdot d / n} - \hat V_{ref}(\xi)|^2

    by Gauss-Newton steps in the tangent space of SO(3) x R^3, starting from the
    identity. It converges for rotations of up to a few times ``1 / r_max`` radians and
    translations of up to the same fraction of the box.

    Parameters
    ----------
    volume, reference
        Maps of shape ``(n, n, n)``.
    r_max
        Band limit in cycles per box.

    Returns
    -------
    rotation, translation
        The motion ``(G, d)``, as in `evaluation.Motion`: the moved map is
        ``V(G (x - d))``, with ``d`` in voxels, and a pose ``R`` becomes ``R G``.
    """
    n, dtype = volume.shape[0], volume.dtype
    indices, lattice = _ball(n, r_max, dtype)
    # The sum is over both frequencies of each conjugate pair, of which rfftn has one.
    root = jnp.asarray(np.sqrt(multiplicity(n)[indices[-1]]), dtype)
    target = jnp.fft.rfftn(jnp.fft.ifftshift(reference))[indices]
    target = target * root.astype(target.dtype)
    spectrum = Gridding().spectrum(volume, r_max)

    def step(motion, _):
        rotation, translation = motion
        points = jnp.matmul(lattice, rotation.T, precision=_HIGHEST)
        x, y, z = (points[:, i] for i in range(3))
        zero = jnp.zeros_like(x)
        directions = ((zero, -z, y), (z, zero, -x), (-y, x, zero))
        values = spectrum.value_and_slopes((x, y, z), directions)
        angle = -2 * math.pi / n * jnp.matmul(lattice, translation, precision=_HIGHEST)
        phase = jax.lax.complex(root * jnp.cos(angle), root * jnp.sin(angle))
        model, *by_rotation = (value * phase for value in values)
        wave_vector = -2 * math.pi / n * lattice
        by_translation = jax.lax.complex(
            -wave_vector * model.imag[:, None], wave_vector * model.real[:, None]
        )
        jacobian = jnp.concatenate(
            [jnp.stack(by_rotation, axis=-1), by_translation], axis=-1
        )
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
        # The pseudo-inverse leaves an empty map in its place.
        update = -jnp.matmul(
            jnp.linalg.pinv(normal, rtol=1e-5, hermitian=True),
            slope,
            precision=_HIGHEST,
        )
        turn = rotvec_to_matrix(update[:3])
        return (
            jnp.matmul(turn, rotation, precision=_HIGHEST),
            translation + update[3:],
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
    """Return the moved map ``V(G (x - d))``, limited to ``r_max`` cycles per box.

    Parameters
    ----------
    volume
        The map ``V``, of shape ``(n, n, n)``.
    rotation, translation
        The motion ``(G, d)``, with ``d`` in voxels.
    r_max
        Band limit in cycles per box, at most ``n // 2``. The default is the last
        complete shell, ``(n - 1) // 2``.
    """
    n, dtype = volume.shape[0], volume.dtype
    limit = (n - 1) // 2 if r_max is None else r_max
    indices, lattice = _ball(n, limit, dtype)
    points = jnp.matmul(lattice, rotation.T, precision=_HIGHEST)
    values = Gridding().spectrum(volume, limit)(*(points[:, i] for i in range(3)))
    angle = -2 * math.pi / n * jnp.matmul(lattice, translation, precision=_HIGHEST)
    values = values * jax.lax.complex(jnp.cos(angle), jnp.sin(angle))
    moved = jnp.zeros((n, n, n // 2 + 1), values.dtype).at[indices].set(values)
    return jnp.fft.fftshift(jnp.fft.irfftn(moved, s=volume.shape))


def _ball(
    n: int, r_max: int, dtype
) -> tuple[tuple[np.ndarray, ...], Float[Array, "k 3"]]:
    """Return the frequencies of a ball: their indices in ``rfftn``, and (x, y, z)."""
    z, y, x = np.broadcast_arrays(*half_lattice(n))
    indices = np.nonzero(x**2 + y**2 + z**2 <= r_max**2)
    frequencies = np.stack([axis[indices] for axis in (x, y, z)], axis=-1)
    return indices, jnp.asarray(frequencies, dtype)
