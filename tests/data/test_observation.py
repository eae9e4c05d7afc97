"""What maps are compared with: whitened spectra on a disc, in batches of particles."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrefine.ctf import CTF
from jaxrefine.data import observation
from jaxrefine.data.particles import Particles

N, R_MAX = 16, 7
SIGMA, PIXEL = 1.0, 4.0
SINGLE = jnp.float32


@pytest.mark.parametrize(("count", "size"), [(7, 3), (6, 3), (2, 5), (1, 1)])
def test_batches_visit_everything_once(count, size):
    indices = np.arange(count) ** 2
    seen = []
    for batch, fresh in observation.batches(indices, size):
        assert batch.shape == (size,) and set(batch) <= set(indices)
        seen += list(batch[:fresh])
    assert seen == list(indices)


def test_the_view():
    """Whitened, the origin left out; frequencies in physical units for the optics."""
    defocus = jnp.linspace(1e4, 2e4, 5, dtype=SINGLE)
    ctf = CTF(defocus, defocus + 300)
    noise = jnp.full(N // 2 + 1, (SIGMA * N) ** 2, SINGLE)
    particles = Particles(np.zeros((5, N, N), np.float32), ctf, PIXEL)
    view = observation.view(particles, R_MAX, noise)
    origin = np.asarray(view.disc.shells) == 0
    weights = np.asarray(view.disc.multiplicity) / (SIGMA * N) ** 2
    np.testing.assert_allclose(view.weights, np.where(origin, 0, weights), rtol=1e-6)
    inverse = np.where(origin, 0, 1 / SIGMA**2)
    np.testing.assert_allclose(view.inverse_noise, inverse, rtol=1e-6)
    physical = np.asarray(view.disc.frequencies) / (N * PIXEL)
    np.testing.assert_allclose(
        view.frequencies_in_inverse_angstroms, physical, rtol=1e-6
    )
    fourth = jax.tree.map(lambda leaf: leaf[3], ctf)
    transfer = view.transfer(ctf, None)
    assert transfer is not None and view.transfer(None, None) is None
    exact = fourth(jnp.asarray(physical, SINGLE))
    np.testing.assert_allclose(transfer[3], exact, atol=2e-5)
    # White noise has, in the spectrum, the power that it was said to have.
    images = SIGMA * np.random.default_rng(1).normal(size=(400, N, N))
    power = np.abs(view.spectra(jnp.asarray(images), None)) ** 2
    assert np.mean(power) / float(noise[0]) == pytest.approx(1, rel=0.02)


@pytest.mark.parametrize("r_max", [1, 5, 7, 12, 15])
def test_a_lower_band_limit_in_the_same_arrays(r_max):
    """As a view that was made for it: the same frequencies, summed in parts."""
    n, part = 32, observation.PART
    particles = Particles(np.zeros((1, n, n), np.float32))
    noise = jnp.linspace(1.0, 2.0, n // 2 + 1)
    exact = observation.view(particles, r_max, noise)
    whole = observation.view(particles, 15, noise, part)
    count = len(exact.weights)
    assert len(whole.weights) % part == 0 and np.sum(whole.disc.multiplicity == 0)
    limited = whole.up_to(jnp.asarray(r_max))
    assert limited.length is not None and int(limited.length) == count
    np.testing.assert_array_equal(limited.weights[:count], exact.weights)
    np.testing.assert_array_equal(limited.weights[count:], 0)
    np.testing.assert_array_equal(
        limited.disc.frequencies[:count], exact.disc.frequencies
    )
    rng = np.random.default_rng(0)
    data = jnp.asarray(rng.normal(size=(2, len(whole.weights))))
    spectrum, transfer = data[0].astype(complex), data[1]

    @jax.jit
    def total(view, spectrum, transfer):
        seen = view.observation(spectrum, transfer)
        calls = []

        def terms(part):
            calls.append(len(part.weights))
            power = part.weights * part.transfer * part.spectrum.real
            return jnp.sum(power), part.disc.frequencies.T @ power

        result = seen.sum_over_parts(terms)
        assert set(calls) == {len(view.weights) if view.length is None else part}
        return result

    found = total(limited, spectrum, transfer)
    expected = total(exact, spectrum[:count], transfer[:count])
    for value, one in zip(found, expected, strict=True):
        np.testing.assert_allclose(value, one, rtol=1e-12, atol=1e-12)
