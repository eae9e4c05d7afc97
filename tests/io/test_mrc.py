"""MRC files: axes, voxel sizes, and one sentence for every bad file."""

import bz2
import errno
import gzip
import os
import re
from itertools import permutations

import jax.numpy as jnp
import mrcfile
import numpy as np
import pytest
from mrcfile.mrcfile import MrcFile

from jaxrefine.errors import InputError
from jaxrefine.io import (
    new_stack,
    open_stack,
    read_mrc,
    read_stack,
    write_mrc,
    write_stack,
)
from jaxrefine.io.mrc import _DECOMPRESSORS


def unique_volume(n=5):
    return np.arange(n**3, dtype=np.float32).reshape(n, n, n)


def unique_stack():
    return np.arange(3 * 4 * 4, dtype=np.float32).reshape(3, 4, 4)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "map.mrc"


def write_raw(path, data, voxel: float | tuple[float, float, float] = 1.5, **fields):
    """Write with mrcfile alone, then set header fields by name."""
    with mrcfile.new(path, overwrite=True) as mrc:
        mrc.set_data(data)
        mrc.voxel_size = voxel
        header = mrc.header
        assert header is not None
        for name, value in fields.items():
            header[name] = value


def header_of(path):
    """The header of a file, as mrcfile reads it."""
    with mrcfile.open(path) as mrc:
        header = mrc.header
    assert header is not None
    return header


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("as_jax", [False, True])
def test_a_volume_comes_back_in_single_precision(path, dtype, as_jax):
    volume = unique_volume().astype(dtype)
    write_mrc(path, jnp.asarray(volume) if as_jax else volume, 2.8667)
    result, voxel = read_mrc(path)
    np.testing.assert_array_equal(result, unique_volume())
    assert result.dtype == np.float32
    assert result.flags.writeable
    assert voxel == pytest.approx(2.8667, rel=1e-6)


def test_a_volume_lies_in_the_file_with_x_fastest(path):
    write_mrc(path, unique_volume(), 1.0)
    values = np.frombuffer(path.read_bytes()[1024:], dtype="<f4")
    np.testing.assert_array_equal(values, np.arange(125))
    header = header_of(path)
    assert (header.mapc, header.mapr, header.maps) == (1, 2, 3)
    assert (header.ispg, header.mz) == (1, 5)


@pytest.mark.parametrize("axes", list(permutations((1, 2, 3))))
def test_every_axis_order_is_brought_to_zyx(path, axes):
    """A voxel at (x, y, z) is stored at the place that the header declares."""
    n, expected = 4, unique_volume(4)
    stored = np.empty_like(expected)
    for z, y, x in np.ndindex(n, n, n):
        column, row, section = ((x, y, z)[axis - 1] for axis in axes)
        stored[section, row, column] = expected[z, y, x]
    write_raw(path, stored, mapc=axes[0], mapr=axes[1], maps=axes[2])
    np.testing.assert_array_equal(read_mrc(path)[0], expected)


def test_unset_axes_mean_xyz(path):
    write_raw(path, unique_volume(), mapc=0, mapr=0, maps=0)
    np.testing.assert_array_equal(read_mrc(path)[0], unique_volume())


@pytest.mark.parametrize("dtype", [np.int8, np.int16, np.uint16, np.float16, ">f4"])
def test_other_modes_and_byte_orders_become_float32(path, dtype):
    write_raw(path, unique_volume(4).astype(dtype))
    result, _ = read_mrc(path)
    assert result.dtype == np.float32
    np.testing.assert_array_equal(result, unique_volume(4))


@pytest.mark.parametrize("compress", [gzip.compress, bz2.compress])
def test_compressed_files_are_read(path, compress):
    write_mrc(path, unique_volume(), 1.5)
    path.write_bytes(compress(path.read_bytes()))
    np.testing.assert_array_equal(read_mrc(path)[0], unique_volume())


def test_harmless_oddities_do_not_warn(path):
    """A wrong machine stamp and trailing bytes: mrcfile warns, we read."""
    write_raw(path, unique_volume(), machst=[0, 0, 0, 0])
    path.write_bytes(path.read_bytes() + b"tail")
    np.testing.assert_array_equal(read_mrc(path)[0], unique_volume())


@pytest.mark.parametrize("read", [read_mrc, read_stack])
def test_unset_voxel_size_is_one(path, read):
    write_raw(path, unique_volume(), voxel=0.0)
    assert read(path)[1] == 1.0
    write_raw(path, unique_volume(), mx=0, my=0, mz=0)
    assert read(path)[1] == 1.0


@pytest.mark.parametrize("count", [3, 1])
def test_a_stack_comes_back_and_is_marked_as_one(path, count):
    images = unique_stack()[:count]
    write_stack(path, images, 1.34)
    result, pixel = read_stack(path)
    np.testing.assert_array_equal(result, images)
    assert pixel == pytest.approx(1.34, rel=1e-6)
    header = header_of(path)
    assert (header.ispg, header.mz, header.nz) == (0, 1, count)


def test_the_z_edge_of_a_stack_does_not_count(path):
    write_raw(path, unique_stack(), voxel=(5.0, 5.0, 1.0))
    assert read_stack(path)[1] == 5.0


BOTH = pytest.mark.parametrize("read", [read_mrc, read_stack])


def assert_one_sentence(read, path, words):
    with pytest.raises(InputError, match=words) as caught:
        read(path)
    message = str(caught.value)
    assert str(path) in message
    assert "\n" not in message
    assert not message.endswith(".")


@BOTH
def test_a_missing_file_and_a_folder_are_refused(read, path):
    assert_one_sentence(read, path, "does not exist")
    assert_one_sentence(read, path.parent, "got a folder")


@BOTH
@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"hello",
        b"x" * 5000,
        b"\x1f\x8b" + b"\0" * 2000,
        b"BZ" + b"h" * 2000,
        gzip.compress(b"x" * 5000),
    ],
    ids=["empty", "short", "long", "false gzip", "false bzip2", "gzip"],
)
def test_a_file_of_another_kind_is_refused(read, path, content):
    path.write_bytes(content)
    assert_one_sentence(read, path, "not an MRC file")


@BOTH
@pytest.mark.parametrize("order", "<>")
@pytest.mark.parametrize("dtype", ["i1", "i2", "f4", "f2"])
def test_headers_of_old_programs_are_read(read, path, order, dtype):
    """Without the word MAP and the machine stamp, if all else fits."""
    data = unique_volume().astype(f"{order}{dtype}")
    write_raw(path, data)
    content = bytearray(path.read_bytes())
    content[208:216] = bytes(8)
    content[224:304] = "Café, dated".encode("latin-1").ljust(80)
    path.write_bytes(content)
    values, size = read(path)
    np.testing.assert_array_equal(values, unique_volume())
    assert size == 1.5
    path.write_bytes(gzip.compress(content))
    np.testing.assert_array_equal(read(path)[0], unique_volume())
    for changed in (content + b"x", content[:-1], content[:1024]):
        path.write_bytes(changed)
        assert_one_sentence(
            read, path, "not an MRC file: its header lacks the word MAP"
        )


@BOTH
@pytest.mark.parametrize("stamp", [b"\0\0", b"DD", b"DA", b"\x11\x11", b"xx"])
@pytest.mark.parametrize("order", "<>")
def test_a_wrong_machine_stamp_does_no_harm(read, path, order, stamp):
    write_raw(path, unique_volume().astype(f"{order}f4"))
    content = bytearray(path.read_bytes())
    content[212:214] = stamp
    path.write_bytes(content)
    np.testing.assert_array_equal(read(path)[0], unique_volume())


@BOTH
def test_values_of_4_bits_are_named(read, path):
    write_raw(path, unique_volume(), mode=101)
    assert_one_sentence(read, path, r"got some of 4 bits \(mode 101\)")


@BOTH
def test_the_systems_reason_is_told(read, path, monkeypatch):
    """Neither a missing permission nor a failing disk is damage."""
    write_raw(path, unique_volume())

    def fail(*_, **__):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr("builtins.open", fail)
    assert_one_sentence(read, path, "^cannot read .*: Permission denied$")


@BOTH
def test_no_more_is_decompressed_than_the_header_announces(read, path, monkeypatch):
    """A tail of zeros, of which there may be gigabytes, is not read."""
    write_raw(path, unique_volume())
    content, tail = path.read_bytes(), 2**26
    for module in (gzip, bz2):
        path.write_bytes(module.compress(content + bytes(tail)))
        taken = []
        plain = module.open

        def counting(*arguments, plain=plain, taken=taken):
            file = plain(*arguments)
            read = file.read

            def count(size):
                taken.append(size)
                return read(size)

            monkeypatch.setattr(file, "read", count)
            return file

        monkeypatch.setitem(_DECOMPRESSORS, path.read_bytes()[:2], counting)
        np.testing.assert_array_equal(read(path)[0], unique_volume())
        assert taken and sum(taken) <= 2 * len(content)


@BOTH
@pytest.mark.parametrize("kept", [1024, 1030, 1024 + 124 * 4])
def test_a_truncated_file_is_refused(read, path, kept):
    write_raw(path, unique_volume())
    path.write_bytes(path.read_bytes()[:kept])
    assert_one_sentence(read, path, "truncated")


@BOTH
def test_a_truncated_gzip_file_is_refused(read, path):
    write_raw(path, np.random.default_rng(0).random((5, 5, 5), np.float32))
    path.write_bytes(gzip.compress(path.read_bytes())[:-60])
    assert_one_sentence(read, path, "damaged")


@BOTH
@pytest.mark.parametrize(("module", "place"), [(gzip, -8), (bz2, -4)])
def test_a_stream_with_another_checksum_is_refused(read, path, module, place):
    """That of gzip is the last but one word, that of bzip2 is in the last."""
    write_raw(path, np.random.default_rng(0).random((5, 5, 5), np.float32))
    compressed = bytearray(module.compress(path.read_bytes()))
    path.write_bytes(compressed)
    read(path)
    compressed[place] ^= 0xFF
    path.write_bytes(compressed)
    assert_one_sentence(read, path, "damaged")


@BOTH
@pytest.mark.parametrize("header", [{"nx": -5}, {"mode": 77}, {"nz": 2**31 - 1}])
def test_nonsense_in_the_header_is_refused(read, path, header):
    write_raw(path, unique_volume())
    content = np.frombuffer(path.read_bytes(), dtype="<i4").copy()
    for name, value in header.items():
        content[{"nx": 0, "nz": 2, "mode": 3}[name]] = value
    path.write_bytes(content.tobytes())
    assert_one_sentence(read, path, "damaged")


@BOTH
def test_a_file_without_values_is_refused(read, path):
    with mrcfile.new(path) as mrc:
        mrc.set_data(np.zeros((0, 0, 0), np.float32))
    assert_one_sentence(read, path, "truncated or damaged")


@BOTH
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_are_refused(read, path, bad):
    write_mrc(path, unique_volume(), 1.0)
    content = bytearray(path.read_bytes())
    content[1024:1032] = np.array([bad, bad], "<f4").tobytes()
    path.write_bytes(content)
    assert_one_sentence(
        read, path, "must hold finite values, got 2 that are NaN or infinite"
    )


@BOTH
def test_complex_values_and_anisotropic_voxels_are_refused(read, path):
    write_raw(path, unique_volume().astype(np.complex64))
    assert_one_sentence(read, path, "must hold real values, got complex")
    write_raw(path, unique_volume(), mode=3)  # of 16-bit integers
    assert_one_sentence(read, path, "must hold real values, got complex")
    write_raw(path, unique_volume(), voxel=(1.0, 1.1, 1.0))
    assert_one_sentence(read, path, "must be isotropic, got 1 x 1.1")


@BOTH
@pytest.mark.parametrize("edge", [-1.0, np.nan, np.inf])
def test_impossible_voxels_are_refused(read, path, edge):
    write_raw(path, unique_volume(), voxel=(edge, 1.0, 1.0))
    assert_one_sentence(read, path, "voxel size must be positive")


def test_maps_must_be_cubic_and_images_square(path):
    write_raw(path, np.zeros((4, 5, 6), np.float32))
    assert_one_sentence(read_mrc, path, "cubic map, got an array of 4 x 5 x 6")
    assert_one_sentence(read_stack, path, "square images, got an array of 4 x 5 x 6")
    write_raw(path, np.zeros((4, 4), np.float32))
    assert_one_sentence(read_mrc, path, "cubic map, got an array of 1 x 4 x 4")
    write_raw(path, np.zeros((2, 4, 4, 4), np.float32))
    assert_one_sentence(read_mrc, path, "cubic map, got an array of 8 x 4 x 4")


def test_a_stack_of_one_volume_is_a_map(path):
    write_raw(path, unique_volume()[None], ispg=401)
    volume, voxel = read_mrc(path)
    np.testing.assert_array_equal(volume, unique_volume())
    assert voxel == 1.5


def test_impossible_axes_are_refused(path):
    write_raw(path, unique_volume(), mapc=1, mapr=1, maps=3)
    assert_one_sentence(read_mrc, path, r"\(1, 1, 3\)")
    write_raw(path, unique_stack(), mapc=2, mapr=1)
    assert_one_sentence(read_stack, path, r"\(2, 1, 3\)")


@pytest.mark.parametrize("scale", [1e-20, 1e20, 1e38])
def test_the_header_has_the_statistics_of_values_of_any_scale(path, scale):
    """Whose squares are beyond single precision."""
    volume = scale * np.random.default_rng(5).uniform(-1, 2, (8, 8, 8))
    write_mrc(path, volume, 1.0)
    with mrcfile.open(path, header_only=True) as mrc:
        header = mrc.header
        assert header is not None
        assert header.rms == pytest.approx(volume.std(), rel=1e-5)
        assert header.dmean == pytest.approx(volume.mean(), rel=1e-5)


@pytest.mark.parametrize(
    ("volume", "voxel", "words"),
    [
        (unique_volume() + np.nan, 1.0, "must be finite"),
        (np.full((2, 2, 2), 1e300), 1.0, "must be finite"),
        (unique_volume(), 0.0, "voxel size must be positive, got 0.0"),
        (unique_volume(), float("nan"), "voxel size must be positive, got nan"),
    ],
)
def test_a_refused_write_leaves_the_old_file(path, volume, voxel, words):
    write_mrc(path, unique_volume(), 1.0)
    before = path.read_bytes()
    with pytest.raises(InputError, match=words):
        write_mrc(path, volume, voxel)
    assert path.read_bytes() == before
    assert list(path.parent.iterdir()) == [path]


def test_a_write_that_dies_half_way_leaves_the_old_file(path, monkeypatch):
    write_stack(path, unique_stack(), 1.0)
    before = path.read_bytes()

    def die(self):
        assert len(list(path.parent.iterdir())) == 2
        raise KeyboardInterrupt

    monkeypatch.setattr(MrcFile, "set_image_stack", die)
    with pytest.raises(KeyboardInterrupt):
        write_stack(path, unique_stack() + 1, 1.0)
    assert path.read_bytes() == before
    assert list(path.parent.iterdir()) == [path]


def test_a_file_that_cannot_be_written_is_a_sentence(tmp_path):
    with pytest.raises(InputError, match="cannot write .*No such file or directory"):
        write_mrc(tmp_path / "absent" / "map.mrc", unique_volume(), 1.0)
    with pytest.raises(InputError, match="cannot write .*: it is a folder"):
        write_mrc(tmp_path, unique_volume(), 1.0)


@pytest.mark.parametrize(
    ("name", "n", "voxel"),
    [
        ("hjc_90.mrc", 90, 2.8666667),
        ("ptch1_84.mrc", 84, 1.8),
        ("hjc_46.mrc", 46, 1.0),
        ("ptch1_44.mrc", 44, 1.0),
        ("relion_oracle/clean70SRibosome_vol_65p.mrc", 65, 1.0),
    ],
)
def test_real_maps_have_their_known_sizes(data_dir, name, n, voxel):
    volume, size = read_mrc(data_dir / name)
    assert volume.shape == (n, n, n)
    assert size == pytest.approx(voxel, rel=1e-6)


@pytest.mark.parametrize(
    ("name", "shape", "pixel"),
    [
        ("real_sample/sample.mrcs", (17, 200, 200), 1.0),
        ("real_betagal/betagal_emd2984_particles_101_96px.mrcs", (101, 96, 96), 5.096),
        ("relion_oracle/rln_proj_64_centered.mrcs", (4, 64, 64), 1.0),
    ],
)
def test_real_stacks_have_their_known_sizes(data_dir, name, shape, pixel):
    images, size = read_stack(data_dir / name)
    assert images.shape == shape
    assert size == pytest.approx(pixel, rel=1e-6)


@BOTH
@pytest.mark.parametrize("order", ["<", ">"])
def test_a_long_extended_header_is_not_taken_at_its_word(read, path, order):
    """It would be 2 GiB long."""
    write_raw(path, unique_volume(4).astype(f"{order}f4"))
    content = bytearray(path.read_bytes())
    content[92:96] = np.array([2**31 - 1], f"{order}i4").tobytes()
    path.write_bytes(content)
    assert_one_sentence(read, path, "truncated or damaged: .* must have 214748")


@pytest.mark.parametrize("dtype", ["<f4", ">f4", np.int8, np.int16, np.float16])
def test_sections_are_read_whatever_their_type(path, dtype):
    with mrcfile.new(path) as mrc:
        mrc.set_extended_header(np.zeros(100, "V1"))
        mrc.set_data(unique_stack().astype(dtype))
        mrc.voxel_size = 2.0
    stack = open_stack(path)
    assert len(stack) == 3 and stack.pixel_size_in_angstroms == 2.0
    for indices in ([0, 1, 2], [2], [1, 1, 2], [2, 0], []):
        chosen = np.array(indices, int)
        assert stack[chosen].dtype == np.dtype(dtype)
        np.testing.assert_array_equal(stack[chosen], unique_stack()[chosen])


def test_a_stack_is_filled_in_place(path):
    images = unique_stack()
    with new_stack(path, 3, 4, 2.5) as empty:
        empty[1:] = images[1:]
        empty[0] = images[0]
        assert not path.exists()
    np.testing.assert_array_equal(read_stack(path)[0], images)
    header = header_of(path)
    assert (header.ispg, header.mz) == (0, 1)
    assert header.dmax < header.dmin, "the statistics are unknown"
    with pytest.raises(KeyboardInterrupt), new_stack(path, 9, 4, 2.5):
        raise KeyboardInterrupt
    assert list(path.parent.iterdir()) == [path]
    assert len(read_stack(path)[0]) == 3


@pytest.mark.skipif(not hasattr(os, "posix_fallocate"), reason="the system has none")
def test_a_stack_has_its_room_before_it_is_filled(tmp_path):
    """A file with holes would meet a full disk with a signal, not with a sentence."""
    with new_stack(tmp_path / "a.mrcs", 5, 200, 1.0):
        (temporary,) = tmp_path.iterdir()
        status = temporary.stat()
        assert 512 * status.st_blocks >= status.st_size > 5 * 4 * 200**2


def test_a_stack_that_the_disk_has_no_room_for_is_refused(tmp_path, monkeypatch):
    def full(descriptor, offset, length):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full, raising=False)
    path = tmp_path / "a.mrcs"
    words = f"^cannot write {re.escape(str(path))}: No space left on device$"
    with pytest.raises(InputError, match=words), new_stack(path, 3, 6, 2.5):
        raise AssertionError("nothing is to be filled in")
    assert not list(tmp_path.iterdir())
