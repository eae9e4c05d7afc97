"""The scale of a map and the power of the noise, shell by shell.

Images are compared with projections of a map that they are not in. Their regression on
the projections gives a gain for each shell: it undoes TV's loss of contrast where the
map is right, and shrinks the map where it is not. What the scaled projections leave of
the images is noise.
"""

from typing import final

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Complex, Float

from jaxrefine.geometry import Poses
from jaxrefine.operators import slices
from jaxrefine.operators.gridding import Spectrum
from jaxrefine.operators.slices import Disc

_HIGHEST = jax.lax.Precision.HIGHEST

_ALIKE = 32.0
"""Frequencies that the common shape of the groups' noise counts for in a shell."""


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
