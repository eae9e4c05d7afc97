"""The pose update of a block of particles: search, polish, weigh, in one visit.

Every particle of a block goes through the same three steps, as far as it needs to:

1. *search* (:mod:`jaxrefine.poses.search`), first in the whole prior and then about
   what is known, if its pose is still undecided;
2. *polish* (:mod:`jaxrefine.poses.polish`): the candidates of a search at the search's
   band limit first, where it is cheap; those that this leaves are polished at the full
   one, as are the hypotheses of a particle that was not searched for;
3. *weigh* (:mod:`jaxrefine.poses.hypotheses`): what is left is ranked by its posterior.

A block is one program of fixed shapes for all band limits and all stages of a
refinement. Those particles and candidates that a step is for are gathered first, so
that the others cost little. :mod:`jaxrefine.data.visit` shares the blocks out among all
devices.
"""

from typing import final

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from jaxrefine._batching import for_active
from jaxrefine._types import Images
from jaxrefine.ctf import CTF
from jaxrefine.data.observation import View
from jaxrefine.operators.gridding import Spectrum
from jaxrefine.poses.hypotheses import Hypotheses, distinct
from jaxrefine.poses.polish import Polish, Polished, weigh
from jaxrefine.poses.prior import Prior
from jaxrefine.poses.search import Search

_HIGHEST = jax.lax.Precision.HIGHEST
# At a time: particles that are searched for, but no more than have 4 MiB of
# scores; and candidates that are polished. The numbers are a convention.
_SEARCHED, _POLISHED, _SCORES = 16, 64, 2**20


@final
class Known(eqx.Module):
    """What is known of each particle of a block beforehand.

    Attributes
    ----------
    index
        Of the particle in its set, which draws its candidates.
    prior
        What was known of its pose at first.
    hypotheses
        Its candidate poses.
    searched
        Whether to search for more.
    """

    index: Int[Array | np.ndarray, "*p"]
    prior: Prior
    hypotheses: Hypotheses
    searched: Bool[Array | np.ndarray, "*p"]


@final
class Reference(eqx.Module):
    """What particles are compared with.

    Attributes
    ----------
    coarse, fine
        Spectrum of the map, for the search and for the polishing.
    view
        How images are compared with it, with a multiple of `observation.PART`
        frequencies.
    """

    coarse: Spectrum
    fine: Spectrum
    view: View


@final
class Steps(eqx.Module):
    """What a visit does.

    Attributes
    ----------
    key
        Draws candidates; folded with the index of each particle.
    searches
        The search of the whole prior, and that about what is known, as one pytree.
    search_r_max
        Their band limits, cycles per box.
    first_search
        0 if the whole prior is searched, 1 if not.
    r_max
        Band limits of the two rounds of the polishing, cycles per box.
    first_round
        0 if there are two rounds, 1 if only the second is made.
    compared
        Whether the poses have been compared with images before.
    negligible
        Hypotheses of at most this weight are not followed.
    separation
        Candidates nearer than this (radians) count as one.
    operators
        Of the map's symmetry.
    polish
        How candidates are polished.
    """

    key: PRNGKeyArray
    searches: Search
    search_r_max: Int[Array, "2"]
    first_search: Int[Array, ""]
    r_max: Int[Array, "2"]
    first_round: Int[Array, ""]
    compared: Bool[Array, ""]
    negligible: Float[Array, ""]
    separation: Float[Array, ""]
    operators: Float[Array, "order 3 3"]
    polish: Polish


@final
class Updated(eqx.Module):
    """What a visit finds of each particle of a block.

    Attributes
    ----------
    hypotheses
        Its candidate poses, the best first.
    information
        That of the best, see `polish.Polished`.
    evidence
        Logarithm of the posterior mass about all of them, relative to the probability
        of the image without a particle.
    evaluations
        How many times the likelihood was evaluated at the full band limit, for all
        candidates.
    """

    hypotheses: Hypotheses
    information: Float[Array | np.ndarray, "p 5 5"]
    evidence: Float[Array | np.ndarray, "p"]
    evaluations: Int[Array | np.ndarray, "p"]


def update_block(
    common: tuple[Steps, Reference],
    images: Images,
    ctf: CTF | None,
    group: Int[Array, "p"],
    exists: Bool[Array, "p"],
    known: Known,
) -> Updated:
    """Search for, polish and weigh the poses of a block of particles.

    Parameters
    ----------
    common
        What is done, and what particles are compared with.
    images, ctf, group
        The images of ``p`` particles, their optics and the groups they belong to.
    exists
        Which of them exist; nothing is done for the others.
    known
        What is known of their poses.
    """
    steps, reference = common
    view, current = reference.view, known.hypotheses
    log_weights = jnp.where(exists[:, None], current.log_weights, -jnp.inf)
    known = eqx.tree_at(
        lambda k: (k.hypotheses.log_weights, k.searched),
        known,
        (log_weights, known.searched & exists),
    )
    current = known.hypotheses
    seen = view.seen(images, ctf, group)
    rows, keep = current.log_weights.shape

    def search(seen, known):
        return _search_one(steps, reference, seen, known)

    start = (current.rotations, current.shifts)
    scores = steps.searches.most * steps.searches.offsets.shape[1]
    rotations, shifts = for_active(
        search,
        jnp.asarray(known.searched),
        max(1, min(_SEARCHED, _SCORES // scores)),
        (seen, known),
        start,
    )
    # The last place keeps the best pose so far, which a search may not find again.
    rotations = jnp.concatenate([rotations, current.rotations[:, :1]], axis=1)
    shifts = jnp.concatenate([shifts, current.shifts[:, :1]], axis=1)
    searched = known.searched[:, None]
    followed = searched | (current.weights > steps.negligible)
    last = searched & steps.compared
    active = jnp.concatenate([followed, last], axis=1)

    places = rows * (keep + 1)
    owners = jnp.arange(places, dtype=jnp.int32) // (keep + 1)

    def polish_round(number, carry):
        candidates, active = carry
        full = number == 1
        limited = view.up_to(steps.r_max[number])
        now = active & (full | searched)

        def polish(owner, candidate):
            observe, prior = jax.tree.map(lambda leaf: leaf[owner], (seen, known.prior))
            return steps.polish(
                reference.fine,
                limited.observation(*observe),
                prior,
                candidate.rotations,
                candidate.shifts,
            )

        flat = jax.tree.map(
            lambda leaf: leaf.reshape(places, *leaf.shape[2:]), candidates
        )
        flat = for_active(polish, now.reshape(-1), _POLISHED, (owners, flat), flat)
        candidates = jax.tree.map(
            lambda leaf: leaf.reshape(rows, keep + 1, *leaf.shape[1:]), flat
        )
        # After the first round, only distinct candidates that are likely are followed.
        evidence = jnp.where(now, candidates.evidence, -jnp.inf)
        evidence = jax.vmap(
            lambda r, e: distinct(r, e, steps.separation, steps.operators)
        )(candidates.rotations, evidence)
        weights = jax.nn.softmax(evidence, axis=1)
        likely = active & (weights > steps.negligible)
        return candidates, jnp.where(~full & searched, likely, active)

    unknown = Polished(
        rotations,
        shifts,
        jnp.zeros((rows, keep + 1, 5, 5), shifts.dtype),
        jnp.zeros((rows, keep + 1), jnp.int32),
        jnp.zeros((rows, keep + 1), shifts.dtype),
    )
    candidates, active = jax.lax.fori_loop(
        steps.first_round, 2, polish_round, (unknown, active)
    )
    evidence = jnp.where(active, candidates.evidence, -jnp.inf)
    hypotheses, order = weigh(
        candidates.rotations,
        candidates.shifts,
        evidence,
        steps.separation,
        keep,
        steps.operators,
    )
    everyone, best = jnp.arange(rows), order[:, 0]
    return Updated(
        hypotheses,
        candidates.information[everyone, best],
        # The mass about the best one over its share of the mass about all.
        evidence[everyone, best] - hypotheses.log_weights[:, 0],
        jnp.sum(jnp.where(active, candidates.evaluations, 0), axis=1),
    )


def _search_one(steps: Steps, reference: Reference, observe, known: Known):
    """Return the best candidates of one particle that a search finds."""
    key = jax.random.fold_in(steps.key, known.index)
    current = known.hypotheses
    given = known.prior.centres
    count, keep = len(given), len(current.rotations)
    # A pose that is known up to a group is searched for about all of its copies.
    turns = jnp.einsum("ji,kjl->kil", given[0], given[1:], precision=_HIGHEST)
    copies = jnp.matmul(current.rotations[0], turns, precision=_HIGHEST)
    given = given[np.minimum(np.arange(2 * keep), count - 1)]
    about = jnp.concatenate(
        [current.rotations[:1], copies, current.rotations[1:], current.rotations]
    )[: 2 * keep]

    def search(number, carry):
        centres, shift, *_ = carry
        settings = jax.tree.map(lambda leaf: leaf[number], steps.searches)
        is_wide = number == 0
        rotations, shifts = settings(
            reference.coarse,
            reference.view.up_to(steps.search_r_max[number]).observation(*observe),
            jax.random.fold_in(key, number),
            known.prior,
            jnp.where(is_wide, given, centres),
            jnp.where(is_wide, known.prior.shifts, shift),
        )
        # The second search is about all that is known: what the first one has found,
        # and the current hypotheses. Polished shifts are better than those it found.
        centres = jnp.concatenate([rotations, current.rotations])
        shift = jnp.where(steps.compared, shift, shifts[0])
        return centres, shift, rotations, shifts

    start = (
        about,
        current.shifts[0],
        current.rotations,
        current.shifts,
    )
    *_, rotations, shifts = jax.lax.fori_loop(steps.first_search, 2, search, start)
    return rotations, shifts
