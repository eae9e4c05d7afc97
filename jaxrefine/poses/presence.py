r"""Whether an image shows a particle: its evidence, after the search has been paid for.

The pose of an image of noise, too, is found where the noise looks most like the map,
and the prior about a pose that was *chosen* in this way does not know of the choice.
The evidence is therefore taken over the whole space of poses, whatever is known of
the pose: with the likelihood ratio :math:`\ell` of an image with and without a
particle, its information :math:`A` about the pose, and the covariance :math:`W` of a
Gaussian as large as the whole space,

.. math:: \log B = \log \int \frac{p(\text{image} \mid \text{pose})}
   {p(\text{image} \mid \text{noise})}\, \frac{d\,\text{pose}}{\text{volume}}
   \approx \log \sum_h e^{\ell_h} - \tfrac12 \log\det(1 + W A),

the sum over the candidate poses (Laplace's method). The last term is the price of the
search: how much larger the space is than the posterior. Candidates that were not found,
or that a prior has kept from their optimum, can only make :math:`B` smaller.

Where an image says little of the pose, the Gaussians about its candidates overlap, and
the sum counts the same poses several times. A mean over the space is never more than
the largest value, and :math:`\log B` therefore not taken to be more than
:math:`\max_h \ell_h`.

For images of noise, whose power is known and on which the map does not depend, the mean
of :math:`B` is at most 1. However poses were found, at most a fraction :math:`1/b` of
images has therefore :math:`B \ge b` (Markov's inequality); such a ratio is an e-value
(Vovk and Wang, Annals of Statistics 49, 2021).

What is fixed is taken to be known for certain, and nothing is paid for it. If it was
found by a search in the same image, as by ``match``, images of noise then have a mean
of :math:`B` that is greater than 1, and may pass for particles. Neither is a contrast
or a defocus paid for that was fitted to the image.
"""

import math
from typing import final

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from jaxrefine._batching import map_over_particles
from jaxrefine.poses.hypotheses import Hypotheses
from jaxrefine.poses.prior import Prior

_HIGHEST = jax.lax.Precision.HIGHEST

LEAST_EVIDENCE = math.log(20)
"""Evidence (natural logarithm) that one image of noise in 20 exceeds.

At most so many, on average over images and their noise.
"""

_BATCH = 256  # particles at a time; with 60 copies of a rotation they take 25 MB


@final
class Space(eqx.Module):
    """The whole space of poses: a Gaussian of its volume.

    Attributes
    ----------
    angle_spread, shift_spread
        Standard deviation of each component of the rotation vector (radians) and of the
        shift (pixels).
    """

    angle_spread: float
    shift_spread: float

    @classmethod
    def of(cls, symmetry_order: int, radius: float) -> "Space":
        r"""Return the space of all rotations, and of shifts within a circle.

        Its volume is that of :math:`8 \pi^2 / k` of SO(3), in rotation vectors, and of
        the circle, :math:`\pi r^2`.

        Parameters
        ----------
        symmetry_order
            How many rotations ``k`` are equivalent.
        radius
            That of the circle ``r``, pixels.
        """
        rotations = 8 * math.pi**2 / symmetry_order
        return cls(math.cbrt(rotations) / math.sqrt(2 * math.pi), radius / math.sqrt(2))


@eqx.filter_jit
def evidence_anywhere(
    space: Space,
    prior: Prior,
    hypotheses: Hypotheses,
    information: Float[Array, "particles 5 5"],
    evidence: Float[Array, "particles"],
) -> Float[Array, "particles"]:
    r"""Return the evidence of particles at any pose, from that with a prior.

    The prior and its information are taken out of each particle's evidence, and the
    whole space put in. What a prior fixes is taken to be known, and costs nothing, even
    if a search found it. All candidates are taken to be as well known as the best of
    them. The evidence is at most the largest log-likelihood ratio of a candidate.

    Parameters
    ----------
    space
        The space of poses.
    prior
        What was known of the poses, with which all else was found.
    hypotheses, information, evidence
        The candidate poses, the information on the best of them and the evidence of
        all, see `update.Updated`.
    """
    return map_over_particles(
        lambda each: _of_one(space, *each),
        (prior, hypotheses, information, evidence),
        _BATCH,
    )


def shown(
    evidence: Float[np.ndarray, " particles"],
    shifts: Float[np.ndarray, "particles 2"],
    image_size: int,
) -> Bool[np.ndarray, " particles"]:
    """Return which images show a particle: by its evidence, and within the image.

    Parameters
    ----------
    evidence
        That of each particle at any pose, from `evidence_anywhere`, which must be more
        than `LEAST_EVIDENCE`.
    shifts
        Where the particle is, pixels: no farther from the centre along x and y than
        half of the image.
    image_size
        Side of the images in pixels.
    """
    inside = np.abs(shifts).max(axis=1) <= image_size / 2
    return (evidence > LEAST_EVIDENCE) & inside


def _of_one(
    space: Space,
    prior: Prior,
    hypotheses: Hypotheses,
    information: Float[Array, "5 5"],
    evidence: Float[Array, ""],
) -> Float[Array, ""]:
    rotations, shifts = map(jnp.asarray, (hypotheses.rotations, hypotheses.shifts))
    costs = jax.vmap(prior.cost)(rotations, shifts)
    shares = hypotheses.log_weights + costs
    known, dtype = prior.information(), information.dtype
    spreads = jnp.repeat(
        jnp.asarray([space.angle_spread, space.shift_spread], dtype),
        np.array([3, 2]),
        total_repeat_length=5,
    )
    whole = jnp.diag(jnp.where(prior.free > 0, spreads**-2, jnp.diagonal(known)))
    # Rounding must not leave less than no information.
    values, axes = jnp.linalg.eigh(information - known)
    scaled = jnp.maximum(values, 0.0)[:, None] * axes.T
    of_image = jnp.matmul(axes, scaled, precision=_HIGHEST)
    _, posterior = jnp.linalg.slogdet(of_image + known)
    _, without = jnp.linalg.slogdet(of_image + whole)
    _, volume = jnp.linalg.slogdet(whole)
    # Shares are log-likelihood ratios of candidates, less what all have in common.
    paid = jax.nn.logsumexp(shares) + (volume - without) / 2
    in_common = evidence - 2.5 * math.log(2 * math.pi) + posterior / 2
    return in_common + jnp.minimum(paid, jnp.max(shares))
