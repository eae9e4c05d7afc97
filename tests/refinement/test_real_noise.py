"""The background of real micrographs: coloured noise, with and without particles."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrefine import evaluation, simulate
from jaxrefine.data.particles import Particles
from jaxrefine.io import read_stack
from jaxrefine.maps.fsc import fsc
from jaxrefine.poses import matching
from jaxrefine.refinement import loop

N, SNR_DB = 48, -10.0


@pytest.fixture
def noise(data_dir):
    """Patches of background, each of mean 0 and standard deviation 1."""
    path = data_dir / "real_betagal" / "betagal_emd2984_background_101_96px.mrcs"
    patches, _ = read_stack(path)
    noise = np.concatenate(
        [patches[:, i : i + N, j : j + N] for i in (0, N) for j in (0, N)]
    )
    noise = noise - noise.mean(axis=(1, 2), keepdims=True)
    return noise / noise.std(axis=(1, 2), keepdims=True)


@pytest.mark.slow
def test_the_spectrum_of_real_noise_is_found(noise):
    """From the residuals, to a few per cent in every shell, while poses are refined.

    Its power falls by nearly a half from the lowest shells to the highest.
    """
    truth = simulate.phantom(jax.random.key(0), N)
    clean = simulate.make_dataset(
        jax.random.key(1),
        truth,
        len(noise),
        max_shift=2.0,
        max_angle_error=0.5,
        sigma=0.0,
    )
    noise *= float(simulate.noise_std(clean.images, SNR_DB))
    frequency = np.fft.fftfreq(N, 1 / N)
    shell = np.rint(np.hypot(frequency[:, None], frequency)).astype(int)
    power = np.mean(np.abs(np.fft.fft2(noise)) ** 2, axis=0)
    shells = np.arange(1, N // 2)
    expected = np.array([power[shell == s].mean() for s in shells])
    assert expected[0] > 1.6 * expected[-1]

    result = loop.refine(
        Particles(np.asarray(clean.images, np.float32) + noise.astype(np.float32)),
        clean.initial,
        simulate.blur(truth, 3.0),
        key=jax.random.key(2),
    )
    (found,) = result.state.set_states[0].noise
    np.testing.assert_allclose(found[shells], expected, rtol=0.05)
    errors = evaluation.pose_errors(
        *jax.tree.map(lambda leaf: leaf.astype(float), (result.poses, clean.truth))
    )
    assert evaluation.summarise(errors)["angle_error_in_degrees_median"] < 6
    volume = jnp.asarray(result.volume)
    assert float(jnp.mean(fsc(volume, truth)[1 : N // 2])) > 0.6


@pytest.mark.slow
def test_real_noise_shows_no_particle(noise):
    """Though poses were found in a map, and refined together with one."""
    particles = Particles(noise[:200].astype(np.float32))
    reference = simulate.phantom(jax.random.key(0), N)
    found = matching.match(particles, reference).poses
    result = loop.refine(particles, found, reference, key=jax.random.key(2))
    assert np.mean(result.undetermined) >= 0.9
