"""The scale of a map and the power of the noise in each Fourier shell.

Images are compared with projections of a map that was made from other images. The
regression of the images on the projections gives a gain for each shell: it restores the
contrast that TV has taken where the map is right, and shrinks the map where it is not.
The residual of the regression is noise.
"""

from typing import final

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Complex, Float, Int

from jaxrefine._arrays import on_device
from jaxrefine.data.observation import batches
from jaxrefine.data.particles import Particles, evenly_spaced
from jaxrefine.errors import InputError
from jaxrefine.operators import slices
from jaxrefine.operators.complex import power, product
from jaxrefine.operators.gridding import Spectrum
from jaxrefine.operators.slices import Disc

_MEASURED = 500  # images that white noise is measured in: its variance within 1 %
_LOOKED_AT = 2000  # images whose spectra are averaged, of all groups together
# Fewest of a group that has as many: even of images of 16 pixels a side, four tell the
# level of the noise within 6 %, and there may be thousands of groups.
_OF_GROUP = 4
_HIGHEST = jax.lax.Precision.HIGHEST

# Degrees of freedom of the prior in `noise_power`: how many frequencies of a shell the
# noise spectrum that all groups share counts for. 32 says that a group's own spectrum
# is expected to differ from it by sqrt(2 / 32), that is by a quarter.
_PRIOR_FREQUENCIES = 32.0


@final
class ShellSums(eqx.Module):
    """Sums over the frequencies of a shell, of one image or of groups of them.

    Attributes
    ----------
    data, model
        Power of the images and of the projections.
    cross
        Inner product of the images and the projections.
    count
        Number of frequencies; a conjugate pair counts twice.
    """

    data: Float[Array | np.ndarray, "*groups shells"]
    model: Float[Array | np.ndarray, "*groups shells"]
    cross: Float[Array | np.ndarray, "*groups shells"]
    count: Float[Array | np.ndarray, "*groups shells"]

    def of_groups(self, included: Bool[np.ndarray, "groups images"]) -> "ShellSums":
        """Return the sums over the images that each group includes.

        They are summed up in double precision on the host, as NumPy does.
        """

        def total(leaf: Float[Array | np.ndarray, "images shells"]):
            sums = included.astype(np.float64) @ np.asarray(leaf, np.float64)
            return on_device(sums.astype(leaf.dtype))

        return jax.tree.map(total, self)

    def pooled(self, weights: Float[Array, "groups shells"]) -> "ShellSums":
        """Return the weighted sums over all groups."""
        return jax.tree.map(lambda leaf: jnp.sum(weights * leaf, axis=0), self)

    @property
    def gain(self) -> Float[Array, "*groups shells"]:
        r"""Least-squares scale of the projections, :math:`\langle g, S\rangle/|S|^2`.

        It is limited to the interval from 0 to 2, and 0 where the projections have no
        power.
        """
        positive = self.model > 0
        ratio = self.cross / jnp.where(positive, self.model, 1.0)
        return jnp.where(positive, jnp.clip(ratio, 0.0, 2.0), 0.0)

    def residual(self, gain: Float[Array, "shells"]) -> Float[Array, "*groups shells"]:
        """Return the power of the images minus the projections times a gain."""
        gain = jnp.broadcast_to(gain, self.data.shape)
        power = self.data - 2 * gain * self.cross + gain**2 * self.model
        return jnp.maximum(power, 0.0)


def shell_sums(
    spectrum: Spectrum,
    disc: Disc,
    data: Complex[Array, "k"],
    rotation: Float[Array, "3 3"],
    shift: Float[Array, "2"],
    transfer: Float[Array, "k"] | None,
    magnification: Float[Array, "2 2"] | None = None,
) -> ShellSums:
    """Compare one image with its projection in each shell.

    Parameters
    ----------
    spectrum
        Spectrum of the map.
    disc
        Frequencies that are compared.
    data
        Spectrum of the image at these frequencies.
    rotation, shift, transfer
        Pose and contrast-transfer function of the image, the shift in pixels.
    magnification
        Matrix that maps its frequencies to those of the slice, by default the identity.
    """
    multiplicity = disc.multiplicity.astype(data.real.dtype)
    model = slices.project_one(spectrum, disc, rotation, shift, transfer, magnification)
    ones = jnp.ones_like(multiplicity)
    values = [power(data), power(model), product(data, model), ones]
    shells = disc.image_size // 2 + 1
    sums = jax.ops.segment_sum(
        jnp.stack(values, axis=-1) * multiplicity[:, None], disc.shells, shells
    )
    return ShellSums(*sums.T)


def noise_power(
    residual: Float[Array, "groups shells"], count: Float[Array, "groups shells"]
) -> Float[Array, "groups shells"]:
    r"""Estimate the mean power of the noise in each group and shell, by shrinkage.

    The noise of a group may have any level :math:`a_g`, and a spectrum whose shape is
    roughly that of all residuals together,
    :math:`\bar N_s = \sum_g E_{gs} / \sum_g n_{gs}`. The group's own estimate
    :math:`E_{gs} / n_{gs}` is shrunk towards that spectrum at its level:

    .. math:: N_{gs} = \frac{E_{gs} + d\, a_g \bar N_s}{n_{gs} + d}, \quad d = 32,
       \qquad
       a_g = \frac{1 + \sum_{s>0} E_{gs} / \bar N_s}{1 + \sum_{s>0} n_{gs}}.

    This is the empirical-Bayes estimate of a variance under a scaled inverse chi-square
    prior with ``d`` degrees of freedom (Smyth, Stat. Appl. Genet. Mol. Biol. 3, 2004,
    whose "moderated" variances have this form), here with a fixed ``d``. Equivalently,
    it is the mean of both estimates weighted by their inverse variances: a mean of
    ``n`` squares has the relative variance ``2 / n``, and the shape of a group's
    spectrum is expected to differ from the common one by the relative variance
    ``2 / d``, a standard deviation of a quarter. Hence a group of few images gets the
    common spectrum at its own level, a group of no images the common spectrum, and a
    single group its own.

    Parameters
    ----------
    residual
        Summed power :math:`E` of the residuals.
    count
        Number :math:`n` of frequencies in the sums.

    Returns
    -------
    Mean power of the noise per frequency, :math:`N`.
    """
    own = residual / jnp.maximum(count, 1.0)
    mean = jnp.sum(residual, axis=0) / jnp.maximum(jnp.sum(count, axis=0), 1.0)
    mean = jnp.broadcast_to(mean, own.shape)
    ratio = jnp.where(mean > 0, own / jnp.where(mean > 0, mean, 1.0), 1.0)
    # Shell 0 is left out, because the background is in it.
    power, frequencies = (
        1.0 + jnp.sum(values[:, 1:], axis=1, keepdims=True)
        for values in (count * ratio, count)
    )
    common = power / frequencies * mean
    # In this form the estimate of a single group is its own, to the last bit.
    return own + (common - own) * (_PRIOR_FREQUENCIES / (count + _PRIOR_FREQUENCIES))


def image_power(
    particles: Particles, batch_size: int
) -> Float[np.ndarray, "groups shells"]:
    """Return the mean power of images in each group and shell, by `noise_power`.

    Where noise is much stronger than the particle, this is the power of the noise.
    About 2000 images are looked at, of each group in proportion to its size, but at
    least 4 or all of them.

    Parameters
    ----------
    particles
        The images.
    batch_size
        How many are read at a time.

    Returns
    -------
    Mean power of a frequency, 0 where all images are empty.
    """
    m, chosen = particles.image_size, _sample(particles)
    disc = slices.disc(m, (m - 1) // 2)
    total = np.zeros((particles.groups, m // 2 + 1))
    number = np.zeros_like(total)
    multiplicity = np.asarray(disc.multiplicity)
    shells = np.asarray(disc.shells)
    frequencies = np.bincount(shells, multiplicity, m // 2 + 1)
    for places, used in batches(chosen, min(batch_size, len(chosen))):
        spectra = slices.image_spectra(particles.batch(places)[0], disc)
        values = np.asarray(power(spectra), np.float64)[:used] * multiplicity
        for group, row in zip(particles.group_of(places[:used]), values, strict=True):
            total[group] += np.bincount(shells, row, m // 2 + 1)
            number[group] += frequencies
    return np.asarray(noise_power(jnp.asarray(total), jnp.asarray(number)), np.float64)


def _sample(particles: Particles) -> Int[np.ndarray, " chosen"]:
    """Return the images whose power is measured, evenly spaced in each group."""
    group = particles.group_of(np.arange(len(particles)))
    order, share = np.argsort(group, kind="stable"), _LOOKED_AT / len(particles)
    chosen = []
    for members in np.split(order, np.flatnonzero(np.diff(group[order])) + 1):
        wanted = max(round(share * len(members)), _OF_GROUP)
        chosen.append(members[evenly_spaced(len(members), wanted)])
    return np.sort(np.concatenate(chosen))


def white_noise(images: Float[Array, "particles m m"]) -> float:
    """Estimate the standard deviation of white noise in images.

    It is that of the pixels outside of the circle that fits in an image, where the
    particle is not, about a plane of each image. Images that are blank there are left
    out. If all are, or if a soft mask makes the noise fall off towards the corners, it
    is found inside of the circle from second differences along both axes (Immerkaer,
    Comput. Vis. Image Underst. 64, 1996), in the ring where these are largest. Fine
    detail of the particle then counts as noise, and noise that has been smoothed is
    underestimated. At most 500 images are looked at.

    Parameters
    ----------
    images
        Images of shape ``(P, m, m)``, of at least 16 pixels a side.

    Raises
    ------
    InputError
        If the images are smaller.
    """
    count, m = len(images), images.shape[-1]
    if m < 16:
        raise InputError(f"images must have at least 16 pixels a side, got {m}")
    chosen = evenly_spaced(count, _MEASURED)
    sample = np.asarray(images[chosen], np.float64)
    axis = np.arange(m) - m // 2
    radius = np.hypot(axis[:, None], axis) / (m / 2)
    outside = radius > 1.0
    y, x = np.nonzero(outside)
    plane = np.stack([np.ones(len(x)), x, y])
    beside = sample[:, outside]
    fitted = np.linalg.lstsq(plane.T, beside.T, rcond=None)[0].T @ plane
    squares = (beside - fitted) ** 2
    # A masked image may have the rounding of a Fourier transform there.
    seen = np.mean(squares, axis=1) > 1e-8 * np.var(sample, axis=(1, 2))
    if np.any(seen):
        squares, far = squares[seen], radius[outside] > 1.1
        if np.mean(squares[:, far]) > 0.7 * np.mean(squares[:, ~far]):
            return float(np.sqrt(np.sum(squares) / (squares.size - 3 * len(squares))))
    differences = np.diff(np.diff(sample, 2, axis=1), 2, axis=2) / 6.0
    inner = radius[1:-1, 1:-1]
    rings = [
        np.mean(differences[:, (inner > low) & (inner <= low + 0.2)] ** 2)
        for low in (0.1, 0.3, 0.5)
    ]
    return float(np.sqrt(max(rings)))
