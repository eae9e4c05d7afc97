"""Tables of particles: what is read, what is kept, and that images are found again."""

import gzip
import os
import warnings
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import mrcfile
import numpy as np
import pytest

from jaxrefine.ctf import CTF
from jaxrefine.errors import InputError
from jaxrefine.euler import euler_to_matrix
from jaxrefine.geometry import Poses
from jaxrefine.io import (
    Pairs,
    image_identities,
    open_stack,
    read_particles,
    read_poses,
    read_stack,
    read_star,
    write_new_particles,
    write_particles,
    write_stack,
    write_star,
)

M, PIXEL = 6, 1.5
RNG = np.random.default_rng(0)


def stack(path, count, m=M, pixel=PIXEL):
    path.parent.mkdir(parents=True, exist_ok=True)
    images = RNG.normal(size=(count, m, m)).astype(np.float32)
    write_stack(path, images, pixel)
    return images


def column(values):
    return [f"{value:.6f}" for value in values]


def particle_columns(names, **further):
    count = len(names)
    angles = RNG.uniform(-180, 180, (3, count))
    kinds = zip(("Rot", "Tilt", "Psi"), angles, strict=True)
    return {
        "rlnImageName": list(names),
        **{f"rlnAngle{kind}": column(values) for kind, values in kinds},
        **further,
    }


def optics(**further):
    return {
        "rlnOpticsGroup": ["1", "2"],
        "rlnOpticsGroupName": ["first", "second"],
        "rlnVoltage": ["300", "200"],
        "rlnSphericalAberration": ["2.7", "2.0"],
        "rlnAmplitudeContrast": ["0.1", "0.07"],
        "rlnImagePixelSize": ["1.5", "1.5"],
        **further,
    }


CTF_COLUMNS = {
    "rlnDefocusU": ["15000", "16000", "17000"],
    "rlnDefocusV": ["14000", "15500", "16900"],
    "rlnDefocusAngle": ["10", "20", "-30"],
}


@pytest.fixture
def new_style(tmp_path):
    """RELION 3.1, two stacks, two optics groups, and a column that nobody knows."""
    a, b = stack(tmp_path / "in/a.mrcs", 4), stack(tmp_path / "in/sub/b.mrcs", 2)
    table = particle_columns(
        ["000003@a.mrcs", "2@sub/b.mrcs", "000001@a.mrcs"],
        rlnOriginXAngst=["3", "-1.5", "0"],
        mine=["x y", "#", "z"],
        rlnOriginYAngst=["0", "0", "6"],
        rlnOpticsGroup=["2", "1", "1"],
        **CTF_COLUMNS,
    )
    path = tmp_path / "in/particles.star"
    blocks = {"optics": optics(), "particles": table, "notes": {"about": ["this one"]}}
    write_star(path, blocks)
    return path, np.stack([a[2], b[1], a[0]])


@pytest.fixture
def old_style(tmp_path):
    """RELION 3.0: no optics block, origins in pixels."""
    images = stack(tmp_path / "in/a.mrcs", 3)
    table = particle_columns(
        [f"{i}@a.mrcs" for i in (1, 2, 3)],
        rlnOriginX=["1", "2", "3"],
        rlnOriginY=["-1", "0", "0"],
        rlnDetectorPixelSize=["5"] * 3,
        rlnMagnification=["37369.207031"] * 3,
        rlnVoltage=["300", "300", "200"],
        rlnSphericalAberration=["2.7"] * 3,
        rlnAmplitudeContrast=["0.1"] * 3,
        rlnPhaseShift=["0", "90", "0"],
        rlnRandomSubset=["2", "1", "2"],
        **CTF_COLUMNS,
    )
    path = tmp_path / "in/particles.star"
    write_star(path, {"images": table})
    return path, images


def ctf_of(file) -> CTF:
    """The optics of a file's particles, which must have some."""
    ctf = file.particles.ctf
    assert ctf is not None
    return ctf


def all_images(file):
    return np.asarray(file.particles.batch(np.arange(len(file)))[0])


# --- reading


def test_images_poses_and_optics_of_relion_31_are_read(new_style):
    path, images = new_style
    file = read_particles(path)
    np.testing.assert_array_equal(all_images(file), images)
    assert file.particles.pixel_size_in_angstroms == 1.5
    np.testing.assert_allclose(file.poses.shifts, [[-2, 0], [1, 0], [0, -4]])
    np.testing.assert_allclose(file.poses.rotations, read_poses(path).rotations)
    assert file.random_subset is None and file.has_poses
    np.testing.assert_array_equal(file.optics_group, [2, 1, 1])
    np.testing.assert_array_equal(file.particles.group, [1, 0, 0])
    ctf = ctf_of(file)
    np.testing.assert_array_equal(ctf.defocus_v, [14000, 15500, 16900])
    np.testing.assert_allclose(ctf.defocus_angle, np.deg2rad([10, 20, -30]))
    # By optics group, which is 2, 1, 1.
    np.testing.assert_array_equal(ctf.voltage, [200, 300, 300])
    np.testing.assert_array_equal(ctf.spherical_aberration, [2.0, 2.7, 2.7])
    np.testing.assert_array_equal(ctf.amplitude_contrast, [0.07, 0.1, 0.1])
    np.testing.assert_array_equal(ctf.scale, np.ones(3))
    np.testing.assert_array_equal(ctf.b_factor, np.zeros(3))


def test_images_poses_and_optics_of_relion_30_are_read(old_style):
    path, images = old_style
    file = read_particles(path)
    np.testing.assert_array_equal(all_images(file), images)
    pixel = file.particles.pixel_size_in_angstroms
    assert pixel == pytest.approx(5e4 / 37369.207031)
    np.testing.assert_array_equal(file.poses.shifts, [[-1, 1], [-2, 0], [-3, 0]])
    np.testing.assert_array_equal(file.random_subset, [2, 1, 2])
    assert file.optics_group is None and file.particles.group is None
    np.testing.assert_array_equal(ctf_of(file).voltage, [300, 300, 200])
    np.testing.assert_allclose(ctf_of(file).phase_shift, [0, np.pi / 2, 0])


def test_a_bare_table_has_no_ctf_and_the_pixel_of_its_stack(tmp_path):
    """No defocus, no correction; the pixel is that of the stack, or 1 A."""
    for pixel, written in ((2.5, 2.5), (1.0, 0.0)):
        images = stack(tmp_path / "a.mrcs", 2)
        with mrcfile.open(tmp_path / "a.mrcs", "r+") as mrc:
            mrc.voxel_size = written
        path = tmp_path / "p.star"
        write_star(path, {"": particle_columns(["1@a.mrcs", "2@a.mrcs"])})
        file = read_particles(path)
        assert file.particles.ctf is None
        assert file.particles.pixel_size_in_angstroms == pixel
        np.testing.assert_array_equal(file.poses.shifts, np.zeros((2, 2)))
        np.testing.assert_array_equal(all_images(file), images)


def test_a_column_of_the_particle_precedes_its_groups(new_style):
    path, _ = new_style
    blocks = read_star(path)
    blocks["particles"]["rlnVoltage"] = ["100", "120", "80"]
    write_star(path, blocks)
    voltage = ctf_of(read_particles(path)).voltage
    np.testing.assert_array_equal(voltage, [100, 120, 80])


def test_a_single_image_needs_no_number(tmp_path):
    with mrcfile.new(tmp_path / "one.mrc") as mrc:
        mrc.set_data(np.arange(M**2, dtype=np.float32).reshape(M, M))
    path = tmp_path / "p.star"
    write_star(path, {"": particle_columns(["one.mrc"])})
    (image,) = all_images(read_particles(path))
    np.testing.assert_array_equal(image.ravel(), np.arange(M**2))


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (np.nan, "must be finite, got a value"),
        (np.inf, "value that"),
        (None, "must not be constant, got 3"),
    ],
)
def test_images_that_are_blank_or_not_finite_are_named(tmp_path, value, words):
    images = RNG.normal(size=(4, M, M)).astype(np.float32)
    images[2] = 3
    if value is not None:
        images[2, 1, 0] = value
    ignored = warnings.catch_warnings(action="ignore")
    with ignored, mrcfile.new(tmp_path / "s.mrcs") as mrc:
        mrc.set_data(images)
    path = tmp_path / "p.star"
    names = [f"{i}@s.mrcs" for i in (4, 3, 1)]
    write_star(path, {"": particle_columns(names)})
    particles = read_particles(path).particles
    particles.batch(np.array([0, 2]))
    with pytest.raises(InputError, match=f"image 000003@.*s.mrcs .*{words}"):
        particles.batch(np.array([2, 0, 1]))


def test_a_linked_folder_is_where_it_leads(tmp_path):
    """``..`` of a link is what is above its target, whatever is above the link."""
    images = stack(tmp_path / "real/particles.mrcs", 1)
    stack(tmp_path / "other/particles.mrcs", 1)
    (tmp_path / "real/job").mkdir()
    write_star(
        tmp_path / "real/job/p.star", {"": particle_columns(["1@../particles.mrcs"])}
    )
    (tmp_path / "other/link").symlink_to(tmp_path / "real/job")
    for folder in ("real/job", "other/link"):
        file = read_particles(tmp_path / folder / "p.star")
        np.testing.assert_array_equal(all_images(file), images)


def test_origins_in_angstroms_need_no_optics_groups(tmp_path):
    """The pixel size is the particles' own, or the detector's."""
    stack(tmp_path / "s.mrcs", 2)
    path = tmp_path / "p.star"
    columns = particle_columns(["1@s.mrcs", "2@s.mrcs"])
    columns |= {"rlnOriginXAngst": ["3", "-6"], "rlnOriginYAngst": ["0", "1.5"]}
    for own in (
        {"rlnPixelSize": ["1.5"] * 2},
        {"rlnDetectorPixelSize": ["15"] * 2, "rlnMagnification": ["100000"] * 2},
    ):
        write_star(path, {"": columns | own})
        file = read_particles(path)
        np.testing.assert_allclose(file.poses.shifts, [[-2, 0], [4, -1]])
        poses = turned(file)
        write_particles(path, file, poses)
        again = read_particles(path).poses
        np.testing.assert_allclose(again.shifts, poses.shifts, atol=1e-6)


@pytest.mark.parametrize("name", ["rlnDefocusV", "rlnDefocusAngle", "rlnPhaseShift"])
def test_optics_without_a_defocus_are_refused(new_style, name):
    path, _ = new_style
    blocks = read_star(path)
    table = blocks["particles"]
    for column in ("rlnDefocusU", "rlnDefocusV", "rlnDefocusAngle"):
        table.pop(column, None)
    table[name] = ["1.0"] * len(table["rlnImageName"])
    write_star(path, blocks)
    with pytest.raises(InputError, match=f"must have rlnDefocusU, got {name}"):
        read_particles(path)


def test_images_of_many_stacks_come_in_the_order_asked_for(tmp_path):
    """No stack stays open, or is mapped to memory."""
    count = 40
    images = [stack(tmp_path / f"{i}.mrcs", 1)[0] for i in range(count)]
    path = tmp_path / "p.star"
    names = [f"1@{i}.mrcs" for i in range(count)]
    write_star(path, {"": particle_columns(names)})
    file = read_particles(path)
    order = RNG.permutation(np.repeat(np.arange(count), 2))
    batch, _ = file.particles.batch(order)
    np.testing.assert_array_equal(batch, np.stack(images)[order])
    if Path("/proc/self/fd").exists():
        links = [os.path.realpath(link) for link in Path("/proc/self/fd").iterdir()]
        assert not [link for link in links if link.startswith(str(tmp_path))]
        assert str(tmp_path) not in Path("/proc/self/maps").read_text()


def test_stacks_are_looked_for_in_the_documented_order(tmp_path, monkeypatch):
    """In the data folder, beside the table, in the working directory, and above."""
    folders = [tmp_path / name for name in ("data", "p/q/table", "work", "p/q", "p")]
    for folder in folders:
        folder.mkdir(parents=True, exist_ok=True)
    path = folders[1] / "p.star"
    write_star(path, {"": particle_columns(["1@raw/a.mrcs"])})
    monkeypatch.chdir(folders[2])
    for folder in folders[::-1]:
        images = stack(folder / "raw/a.mrcs", 1)
        np.testing.assert_array_equal(
            all_images(read_particles(path, folders[0])), images
        )
    with pytest.raises(InputError, match="datadir must be a folder, got .*absent"):
        read_particles(path, tmp_path / "absent")


def test_a_pixel_size_of_the_particles_precedes_the_headers(tmp_path):
    """Origins in Angstrom are in it, and written so."""
    stack(tmp_path / "s.mrcs", 2, pixel=9.0)
    path = tmp_path / "p.star"
    columns = particle_columns(["1@s.mrcs", "2@s.mrcs"], rlnOriginXAngst=["3", "-6"])
    for further in ({}, {"rlnPixelSize": ["9"] * 2}):
        write_star(path, {"": columns | {"rlnImagePixelSize": ["1.5"] * 2} | further})
        file = read_particles(path)
        assert file.particles.pixel_size_in_angstroms == 1.5
        np.testing.assert_array_equal(file.poses.shifts, [[-2, 0], [4, 0]])
        poses = turned(file)
        write_particles(path, file, poses)
        assert {"rlnOriginX", "rlnOriginY"}.isdisjoint(read_star(path)[""])
        again = read_particles(path).poses
        np.testing.assert_allclose(again.shifts, poses.shifts, atol=1e-6)


@pytest.mark.parametrize("mark", [":mrc", ":mrcs"])
def test_a_format_after_the_name_is_kept(tmp_path, mark):
    images = stack(tmp_path / "in/a.st", 2)
    path = tmp_path / "in/p.star"
    write_star(path, {"": particle_columns([f"2@a.st{mark}", "1@a.st"])})
    file = read_particles(path)
    np.testing.assert_array_equal(all_images(file), images[::-1])
    write_particles(tmp_path / "q.star", file, file.poses)
    table = read_star(tmp_path / "q.star")
    assert table[""]["rlnImageName"] == [f"2@in/a.st{mark}", "1@in/a.st"]
    plain = {"": {"rlnImageName": ["2@in/a.st", "1@in/a.st"]}}
    names = [image_identities(each, tmp_path / "q.star") for each in (table, plain)]
    assert names[0] == names[1]


def test_particles_without_poses_are_given_those_of_zero(old_style, tmp_path):
    """Particles as extracted, even with an angle in the plane, have poses of zero."""
    path, images = old_style
    blocks = read_star(path)
    for name in ("rlnAngleRot", "rlnAngleTilt"):
        del blocks["images"][name]
    write_star(path, blocks)
    file = read_particles(path)
    assert not file.has_poses
    np.testing.assert_array_equal(file.poses.rotations, [np.eye(3)] * 3)
    np.testing.assert_array_equal(file.poses.shifts, np.zeros((3, 2)))
    np.testing.assert_array_equal(all_images(file), images)
    poses = turned(file)
    write_particles(path, file, poses)
    again = read_particles(path)
    assert again.has_poses
    np.testing.assert_allclose(again.poses.rotations, poses.rotations, atol=1e-8)
    np.testing.assert_allclose(again.poses.shifts, poses.shifts, atol=1e-6)


def test_unused_groups_may_differ(new_style):
    """Groups go by number, however it is written, and only those in use matter."""
    path, _ = new_style
    blocks = read_star(path)
    blocks["optics"] |= {"rlnImageSize": ["6", "8"], "rlnImagePixelSize": ["1.5", "2"]}
    blocks["particles"]["rlnOpticsGroup"] = ["1", "1.000000", "01"]
    write_star(path, blocks)
    file = read_particles(path)
    np.testing.assert_array_equal(file.optics_group, [1, 1, 1])
    np.testing.assert_array_equal(ctf_of(file).voltage, [300] * 3)


def test_images_that_are_said_to_be_raw_are_accepted(new_style):
    path, _ = new_style
    blocks = read_star(path)
    blocks["optics"]["rlnCtfDataAreCtfPremultiplied"] = ["0", "0"]
    write_star(path, blocks)
    assert len(read_particles(path)) == 3


def test_real_files_have_their_known_values(data_dir):
    for version, pixel in ((30, 5e4 / 37369.207031), (31, 1.4)):
        path = data_dir / "real_sample" / f"sample_particles_relion{version}.star"
        file = read_particles(path)
        assert file.particles.images.shape == (17, 200, 200)
        assert file.particles.pixel_size_in_angstroms == pytest.approx(pixel)
        assert ctf_of(file).defocus_u[0] == pytest.approx(21186.804688)
        np.testing.assert_array_equal(ctf_of(file).voltage[7:9], [300, 200])
        assert file.random_subset is not None and set(file.random_subset) == {1, 2}
        last, _ = file.particles.batch(np.array([16]))
        np.testing.assert_array_equal(
            last[0], read_stack(path.parent / "sample.mrcs")[0][16]
        )


# --- writing


def turned(file):
    """Other poses, of values that STAR files hold exactly."""
    count = len(file)
    angles = np.deg2rad(np.round(RNG.uniform(-180, 180, (count, 3)), 3))
    shifts = RNG.integers(-8, 8, (count, 2)) / 4.0
    return Poses(euler_to_matrix(jnp.asarray(angles)), shifts)


POSE_COLUMNS = {"rlnAngleRot", "rlnAngleTilt", "rlnAnglePsi"}


@pytest.mark.parametrize(
    ("style", "origins", "written"),
    [
        ("new_style", {"rlnOriginXAngst", "rlnOriginYAngst"}, 1.5),
        ("old_style", {"rlnOriginX", "rlnOriginY"}, 1.0),
    ],
)
def test_all_but_the_poses_is_kept(style, origins, written, tmp_path, request):
    path, images = request.getfixturevalue(style)
    file = read_particles(path)
    poses, out = turned(file), path.parent / "out.star"
    extra = {"rlnLogLikeliContribution": np.array([1.5, 2, -3]), "count": [1, 2, 3]}
    write_particles(out, file, poses, extra)
    old, new = read_star(path), read_star(out)
    name = "particles" if style == "new_style" else "images"
    assert list(new) == list(old)
    assert all(new[block] == old[block] for block in old if block != name)
    before, after = old[name], new[name]
    assert list(after) == [*before, *extra]
    for key in before.keys() - POSE_COLUMNS - origins:
        assert after[key] == before[key], key
    x, y = (np.array(after[f"{o}"], float) for o in sorted(origins))
    np.testing.assert_allclose(np.stack([x, y], 1), -written * poses.shifts, atol=1e-6)
    assert after["rlnLogLikeliContribution"] == ["1.500000", "2.000000", "-3.000000"]
    assert after["count"] == ["1", "2", "3"]
    again = read_particles(out)
    np.testing.assert_allclose(again.poses.rotations, poses.rotations, atol=1e-8)
    np.testing.assert_allclose(again.poses.shifts, poses.shifts, atol=1e-6)
    np.testing.assert_array_equal(all_images(again), images)


@pytest.mark.parametrize(
    ("style", "name", "suffix"),
    [("new_style", "particles", "Angst"), ("old_style", "images", "")],
)
def test_missing_origins_are_added_in_the_style_of_the_file(
    style, name, suffix, request
):
    path, _ = request.getfixturevalue(style)
    blocks = read_star(path)
    for axis in "XY":
        del blocks[name][f"rlnOrigin{axis}{suffix}"]
    write_star(path, blocks)
    file = read_particles(path)
    np.testing.assert_array_equal(file.poses.shifts, np.zeros((3, 2)))
    poses = turned(file)
    write_particles(path, file, poses)
    assert list(read_star(path)[name])[-2:] == [f"rlnOrigin{a}{suffix}" for a in "XY"]
    found = read_particles(path).poses.shifts
    np.testing.assert_allclose(found, poses.shifts, atol=1e-6)


def test_both_units_are_written_where_both_stand(new_style):
    """RELION 3.1 reads Angstrom alone; other programs may read the pixels."""
    path, _ = new_style
    blocks = read_star(path)
    for axis in "XY":
        del blocks["particles"][f"rlnOrigin{axis}Angst"]
    blocks["particles"]["rlnOriginX"] = ["1", "2", "3"]
    write_star(path, blocks)
    file = read_particles(path)
    np.testing.assert_array_equal(file.poses.shifts, [[-1, 0], [-2, 0], [-3, 0]])
    poses = turned(file)
    write_particles(path, file, poses)
    after = read_star(path)["particles"]
    for suffix, unit in (("", 1.0), ("Angst", 1.5)):
        origins = [after[f"rlnOrigin{axis}{suffix}"] for axis in "XY"]
        found = np.array(origins, float).T
        np.testing.assert_allclose(found, -unit * poses.shifts, atol=1e-6)


@pytest.mark.parametrize("kept", ["rotations", "shifts"])
def test_numbers_that_stay_are_written_as_they_stand(new_style, kept):
    path, _ = new_style
    blocks = read_star(path)
    blocks["particles"]["rlnAngleRot"] = ["1e1", "+0.12345678901", "-180"]
    write_star(path, blocks)
    file = read_particles(path)
    poses = turned(file)
    given = {"rotations": poses.rotations, "shifts": poses.shifts}
    given[kept] = getattr(file.poses, kept)
    write_particles(path, file, Poses(**given))
    before, after = file.blocks["particles"], read_star(path)["particles"]
    origins = {f"rlnOrigin{axis}Angst" for axis in "XY"}
    for name in {"rlnAngleRot", "rlnAngleTilt", "rlnAnglePsi"} | origins:
        stays = (name in origins) == (kept == "shifts")
        assert (after[name] == before[name]) == stays, name
    found = read_particles(path).poses
    np.testing.assert_allclose(found.shifts, given["shifts"], atol=1e-6)


def test_a_column_written_twice_stays_in_its_place(new_style):
    path, _ = new_style
    file = read_particles(path)
    write_particles(path, file, file.poses, {"rlnDefocusU": [1.0, 2.0, 3.0]})
    after = read_star(path)["particles"]
    assert list(after) == list(file.blocks["particles"])
    assert after["rlnDefocusU"] == ["1.000000", "2.000000", "3.000000"]
    assert file.blocks["particles"]["rlnDefocusU"][0] == "15000", "must be untouched"


def test_priors_and_single_particles_stay(new_style):
    """A table of one row may stand in its file without a loop."""
    path, _ = new_style
    blocks = read_star(path)
    one = {name: values[:1] for name, values in blocks["particles"].items()}
    one |= {"rlnAnglePsiPrior": ["12.5"], "rlnOriginXPriorAngst": ["0.250"]}
    blocks["particles"] = Pairs(one)
    write_star(path, blocks)
    file = read_particles(path)
    write_particles(path, file, turned(file), {"count": [1]})
    after = read_star(path)["particles"]
    assert isinstance(after, Pairs)
    assert list(after) == [*one, "count"]
    for name in ("rlnAnglePsiPrior", "rlnOriginXPriorAngst", "mine", "rlnDefocusU"):
        assert after[name] == one[name]


@pytest.mark.parametrize("place", ["out", "in/deeper", "."])
@pytest.mark.parametrize("relative", [False, True])
def test_images_are_found_from_another_folder(
    new_style, tmp_path, monkeypatch, place, relative
):
    path, images = new_style
    if relative:
        monkeypatch.chdir(tmp_path)
        path = path.relative_to(tmp_path)
    file = read_particles(path)
    folder = (Path() if relative else tmp_path) / place
    folder.mkdir(exist_ok=True)
    write_particles(folder / "out.star", file, file.poses)
    names = read_star(folder / "out.star")["particles"]["rlnImageName"]
    assert not any(os.path.isabs(name.partition("@")[2]) for name in names)
    assert [name.partition("@")[0] for name in names] == ["000003", "2", "000001"]
    monkeypatch.chdir("/")
    np.testing.assert_array_equal(
        all_images(read_particles(tmp_path / place / "out.star")), images
    )
    # Both tables still tell which images they mean.
    absolute = tmp_path / "in/particles.star"
    assert image_identities(
        read_star(tmp_path / place / "out.star"), tmp_path / place / "out.star"
    ) == image_identities(read_star(absolute), absolute)


def test_names_from_the_working_directory_stay(tmp_path, monkeypatch):
    """As RELION wants them, unless another stack would then be found."""
    monkeypatch.chdir(tmp_path)
    images = stack(Path("raw/a.mrcs"), 1)
    Path("in").mkdir()
    Path("out").mkdir()
    write_star("in/p.star", {"": particle_columns(["1@raw/a.mrcs"])})
    file = read_particles("in/p.star")
    write_particles("out/p.star", file, file.poses)
    assert read_star("out/p.star")[""]["rlnImageName"] == ["1@raw/a.mrcs"]
    stack(Path("out/raw/a.mrcs"), 1)
    write_particles("out/p.star", file, file.poses)
    np.testing.assert_array_equal(all_images(read_particles("out/p.star")), images)


def test_names_hold_in_the_working_directory_wherever_the_table_goes(
    tmp_path, monkeypatch
):
    """RELION is started there, and knows nothing of the folder of a table."""
    project, elsewhere = tmp_path / "project", tmp_path / "scratch/run"
    images = stack(project / "Extract/a.mrcs", 1)
    elsewhere.mkdir(parents=True)
    write_star(project / "p.star", {"": particle_columns(["1@Extract/a.mrcs"])})
    for folder, kept in ((project, True), (tmp_path, False)):
        monkeypatch.chdir(folder)
        file = read_particles(project / "p.star")
        write_particles(elsewhere / "p.star", file, file.poses)
        (name,) = read_star(elsewhere / "p.star")[""]["rlnImageName"]
        assert (name == "1@Extract/a.mrcs") == kept
        np.testing.assert_array_equal(
            all_images(read_particles(elsewhere / "p.star")), images
        )


def test_names_from_the_project_stay(tmp_path, monkeypatch):
    """A table of a RELION job names stacks from the project's folder, above it."""
    monkeypatch.chdir("/")
    images = stack(tmp_path / "Extract/job1/a.mrcs", 2)
    (tmp_path / "Refine3D/job2").mkdir(parents=True)
    (tmp_path / "Refine/job3").mkdir(parents=True)
    path = tmp_path / "Refine3D/job2/run_data.star"
    names = ["1@Extract/job1/a.mrcs", "000002@Extract/job1/a.mrcs"]
    write_star(path, {"": particle_columns(names)})
    file = read_particles(path)
    out = tmp_path / "Refine/job3/particles.star"
    write_particles(out, file, file.poses)
    assert read_star(out)[""]["rlnImageName"] == names
    np.testing.assert_array_equal(all_images(read_particles(out)), images)
    tables = [read_star(path), read_star(out)]
    assert image_identities(tables[0], path) == image_identities(tables[1], out)


def test_the_first_at_sign_of_a_name_ends_the_number(tmp_path):
    """As in RELION."""
    images = stack(tmp_path / "a@b.mrcs", 2)
    write_star(tmp_path / "p.star", {"": particle_columns(["2@a@b.mrcs"])})
    file = read_particles(tmp_path / "p.star")
    np.testing.assert_array_equal(all_images(file), images[1:])
    write_particles(tmp_path / "p.star", file, file.poses)
    assert read_star(tmp_path / "p.star")[""]["rlnImageName"] == ["2@a@b.mrcs"]


def test_names_from_the_data_folder_become_absolute(tmp_path):
    images = stack(tmp_path / "data/a.mrcs", 1)
    write_star(tmp_path / "p.star", {"": particle_columns(["1@a.mrcs"])})
    file = read_particles(tmp_path / "p.star", tmp_path / "data")
    write_particles(tmp_path / "q.star", file, file.poses)
    np.testing.assert_array_equal(
        all_images(read_particles(tmp_path / "q.star")), images
    )


def test_a_folder_whose_name_is_not_text_is_one_like_others(tmp_path):
    """Its bytes are read and written as they are, here one of Latin-1."""
    folder = tmp_path / os.fsdecode(b"f\xe9")
    images = stack(folder / "a.mrcs", 1)
    write_star(folder / "p.star", {"": particle_columns(["1@a.mrcs"])})
    file = read_particles(folder / "p.star")
    (folder / "job").mkdir()
    for place in (folder / "job", tmp_path):
        write_particles(place / "p.star", file, file.poses)
        found = read_particles(place / "p.star")
        np.testing.assert_array_equal(all_images(found), images)
    assert b"f\xe9/a.mrcs" in (tmp_path / "p.star").read_bytes()


def test_what_is_wrong_with_a_stack_is_said(tmp_path, monkeypatch):
    """It is nowhere, leads nowhere, is no file, or has a name of another system."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder.mrcs").mkdir()
    (tmp_path / "link.mrcs").symlink_to("../gone/mic.mrcs")
    (tmp_path / "imported").symlink_to("gone")
    (tmp_path / "loop.mrcs").symlink_to("loop.mrcs")
    os.mkfifo(tmp_path / "pipe.mrcs")
    for name, words in {
        "folder.mrcs": "which is a folder",
        "link.mrcs": r"symbolic link to \.\./gone/mic\.mrcs, which is missing",
        "imported/a.mrcs": "imported is a symbolic link to gone, which is missing",
        "loop.mrcs": "which cannot be read: Too many levels of symbolic links",
        "pipe.mrcs": "which is not a regular file",
        r"Extract\job1\a.mrcs": "backslashes of a path of Windows",
        "a.mrcs": "which is neither in",
    }.items():
        write_star("p.star", {"": particle_columns([f"1@{name}"])})
        with pytest.raises(InputError, match=f"^p.star names .*{words}") as caught:
            read_particles("p.star")
        assert str(caught.value).count(name) and "\n" not in str(caught.value)
    stack(tmp_path / "Extract/job1/a.mrcs", 1)
    write_star("p.star", {"": particle_columns([r"1@Extract\job1\a.mrcs"])})
    with pytest.raises(InputError, match=r"by / \(Extract/job1/a.mrcs is there\)"):
        read_particles("p.star")


def test_a_stack_that_becomes_shorter_is_a_sentence(new_style):
    """A memory map would end the process with a signal."""
    path, _ = new_style
    file = read_particles(path)
    file.particles.batch(np.arange(len(file)))
    shortened = path.parent / "a.mrcs"
    os.truncate(shortened, 1024 + 4)
    with pytest.raises(InputError, match="a.mrcs must stay as it is .* shorter"):
        file.particles.batch(np.arange(len(file)))
    shortened.unlink()
    with pytest.raises(InputError, match="cannot read .*a.mrcs: No such file"):
        file.particles.batch(np.arange(len(file)))


def test_all_stacks_are_found_from_one_folder(tmp_path, monkeypatch):
    """Of one beside the old table and one above, neither keeps a name of its own."""
    monkeypatch.chdir("/")
    stack(tmp_path / "job/l.mrcs", 1)
    stack(tmp_path / "Extract/e.mrcs", 2)
    names = ["1@l.mrcs", "2@Extract/e.mrcs"]
    write_star(tmp_path / "job/p.star", {"": particle_columns(names)})
    file = read_particles(tmp_path / "job/p.star")
    for folder in ("job/deeper", "job2"):
        (tmp_path / folder).mkdir()
        write_particles(tmp_path / folder / "p.star", file, file.poses)
        new = read_star(tmp_path / folder / "p.star")[""]["rlnImageName"]
        stacks = [name.split("@")[1] for name in new]
        assert all((tmp_path / folder / each).is_file() for each in stacks)
    again = read_particles(tmp_path / "job2/p.star")
    np.testing.assert_array_equal(all_images(again), all_images(file))


def test_half_sets_are_looked_at_when_they_are_wanted(new_style):
    """Other columns are carried along, whatever they hold."""
    for halves, words in (
        (["1", "None", "2"], "None"),
        (["1", "3", "2"], r"must be 1 or 2, got '3' \(row 2\)"),
        (["2", "2", "2"], "both half sets, 1 and 2, got 2 for all"),
    ):
        change = {"rlnRandomSubset": halves}
        file = read_particles(damaged(new_style, lambda t, _, c=change: t.update(c)))
        with pytest.raises(InputError, match=f"rlnRandomSubset.*{words}"):
            _ = file.random_subset


def test_the_tables_pixel_size_comes_before_the_headers(new_style):
    """A header that says nonsense does no harm."""
    path, _ = new_style
    with mrcfile.open(path.parent / "a.mrcs", "r+") as mrc:
        mrc.voxel_size = (1.5, 1.0, 1.0)
    pixel = open_stack(path.parent / "a.mrcs").pixel_size_in_angstroms
    assert pixel is not None and np.isnan(pixel)
    assert read_particles(path).particles.pixel_size_in_angstroms == 1.5
    plain = path.with_name("plain.star")
    write_star(plain, {"": particle_columns(["1@a.mrcs"])})
    with pytest.raises(
        InputError, match="pixel size of the first stack must be .*a.mrcs"
    ):
        read_particles(plain)


def test_each_particle_needs_one_value_of_every_column(new_style, tmp_path):
    file = read_particles(new_style[0])
    few = file.poses.take(np.arange(2))
    twice = file.poses.take(np.tile(np.arange(3), 2))
    for poses, extra in ((few, {}), (twice, {}), (file.poses, {"x": [1]})):
        with pytest.raises(InputError, match="for each of 3 particles"):
            write_particles(tmp_path / "out.star", file, poses, extra)
    assert not (tmp_path / "out.star").exists()


def test_a_new_file_is_read_back(new_style, tmp_path):
    file = read_particles(new_style[0])
    group = CTF(0.0, 0.0)
    ctf = replace(
        ctf_of(file),
        voltage=group.voltage,
        spherical_aberration=group.spherical_aberration,
        amplitude_contrast=group.amplitude_contrast,
    )
    path = tmp_path / "in/new.star"
    names = file.blocks["particles"]["rlnImageName"]
    write_new_particles(path, file.poses, names, M, 1.5, group, ctf)
    again = read_particles(path)
    for name, leaf in vars(ctf).items():
        found = getattr(ctf_of(again), name)
        np.testing.assert_allclose(found, leaf, rtol=1e-6, atol=1e-7)
    np.testing.assert_allclose(again.poses.shifts, file.poses.shifts, atol=1e-6)
    for without_ctf in ((group,), ()):
        write_new_particles(path, file.poses, names, M, 1.5, *without_ctf)
        assert read_particles(path).particles.ctf is None


def test_what_a_new_file_lacks_is_named(new_style, tmp_path):
    path, file = tmp_path / "new.star", read_particles(new_style[0])
    names = file.blocks["particles"]["rlnImageName"]
    with pytest.raises(InputError, match="one image name for each of 3 poses, got 1"):
        write_new_particles(path, file.poses, names[:1], M, 1.5)
    with pytest.raises(InputError, match="a CTF must have a group, got none"):
        write_new_particles(path, file.poses, names, M, 1.5, ctf=ctf_of(file))
    assert not path.exists()


# --- bad input


def damaged(new_style, change):
    path, _ = new_style
    blocks = read_star(path)
    change(blocks["particles"], blocks["optics"])
    write_star(path, blocks)
    return path


def set_names(*names):
    return lambda table, _: table.update(rlnImageName=list(names))


def drop(*names):
    def change(table, groups):
        for name in names:
            table.pop(name, None)
            groups.pop(name, None)

    return change


BAD_TABLES = {
    "missing stack": (
        set_names("1@a.mrcs", "1@gone.mrcs", "1@a.mrcs"),
        "names gone.mrcs, which is neither in .*in, nor in a folder above",
    ),
    "beyond the end": (
        set_names("4@a.mrcs", "5@a.mrcs", "1@a.mrcs"),
        "names image 5 of .*a.mrcs, which has only 4",
    ),
    "absolute": (
        set_names("1@/old/place/a.mrcs", *["1@a.mrcs"] * 2),
        "names /old/place/a.mrcs, which does not exist; other folders are searched",
    ),
    "long name": (
        set_names(f"1@{'a' * 300}", *["1@a.mrcs"] * 2),
        "names a*, which cannot be read: File name too long",
    ),
    "no number but sections": (
        set_names("a.mrcs", *["1@a.mrcs"] * 2),
        "names a.mrcs without .* must hold one image, got 4 sections",
    ),
    "volumes": (
        lambda _, groups: groups.update(rlnImageDimensionality=["2", "3"]),
        "rlnImageDimensionality must be 2, for single particles, got 3",
    ),
    "number zero": (
        set_names("0@a.mrcs", *["1@a.mrcs"] * 2),
        "number from 1, .* got '0@a",
    ),
    "no number": (
        set_names("x@a.mrcs", *["1@a.mrcs"] * 2),
        "number from 1, .* got 'x@a",
    ),
    "no images": (drop("rlnImageName"), "must have the column rlnImageName"),
    "no poses": (drop("rlnAngleTilt"), "must have the columns rlnAngleTilt"),
    "no poses but one": (drop("rlnAngleRot"), "must have the columns rlnAngleRot"),
    "no defocus": (drop("rlnDefocusU"), "must have rlnDefocusU, got rlnDefocusV"),
    "two boxes": (
        lambda _, groups: groups.update(rlnImageSize=["6", "8"]),
        "rlnImageSize must be 6, .* got 6, 8",
    ),
    "another box": (
        lambda _, groups: groups.update(rlnImageSize=["8", "8"]),
        "rlnImageSize must be 6, .* got 8",
    ),
    "premultiplied": (
        lambda _, groups: groups.update(rlnCtfDataAreCtfPremultiplied=["0", "1"]),
        "got rlnCtfDataAreCtfPremultiplied: they are multiplied by their CTF",
    ),
    "flipped": (
        lambda table, _: table.update(rlnCtfDataArePhaseFlipped=["0", "1", "0"]),
        "got rlnCtfDataArePhaseFlipped: they are phase-flipped",
    ),
    "missing group": (
        lambda table, _: table.update(rlnOpticsGroup=["1", "3", "7"]),
        "got particles of group 3, 7",
    ),
    "group twice": (
        lambda _, groups: groups.update(rlnOpticsGroup=["1", "1"]),
        "got two with the same number",
    ),
    "half a group": (
        lambda table, _: table.update(rlnOpticsGroup=["1", "1.5", "2"]),
        r"rlnOpticsGroup: .* must be a whole number, got '1.5' \(row 2\)",
    ),
    "huge number": (
        set_names(f"{'9' * 5000}@a.mrcs", *["1@a.mrcs"] * 2),
        "a number from 1",
    ),
    "beyond floats": (
        lambda table, groups: (
            table.update(rlnOriginXAngst=["1e30"] * 3),
            groups.update(rlnImagePixelSize=["1e-30"] * 2),
        ),
        "origins in pixels must be finite",
    ),
    "defocus NaN": (
        lambda table, _: table.update(rlnDefocusU=["1", "nan", "2"]),
        r"rlnDefocusU: .* must be a finite number .* got 'nan' \(row 2\)",
    ),
    "no voltage": (drop("rlnVoltage"), "rlnVoltage"),
    "no contrast": (drop("rlnAmplitudeContrast"), "rlnAmplitudeContrast"),
    "no groups": (drop("rlnOpticsGroup"), "rlnOpticsGroup"),
    "no rows": (
        lambda table, _: [v.clear() for v in table.values()],
        "must hold particles",
    ),
    "contrast": (
        lambda _, groups: groups.update(rlnAmplitudeContrast=["0.1", "1.2"]),
        "rlnAmplitudeContrast: values must be from 0 to 1",
    ),
    "voltage": (
        lambda _, groups: groups.update(rlnVoltage=["0", "300"]),
        "rlnVoltage: values must be positive, got 0",
    ),
    "two pixel sizes": (
        lambda _, groups: groups.update(rlnImagePixelSize=["1.5", "1.9"]),
        "pixel sizes must differ .* got 1.5 to 1.9 A",
    ),
    "no name": (set_names("", *["1@a.mrcs"] * 2), "a number from 1, .* got ''"),
    "endless CTF": (
        lambda table, _: table.update(rlnCtfBfactor=["1", "-1e6", "2"]),
        "of particle 2 must be finite, got optics",
    ),
    "endless scale": (
        lambda table, _: table.update(rlnCtfScalefactor=["1", "1", "1e39"]),
        r"rlnCtfScalefactor: .*single precision, got '1e39' \(row 3\)",
    ),
    "not a number": (
        lambda table, _: table.update(rlnDefocusU=["1", "x", "2"]),
        "rlnDefocusU",
    ),
}


@pytest.mark.parametrize("bad", BAD_TABLES)
def test_a_bad_table_is_a_sentence(new_style, bad):
    change, words = BAD_TABLES[bad]
    path = damaged(new_style, change)
    with pytest.raises(InputError, match=words) as caught:
        read_particles(path)
    message = str(caught.value)
    assert str(path) in message and "\n" not in message and not message.endswith(".")


@pytest.mark.parametrize("x64", [False, True])
@pytest.mark.parametrize("size", ["1e39", "-1e300", "3e38"])
@pytest.mark.parametrize(
    "name", ["rlnAngleRot", "rlnOriginXAngst", "rlnDefocusU", "rlnVoltage"]
)
def test_numbers_that_overflow_are_a_sentence(new_style, name, size, x64):
    """Warnings are errors here, in which 3e38 must not end either."""
    path = damaged(new_style, lambda t, _: t.update({name: ["1", size, "2"]}))
    with jax.enable_x64(x64):
        if size == "3e38":
            assert np.isfinite(read_particles(path).poses.shifts).all()
            return
        with pytest.raises(InputError, match=rf"{name}: .*'{size}' \(row 2\)"):
            read_particles(path)


def test_two_dimensional_stacks_of_tomograms_are_a_sentence(new_style):
    """A file of RELION 5 says so in a block of its own; unused groups do not count."""
    path, _ = new_style
    blocks = read_star(path)
    blocks["optics"]["rlnImageDimensionality"] = ["2", "3"]
    blocks["particles"]["rlnOpticsGroup"] = ["1", "1", "1"]
    for said in ("0", "1"):
        general = Pairs(rlnTomoSubTomosAre2DStacks=[said])
        write_star(path, {"general": general} | blocks)
        if said == "0":
            assert len(read_particles(path)) == 3
    words = "single particles, got rlnTomoSubTomosAre2DStacks: .* tilt series"
    with pytest.raises(InputError, match=words):
        read_particles(path)


def truncate(path):
    path.write_bytes(path.read_bytes()[:-1])


def compress(path):
    path.write_bytes(gzip.compress(path.read_bytes()))


def other_size(path):
    stack(path, 4, M + 1)


def not_square(path):
    with mrcfile.new(path, overwrite=True) as mrc:
        mrc.set_data(np.zeros((4, M, M + 1), np.float32))


def complex_values(path):
    with mrcfile.new(path, overwrite=True) as mrc:
        mrc.set_data(np.zeros((4, M, M), np.complex64))


BAD_STACKS = {
    truncate: "a.mrcs is truncated or damaged.*4 x 6 x 6",
    compress: "a.mrcs is compressed",
    other_size: "same size, got 6 pixels .*b.mrcs.* and 7",
    not_square: "a.mrcs must hold .*, got an array of 4 x 6 x 7",
    complex_values: "a.mrcs must hold real values",
    lambda path: path.write_bytes(b""): "a.mrcs is not an MRC file",
    lambda path: path.write_text("no map" * 999): "a.mrcs is not an MRC file",
}


@pytest.mark.parametrize("damage", BAD_STACKS)
def test_a_bad_stack_is_a_sentence(new_style, damage):
    path, _ = new_style
    damage(path.parent / "a.mrcs")
    with pytest.raises(InputError, match=BAD_STACKS[damage]) as caught:
        read_particles(path)
    assert "\n" not in str(caught.value)


def test_defoci_without_any_pixel_size_are_refused(new_style):
    path, _ = new_style
    table = read_star(path)["particles"]
    for name in ("rlnOriginXAngst", "rlnOriginYAngst", "rlnOpticsGroup"):
        table.pop(name)
    table |= {
        name: [value] * 3
        for name, value in (
            ("rlnVoltage", "300"),
            ("rlnSphericalAberration", "2.7"),
            ("rlnAmplitudeContrast", "0.1"),
        )
    }
    write_star(path, {"particles": table})
    assert read_particles(path).particles.pixel_size_in_angstroms == PIXEL
    for name in ("a.mrcs", "sub/b.mrcs"):
        with mrcfile.open(path.parent / name, "r+") as mrc:
            mrc.voxel_size = 0
    with pytest.raises(InputError, match="must give a pixel size, got defocus values"):
        read_particles(path)
