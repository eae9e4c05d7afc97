r"""The origin of a map, moved to the particle's centre of mass; poses go along with it.

A map that is moved together with the shifts of its poses gives the same images. With
the centre :math:`c`, in voxels from the origin, and :math:`M` the first two rows of a
pose's rotation,

.. math:: V'(x) = V(x + c), \qquad t' = t + M c.
"""

import math

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxrefine._types import Volume
from jaxrefine.errors import InputError
from jaxrefine.geometry import Poses
from jaxrefine.maps.mask import soft_mask
from jaxrefine.operators.fourier import half_lattice


def centre_of_mass(density: Array | np.ndarray) -> Float[np.ndarray, "3"]:
    """Return the centre of mass ``(x, y, z)`` of a map, in voxels from the origin.

    Parameters
    ----------
    density
        A map of shape ``(n, n, n)`` without negative values, such as a mask.

    Raises
    ------
    InputError
        If it has no mass, or a negative one.
    """
    density = np.asarray(density, np.float64)
    mass = density.sum()
    if not mass > 0:
        raise InputError(
            f"a map must have a positive sum to have a centre of mass, got {mass:g}"
        )
    places = np.arange(len(density)) - len(density) // 2
    z, y, x = (density.sum(axis=others) for others in ((1, 2), (0, 2), (0, 1)))
    return np.array([axis @ places for axis in (x, y, z)]) / mass


def particle_centre(
    volume: Volume,
    voxel_size_in_angstroms: float,
    mask: Volume | None,
    operators: Float[np.ndarray, "order 3 3"],
) -> Float[np.ndarray, "3"]:
    """Return the centre of a particle, in voxels from the origin, on its axes.

    Parameters
    ----------
    volume
        The particle's map, positive where it is.
    voxel_size_in_angstroms
        Edge of a voxel.
    mask
        The mask whose centre of mass it is. None for the centre of mass of the positive
        densities within the mask that `mask.soft_mask` makes of the map.
    operators
        Of the map's symmetry, which the centre keeps: it is the mean of all that it is
        taken to.

    Raises
    ------
    InputError
        If there is no mass, or no mask can be made.
    """
    mass = mask
    if mass is None:
        mass = soft_mask(volume, voxel_size_in_angstroms) * jnp.clip(volume, 0)
    return operators.mean(axis=0) @ centre_of_mass(mass)


def check_stays_inside(
    volume: Volume, voxel_size_in_angstroms: float, translation: Float[np.ndarray, "3"]
) -> None:
    """Check that no part of a particle leaves the box when its map is moved.

    The particle is what `mask.soft_mask` finds in the map, without its margins. In a
    map in which noise reaches all sides of the box this holds for small motions only.

    Parameters
    ----------
    volume
        The particle's map, of shape ``(n, n, n)``, positive where it is.
    voxel_size_in_angstroms
        Edge of a voxel.
    translation
        The motion, ``(x, y, z)`` in voxels. A voxel has left the box if its centre is
        at least half a voxel beyond the last one.

    Raises
    ------
    InputError
        If a part leaves it, or if there is no particle.
    """
    particle = soft_mask(volume, voxel_size_in_angstroms, extend=0.0, edge=0.0)
    places = np.argwhere(np.asarray(particle) > 0)[:, ::-1] + translation
    beyond = ((places <= -0.5) | (places >= len(volume) - 0.5)).any(axis=1)
    if beyond.any():
        moved = ", ".join(f"{each:.2f}" for each in translation)
        raise InputError(
            "the particle must stay within the box when its origin moves, got "
            f"{beyond.mean():.1%} of it beyond after a motion by ({moved}), x, y, z in "
            "voxels"
        )


@eqx.filter_jit
def translated(volume: Volume, translation: Float[Array, "3"]) -> Volume:
    """Return the moved map ``V(x - d)``, as the trigonometric polynomial through it.

    What leaves the box on one side comes in on the other. A map is moved by whole
    voxels without an error, and by parts of one if it has no power at the Nyquist
    frequency, where a sampled wave cannot be moved.

    Parameters
    ----------
    volume
        The map ``V``, of shape ``(n, n, n)``.
    translation
        ``d``, ``(x, y, z)`` in voxels.
    """
    n = volume.shape[0]
    spectrum = jnp.fft.rfftn(volume)
    for frequency, step in zip(half_lattice(n), translation[::-1], strict=True):
        angle = -2 * math.pi / n * jnp.asarray(frequency, volume.dtype) * step
        # Of the two waves at the Nyquist frequency, the mean.
        sine = jnp.where(jnp.asarray(2 * np.abs(frequency) == n), 0, jnp.sin(angle))
        factor = jax.lax.complex(jnp.cos(angle), sine)
        spectrum = spectrum * jnp.broadcast_to(factor, spectrum.shape)
    return jnp.fft.irfftn(spectrum, s=volume.shape)


def translated_mask(
    mask: Volume, translation: Float[np.ndarray, "3"]
) -> Float[np.ndarray, "n n n"]:
    """Return a moved mask, interpolated linearly so that it stays between 0 and 1.

    It is 0 where it was outside of the box. The parameters are those of `translated`.
    """
    from scipy import ndimage  # slow to import

    return np.asarray(ndimage.shift(np.asarray(mask), translation[::-1], order=1))


def following(
    poses: Poses,
    centre: Float[np.ndarray, "3"],
    magnification: Float[np.ndarray, "particles 2 2"] | None = None,
) -> Poses:
    r"""Return the poses for a map whose origin has moved to a centre.

    Shifts become :math:`t + A^T M c`, with :math:`A` the anisotropic magnification of
    the image, see `jaxrefine.aberrations.Aberrations`.

    Parameters
    ----------
    poses
        The poses for the map as it was.
    centre
        ``c``, ``(x, y, z)`` in voxels.
    magnification
        ``A`` of each particle; None if all are the identity.
    """
    rotations = np.asarray(poses.rotations, np.float64)
    moved = rotations[:, :2] @ centre
    if magnification is not None:
        moved = np.einsum("pji,pj->pi", magnification, moved)
    shifts = np.asarray(poses.shifts, np.float64) + moved
    return eqx.tree_at(
        lambda each: each.shifts, poses, shifts.astype(poses.shifts.dtype)
    )
