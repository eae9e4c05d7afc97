"""The evidence of a particle at any pose, against integrals that are known."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.integrate import quad

from jaxrefine import symmetry
from jaxrefine.geometry import Poses, rotvec_to_matrix
from jaxrefine.poses.hypotheses import Hypotheses
from jaxrefine.poses.presence import LEAST_EVIDENCE, Space, evidence_anywhere, shown
from jaxrefine.poses.prior import priors_about

SPACE = Space.of(1, 9.0)
# Spreads of priors, radians and pixels, and the distances of poses from them.
KNOWN = [(0.45, 2.0, 0.0), (0.45, 2.0, 1.5), (0.02, 0.3, 1.0), (3.0, 9.0, 0.3)]


def information_of(seed):
    """That of an image about a pose: positive definite, of angles and of shifts."""
    root = np.random.default_rng(seed).normal(size=(5, 5)) * [9, 9, 9, 2, 2]
    return root.T @ root


def found(known, ratios, informations, **limits):
    """Return the evidence anywhere of a particle with these candidates.

    Their log-likelihood ratios, and what the image says of each pose. All of them are
    as far from the prior's pose, in standard deviations; the evidence with the prior
    is that of Laplace's method.
    """
    angle_spread, shift_spread, distance = known
    within: dict[str, Any] = {"max_angle": math.pi, "max_shift": 50.0} | limits
    centre = Poses(jnp.eye(3)[None], jnp.zeros((1, 2)))
    prior = priors_about(centre, angle_spread, shift_spread, **within)
    count = len(ratios)
    axes = np.eye(3)[np.arange(count) % 3]
    turns = rotvec_to_matrix(jnp.asarray(distance * angle_spread * axes))
    shifts = jnp.asarray(np.tile([distance * shift_spread, 0.0], (count, 1)))
    one = jax.tree.map(lambda leaf: leaf[0], prior)
    free, known = np.asarray(one.free), np.asarray(one.information())
    posteriors = [free[:, None] * free * a + known for a in informations]
    evidence = np.array(
        [
            ratio
            - float(one.cost(turn, shift))
            + 2.5 * np.log(2 * np.pi)
            - np.linalg.slogdet(posterior)[1] / 2
            for ratio, turn, shift, posterior in zip(
                ratios, turns, shifts, posteriors, strict=True
            )
        ]
    )
    total = np.logaddexp.reduce(evidence)
    hypotheses = Hypotheses(
        turns[None], shifts[None], jnp.asarray(evidence - total)[None]
    )
    best = jnp.asarray(posteriors[int(np.argmax(evidence))])
    return float(
        evidence_anywhere(
            SPACE, prior, hypotheses, best[None], jnp.asarray(total)[None]
        )[0]
    )


@pytest.mark.parametrize("known", KNOWN)
def test_it_is_the_integral_over_the_space(known):
    """Of the likelihood along each axis, whatever was known of the pose."""
    precisions = np.array([300.0, 80.0, 0.5, 9.0, 0.0])
    spreads = np.repeat([SPACE.angle_spread, SPACE.shift_spread], [3, 2])

    def mean(precision, spread):
        def integrand(x):
            return math.exp(-(precision + spread**-2) * x**2 / 2)

        return quad(integrand, -np.inf, np.inf)[0] / (spread * math.sqrt(2 * math.pi))

    expected = 7.0 + sum(map(math.log, map(mean, precisions, spreads)))
    assert found(known, [7.0], [np.diag(precisions)]) == pytest.approx(
        expected, abs=1e-6
    )


def test_the_space_has_the_volume_of_all_poses():
    for order, radius in ((1, 9.0), (24, 4.0)):
        space = Space.of(order, radius)
        volume = (2 * np.pi) ** 2.5 * space.angle_spread**3 * space.shift_spread**2
        expected = 8 * np.pi**2 / order * np.pi * radius**2
        assert volume == pytest.approx(expected)


@pytest.mark.parametrize("seed", range(3))
def test_what_was_known_does_not_matter(seed):
    """Priors that are wide, tight or wrong: the candidates count as they are likely."""
    information = information_of(seed)
    ratios = [7.0, 6.5, 2.0]
    values = [found(known, ratios, [information] * 3) for known in KNOWN]
    determinant = np.linalg.slogdet(
        np.eye(5)
        + information
        @ np.diag(np.repeat([SPACE.angle_spread, SPACE.shift_spread], [3, 2]) ** 2)
    )[1]
    expected = np.logaddexp.reduce(ratios) - determinant / 2
    np.testing.assert_allclose(values, expected, atol=1e-4)


def test_an_image_that_says_nothing_has_no_evidence():
    """Neither for a particle nor against one."""
    for known in KNOWN:
        assert found(known, [0.0], [np.zeros((5, 5))]) == pytest.approx(0, abs=1e-6)


def test_what_is_fixed_costs_nothing():
    """Both: the likelihood ratio; one of them: the price of the other."""
    information, known = np.diag([300.0, 300.0, 300.0, 9.0, 9.0]), (0.45, 2.0, 0.0)
    fixed = found(known, [7.0], [information], max_angle=0.0, max_shift=0.0)
    assert fixed == pytest.approx(7.0, abs=1e-6)
    prices = [
        7.0 - found(known, [7.0], [information], **{f"max_{what}": 0.0})
        for what in ("angle", "shift")
    ]
    both = 7.0 - found(known, [7.0], [information])
    assert sum(prices) == pytest.approx(both, abs=1e-6)
    assert min(prices) > 1


@pytest.mark.parametrize("group", ["C1", "D2", "I"])
@pytest.mark.parametrize("known", KNOWN)
def test_the_same_poses_do_not_count_several_times(known, group):
    """Of images that say nothing: however many candidates and copies there are."""
    operators = symmetry.operators(group)
    flat = found(known, [0.0] * 6, [np.zeros((5, 5))] * 6, operators=operators)
    assert flat <= 1e-5


@pytest.mark.parametrize("scale", [0.0, 0.1, 1.0, 10.0])
def test_a_mean_is_at_most_the_largest_value(scale):
    """And not changed where it is less, with candidates that do not overlap."""
    information, ratios = scale * information_of(0), [7.0, 7.0, 6.5, 7.0]
    _, determinant = np.linalg.slogdet(
        np.eye(5)
        + information
        @ np.diag(np.repeat([SPACE.angle_spread, SPACE.shift_spread], [3, 2]) ** 2)
    )
    total = np.logaddexp.reduce(ratios) - determinant / 2
    value = found(KNOWN[0], ratios, [information] * 4)
    assert value == pytest.approx(min(total, 7.0), abs=1e-4)


def many(count, group="C1"):
    """Return arguments of ``count`` different particles with eight candidates each."""
    random, shape = np.random.default_rng(count), (count, 8)
    given = Poses(
        rotvec_to_matrix(jnp.asarray(random.normal(size=(count, 3)))),
        jnp.asarray(random.normal(size=(count, 2))),
    )
    limits = {"max_angle": math.pi, "max_shift": 6.0}
    operators = symmetry.operators(group)
    prior = priors_about(given, 0.45, 2.0, **limits, operators=operators)
    hypotheses = Hypotheses(
        rotvec_to_matrix(jnp.asarray(random.normal(size=(*shape, 3)))),
        jnp.asarray(random.normal(size=(*shape, 2))),
        jax.nn.log_softmax(jnp.asarray(random.normal(size=shape))),
    )
    information = np.stack([information_of(seed) for seed in range(count)])
    evidence = jnp.asarray(9 * random.normal(size=count))
    return prior, hypotheses, jnp.asarray(information + np.eye(5)), evidence


def test_each_particle_is_on_its_own():
    """Whichever others there are: more than one batch of them, and the last one."""
    arguments = many(300)
    together = np.asarray(evidence_anywhere(SPACE, *arguments))
    for index in (0, 150, 299):
        one = jax.tree.map(lambda leaf, i=index: leaf[i : i + 1], arguments)
        alone = evidence_anywhere(SPACE, *one)
        assert float(alone[0]) == pytest.approx(together[index], rel=1e-5)


def test_its_memory_is_that_of_a_batch():
    """With 60 copies of each rotation, a thousand more particles take no more."""

    def temporary(count):
        arguments = jax.tree.map(
            lambda leaf: jnp.zeros((count, *leaf.shape[1:]), leaf.dtype), many(2, "I")
        )
        program: Any = evidence_anywhere
        compiled = program.lower(SPACE, *arguments).compile()
        return compiled.compiled.memory_analysis().temp_size_in_bytes

    assert temporary(1300) - temporary(300) < 1000 * 1000


def test_a_particle_is_shown_by_evidence_and_within_its_image():
    """Of 8 pixels; what is not a number shows nothing."""
    more, less = LEAST_EVIDENCE + 1e-3, LEAST_EVIDENCE
    cases = {
        (more, 0.0, 0.0): True,
        (less, 0.0, 0.0): False,
        (more, 4.0, -4.0): True,
        (more, 0.0, -4.1): False,
        (more, 4.1, 0.0): False,
        (np.nan, 0.0, 0.0): False,
        (more, np.nan, 0.0): False,
    }
    values = np.array(list(cases))
    np.testing.assert_array_equal(
        shown(values[:, 0], values[:, 1:], 8), list(cases.values())
    )
