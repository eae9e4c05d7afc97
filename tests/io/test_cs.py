"""cryoSPARC's tables: what they mean in RELION's words."""

import jax.numpy as jnp
import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from jaxrefine.errors import InputError
from jaxrefine.euler import euler_to_matrix
from jaxrefine.io import (
    read_cs,
    read_particles,
    read_star,
    write_particles,
    write_stack,
    write_star,
)

M, COUNT = 6, 5
RNG = np.random.default_rng(0)
FIELDS = {
    "blob/path": ("S20", [b">J1/a.mrcs"] * 3 + [b"J1/b.mrcs"] * 2),
    "blob/idx": ("<u4", [0, 2, 1, 0, 1]),
    "blob/shape": ("<u4", [[M, M]] * COUNT),
    "blob/psize_A": ("<f4", [1.5] * COUNT),
    "blob/sign": ("<f4", [1.0] * COUNT),
    "ctf/exp_group_id": ("<u4", [7, 7, 2, 2, 7]),
    "ctf/accel_kv": ("<f4", [300, 300, 200, 200, 300]),
    "ctf/cs_mm": ("<f4", [2.7] * COUNT),
    "ctf/amp_contrast": ("<f4", [0.1, 0.1, 0.07, 0.07, 0.1]),
    "ctf/df1_A": ("<f4", [15000.0, 16000, 17000, 18000, 19000]),
    "ctf/df2_A": ("<f4", [14000.0, 15500, 16900, 17000, 18000]),
    "ctf/df_angle_rad": ("<f4", [0.5, -1, 2, 3, 0]),
    "ctf/phase_shift_rad": ("<f4", [0, 0, 0.25, 0, 0]),
    "ctf/scale": ("<f4", [1, 1, 0.5, 1, 1]),
    "ctf/bfactor": ("<f4", [0, 20, 0, 0, 0]),
    "alignments3D/pose": ("<f4", RNG.normal(size=(COUNT, 3))),
    "alignments3D/shift": ("<f4", RNG.normal(size=(COUNT, 2))),
    "alignments3D/psize_A": ("<f4", [3.0] * COUNT),
    "alignments3D/split": ("<u4", [0, 1, 1, 0, 1]),
}


def save(path, dropped=(), **changed):
    """Write a table with some fields left out, or others in their place."""
    fields = {name: field for name, field in FIELDS.items() if name not in dropped}
    fields |= {name.replace("__", "/"): field for name, field in changed.items()}
    columns = {
        name: np.array(values).astype(kind) for name, (kind, values) in fields.items()
    }
    rows = len(next(iter(columns.values())))
    kinds = [(name, each.dtype, each.shape[1:]) for name, each in columns.items()]
    table = np.zeros(rows, kinds)
    for name, values in columns.items():
        table[name] = values
    with open(path, "wb") as file:
        np.save(file, table)
    return path


@pytest.fixture
def path(tmp_path):
    """A file in a job's folder, of a project in which stacks are."""
    for name, count in (("a", 3), ("b", 2)):
        (tmp_path / "J1").mkdir(exist_ok=True)
        images = RNG.normal(size=(count, M, M)).astype(np.float32)
        write_stack(tmp_path / f"J1/{name}.mrcs", images, 1.5)
    (tmp_path / "J2").mkdir()
    return tmp_path / "J2/particles.cs"


@pytest.mark.parametrize(
    ("vector", "angles"),
    [
        ((0, 0, 0), (0, 0, 0)),
        ((0, 0, 0.5), (0, 0, 0.5)),
        ((0, 0.5, 0), (0, 0.5, 0)),
        ((0.5, 0, 0), (-np.pi / 2, 0.5, np.pi / 2)),
    ],
)
def test_rotation_vectors_about_the_axes_become_rotations(path, vector, angles):
    """By hand: ``Z(0.5)``, ``Y(0.5)`` and ``Z(pi/2) Y(0.5) Z(-pi/2) = X(0.5)``."""
    save(path, alignments3D__pose=("<f8", [vector] * COUNT))
    found = read_particles(path).poses.rotations
    expected = euler_to_matrix(jnp.asarray(angles, float))
    np.testing.assert_allclose(found, np.stack([expected] * COUNT), atol=1e-8)


def test_poses_are_those_that_a_table_was_made_from(path):
    """Made by SciPy from the transposes of RELION's matrices, in doubled pixels."""
    angles = RNG.uniform(-np.pi, np.pi, (COUNT, 3))
    shifts = RNG.normal(0, 3, (COUNT, 2))
    rotations = np.asarray(euler_to_matrix(jnp.asarray(angles)))
    vectors = Rotation.from_matrix(rotations.transpose(0, 2, 1)).as_rotvec()
    save(
        path,
        alignments3D__pose=("<f8", vectors),
        alignments3D__shift=("<f8", -shifts / 2),
    )
    file = read_particles(path)
    assert file.has_poses
    np.testing.assert_allclose(file.poses.rotations, rotations, atol=3e-8)
    np.testing.assert_allclose(file.poses.shifts, shifts, atol=1e-6)
    save(path, ["alignments3D/psize_A"], alignments3D__shift=("<f8", -shifts))
    np.testing.assert_allclose(read_particles(path).poses.shifts, shifts, atol=1e-6)


def test_images_optics_and_halves_are_those_of_the_table(path, tmp_path):
    file = read_particles(save(path))
    stacks = {
        name: np.fromfile(tmp_path / f"J1/{name}.mrcs", "<f4", offset=1024)
        for name in "ab"
    }
    a, b = (stack.reshape(-1, M, M) for stack in stacks.values())
    images, ctf = file.particles.batch(np.arange(COUNT))
    np.testing.assert_array_equal(images, np.stack([a[0], a[2], a[1], b[0], b[1]]))
    assert file.particles.pixel_size_in_angstroms == 1.5
    for leaf, field in (
        ("defocus_u", "df1_A"),
        ("defocus_v", "df2_A"),
        ("defocus_angle", "df_angle_rad"),
        ("phase_shift", "phase_shift_rad"),
        ("b_factor", "bfactor"),
        ("scale", "scale"),
        ("voltage", "accel_kv"),
        ("spherical_aberration", "cs_mm"),
        ("amplitude_contrast", "amp_contrast"),
    ):
        values = np.array(FIELDS[f"ctf/{field}"][1])
        np.testing.assert_allclose(getattr(ctf, leaf), values, rtol=1e-6, atol=1e-7)
    np.testing.assert_array_equal(file.random_subset, [1, 2, 2, 1, 2])
    np.testing.assert_array_equal(file.optics_group, [2, 2, 1, 1, 2])
    np.testing.assert_array_equal(file.particles.group, [1, 1, 0, 0, 1])


def test_what_is_written_is_relions(path, tmp_path):
    file = read_particles(save(path))
    out = tmp_path / "J3/particles.star"
    out.parent.mkdir()
    write_particles(out, file, file.poses, {"further": np.arange(COUNT)})
    blocks = read_star(out)
    assert blocks["optics"] == {
        "rlnOpticsGroup": ["1", "2"],
        "rlnOpticsGroupName": ["opticsGroup1", "opticsGroup2"],
        "rlnVoltage": ["200.000000", "300.000000"],
        "rlnSphericalAberration": ["2.700000"] * 2,
        "rlnAmplitudeContrast": ["0.070000", "0.100000"],
        "rlnImagePixelSize": ["1.500000"] * 2,
        "rlnImageSize": ["6", "6"],
        "rlnImageDimensionality": ["2", "2"],
    }
    names = blocks["particles"]["rlnImageName"]
    assert names[:2] == ["000001@J1/a.mrcs", "000003@J1/a.mrcs"]
    again = read_particles(out)
    np.testing.assert_allclose(again.poses.rotations, file.poses.rotations, atol=5e-8)
    np.testing.assert_allclose(again.poses.shifts, file.poses.shifts, atol=1e-6)
    for name in ("defocus_u", "defocus_angle", "scale", "voltage"):
        mine, its = (getattr(each.particles.ctf, name) for each in (file, again))
        np.testing.assert_allclose(its, mine)
    np.testing.assert_array_equal(again.optics_group, file.optics_group)
    np.testing.assert_array_equal(again.random_subset, file.random_subset)


@pytest.mark.parametrize("half", [0, 1])
def test_halves_of_which_one_is_empty_are_none(path, half):
    """So are those of particles that were never split, all 0."""
    save(path, alignments3D__split=("<u4", [half] * COUNT))
    assert read_particles(path).random_subset is None


def test_dark_protein_is_a_negative_scale(path):
    save(path, blob__sign=("<f4", [-1, 1, -1, 1, 1]))
    ctf = read_particles(path).particles.ctf
    assert ctf is not None
    np.testing.assert_array_equal(ctf.scale, [-1, 1, -0.5, 1, 1])


def test_fields_that_are_optional_have_defaults(path):
    dropped = [name for name in FIELDS if name.startswith(("align", "ctf"))]
    file = read_particles(save(path, dropped))
    assert not file.has_poses
    assert file.particles.ctf is None and file.random_subset is None
    np.testing.assert_array_equal(file.poses.rotations, [np.eye(3)] * COUNT)
    np.testing.assert_array_equal(file.optics_group, np.ones(COUNT))
    optional = ["ctf/phase_shift_rad", "ctf/scale", "ctf/bfactor", "blob/sign"]
    ctf = read_particles(save(path, optional)).particles.ctf
    assert ctf is not None
    np.testing.assert_array_equal(ctf.scale, np.ones(COUNT))
    np.testing.assert_array_equal(ctf.phase_shift, np.zeros(COUNT))


def test_a_real_file_has_its_known_values(data_dir, tmp_path):
    """Imported particles, as exported after 2-D classification."""
    path = data_dir / "cs/cryosparc_J2_particles_exported.cs"
    blocks = read_cs(path)
    write_star(tmp_path / "p.star", blocks)
    assert read_star(tmp_path / "p.star") == blocks
    assert blocks["optics"]["rlnImagePixelSize"] == ["1.345000"]
    assert blocks["optics"]["rlnImageSize"] == ["300"]
    table = blocks["particles"]
    stem = "J1/imported/000090334788266266069_18jam15b_0345_ali_DW.mrcs"
    assert table["rlnImageName"][:2] == [f"000001@{stem}", f"000002@{stem}"]
    assert len(table["rlnImageName"]) == 22
    assert float(table["rlnDefocusU"][0]) == pytest.approx(16412.178)
    assert float(table["rlnDefocusAngle"][0]) == pytest.approx(np.rad2deg(0.86163914))
    assert set(table["rlnCtfScalefactor"]) == {"-1.000000"}
    assert "rlnAngleRot" not in table
    with pytest.raises(InputError, match="names J1/imported.*neither in"):
        read_particles(path)


NO_CTF = [name for name in FIELDS if name.startswith("ctf")]
BAD = {
    "no stack": ({"dropped": ["blob/path"]}, "must have the field blob/path"),
    "no voltage": ({"dropped": ["ctf/accel_kv"]}, "must have the field ctf/accel_kv"),
    "no angle": ({"dropped": ["ctf/df_angle_rad"]}, "must have the field ctf/df_angle"),
    "no shift": (
        {"dropped": ["alignments3D/shift"]},
        "must have the field alignments3D/s",
    ),
    "NaN": (
        {"alignments3D__pose": ("<f4", [[0, np.nan, 0]] * COUNT)},
        "field alignments3D/pose: values must be finite .* got nan",
    ),
    "beyond single precision": (
        {"ctf__df1_A": ("<f8", [1e39] * COUNT)},
        r"field ctf/df1_A: values must be finite in single precision, got 1e\+39",
    ),
    "pixel": (
        {"blob__psize_A": ("<f4", [1, 1, 0, 1, 1])},
        "field blob/psize_A: values must be positive, got 0",
    ),
    "pixel of shifts": (
        {"alignments3D__psize_A": ("<f4", [1, 1, 1, -2, 1])},
        "field alignments3D/psize_A: values must be positive, got -2",
    ),
    "two numbers": (
        {"alignments3D__pose": ("<f4", [[0, 0]] * COUNT)},
        "field alignments3D/pose: there must be 3 numbers",
    ),
    "text": ({"ctf__df1_A": ("S3", [b"a"] * COUNT)}, "df1_A: there must be one number"),
    "no text": ({"blob__path": ("<f4", [1] * COUNT)}, "blob/path: values must be text"),
    "odd text": (
        {"blob__path": ("S3", [b"a\nb"] * COUNT)},
        "printable characters only",
    ),
    "bad text": (
        {"blob__path": ("S2", [b"\xff"] * COUNT)},
        "blob/path: values must be text",
    ),
    "dark": (
        {"dropped": NO_CTF, "blob__sign": ("<f4", [-1] * COUNT)},
        "protein must be bright in images without a CTF",
    ),
    "boxes": (
        {"blob__shape": ("<u4", [[M, M], [8, 8]] + [[M, M]] * 3)},
        "rlnImageSize must be 6, .* got 6, 8",
    ),
    "pixels": (
        {"blob__psize_A": ("<f4", [1, 1, 1, 1, 2])},
        "pixel sizes must differ .* got 1 to 2 A",
    ),
    "no particles": (
        {name.replace("/", "__"): (kind, []) for name, (kind, _) in FIELDS.items()}
        | {
            name: ("<f4", np.zeros((0, width)))
            for name, width in (
                ("blob__shape", 2),
                ("alignments3D__pose", 3),
                ("alignments3D__shift", 2),
            )
        },
        "must hold particles, got none",
    ),
}


@pytest.mark.parametrize("bad", BAD)
def test_a_bad_table_is_a_sentence(path, bad):
    changes, words = BAD[bad]
    with pytest.raises(InputError, match=words) as caught:
        read_particles(save(path, **changes))
    message = str(caught.value)
    assert str(path) in message and "\n" not in message and not message.endswith(".")


def test_files_of_another_kind_are_refused(path):
    with pytest.raises(InputError, match="does not exist"):
        read_cs(path)
    objects = np.array([({},)], [("blob/path", object)])
    for content in (np.zeros(3), np.zeros((2, 2), [("a", "f4")]), objects):
        with open(path, "wb") as file:
            np.save(file, content, allow_pickle=True)
        with pytest.raises(InputError, match="must be a cryoSPARC table"):
            read_cs(path)
    for content in (b"", b"data_\n", b"PK\x03\x04 and more", b"\x94CSDAT"):
        path.write_bytes(content)
        with pytest.raises(InputError, match="must be a cryoSPARC table"):
            read_cs(path)


def test_copies_and_segments_of_filaments_are_clusters(path):
    """Their identities have 64 bits, and RELION's numbers of tubes 32."""
    uids = np.array([2**63 + 5, 7, 2**63 + 5, 7, 2**63 + 6], np.uint64)
    for name, word in (
        ("sym_expand__src_uid", "particles"),
        ("filament__filament_uid", "helical tubes"),
    ):
        file = read_particles(save(path, **{name: ("<u8", uids)}))
        cluster = file.particles.cluster
        assert cluster is not None and file.shared == {word: 3}
        assert cluster[0] == cluster[2] and cluster[1] == cluster[3]
        out = path.with_suffix(".star")
        write_particles(out, file, file.poses)
        again = read_particles(out)
        np.testing.assert_array_equal(again.particles.cluster, cluster)
    assert read_star(out)["particles"]["rlnHelicalTubeID"] == ["1", "2", "1", "2", "3"]
    unset = {
        "sym_expand__src_uid": ("<u8", [0] * COUNT),
        "filament__filament_uid": ("<u8", [0] * COUNT),
    }
    assert read_particles(save(path, **unset)).particles.cluster is None
    bad = {"sym_expand__src_uid": ("<f8", np.ones(COUNT))}
    with pytest.raises(InputError, match="src_uid: there must be one whole number"):
        read_particles(save(path, **bad))


def test_names_are_those_that_relion_can_read(path):
    """Stacks that end in ``.mrc`` are marked; what has no micrograph has its stack."""
    paths = [b"J1/a.mrcs", b"J1/a.mrcs", b"J1/c.mrc", b"J1/c.mrc", b"J1/d.st"]
    micrographs = [b">J0/m.mrc", b"", b"J0/m.mrc", b"", b""]
    table = save(
        path,
        blob__path=("S20", paths),
        location__micrograph_path=("S20", micrographs),
    )
    particles = read_cs(table)["particles"]
    assert particles["rlnImageName"] == [
        "000001@J1/a.mrcs",
        "000003@J1/a.mrcs",
        "000002@J1/c.mrc:mrcs",
        "000001@J1/c.mrc:mrcs",
        "000002@J1/d.st:mrcs",
    ]
    assert particles["rlnMicrographName"] == [
        "J0/m.mrc",
        "J1/a.mrcs",
        "J0/m.mrc",
        "J1/c.mrc",
        "J1/d.st",
    ]
