"""The contrast-transfer function: its laws, and RELION's own values."""

import shutil
import subprocess

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrefine.ctf import CTF, apply_ctf, electron_wavelength, is_finite
from jaxrefine.io import read_stack, write_mrc, write_star


def frequencies(m, pixel):
    """Frequencies (x, y) of ``rfft2``, in periods per Angstrom."""
    x, y = np.fft.rfftfreq(m, pixel), np.fft.fftfreq(m, pixel)
    return jnp.asarray(np.stack(np.meshgrid(x, y), axis=-1).reshape(-1, 2))


def on_circle(ctf, radius, angles):
    points = radius * np.stack([np.cos(angles), np.sin(angles)], axis=-1)
    return np.asarray(ctf(jnp.asarray(points)))


def test_wavelengths_of_the_textbook():
    # 300 kV: 1.9687 pm; 200 kV: 2.5079 pm.
    for voltage, expected in ((300.0, 0.019687), (200.0, 0.025079)):
        found = electron_wavelength(jnp.array(voltage))
        np.testing.assert_allclose(found, expected, atol=1e-6)


def test_amplitude_contrast_is_all_there_is_at_zero():
    """With RELION's sign: bright protein stays bright at low frequencies."""
    ctf = CTF(15000.0, 14000.0, 0.3, amplitude_contrast=0.07, scale=2.0)
    value = ctf(jnp.zeros((1, 2)))
    np.testing.assert_allclose(value, 2 * 0.07)
    first_ring = on_circle(ctf, 0.02, np.linspace(0, 6, 7))
    assert (first_ring > 0.3).all()


def test_zeros_are_where_the_defocus_puts_them():
    """Without aberration and amplitude contrast at ``lambda delta u^2 = k``."""
    ctf = CTF(
        12000.0, 12000.0, voltage=200.0, spherical_aberration=0, amplitude_contrast=0
    )
    k = np.arange(1, 9)
    zeros = np.sqrt(k / (float(electron_wavelength(jnp.array(200.0))) * 12000))
    points = jnp.asarray(np.stack([zeros, 0 * zeros], axis=-1))
    np.testing.assert_allclose(ctf(points), 0, atol=1e-10)


def test_astigmatism_turns_with_its_angle():
    """Along ``defocus_angle`` the defocus is ``defocus_u``, across it ``defocus_v``."""
    angle = 0.4
    ctf = CTF(16000.0, 11000.0, angle)
    for direction, defocus in ((angle, 16000.0), (angle + np.pi / 2, 11000.0)):
        round_one = CTF(defocus, defocus)
        for turn in (0, np.pi):
            values, expected = (
                on_circle(c, 0.08, [direction + turn]) for c in (ctf, round_one)
            )
            np.testing.assert_allclose(values, expected, atol=1e-9)


def test_envelope_and_phase_plate():
    plain, points = CTF(9000.0, 9000.0), frequencies(16, 2.0)
    squared = jnp.sum(points**2, axis=1)
    damped = CTF(9000.0, 9000.0, b_factor=80.0, scale=0.7)(points)
    expected = 0.7 * jnp.exp(-20 * squared) * plain(points)
    np.testing.assert_allclose(damped, expected, atol=1e-12)
    # Half a turn flips the sign; so does a defocus of the other sign, nearly.
    flipped = CTF(9000.0, 9000.0, phase_shift=np.pi)
    np.testing.assert_allclose(flipped(points), -plain(points), atol=1e-9)


def test_one_number_serves_all_particles():
    ctf = CTF(jnp.array([1e4, 2e4]), jnp.array([9e3, 2e4]), 0.1, voltage=200.0)
    assert {leaf.shape for leaf in jax.tree.leaves(ctf)} == {(2,)}
    points = frequencies(8, 1.5)
    many = jax.vmap(lambda c: c(points))(ctf)
    np.testing.assert_allclose(many[1], CTF(2e4, 2e4, voltage=200.0)(points))


def test_single_precision_stays_single():
    ctf = CTF(jnp.float32(2e4), jnp.float32(1.9e4))
    points = frequencies(16, 1.0)
    value = ctf(points.astype(jnp.float32))
    assert value.dtype == jnp.float32
    # A hundred radians of phase, at 24 bits.
    np.testing.assert_allclose(value, CTF(2e4, 1.9e4)(points), atol=1e-4)


@pytest.mark.parametrize("m", [8, 9])
def test_applied_to_a_wave_it_is_a_factor(m):
    """A plane wave keeps its shape; each image has its own factor."""
    ctf = CTF(jnp.array([8e3, 2e4]), jnp.array([7e3, 1.5e4]), jnp.array([0.2, 1.0]))
    y, x = np.mgrid[:m, :m]
    waves = np.stack([np.cos(2 * np.pi * (2 * x - y) / m + 0.3)] * 2)
    found = apply_ctf(ctf, jnp.asarray(waves), 2.5)
    point = jnp.array([[2.0, -1.0]]) / (2.5 * m)
    factor = jax.vmap(lambda c: c(point))(ctf)
    np.testing.assert_allclose(found, factor[:, :, None] * waves, atol=1e-12)


# --- RELION

PROJECT = shutil.which("relion_project")
PIXEL, SIDE = 3.0, 32


@pytest.mark.skipif(PROJECT is None, reason="relion_project is not installed")
def test_relion_has_the_same_ctf(tmp_path):
    """The ratio of RELION's projections with and without its CTF."""
    rng = np.random.default_rng(0)
    k = np.arange(SIDE) - SIDE // 2
    inside = k**2 + k[:, None] ** 2 + k[:, None, None] ** 2 < 10**2
    write_mrc(tmp_path / "map.mrc", inside * rng.random((SIDE,) * 3), PIXEL)
    u = rng.uniform(8000, 22000, 4)
    columns = {
        "rlnDefocusU": u,
        "rlnDefocusV": u - rng.uniform(500, 3000, 4),
        "rlnDefocusAngle": rng.uniform(-90, 90, 4),
        "rlnPhaseShift": np.array([0.0, 0.0, 40.0, 90.0]),
        "rlnCtfBfactor": np.array([0.0, 60.0, 0.0, 100.0]),
        "rlnCtfScalefactor": np.array([1.0, 1.0, 0.5, 1.0]),
        "rlnAngleRot": rng.uniform(0, 360, 4),
        "rlnAngleTilt": rng.uniform(0, 180, 4),
        "rlnAnglePsi": rng.uniform(0, 360, 4),
    }
    optics = {
        "rlnOpticsGroup": ["1", "2"],
        "rlnOpticsGroupName": ["a", "b"],
        "rlnVoltage": ["300", "200"],
        "rlnSphericalAberration": ["2.7", "2.0"],
        "rlnAmplitudeContrast": ["0.1", "0.07"],
        "rlnImagePixelSize": [str(PIXEL)] * 2,
        "rlnImageSize": [str(SIDE)] * 2,
        "rlnImageDimensionality": ["2"] * 2,
    }
    particles = {
        "rlnImageName": [f"{i}@absent.mrcs" for i in range(1, 5)],
        "rlnOpticsGroup": ["1", "1", "2", "2"],
        **{name: [f"{x:.6f}" for x in values] for name, values in columns.items()},
    }
    write_star(tmp_path / "poses.star", {"optics": optics, "particles": particles})
    spectra = []
    for name, further in (("plain", []), ("seen", ["--ctf"])):
        command = [PROJECT, "--i", "map.mrc", "--ang", "poses.star", "--o", name]
        command += ["--angpix", str(PIXEL), *further]
        subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)
        images, _ = read_stack(tmp_path / f"{name}.mrcs")
        spectra.append(np.fft.rfft2(images.astype(float)))

    ctf = CTF(
        u,
        columns["rlnDefocusV"],
        np.deg2rad(columns["rlnDefocusAngle"]),
        voltage=np.array([300.0, 300, 200, 200]),
        spherical_aberration=np.array([2.7, 2.7, 2.0, 2.0]),
        amplitude_contrast=np.array([0.1, 0.1, 0.07, 0.07]),
        phase_shift=np.deg2rad(columns["rlnPhaseShift"]),
        b_factor=columns["rlnCtfBfactor"],
        scale=columns["rlnCtfScalefactor"],
    )
    points = frequencies(SIDE, PIXEL)
    ours = np.asarray(jax.vmap(lambda c: c(points))(ctf))
    plain, seen = (spectrum.reshape(4, -1) for spectrum in spectra)
    # RELION's images are in single precision; where there is power, and off Nyquist.
    x, y = np.abs(np.asarray(points)).T * PIXEL
    chosen = (x < 0.49) & (y < 0.49) & (np.abs(plain) > 1e-3 * np.abs(plain).max())
    assert chosen.sum() > 4 * 300
    ratio = seen[chosen] / plain[chosen]
    np.testing.assert_allclose(ratio, ours[chosen], atol=5e-5)


def test_what_single_precision_cannot_hold_is_told():
    defocus = jnp.asarray([2e4, 1e39, 2e4])
    b_factor = jnp.asarray([100.0, 0.0, -1e9])
    ctf = CTF(defocus, defocus, b_factor=b_factor)
    np.testing.assert_array_equal(is_finite(ctf, 1.5), [True, False, False])
