"""Aberrations in tables: read for each optics group, written back, refused, told of."""

import numpy as np
import pytest
from helpers import cryosparc_fields, there, write_cs

from jaxrefine.aberrations import with_beam_tilt
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
    for columns in (nothing, {}, {"rlnMagMat00": ["1"] * 3}):
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


@pytest.mark.parametrize(
    ("columns", "words"),
    [
        ({"rlnOddZernike": ["[1,x]", "[]", "[]"]}, "column rlnOddZernike: .*brackets"),
        ({"rlnEvenZernike": ["1;2", "[]", "[]"]}, "column rlnEvenZernike: .*brackets"),
        ({"rlnBeamTiltY": ["nan", "0", "0"]}, "column rlnBeamTiltY: .*finite"),
        ({"rlnEvenZernike": ["[3e38,3e38]", "[]", "[]"]}, "must be finite"),
        ({"rlnMagMat00": ["1", "1", "0.01"]}, "close to the identity.*0.01 0 0 1"),
        ({"rlnMagMat00": ["1", "-1", "1"]}, "close to the identity.*-1 0 0 1"),
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


def test_what_cryosparc_does_not_define_is_named(cs):
    zero, some = np.zeros((COUNT, 2)), np.ones((COUNT, 2))
    file = read_particles(cs(trefoil_A=some, tetra_A=np.ones((COUNT, 4)), shift_A=zero))
    assert file.ignored == ("ctf/trefoil_A", "ctf/tetra_A")
    assert file.particles.aberrations is None
    # Without spherical aberration, coma is not that of a tilt.
    file = read_particles(cs(tilt_A=some, cs_mm=np.zeros(COUNT)))
    assert file.ignored == ("ctf/tilt_A",) and file.particles.aberrations is None
    file = read_particles(cs(tilt_A=TILT), with_ctf=False)
    assert file.ignored == ("ctf/tilt_A",) and file.particles.aberrations is None
