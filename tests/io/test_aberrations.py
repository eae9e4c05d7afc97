"""Aberrations in tables: read for each optics group, written back, refused, told of."""

import jax.numpy as jnp
import numpy as np
import pytest
from helpers import cryosparc_fields, there, write_cs

from jaxrefine.aberrations import with_beam_tilt
from jaxrefine.ctf import CTF
from jaxrefine.errors import InputError
from jaxrefine.io import read_particles, read_star, write_particles, write_star
from jaxrefine.io import write_stack as stack_of

M, COUNT, PIXEL = 8, 5, 1.5
GROUPS = [3, 1, 3, 3, 1]  # the second one has no particles
OPTICS = {
    "rlnOpticsGroup": ["3", "2", "1"],
    "rlnOpticsGroupName": ["c", "b", "a"],
    "rlnVoltage": ["300", "300", "200"],
    "rlnSphericalAberration": ["2.7", "2.7", "2.0"],
    "rlnAmplitudeContrast": ["0.1"] * 3,
    "rlnImagePixelSize": [str(PIXEL)] * 3,
    "rlnImageSize": [str(M)] * 3,
    "rlnImageDimensionality": ["2"] * 3,
}
ABERRATIONS = {
    "rlnBeamTiltX": ["0.5", "9", "0"],
    "rlnBeamTiltY": ["-0.25", "9", "0.125"],
    "rlnOddZernike": ["[1,2,3,4,5,6]", "[9]", "[]"],
    "rlnEvenZernike": ["[0.5,0,-2e1]", "[9]", "[1]"],
    "rlnMagMat00": ["1.01", "1", "1"],
    "rlnMagMat01": ["0.02", "0", "0"],
    "rlnMagMat10": ["-0.03", "0", "0"],
    "rlnMagMat11": ["0.99", "1", "1"],
}


@pytest.fixture
def table(tmp_path):
    """Write a table with the given columns of optics groups and of particles."""
    images = np.random.default_rng(0).normal(size=(COUNT, M, M)).astype(np.float32)
    stack_of(tmp_path / "images.mrcs", images, PIXEL)

    def write(optics=None, particles=None):
        rows = {
            "rlnImageName": [f"{i}@images.mrcs" for i in range(1, COUNT + 1)],
            "rlnOpticsGroup": [str(group) for group in GROUPS],
            "rlnDefocusU": ["10000"] * COUNT,
            "rlnAngleRot": ["10"] * COUNT,
            "rlnAngleTilt": ["20"] * COUNT,
            "rlnAnglePsi": ["30"] * COUNT,
            **(particles or {}),
        }
        path = tmp_path / "particles.star"
        write_star(path, {"optics": OPTICS | (optics or {}), "particles": rows})
        return path

    return write


def test_groups_have_the_aberrations_of_their_rows(table):
    """By number, whatever the order of the rows; the unused row is not read."""
    particles = read_particles(table(ABERRATIONS)).particles
    found = there(particles.aberrations)
    assert found.groups == particles.groups == 2
    assert there(particles.group).tolist() == [1, 0, 1, 1, 0]
    wave = 12.2643247 / np.sqrt(1e3 * 300 * (1 + 0.978466e-3 * 300))
    first = with_beam_tilt(
        np.array([[1.0, 2, 3, 4, 5, 6]]),
        np.array([[0.5, -0.25]]),
        np.array([2.7]),
        np.array([wave]),
    )
    np.testing.assert_allclose(there(found.odd)[1], first[0], rtol=1e-6)
    wave = 12.2643247 / np.sqrt(1e3 * 200 * (1 + 0.978466e-3 * 200))
    z = -2e4 * np.pi * 2.0 * wave**2 * 0.125 / 3
    np.testing.assert_allclose(there(found.odd)[0], [2 * z, 0, 0, z, 0, 0], rtol=1e-6)
    np.testing.assert_allclose(there(found.even), [[1, 0, 0], [0.5, 0, -20]])
    matrices = [[[1, 0], [0, 1]], [[1.01, 0.02], [-0.03, 0.99]]]
    np.testing.assert_allclose(there(found.magnification), matrices)


def test_tables_are_written_back_as_they_were(table, tmp_path):
    file = read_particles(table(ABERRATIONS))
    out = tmp_path / "out.star"
    write_particles(out, file, file.poses)
    assert read_star(out)["optics"] == OPTICS | ABERRATIONS
    again, first = read_particles(out).particles, file.particles
    for name in ("odd", "even", "magnification"):
        np.testing.assert_array_equal(
            getattr(again.aberrations, name), getattr(first.aberrations, name)
        )


def test_what_is_no_aberration_costs_nothing(table):
    """Zeros, the identity, and matrices of zeros, as other programs write them."""
    nothing = {name: ["0"] * 3 for name in ("rlnBeamTiltX", "rlnBeamTiltY")}
    nothing |= {name: ["[0,0.0]"] * 3 for name in ("rlnOddZernike", "rlnEvenZernike")}
    nothing |= {f"rlnMagMat{i}{j}": ["0"] * 3 for i in (0, 1) for j in (0, 1)}
    for columns in (nothing, {}, IDENTITY):
        file = read_particles(table(columns))
        assert file.particles.aberrations is None and file.ignored == ()


def test_without_a_ctf_only_the_magnification_is_used(table):
    path = table(ABERRATIONS)
    file = read_particles(path, with_ctf=False)
    found = file.particles.aberrations
    assert found is not None and found.odd is None and found.even is None
    np.testing.assert_allclose(
        there(found.magnification)[1], [[1.01, 0.02], [-0.03, 0.99]]
    )
    assert file.ignored == (
        "rlnBeamTiltX",
        "rlnBeamTiltY",
        "rlnOddZernike",
        "rlnEvenZernike",
    )


def test_what_is_ignored_is_named(table):
    """What RELION does not read from particles either, and a detector's function."""
    particles = {"rlnBeamTiltX": ["1"] * COUNT, "rlnMagMat00": ["1.000"] * COUNT}
    file = read_particles(table({"rlnMtfFileName": ["", "mtf.star", ""]}, particles))
    assert file.particles.aberrations is None
    assert file.ignored == ("rlnBeamTiltX", "rlnMtfFileName")


def old(table, columns):
    """A table of RELION 3.0: without optics, all columns in that of particles."""
    path = table({}, columns)
    rows = read_star(path)["particles"]
    del rows["rlnOpticsGroup"]
    optics = ("rlnVoltage", "rlnSphericalAberration", "rlnAmplitudeContrast")
    for name in optics:
        rows.setdefault(name, [OPTICS[name][0]] * COUNT)
    rows["rlnMagnification"] = ["10000"] * COUNT
    rows["rlnDetectorPixelSize"] = [str(PIXEL)] * COUNT
    write_star(path, {"": rows})
    return path


def test_beam_tilts_of_relion_3_0_are_groups(table):
    """Those of a group of RELION 3.1 with the same tilt; written back as they were."""
    columns = {
        "rlnBeamTiltX": ["0.5", "0", "0.5", "0.5", "0"],
        "rlnBeamTiltY": ["-0.25", "0.125", "-0.25", "-0.25", "0.125"],
    }
    new = read_particles(table({name: ABERRATIONS[name] for name in columns}))
    path = old(table, columns | {"rlnVoltage": ["300", "200", "300", "300", "200"]})
    file = read_particles(path)
    assert file.optics_group is None and "rlnBeamTiltX" not in file.ignored
    assert there(file.particles.group).tolist() == [1, 0, 1, 1, 0]
    odd = there(there(file.particles.aberrations).odd)
    exact = np.asarray(there(there(new.particles.aberrations).odd))
    np.testing.assert_allclose(odd[1], exact[1], rtol=1e-6)
    assert there(file.particles.aberrations).even is None
    write_particles(path.with_name("out.star"), file, file.poses)
    again = read_particles(path.with_name("out.star"))
    np.testing.assert_array_equal(again.particles.group, file.particles.group)
    assert read_particles(path, with_ctf=False).particles.group is None


def test_no_tilt_and_no_number(table):
    zeros = {"rlnBeamTiltX": ["0"] * COUNT}
    assert read_particles(old(table, zeros)).particles.aberrations is None
    with pytest.raises(InputError, match="rlnBeamTiltX.*finite"):
        read_particles(old(table, {"rlnBeamTiltX": ["1", "nan", "1", "1", "1"]}))


def test_corrections_that_are_not_applied_are_named(table):
    """Columns of a refinement by RELION, unless they say that there is nothing."""
    corrections = {"rlnNormCorrection": "0.9", "rlnGroupScaleCorrection": "1.1"}
    corrections |= {"rlnIsFlip": "1"}
    for values in (corrections, dict(zip(corrections, "110", strict=True))):
        blocks = read_star(table({}))
        for name, value in values.items():
            blocks["particles"][name] = ["1.000000", *[value] * (COUNT - 1)]
            if name == "rlnIsFlip":
                blocks["particles"][name][0] = "0"
        path = table({}).with_name("corrected.star")
        write_star(path, blocks)
        told = tuple(corrections) if values is corrections else ()
        assert read_particles(path).ignored == told


IDENTITY = {f"rlnMagMat{i}{j}": [str(int(i == j))] * 3 for i in (0, 1) for j in (0, 1)}


@pytest.mark.parametrize(
    ("columns", "words"),
    [
        ({"rlnOddZernike": ["[1,x]", "[]", "[]"]}, "column rlnOddZernike: .*brackets"),
        ({"rlnEvenZernike": ["1;2", "[]", "[]"]}, "column rlnEvenZernike: .*brackets"),
        ({"rlnEvenZernike": ["[0,0,1", "[]", "[]"]}, "EvenZernike: .*brackets"),
        ({"rlnMagMat10": ["0", "0", "0"]}, "none of rlnMagMat00, rlnMagMat01, rlnMagM"),
        ({"rlnBeamTiltY": ["nan", "0", "0"]}, "column rlnBeamTiltY: .*finite"),
        ({"rlnEvenZernike": ["[3e38,3e38]", "[]", "[]"]}, "must be finite"),
        (
            IDENTITY | {"rlnMagMat00": ["1", "1", "0.01"]},
            "close to the identity.*0.01 0 0 1",
        ),
        (
            IDENTITY | {"rlnMagMat00": ["1", "-1", "1"]},
            "close to the identity.*-1 0 0 1",
        ),
        ({"rlnEvenZernike": ["[0,0,1", "[]", "[]"]}, "rlnEvenZernike: .*brackets"),
        ({"rlnMagMat10": ["0", "0", "0"]}, "got none of rlnMagMat00, rlnMagMat01, rl"),
    ],
)
def test_bad_values_are_refused(table, columns, words):
    with pytest.raises(InputError, match=words):
        read_particles(table(columns))


# --- cryoSPARC

TILT = [[0.0, 0], [5000, -2500], [5000, -2500], [0, 0], [5000, -2500]]
STRETCH = [[0.0] * 4, [0.01, 0.02, -0.03, -0.01], [0.01, 0.02, -0.03, -0.01]]
STRETCH += [[0.0] * 4, [0.01, 0.02, -0.03, -0.01]]


@pytest.fixture
def cs(table, tmp_path):
    """Write a table of cryoSPARC with the given fields."""
    table()

    def write(**fields):
        columns = cryosparc_fields(COUNT, M, PIXEL) | {
            f"ctf/{name}": np.asarray(values, "<f4") for name, values in fields.items()
        }
        return write_cs(tmp_path / "particles.cs", columns)

    return write


def test_fields_of_cryosparc_become_relions(cs, tmp_path):
    """``tilt_A`` is the sine of the tilt times ``C_s``, ``anisomag`` is ``M - 1``."""
    file = read_particles(cs(tilt_A=TILT, anisomag=STRETCH))
    assert (
        there(file.particles.group).tolist() == [0, 1, 1, 0, 1] and file.ignored == ()
    )
    optics = file.blocks["optics"]
    angles = 1e3 * np.arcsin(np.array([5000, -2500]) / 2.7e7)
    for name, angle in zip(("rlnBeamTiltX", "rlnBeamTiltY"), angles, strict=True):
        np.testing.assert_allclose(np.array(optics[name], float), [0, angle], atol=1e-6)
    found = there(file.particles.aberrations)
    matrices = [np.eye(2), [[1.01, 0.02], [-0.03, 0.99]]]
    np.testing.assert_allclose(there(found.magnification), matrices, atol=1e-6)
    out = tmp_path / "out.star"
    write_particles(out, file, file.poses)
    again = there(read_particles(out).particles.aberrations)
    np.testing.assert_array_equal(again.odd, found.odd)
    np.testing.assert_array_equal(again.magnification, found.magnification)


TREFOIL, TETRAFOIL = [500.0, -300.0], [100.0, -200.0, 50.0, -75.0]
FREQUENCIES = np.random.default_rng(5).uniform(-0.4, 0.4, (50, 2))


def test_lengths_of_cryosparc_have_the_phases_of_specter(cs, tmp_path):
    """Lengths, factors and axes of its tests: its angles count from the y axis.

    There ``tilt_A`` has the phase ``-2 pi lambda^2 k^2 (k . tilt_A)``, as here, so that
    trefoil has its sign relative to the beam tilt. The absolute sign is not specter's:
    its images have the factor ``exp(-i chi)``, the conjugate of RELION's. It is that of
    the beam tilt in pyem.
    """
    some = np.arange(COUNT)[:, None] % 2
    path = cs(trefoil_A=some * TREFOIL, tetra_A=some * TETRAFOIL)
    file = read_particles(path)
    assert there(file.particles.group).tolist() == [0, 1, 0, 1, 0]
    found = there(file.particles.aberrations)
    x, y = FREQUENCIES.T
    k, angle, wave = np.hypot(x, y), np.arctan2(x, y), 0.0196874867
    t1, t2 = 2 * np.pi / 3 * wave**2 * np.array(TREFOIL)
    chi = k**3 * (t1 * np.sin(3 * angle) + t2 * np.cos(3 * angle))
    phases = there(found.phase(jnp.asarray(FREQUENCIES)))
    np.testing.assert_allclose(phases[0], 1)
    np.testing.assert_allclose(phases[1], np.exp(1j * chi), rtol=1e-5)
    factors = np.array([-2, 2, 0.5, -0.5]) * np.pi * wave**3
    u1, u2, u3, u4 = factors * TETRAFOIL
    gamma = u1 * np.cos(2 * angle) + u2 * np.sin(2 * angle)
    gamma += u3 * np.cos(4 * angle) + u4 * np.sin(4 * angle)
    offsets = there(found.gamma(jnp.asarray(FREQUENCIES)))
    np.testing.assert_allclose(offsets[0], 0)
    np.testing.assert_allclose(offsets[1], k**4 * gamma, atol=1e-6)
    write_particles(tmp_path / "out.star", file, file.poses)
    again = there(read_particles(tmp_path / "out.star").particles.aberrations)
    np.testing.assert_array_equal(again.odd, found.odd)
    np.testing.assert_array_equal(again.even, found.even)
    assert "-0.000000" not in ",".join(file.blocks["optics"]["rlnOddZernike"])


def test_lengths_are_those_of_the_other_aberrations(cs):
    """Along x: a trefoil of three times a coma is one, and ``a_1`` adds to ``C_s``."""
    every = np.ones((COUNT, 1))
    along_x = jnp.stack([jnp.linspace(0, 0.4, 20), jnp.zeros(20)], axis=1)

    def aberrations(**fields):
        fields = {name: every * value for name, value in fields.items()}
        return there(read_particles(cs(**fields)).particles.aberrations)

    coma = there(aberrations(tilt_A=[2000.0, 0]).phase(along_x))
    trefoil = there(aberrations(trefoil_A=[6000.0, 0]).phase(along_x))
    np.testing.assert_allclose(trefoil, coma, rtol=1e-5)
    gamma = there(aberrations(tetra_A=[0, 0, 1e5, 0]).gamma(along_x))[0]
    ctf, more = CTF(0.0, 0.0), CTF(0.0, 0.0, spherical_aberration=2.71)(along_x)
    np.testing.assert_allclose(ctf(along_x, gamma), more, atol=1e-5)
    assert np.abs(ctf(along_x) - more).max() > 1e-2


def test_what_of_cryosparc_has_no_column_is_named(cs):
    zero, some = np.zeros((COUNT, 2)), np.ones((COUNT, 2))
    fourth = np.ones((COUNT, 4))
    file = read_particles(cs(trefoil_A=zero, tetra_A=0 * fourth, shift_A=some))
    assert file.ignored == ("ctf/shift_A",) and file.particles.aberrations is None
    file = read_particles(cs(trefoil_A=some, tetra_A=fourth), with_ctf=False)
    assert file.ignored == ("ctf/trefoil_A", "ctf/tetra_A")
    # Without spherical aberration, coma is not that of a tilt.
    file = read_particles(cs(tilt_A=some, cs_mm=np.zeros(COUNT)))
    assert file.ignored == ("ctf/tilt_A",) and file.particles.aberrations is None
    file = read_particles(cs(tilt_A=TILT), with_ctf=False)
    assert file.ignored == ("ctf/tilt_A",) and file.particles.aberrations is None


def test_aberrations_that_are_not_used_may_be_bad(cs):
    """Without a CTF they are named; so are those that lack the rest of the optics."""
    some, bad = np.ones((COUNT, 2)), np.full((COUNT, 2), np.nan)
    every = ("ctf/tilt_A", "ctf/trefoil_A", "ctf/tetra_A")
    with pytest.raises(InputError, match="field ctf/trefoil_A: values must be finite"):
        read_particles(cs(trefoil_A=bad))
    for fields, named in (
        ({"tilt_A": bad, "trefoil_A": bad, "tetra_A": some}, every),
        ({"trefoil_A": bad, "tetra_A": np.zeros((COUNT, 4))}, every[1:2]),
        (
            {"cs_mm": bad[:, 0], "tilt_A": some, "trefoil_A": some, "shift_A": some},
            (*every[:2], "ctf/shift_A"),
        ),
        ({"accel_kv": np.zeros(COUNT), "trefoil_A": some}, every[1:2]),
    ):
        file = read_particles(cs(**fields), with_ctf=False)
        assert file.ignored == named and file.particles.aberrations is None
