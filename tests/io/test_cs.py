"""cryoSPARC's tables: what they mean in RELION's words."""

import warnings

import jax.numpy as jnp
import numpy as np
import pytest
from helpers import write_cs
from scipy.spatial.transform import Rotation

from jaxrefine.errors import InputError
from jaxrefine.euler import euler_to_matrix
from jaxrefine.io import (
    read_cs,
    read_particles,
    read_star,
    read_table,
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
    return write_cs(path, columns)


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


@pytest.mark.parametrize(
    ("kind", "bad", "said"),
    [("<u4", 2, "2"), ("<i4", -1, "-1"), ("<f4", 0.5, "0.5"), ("<f4", np.nan, "nan")],
)
def test_halves_of_another_number_matter_only_where_halves_are_used(
    path, kind, bad, said
):
    """As they do in STAR files; the sentence counts as the file does."""
    file = read_particles(save(path, alignments3D__split=(kind, [0, 1, bad, 0, 1])))
    words = f"split: the value must be 0 or 1, got '{said}' .row 3.$"
    with pytest.raises(InputError, match=words):
        _ = file.random_subset
    write_particles(path.with_suffix(".star"), file, file.poses)
    again = read_particles(path.with_suffix(".star"))
    with pytest.raises(InputError, match="the value must be 1 or 2, got"):
        _ = again.random_subset


@pytest.mark.parametrize(
    ("dropped", "changed"),
    [
        ((), {"ctf__df1_A": ("<f4", [np.nan] * COUNT)}),
        ((), {"ctf__cs_mm": ("<f8", [1e39] + [2.7] * 4)}),
        ((), {"ctf__scale": ("<f4", [np.inf] * COUNT)}),
        ((), {"ctf__df2_A": ("S1", [b"a"] * COUNT)}),
        ((), {"ctf__amp_contrast": ("<f4", [[0.1, 0.2]] * COUNT)}),
        (["ctf/accel_kv"], {}),
    ],
)
def test_optics_that_are_not_used_may_be_bad(path, dropped, changed):
    """Groups are then told apart by their number alone, and the sign is kept."""
    dark = {"blob__sign": ("<f4", [-1] * COUNT)}
    save(path, dropped, **dark, **changed)
    with pytest.raises(InputError, match="field ctf/"):
        read_particles(path)
    file = read_particles(path, with_ctf=False)
    assert file.particles.ctf is None and file.protein_is_dark
    assert "rlnDefocusU" not in file.blocks["particles"]
    np.testing.assert_array_equal(file.optics_group, [2, 2, 1, 1, 2])
    whole = read_particles(save(path), with_ctf=False)
    assert whole.blocks == read_particles(path).blocks
    np.testing.assert_array_equal(file.poses.rotations, whole.poses.rotations)


def test_groups_that_are_not_used_may_be_bad(path):
    save(path, ctf__exp_group_id=("<f4", [np.nan] * COUNT))
    file = read_particles(path, with_ctf=False)
    assert "rlnDefocusU" in file.blocks["particles"]
    np.testing.assert_array_equal(file.optics_group, [2, 2, 1, 1, 2])  # by voltage


def test_dark_protein_is_a_negative_scale(path):
    save(path, blob__sign=("<f4", [-1, 1, -1, 1, 1]))
    ctf = read_particles(path).particles.ctf
    assert ctf is not None
    np.testing.assert_array_equal(ctf.scale, [-1, 1, -0.5, 1, 1])


def test_fields_that_are_optional_have_defaults(path):
    dropped = [name for name in FIELDS if name.startswith(("align", "ctf"))]
    file = read_particles(save(path, dropped), with_ctf=False)
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
    blocks = read_cs(path).blocks
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
    "no UTF-8": (
        {"blob__path": ("S9", [b"caf\xe9.mrcs"] * COUNT)},
        r"names caf\udce9.mrcs, which is neither in",
    ),
    "no optics": (
        {"dropped": NO_CTF},
        r"must have the fields ctf/\.\.\., got none; .* --passthrough",
    ),
    "no images": (
        {"dropped": [name for name in FIELDS if name.startswith("blob")]},
        r"must have the fields blob/\.\.\., got none",
    ),
    "no defocus": ({"dropped": ["ctf/df1_A"]}, "must have the field ctf/df1_A"),
    "no pose": (
        {"dropped": ["alignments3D/pose"]},
        "must have the field alignments3D/pose",
    ),
    "contrast": (
        {"ctf__amp_contrast": ("<f4", [2] * COUNT)},
        "field ctf/amp_contrast: values must be from 0 to 1, got 2 to 2",
    ),
    "voltage": (
        {"ctf__accel_kv": ("<f4", [0] * COUNT)},
        "field ctf/accel_kv: values must be positive, got 0",
    ),
    "shift in angstroms": (
        {
            "alignments3D__shift": ("<f4", [[1e38, 0]] * COUNT),
            "alignments3D__psize_A": ("<f4", [1e3] * COUNT),
        },
        "field alignments3D/shift: the value must be a finite number",
    ),
    "number": (
        {"blob__idx": ("<i4", [-1] * COUNT)},
        "field blob/idx: values must be whole numbers from 0 .* got -1",
    ),
    "empty path": (
        {"blob__path": ("S1", [b""] * COUNT)},
        "field blob/path: paths must be text, got an empty one",
    ),
    "half": (
        {"alignments3D__split": ("S1", [b"a"] * COUNT)},
        "field alignments3D/split: there must be one number",
    ),
    "tube": (
        {"filament__filament_uid": ("<f4", [1] * COUNT)},
        "field filament/filament_uid: there must be one whole number",
    ),
    "boxes": (
        {"blob__shape": ("<u4", [[M, M], [8, 8]] + [[M, M]] * 3)},
        "blob/shape must be 6, .* got 6, 8",
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


ROWS = [4, 3, 2, 1, 0]
UIDS = ("<u8", [2**63 + 5, 4, 3, 2, 2**60])
OPTICS = [name for name in FIELDS if name.startswith("ctf")]
IMAGES = [name for name in FIELDS if name.startswith("blob")]
POSES = [name for name in FIELDS if name.startswith("align")]


def other(names, rows=ROWS, **changed):
    """What `save` is to be told for a table of these fields, in another order."""
    fields = {name: FIELDS[name] for name in names} | {"uid": UIDS}
    reordered = {
        name: (kind, [values[row] for row in rows])
        for name, (kind, values) in (fields | changed).items()
    }
    dropped = [name for name in FIELDS if name not in names]
    return {"dropped": dropped} | {
        name.replace("/", "__"): field for name, field in reordered.items()
    }


def same(file, whole):
    """Whether two tables say the same of the same particles."""
    assert file.blocks == whole.blocks
    np.testing.assert_array_equal(file.poses.rotations, whole.poses.rotations)


@pytest.mark.parametrize("names", [OPTICS, IMAGES, POSES], ids=["ctf", "blob", "poses"])
def test_a_passthrough_file_is_joined_by_uid(path, tmp_path, names):
    """The whole table is cut in two, and the rows of one half are turned round."""
    whole = read_particles(save(path, uid=UIDS))
    kept = [name for name in FIELDS if name not in names]
    save(path, **other(kept, rows=range(COUNT)))
    (tmp_path / "elsewhere").mkdir()
    beside = path.with_name("J2_passthrough_particles.cs")
    for place in (beside, tmp_path / "elsewhere/some.cs"):
        save(place, **other(names))
        given = None if place == beside else place
        file = read_particles(path, passthrough=given)
        same(file, whole)
        assert set(file.joined) == {place}
        if given:  # The other way round, but for the order of the rows.
            file = read_particles(place, tmp_path, passthrough=path)
            image = file.blocks["particles"]["rlnImageName"]
            assert image == whole.blocks["particles"]["rlnImageName"][::-1]
        place.unlink()


FURTHER = {
    "location/micrograph_path": ("S9", [b">J0/m.mrc", b"", b"J0/n.mrc", b"", b""]),
    "filament/filament_uid": ("<u8", [2**63 + 1, 2**63 + 1, 0, 0, 8]),
    "sym_expand/src_uid": ("<u8", [2**63, 6, 7, 2**63, 0]),
}


@pytest.mark.parametrize("names", [{name} for name in FURTHER] + [set(FURTHER)])
def test_what_rows_share_is_found_in_a_passthrough_file(path, names):
    """Rows of one filament and copies of one particle are clusters all the same."""

    def of(names):
        return {name.replace("/", "__"): FURTHER[name] for name in names}

    whole = read_particles(save(path, uid=UIDS, **of(FURTHER)))
    assert whole.shared == {"particles": 4, "helical tubes": 4}
    save(path, uid=UIDS, **of(FURTHER.keys() - names))
    turned = {
        name: (kind, [values[row] for row in ROWS])
        for name, (kind, values) in of(names).items()
    }
    save(path.with_name("J2_passthrough_particles.cs"), **other(OPTICS), **turned)
    file = read_particles(path)
    same(file, whole)
    assert file.shared == whole.shared
    np.testing.assert_array_equal(file.particles.cluster, whole.particles.cluster)
    groups = {name.partition("/")[0] for name in names}
    assert set(*file.joined.values()) == groups


@pytest.mark.parametrize(
    ("table", "passthrough", "is_found"),
    [
        ("cryosparc_P1_J22_003_particles", "cryosparc_P1_J22_passthrough_particles", 1),
        ("J22_class_00_00042_particles", "P1_J22_passthrough_particles_class_0", 1),
        ("particles_selected", "J2_passthrough_particles_selected", 1),
        ("particles", "my_passthrough", 1),
        ("J22_003_particles", "J21_passthrough_particles", 0),
        ("particles_selected", "J3_passthrough_particles_selected", 0),
    ],
)
def test_a_passthrough_file_is_found_beside(path, table, passthrough, is_found):
    """The folder is J2: a file that is named after another job is not taken."""
    path = path.with_name(f"{table}.cs")
    save(path, OPTICS, uid=UIDS)
    save(path.with_name(f"{passthrough}.cs"), **other(OPTICS))
    if is_found:
        ctf = read_particles(path).particles.ctf
        assert ctf is not None
        np.testing.assert_allclose(ctf.defocus_u, FIELDS["ctf/df1_A"][1])
    else:
        with pytest.raises(InputError, match=r"must have the fields ctf/\.\.\."):
            read_particles(path)


def test_a_passthrough_file_of_other_particles_is_not_taken(path):
    """That of another class lies beside, too, or one that lacks a particle."""
    save(path, OPTICS, uid=UIDS)
    lacking = save(
        path.with_name("J2_passthrough_particles_class_1.cs"),
        **other(OPTICS, rows=ROWS[:-1]),
    )
    words = "ctf/.*class_1.cs beside it lacks 1 of its 5 particles; .*--no-ctf"
    with pytest.raises(InputError, match=words):
        read_particles(path)
    with pytest.raises(InputError, match="every particle of .* got 1 of 5 missing"):
        read_particles(path, passthrough=lacking)
    save(path.with_name("J2_passthrough_particles_class_0.cs"), **other(OPTICS))
    assert list(read_particles(path).joined.values()) == [("ctf",)]


def test_passthrough_files_that_disagree_are_refused(path):
    save(path, OPTICS, uid=UIDS)
    right = path.with_name("J2_passthrough_a.cs")
    save(right, **other(OPTICS))
    save(path.with_name("J2_passthrough_b.cs"), **other(OPTICS))
    whole = read_particles(path)
    changed = {"ctf/df1_A": ("<f4", [1e4] * COUNT)}
    save(path.with_name("J2_passthrough_b.cs"), **other(OPTICS, **changed))
    with pytest.raises(InputError, match="must agree, got different fields ctf/"):
        read_particles(path)
    same(read_particles(path, passthrough=right), whole)


def test_a_table_has_the_last_word(path):
    """Its own groups are kept, even where a passthrough file has them as well."""
    whole = read_particles(save(path, uid=UIDS))
    changed = {"ctf/df1_A": ("<f4", [1e4] * COUNT)}
    old = {
        "alignments_class_0/pose": ("<f4", [[0.5] * 3] * COUNT),
        "alignments_class_0/shift": ("<f4", [[0.5] * 2] * COUNT),
        "alignments_class_0/class": ("<u4", [0] * COUNT),
        "alignments_class_0/class_posterior": ("<f4", [1] * COUNT),
    }
    save(
        path.with_name("J2_passthrough_particles.cs"), **other(OPTICS, **changed, **old)
    )
    same(read_particles(path), whole)


def test_uids_that_cannot_be_joined_are_a_sentence(path):
    passthrough = path.with_name("passthrough.cs")
    save(path, OPTICS, uid=UIDS)
    for uid, words in (
        (("<u8", [1] * COUNT), "missing"),
        (("<u8", [4] * COUNT), "each uid once, got 4 5 times"),
        (("<f4", UIDS[1]), "field uid: there must be one whole number"),
    ):
        save(passthrough, **other(OPTICS, uid=uid))
        with pytest.raises(InputError, match=words):
            read_particles(path, passthrough=passthrough)
    save(passthrough, **{**other(OPTICS), "uid": UIDS})
    save(path, OPTICS)
    with pytest.raises(InputError, match="particles.cs must have the field uid"):
        read_particles(path, passthrough=passthrough)


def test_what_is_damaged_beside_does_not_stop_a_whole_table(path):
    path.with_name("J2_passthrough.cs").write_bytes(b"nothing")
    save(path, uid=UIDS)
    read_particles(path)
    save(path, OPTICS, uid=UIDS)
    with pytest.raises(InputError, match="J2_passthrough.cs must be a cryoSPARC"):
        read_particles(path)


CLASSES = 3
POSTERIOR = np.array([[0.1, 0.8, 0.1], [1, 0, 0], [0, 0.4, 0.6], [0, 1, 0], [1, 0, 0]])
OF_CLASSES = {
    "pose": RNG.normal(size=(COUNT, CLASSES, 3)),
    "shift": RNG.normal(size=(COUNT, CLASSES, 2)),
    "class_posterior": POSTERIOR,
    "class": np.tile(np.arange(CLASSES), (COUNT, 1)),
}


def of_classes(layout):
    """The fields of poses of several classes, as of either kind of job."""
    if layout == "multi":
        fields = {
            f"alignments3D_multi__{name}": ("<f4", values)
            for name, values in OF_CLASSES.items()
        }
        return fields | {"alignments3D_multi__psize_A": ("<f4", [3.0] * COUNT)}
    return {
        f"alignments_class_{k}__{name}": ("<f4", values[:, k])
        for k in range(CLASSES)
        for name, values in (
            OF_CLASSES | {"psize_A": np.full((COUNT, CLASSES), 3.0)}
        ).items()
    }


@pytest.mark.parametrize("layout", ["multi", "single"])
def test_poses_of_several_classes_are_those_of_the_most_probable(path, layout):
    best, rows = POSTERIOR.argmax(axis=1), np.arange(COUNT)
    expected = read_particles(
        save(
            path,
            ["alignments3D/split"],
            alignments3D__pose=("<f4", OF_CLASSES["pose"][rows, best]),
            alignments3D__shift=("<f4", OF_CLASSES["shift"][rows, best]),
        )
    )
    save(path, POSES, **of_classes(layout))
    file = read_particles(path)
    np.testing.assert_array_equal(file.poses.rotations, expected.poses.rotations)
    np.testing.assert_array_equal(file.poses.shifts, expected.poses.shifts)
    assert file.blocks["particles"]["rlnClassNumber"] == [str(k + 1) for k in best]
    assert file.classes == {0: 2, 1: 2, 2: 1}
    kept = read_particles(path, class_number=1)
    np.testing.assert_array_equal(
        kept.poses.rotations, expected.poses.rotations[best == 1]
    )
    names = np.array(file.blocks["particles"]["rlnImageName"])
    assert kept.blocks["particles"]["rlnImageName"] == names[best == 1].tolist()
    with pytest.raises(InputError, match="that has particles, 0, 1, 2, got 3"):
        read_particles(path, class_number=3)


def test_classes_of_a_single_refinement_can_be_kept(path):
    save(path, alignments3D__class=("<u4", [0, 0, 4, 4, 4]))
    assert len(read_particles(path)) == COUNT and not read_particles(path).classes
    assert len(read_particles(path, class_number=4)) == 3
    save(path)
    with pytest.raises(InputError, match="must have the field alignments3D/class"):
        read_particles(path, class_number=0)


@pytest.mark.parametrize("version", [(1, 0), (2, 0), (3, 0)])
def test_headers_of_any_version_and_length_are_read(path, version):
    """A table of some hundred fields has a longer header than NumPy allows."""
    further = {f"group_{i}__{'x' * 100}": ("<f4", [0] * COUNT) for i in range(400)}
    whole = read_particles(save(path))
    save(path, **(further if version > (1, 0) else {}))
    table = np.load(path, max_header_size=10**6)
    with open(path, "wb") as file, warnings.catch_warnings(action="ignore"):
        np.lib.format.write_array(file, table, version)
    assert path.read_bytes()[6] == version[0]
    assert read_particles(path).blocks == whole.blocks


def test_a_list_of_tables_is_refused_with_their_names(path):
    path = path.with_suffix(".csg")
    path.write_text(
        "group: {name: particles}\nresults:\n"
        "  alignments3D: {metafile: '>J2_003_particles.cs', num_items: 9}\n"
        "  blob: {metafile: '>J2_passthrough_particles.cs', num_items: 9}\n"
        "  ctf:\n    metafile: '>J2_003_particles.cs'\n"
    )
    words = "names: J2_003_particles.cs --passthrough J2_passthrough_particles.cs$"
    with pytest.raises(InputError, match=words):
        read_particles(path)
    path.write_bytes(b"\xff\0")
    with pytest.raises(InputError, match="give the .cs file that it names$"):
        read_particles(path)


def test_what_is_cryosparcs_is_refused_with_a_star_file(path, tmp_path):
    write_star(tmp_path / "p.star", read_cs(save(path)).blocks)
    for passthrough, number in ((path, None), (None, 1)):
        with pytest.raises(InputError, match="must be given with a cryoSPARC table"):
            read_table(tmp_path / "p.star", passthrough, number)


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
        assert cluster[0] == cluster[2] != cluster[1] == cluster[3]
        assert cluster[4] not in cluster[:4]
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
    # The original of copies has its own uid, which two stacks may have, too.
    some = {"sym_expand__src_uid": ("<u8", [0, 11, 0, 11, 0])}
    own = {"uid": ("<u8", [11, 12, 13, 14, 15])}
    cluster = read_particles(save(path, **some, **own)).particles.cluster
    np.testing.assert_array_equal(cluster, [0, 0, 1, 0, 2])
    twice = {"uid": ("<u8", [11, 12, 13, 11, 12])}
    file = read_particles(save(path, **twice))
    np.testing.assert_array_equal(file.particles.cluster, [0, 1, 2, 0, 1])
    for uids in (own["uid"][1], [0] * COUNT, [7] * COUNT):
        file = read_particles(save(path, uid=("<u8", uids)))
        assert file.particles.cluster is None
        assert "jaxrefineSource" not in file.blocks["particles"]
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
    particles = read_cs(table).blocks["particles"]
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
