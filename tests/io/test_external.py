"""The files of RELION's external reconstruction: read as written, or one sentence."""

import mrcfile
import numpy as np
import pytest

from jaxrefine.errors import InputError
from jaxrefine.io import Pairs, read_external_reconstruction, write_star

BOX, SIZE = 4, 8
SHAPE = (SIZE, SIZE, SIZE // 2 + 1)
BLOCK = "external_reconstruct_general"


def write_grid(path, values):
    with mrcfile.new(path, overwrite=True) as mrc:
        mrc.set_data(np.asarray(values, np.float32))


@pytest.fixture
def asked(tmp_path):
    """Random grids of a box of 4 voxels, and the table that names them."""
    rng = np.random.default_rng(0)
    table = Pairs()
    for label, name in (("DataReal", "real"), ("DataImag", "imag")):
        write_grid(tmp_path / f"{name}.mrc", rng.normal(size=SHAPE))
        table[f"rlnExtRecons{label}"] = [str(tmp_path / f"{name}.mrc")]
    write_grid(tmp_path / "weight.mrc", rng.uniform(size=SHAPE))
    table["rlnExtReconsWeight"] = [str(tmp_path / "weight.mrc")]
    table["rlnExtReconsResult"] = [str(tmp_path / "result.mrc")]
    table["rlnReferenceDimensionality"] = ["3"]
    table["rlnOriginalImageSize"] = [str(BOX)]
    return tmp_path, table


def read(folder, table, block=BLOCK):
    path = folder / "sums.star"
    write_star(path, {block: table})
    return read_external_reconstruction(path)


@pytest.mark.parametrize("voxel", [None, 1.25])
def test_what_is_written_is_read(asked, voxel):
    folder, table = asked
    if voxel is not None:
        table["rlnPixelSize"] = [str(voxel)]
    found = read(folder, table)
    real, imag, weight = (
        mrcfile.read(folder / f"{name}.mrc") for name in ("real", "imag", "weight")
    )
    np.testing.assert_array_equal(found.data, real + 1j * imag)
    np.testing.assert_array_equal(found.weight, weight)
    assert (found.box, found.voxel_size_in_angstroms) == (BOX, voxel)
    assert found.result == folder / "result.mrc"
    names = [path.name for path in found.inputs]
    assert names == ["sums.star", "real.mrc", "imag.mrc", "weight.mrc"]


@pytest.mark.parametrize(
    ("label", "value", "sentence"),
    [
        ("rlnExtReconsWeight", None, "one value of .* got none or several of .*Weight"),
        ("rlnExtReconsResult", None, "got none or several of rlnExtReconsResult"),
        ("rlnExtReconsDataImag", "absent.mrc", "absent.mrc does not exist"),
        ("rlnReferenceDimensionality", "2", "must have 3 dimensions, got 2"),
        ("rlnOriginalImageSize", "10", "at least 10 x 10 x 6 values, .* 8 x 8 x 5"),
        ("rlnOriginalImageSize", "2", "must be at least 4, got 2"),
        ("rlnOriginalImageSize", "four", "must be .* number.*, got 'four'"),
        ("rlnPixelSize", "0", "rlnPixelSize must be positive, got 0 A"),
    ],
)
def test_a_bad_table_is_one_sentence(asked, label, value, sentence):
    folder, table = asked
    table.pop(label, None)
    if value is not None:
        table[label] = [value]
    with pytest.raises(InputError, match=sentence):
        read(folder, table)


@pytest.mark.parametrize(
    ("name", "values", "sentence"),
    [
        ("weight", np.full(SHAPE, -1.0), "weight.mrc must hold weights of at least 0"),
        ("imag", np.ones((6, 6, 4)), "imag.mrc must hold a half-complex cube .* 6 x 6"),
        ("weight", np.ones((8, 8, 8)), "weight.mrc must hold a half-complex cube"),
    ],
)
def test_a_bad_grid_is_one_sentence(asked, name, values, sentence):
    folder, table = asked
    write_grid(folder / f"{name}.mrc", values)
    with pytest.raises(InputError, match=sentence):
        read(folder, table)


def test_a_grid_that_is_not_finite_is_one_sentence(asked):
    folder, table = asked
    path = folder / "real.mrc"
    path.write_bytes(path.read_bytes()[:-4] + np.float32(np.nan).tobytes())
    with pytest.raises(InputError, match="real.mrc must hold finite values, got 1"):
        read(folder, table)


def test_a_truncated_grid_is_one_sentence(asked):
    folder, table = asked
    path = folder / "weight.mrc"
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(InputError, match="weight.mrc is truncated or damaged"):
        read(folder, table)


def test_another_star_file_is_one_sentence(asked):
    folder, table = asked
    with pytest.raises(InputError, match="a block .*, got the blocks 'other'"):
        read(folder, table, "other")


def test_a_table_that_relion_would_take_instead_of_its_own_is_named(asked):
    folder, table = asked
    assert read(folder, table).result_table is None
    table["rlnExtReconsResultStarfile"] = [str(folder / "out.star")]
    assert read(folder, table).result_table == folder / "out.star"
