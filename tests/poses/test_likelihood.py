"""The likelihood of a pose against autodiff of the slice, written in the open.

The cost is half the weighted sum of squares, its gradient is that of ``jax.grad``, the
normal equations are those of ``jax.jacfwd``, and Gauss-Newton steps find the pose.
"""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import blobs, draw, draw_complex, draw_poses, relative_error

from jaxrefine import geometry
from jaxrefine.data.observation import Observation
from jaxrefine.operators import slices
from jaxrefine.operators.gridding import Gridding
from jaxrefine.poses import likelihood

N, R_MAX = 16, 7
GRIDDING = Gridding(2, 1.5)
DISC = slices.disc(N, R_MAX)
K = len(DISC.multiplicity)
equations = eqx.filter_jit(likelihood.normal_equations)
with_gradient = eqx.filter_jit(likelihood.cost_and_gradient)


def particle(dtype=jnp.float64, transfer=True):
    """A particle, and a pose that is not its best."""
    poses = draw_poses(1, dtype=dtype)
    observation = Observation(
        DISC,
        DISC.quadrature.astype(dtype) * (1 + draw(K, seed=6, dtype=dtype) ** 2),
        8 * draw_complex(K, seed=7, dtype=dtype),
        jnp.cos(draw(K, seed=5, dtype=dtype)) if transfer else None,
    )
    return observation, poses.rotations[0], poses.shifts[0]


def model(reference, rotation, shift, transfer):
    """The slice in the open: no trick but the interpolated spectrum."""
    omega = DISC.frequencies
    k = omega @ rotation[:2]
    angle = -2 * np.pi / N * (omega @ shift)
    phases = jax.lax.complex(jnp.cos(angle), jnp.sin(angle))
    gain = (DISC.envelope * transfer).astype(phases.dtype)
    return phases * gain * reference(k[:, 0], k[:, 1], k[:, 2])


def moved(rotation, shift, step):
    return geometry.rotvec_to_matrix(step[:3]) @ rotation, shift + step[3:]


@pytest.mark.slow
@pytest.mark.parametrize("transfer", [True, False])
def test_cost_gradient_and_normal_equations(transfer):
    """The gradient is ``jax.grad`` of the cost, ``J`` is ``jacfwd`` of the slice."""
    reference = GRIDDING.spectrum(draw(N, N, N), R_MAX)
    observation, rotation, shift = particle(transfer=transfer)
    pose = rotation, shift
    factor = observation.transfer if transfer else jnp.ones(K)

    def residual(step):
        return (
            model(reference, *moved(rotation, shift, step), factor)
            - observation.spectrum
        )

    step = jnp.zeros(5)
    r = np.asarray(jax.jit(residual)(step))
    w = np.asarray(observation.weights)
    energy = np.sum(w * np.abs(r) ** 2) / 2
    jacobian = np.asarray(jax.jit(jax.jacfwd(residual))(step))
    slope = np.real((jacobian.conj() * w[:, None]).T @ r)
    square = np.real((jacobian.conj() * w[:, None]).T @ jacobian)

    @jax.jit
    def cost(step):
        return likelihood.cost(reference, observation, *moved(rotation, shift, step))

    np.testing.assert_allclose(cost(step), energy, rtol=1e-12)
    assert relative_error(jax.grad(cost)(step), slope) < 1e-10
    value, gradient = with_gradient(reference, observation, *pose)
    np.testing.assert_allclose(value, energy, rtol=1e-12)
    assert relative_error(gradient, slope) < 1e-10
    value, gradient, curvature = equations(reference, observation, *pose)
    np.testing.assert_allclose(value, energy, rtol=1e-12)
    assert relative_error(gradient, slope) < 1e-10
    assert relative_error(curvature, square) < 1e-10


@pytest.mark.slow
def test_gauss_newton_finds_the_pose():
    """From two degrees and half a pixel away, to rounding, in a few steps."""
    reference = Gridding(4, 1.75).spectrum(blobs(N, 1.0), R_MAX)
    observation, rotation, shift = particle(transfer=False)
    spectrum = jax.jit(model)(reference, rotation, shift, jnp.ones(K))
    observation = Observation(DISC, observation.weights, spectrum, None)
    pose = moved(rotation, shift, jnp.asarray([0.02, -0.02, 0.02, 0.3, -0.4]))
    for _ in range(8):
        _, gradient, curvature = equations(reference, observation, *pose)
        pose = moved(*pose, -jnp.linalg.solve(curvature, gradient))
    for value, exact in zip(pose, (rotation, shift), strict=True):
        np.testing.assert_allclose(value, exact, rtol=0, atol=1e-8)


@pytest.mark.slow
def test_particles_of_a_batch_have_their_own_equations():
    reference = GRIDDING.spectrum(draw(N, N, N), R_MAX)
    poses, spectra = draw_poses(5), draw_complex(5, K)

    def equations_of(spectrum, rotation, shift):
        observation = Observation(DISC, DISC.quadrature, spectrum, None)
        return likelihood.normal_equations(reference, observation, rotation, shift)

    particles = (spectra, poses.rotations, poses.shifts)
    together = jax.jit(jax.vmap(equations_of))(*particles)
    for p in (0, 4):
        alone = jax.jit(equations_of)(*(leaf[p] for leaf in particles))
        for value, exact in zip(together, alone, strict=True):
            np.testing.assert_allclose(value[p], exact, rtol=1e-12, atol=1e-12)


def test_single_precision():
    volume = draw(N, N, N)
    single, double = (
        equations(GRIDDING.spectrum(volume.astype(dtype), R_MAX), *particle(dtype))
        for dtype in (jnp.float32, jnp.float64)
    )
    for value, exact in zip(single, double, strict=True):
        assert value.dtype == jnp.float32
        assert relative_error(value, exact) < 1e-4
