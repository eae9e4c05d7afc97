"""The evaluation of given candidate poses in batches: polishing, and curvature.

Each candidate is evaluated with the image of the particle that it belongs to, by a
function of one candidate, which is given the map, the image and the candidate's own
values.
"""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, PyTree

from jaxrefine._types import Images
from jaxrefine.ctf import CTF
from jaxrefine.data.observation import View, batches
from jaxrefine.data.particles import Particles
from jaxrefine.operators.gridding import Spectrum

Comparison = Callable[..., PyTree]
"""``comparison(reference, observation, *candidate)``, a function of one candidate."""


def visit(
    comparison: Comparison,
    particles: Particles,
    owners: Int[np.ndarray, " c"],
    reference: Spectrum,
    view: View,
    candidates: tuple[PyTree, ...],
    batch_size: int,
) -> Any:
    """Compare candidates with the images of their particles.

    Parameters
    ----------
    comparison
        Evaluates one candidate: a function, or a pytree that can be called. It is
        compiled once for each function and each structure of candidates.
    particles, owners
        All particles, and the index of the one that each of ``c`` candidates belongs
        to.
    reference, view
        Spectrum of the map, and how images are compared with it.
    candidates
        The values of the candidates: pytrees with a leading axis ``c``.
    batch_size
        Number of candidates at a time, at most that of the particles.

    Returns
    -------
    The values of the function, with a leading axis ``c``, in NumPy arrays.
    """
    size, results = min(batch_size, len(particles)), []
    # Cut on the host: JAX would compile a program for each size.
    candidates = jax.tree.map(np.asarray, candidates)
    for places, count in batches(np.arange(len(owners)), size):
        chosen = owners[places]
        images, ctf = particles.batch(chosen)
        batch = jax.tree.map(lambda leaf, at=places: jnp.asarray(leaf[at]), candidates)
        group = jnp.asarray(particles.group_of(chosen))
        values = compare_batch(comparison, reference, view, images, ctf, group, batch)
        results.append(jax.tree.map(lambda leaf, n=count: np.asarray(leaf)[:n], values))
    return jax.tree.map(lambda *leaves: np.concatenate(leaves), *results)


@eqx.filter_jit
def compare_batch(
    comparison: Comparison,
    reference: Spectrum,
    view: View,
    images: Images,
    ctf: CTF | None,
    group: Int[Array, "b"],
    candidates: tuple[PyTree, ...],
) -> PyTree:
    """Compare a batch of candidates, one for each image; see `visit`."""

    def compare_one(spectrum, transfer, candidate):
        observation = view.observation(spectrum, transfer)
        return comparison(reference, observation, *candidate)

    spectra, transfer = view.spectra(images, group), view.transfer(ctf, group)
    return jax.vmap(compare_one)(spectra, transfer, candidates)
