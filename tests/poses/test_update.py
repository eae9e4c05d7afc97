"""The visit of a block: its steps are those of one particle, wherever it is visited."""

import dataclasses

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import blobs
from scipy.spatial.transform import Rotation

from jaxrefine.ctf import CTF
from jaxrefine.data import observation, visit
from jaxrefine.data.particles import Particles
from jaxrefine.geometry import Poses, geodesic_distance
from jaxrefine.operators import slices
from jaxrefine.poses import update
from jaxrefine.poses.hypotheses import Hypotheses, distinct, merge
from jaxrefine.poses.prior import priors_about
from jaxrefine.refinement import pose_step
from jaxrefine.refinement.config import RefineConfig

N, P, KEEP = 16, 300, 3
LAST, SEARCH = 7, 5
SINGLE = jnp.float32
CONFIG = RefineConfig(angle_spread=0.2, first_r_max=4, search_r_max=SEARCH)
NEGLIGIBLE = CONFIG.tuning.negligible


class Scene:
    """Noisy images of two optics groups, some of them searched for."""

    def __init__(self):
        rng = np.random.default_rng(0)
        truth = Poses(
            jnp.asarray(Rotation.random(P, rng).as_matrix(), SINGLE),
            jnp.asarray(rng.uniform(-1, 1, (P, 2)), SINGLE),
        )
        defocus = jnp.asarray(rng.uniform(1e4, 2e4, P), SINGLE)
        ctf, group = CTF(defocus, defocus + 300), np.arange(P) % 2
        empty = Particles(np.zeros((P, N, N), np.float32), ctf, 4.0, group)
        noise = np.array([[1.0], [2.0]]) * np.full(N // 2 + 1, 0.5 * N**2)
        self.view = observation.view(
            empty, LAST, jnp.asarray(noise, SINGLE), observation.PART
        )
        volume = blobs(N, dtype=SINGLE)
        self.reference = update.Reference(
            CONFIG.search_interpolation.spectrum(volume, SEARCH),
            CONFIG.interpolation.spectrum(volume, LAST),
            self.view,
        )
        transfer = dataclasses.replace(self.view, factor=None).transfer(ctf, None)
        clean = slices.project(self.reference.fine, self.view.disc, truth, transfer)
        images = np.asarray(slices.to_images(clean, self.view.disc))
        images = images + np.sqrt(0.5 * (1 + group))[:, None, None] * rng.normal(
            size=images.shape
        )
        self.truth = truth
        self.particles = Particles(images.astype(np.float32), ctf, 4.0, group)
        turns = Rotation.from_rotvec(0.15 * rng.normal(size=(P, 3))).as_matrix()
        near = jnp.asarray(turns @ np.asarray(truth.rotations), SINGLE)
        given = Poses(near, jnp.zeros((P, 2), SINGLE))
        rotations = np.repeat(np.asarray(near)[:, None], KEEP, axis=1)
        more = Rotation.from_rotvec(0.3 * rng.normal(size=(P, 3))).as_matrix()
        rotations[:, 1] = (more @ np.asarray(near)).astype(np.float32)
        weights = np.tile([0.6, 0.4, 0.0], (P, 1))
        weights[::3] = [1.0, 0.0, 0.0]
        with np.errstate(divide="ignore"):
            logs = np.log(weights).astype(np.float32)
        known = Hypotheses(
            jnp.asarray(rotations), jnp.zeros((P, KEEP, 2), SINGLE), jnp.asarray(logs)
        )
        self.known = update.Known(
            np.arange(P, dtype=np.int32),
            priors_about(given, 0.2, 2.0, np.pi, 6.0),
            known,
            np.arange(P) % 4 > 0,
        )

    def steps(self, r_max=LAST, *, is_wide=True, compared=True):
        return pose_step.visit_steps(
            CONFIG,
            N,
            min(SEARCH, r_max),
            r_max,
            is_wide=is_wide,
            compared=compared,
            key=jax.random.key(3),
        )

    def visit(self, steps, chosen=None, batch_size=64):
        chosen = np.arange(P) if chosen is None else chosen
        return visit.visit(
            update.update_block,
            (steps, self.reference),
            self.particles,
            chosen,
            jax.tree.map(lambda leaf: np.asarray(leaf)[chosen], self.known),
            batch_size,
        )


@pytest.fixture(scope="module")
def scene():
    return Scene()


@eqx.filter_jit
def search_one(searches, number, reference, seen, key, prior, centres, shift):
    search = jax.tree.map(lambda leaf: leaf[number], searches)
    return search(reference, seen, key, prior, centres, shift)


@eqx.filter_jit
def polish_one(polish, reference, seen, prior, rotation, shift):
    return polish(reference, seen, prior, rotation, shift)


def one_by_one(scene, steps, p):
    """The steps in the open, for one particle."""
    chosen = np.array([p])
    images, ctf = scene.particles.batch(chosen)
    group = jnp.asarray(scene.particles.group_of(chosen))
    view = scene.view
    observe = view.spectra(images, group)[0], view.transfer(ctf, group)[0]
    prior, known = jax.tree.map(
        lambda leaf: jnp.asarray(leaf[p]), (scene.known.prior, scene.known.hypotheses)
    )
    searched, found, whole = bool(scene.known.searched[p]), (), None
    candidates = [
        (known.rotations[i], known.shifts[i])
        for i in range(KEEP)
        if known.weights[i] > NEGLIGIBLE
    ]
    rounds = [int(steps.r_max[1])]
    if searched:
        key = jax.random.fold_in(steps.key, p)
        centres, shift = known.rotations, known.shifts[0]
        for number in range(int(steps.first_search), 2):
            about = centres
            at = shift
            if number == 0:
                about, at = prior.rotations[None], prior.shifts
            seen = view.up_to(jnp.asarray(steps.search_r_max[number]))
            found = search_one(
                steps.searches,
                number,
                scene.reference.coarse,
                seen.observation(*observe),
                jax.random.fold_in(key, number),
                prior,
                about,
                at,
            )
            centres = jnp.concatenate([found[0], known.rotations])
            shift = shift if steps.compared else found[1][0]
        candidates = list(zip(*found, strict=True))
        if steps.compared:
            candidates.append((known.rotations[0], known.shifts[0]))
        if int(steps.first_round) == 0:
            rounds.insert(0, int(steps.r_max[0]))
    separation = jnp.asarray(steps.separation)
    for number, r_max in enumerate(rounds):
        seen = view.up_to(jnp.asarray(r_max)).observation(*observe)
        polished = [
            polish_one(steps.polish, scene.reference.fine, seen, prior, *candidate)
            for candidate in candidates
        ]
        whole = jax.tree.map(lambda *leaves: jnp.stack(leaves), *polished)
        if number + 1 < len(rounds):
            evidence = distinct(whole.rotations, whole.evidence, separation)
            likely = jax.nn.softmax(evidence) > NEGLIGIBLE
            candidates = [
                (each.rotations, each.shifts)
                for each, is_likely in zip(polished, likely, strict=True)
                if is_likely
            ]
    assert whole is not None
    ranked, order = merge(whole.rotations, whole.shifts, whole.evidence, separation)
    return whole, ranked, order


@pytest.mark.slow
@pytest.mark.parametrize(
    ("r_max", "is_wide", "compared"),
    [(LAST, True, True), (LAST, False, True), (SEARCH, True, False)],
)
def test_a_block_does_what_each_particle_needs(scene, r_max, is_wide, compared):
    """Searched for or not, in one round or two: as one particle after the other."""
    steps = scene.steps(r_max, is_wide=is_wide, compared=compared)
    found = scene.visit(steps)
    undecided = int(np.argmin(found.hypotheses.log_weights[:, 0]))
    for p in (0, 1, 2, 3, 5, 6, 63, 64, 99, undecided):
        whole, ranked, order = one_by_one(scene, steps, p)
        best = int(order[0])
        masses = distinct(
            whole.rotations, whole.evidence, jnp.asarray(steps.separation)
        )
        mass = float(jax.nn.logsumexp(masses[order][:KEEP]))
        assert found.evidence[p] == pytest.approx(mass, abs=0.02)
        assert p != undecided or mass > float(whole.evidence[best]) + 0.1
        weights = np.exp(found.hypotheses.log_weights[p])
        assert weights.sum() == pytest.approx(1, abs=1e-5)
        exact = np.zeros(KEEP)
        exact[: len(ranked.weights)] = ranked.weights[:KEEP]
        np.testing.assert_allclose(weights, exact / exact.sum(), atol=0.01)
        for i in np.flatnonzero(weights > 0.05):
            np.testing.assert_allclose(
                found.hypotheses.rotations[p, i], ranked.rotations[i], atol=2e-3
            )
            np.testing.assert_allclose(
                found.hypotheses.shifts[p, i], ranked.shifts[i], atol=0.01
            )
        scale = np.abs(whole.information[best]).max()
        np.testing.assert_allclose(
            found.information[p], whole.information[best], atol=0.02 * scale
        )


def test_poses_come_nearer_the_truth(scene):
    found = scene.visit(scene.steps())
    best = Poses(
        *(
            jnp.asarray(leaf)
            for leaf in (
                found.hypotheses.rotations[:, 0],
                found.hypotheses.shifts[:, 0],
            )
        )
    )
    after, before = (
        np.median(geodesic_distance(rotations, scene.truth.rotations))
        for rotations in (best.rotations, scene.known.prior.rotations)
    )
    assert after < 0.5 * before
    assert (found.evaluations >= 1).all()


def bits(updated):
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(updated)]


def test_no_bit_depends_on_the_batch(scene):
    steps = scene.steps()
    together = bits(scene.visit(steps, batch_size=1000))
    assert bits(scene.visit(steps, batch_size=1)) == together
    # The first block alone: other particles are not seen.
    part = scene.visit(steps, np.arange(visit.BLOCK))
    whole = scene.visit(steps)
    assert bits(part) == bits(jax.tree.map(lambda leaf: leaf[: visit.BLOCK], whole))
