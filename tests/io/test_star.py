"""STAR files of several writers: quotes, comments, and rows that do not fit."""

import codecs
import time
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from jaxrefine.errors import InputError
from jaxrefine.io import Pairs, read_star, write_star


@pytest.fixture
def path(tmp_path):
    return tmp_path / "particles.star"


def assert_same(blocks, expected):
    """Blocks, columns, their order, values, and what was a loop."""
    assert list(blocks) == list(expected)
    for name, table in blocks.items():
        assert list(table.items()) == list(expected[name].items())
        assert isinstance(table, Pairs) == isinstance(expected[name], Pairs)


AWKWARD = """
# version 30001
data_general # a comment
_rlnVersion  3.1
_quoted 'two words' # another
_hash a#b

data_
loop_ \t
_rlnName #1
_rlnValue
"quote string" ' '
""  5'end
'it's "here"' "#7"   # a comment
data_2020/mic.mrc _x

data_empty
loop_
_rlnAlone #1

data_last
loop_
_rlnOne #1 [a remark]
1
"_two"
"data_3"
#
"""


def test_quotes_comments_pairs_and_empty_loops_are_read(path):
    path.write_bytes(AWKWARD.replace("\n", "\r\n").encode("utf-8-sig"))
    assert read_star(path) == {
        "general": {
            "rlnVersion": ["3.1"],
            "quoted": ["two words"],
            "hash": ["a#b"],
        },
        "": {
            "rlnName": ["quote string", "", 'it\'s "here"', "data_2020/mic.mrc"],
            "rlnValue": [" ", "5'end", "#7", "_x"],
        },
        "empty": {"rlnAlone": []},
        "last": {"rlnOne": ["1", "_two", "data_3"]},
    }


def test_what_was_no_loop_stays_none(path):
    path.write_text(AWKWARD)
    blocks = read_star(path)
    kinds = {name: isinstance(table, Pairs) for name, table in blocks.items()}
    assert kinds == {"general": True, "": False, "empty": False, "last": False}
    write_star(path, blocks)
    assert_same(read_star(path), blocks)


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_tabs_and_blank_lines_may_be_anywhere(path, end):
    text = "\n\n\tdata_a\n\n\nloop_\n\n_x #1\n\n\t_y\t#2\n\n1\t2\n \n\n3 4\n\n"
    path.write_bytes(text.replace("\n", end).encode())
    assert read_star(path) == {"a": {"x": ["1", "3"], "y": ["2", "4"]}}


def test_only_ascii_blanks_part_values(path):
    """A no-break space belongs to a name, as it does for RELION."""
    path.write_text("data_\nloop_\n_x\n_y\na\u00a0b 2\n", encoding="utf-8")
    blocks = read_star(path)
    assert blocks == {"": {"x": ["a\u00a0b"], "y": ["2"]}}
    write_star(path, blocks)
    assert read_star(path) == blocks


def test_only_files_with_optics_groups_are_marked_as_new(path):
    write_star(path, {"images": {"rlnX": ["1"]}})
    assert "version" not in path.read_text()


def test_awkward_values_come_back(path):
    blocks = {
        "optics": {"rlnOpticsGroup": ["1"], "rlnName": ["two words"]},
        "particles": {
            "rlnA": ["", " ", "a\tb", "#", "_a", "loop_", "data_x", '"', "'", "a#b"],
            "rlnB": ["'a", '"a"', "a'b c", 'a"b c', ";", "é", "1", "-", "data_", "''"],
            "both": [f"{a}x{b}" for a in ("a\" b' ", "\" '\t") for b in "'\" \\_#"][
                :10
            ],
        },
        "one": {"rlnA": ["_a", "data_x", "loop_", "", "#", "x"]},
        "empty": {"rlnA": [], "rlnB": []},
        "": {},
        "general": Pairs(rlnA=["two words"], rlnB=["#"], rlnC=[""]),
        "nothing": Pairs(),
    }
    write_star(path, blocks)
    assert_same(read_star(path), blocks)


def test_a_quote_after_a_bell_does_not_close(path):
    """RELION's mark, which it leaves out of the value, in quotes of either kind."""
    text = """data_\nloop_\n_a\n_b\n_c\n"say "hi\a" now" 'it\a' 's' x\ay\n"""
    path.write_text(text)
    blocks = {"": {"a": ['say "hi" now'], "b": ["it' 's"], "c": ["x\ay"]}}
    assert read_star(path) == blocks
    write_star(path, blocks | {"both": {"d": ["5\" by 3' wide"]}})
    assert '"5\a" by 3\' wide"' in path.read_text()


def test_the_second_of_two_columns_may_be_missing(path):
    path.write_text("data_\nloop_\n_a\n_b\nfn_mtf\nnr_mpi 3\n'x y'  # a remark\n")
    blocks = read_star(path)
    assert blocks == {"": {"a": ["fn_mtf", "nr_mpi", "x y"], "b": ["", "3", ""]}}
    write_star(path, blocks)
    assert read_star(path) == blocks


@pytest.mark.parametrize(
    "values",
    [
        (1, 2.5, "three", None),
        [0.1 + 0.2, 1e-300, -1e22],
        np.array([1 / 3, 1e300]),
        np.array([0.1, 3e38], np.float32),
        np.arange(3, dtype=np.uint8),
        np.array(["two words", ""]),
        jnp.array([1 / 3, 2.0]),
        [np.float64(1 / 3), np.int32(7)],
    ],
    ids=str,
)
def test_values_are_written_as_their_text(path, values):
    """Numbers exactly: in their own type they are the same again."""
    write_star(path, {"x": {"a": values, "b": list(values)}})
    table = read_star(path)["x"]
    assert table["a"] == table["b"] == [str(value) for value in values]
    for text, value in zip(table["a"], values, strict=True):
        assert not hasattr(value, "dtype") or value.dtype.type(text) == value


def test_files_are_laid_out_as_relions(path):
    write_star(path, {"optics": {"rlnOpticsGroup": ["1"]}, "particles": {"rlnX": []}})
    lines = [line.strip() for line in path.read_text().splitlines()]
    assert lines == [
        *["", "# version 30001", "", "data_optics", "", "loop_", "_rlnOpticsGroup #1"],
        *["1", "", "", "# version 30001", "", "data_particles", "", "loop_"],
        *["_rlnX #1", ""],
    ]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "it has no data_ block"),
        (b"# only a comment\n", "it has no data_ block"),
        (b"\x93NUMPY\xff\xfe", "does not begin with a data_ block"),
        (b"MAP\0\0\0\0", "it is not text"),
        ("data_\n".encode("utf-16"), "text in UTF-16"),
        (codecs.BOM_UTF16_BE + "data_\n".encode("utf-16-be"), "text in UTF-16"),
        (b"{\n", "line 1: this is not a STAR file"),
        (b"data_\nhello\n", "line 2: the line must be loop_, or a name"),
        (b"data_\n_a 1 2\n", "line 2: the line must be loop_, or a name"),
        (b"data_\n_a\n", "line 2: the line must be loop_, or a name"),
        (
            b"data_\nloop_\n_a\n_b\n_c\n1\n",
            "line 6: the row must have 3 values, .* got 1",
        ),
        (
            b"data_\nloop_\n_a\n_b\n1 2 3\n",
            "line 5: the row must have 2 values, .* got 3",
        ),
        (
            b'data_\nloop_\n_a\n_b\n1 "x y\n',
            "line 5: the row must have 2 values, .* got 3",
        ),
        (b"data_\nloop_\n1 2 3\n", "line 3: the row must have 0 values, .* got 3"),
        (b"data_\nloop_\n_a\n1\nloop_\n_b\n2\n", "line 5: a block must hold one table"),
        (b"data_\n_a 1\nloop_\n_b\n2\n", "line 3: a block must hold one table"),
        (b"data_\nloop_\n_a\n_a\n", "line 4: 'a' occurs twice"),
        (b"data_\n_a 1\n_a 2\n", "line 3: 'a' occurs twice"),
        (b"data_x\ndata_x\n", "line 2: 'x' occurs twice"),
    ],
)
def test_bad_content_is_a_sentence(path, content, words):
    path.write_bytes(content)
    with pytest.raises(InputError, match=words) as caught:
        read_star(path)
    message = str(caught.value)
    assert str(path) in message
    assert "\n" not in message
    assert not message.endswith(".")


def test_paths_that_cannot_be_read_or_written_are_refused(path):
    with pytest.raises(InputError, match="does not exist"):
        read_star(path)
    with pytest.raises(InputError, match="got a folder"):
        read_star(path.parent)
    with pytest.raises(InputError, match="cannot read .*[Nn]ame too long"):
        read_star(path.with_name("a" * 300))
    with pytest.raises(InputError, match="cannot write .*[Nn]ame too long"):
        write_star(path.with_name("a" * 300), {"": {}})


WORD: Any = "word"  # where a list of values belongs


@pytest.mark.parametrize(
    ("table", "words"),
    [
        ({"a": ["1"], "b": []}, "columns must have the same length, got .* 0, 1"),
        (Pairs(a=["1", "2"]), "columns must have one value, got .* 2"),
        (
            {"a": ["b", "two\nlines"]},
            r"column 'a': .* cannot hold the value 'two\\nlin",
        ),
        ({"a": ["a bell \a in quotes"]}, "cannot hold the value 'a bell"),
        ({"a": ["a\0b"]}, "cannot hold the value"),
        ({"a": ["half\ud800"]}, r"cannot hold the value 'half\\ud800'"),
        ({"a": WORD}, "block 'x', column 'a': values must be a list, got a single s"),
        (Pairs(a=WORD), "values must be a list, got a single str"),
        ({"a": b"word"}, "got a single bytes"),
        ({"a": np.array(1.5)}, r"got an array of shape \(\)"),
        ({"a": np.zeros((2, 1))}, r"got an array of shape \(2, 1\)"),
        ({"a b": ["1"]}, "names must be text without blanks"),
        ({"": ["1"]}, "names must be text without blanks"),
        ({"a\n": ["1"]}, "names must be text without blanks"),
    ],
)
def test_a_refused_write_leaves_the_old_file(path, table, words):
    write_star(path, {"a": {"b": ["1"]}})
    before = path.read_bytes()
    with pytest.raises(InputError, match=words) as caught:
        write_star(path, {"x": table})
    message = str(caught.value)
    assert str(path) in message and "\n" not in message and not message.endswith(".")
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    ("blocks", "words"),
    [({}, "at least one block"), ({"x y": {"a": ["1"]}}, "block 'x y': names must")],
)
def test_blocks_that_could_not_be_read_back_are_refused(path, blocks, words):
    with pytest.raises(InputError, match=words):
        write_star(path, blocks)
    assert not path.exists()


def test_a_write_that_dies_half_way_leaves_the_old_file(path, monkeypatch):
    write_star(path, {"a": {"b": ["1"]}})
    before = path.read_bytes()

    def die(self, text, encoding, errors):
        self.write_bytes(text.encode(encoding)[:10])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", die)
    with pytest.raises(InputError, match="No space left on device"):
        write_star(path, {"a": {"b": ["2"]}})
    assert path.read_bytes() == before
    assert list(path.parent.iterdir()) == [path]


SHAPES = {
    "empty_loop": {"": (1, 0)},
    "loop_double_quote": {"": (8, 2)},
    "one_loop": {"": (12, 16)},
    "relion31.v2": {"particles": (26, 5), "optics": (9, 1)},
    "relion_style_particles": {"optics": (8, 1), "particles": (14, 106)},
    "sample_incomplete_ctf_params": {"model_class_1": (28, 1)},
    "toy_projections_13": {"optics": (9, 1), "particles": (9, 13)},
}


def test_every_real_file_is_covered(data_dir):
    assert {file.stem for file in (data_dir / "star").glob("*.star")} == set(SHAPES)


@pytest.mark.parametrize("name", SHAPES)
def test_real_files_survive_a_round_trip(data_dir, path, name):
    blocks = read_star(data_dir / "star" / f"{name}.star")
    for block, shape in SHAPES[name].items():
        columns = list(blocks[block].values())
        assert (len(columns), len(columns[0])) == shape
    assert list(blocks) == list(SHAPES[name])
    write_star(path, blocks)
    assert_same(read_star(path), blocks)


@pytest.mark.parametrize("folder", ["real_sample", "real_betagal", "relion_oracle"])
def test_real_particles_survive_a_round_trip(data_dir, path, folder):
    files = sorted((data_dir / folder).glob("*.star"))
    assert files
    for file in files:
        blocks = read_star(file)
        write_star(path, blocks)
        assert_same(read_star(path), blocks)


def test_real_quoted_values_are_read(data_dir):
    table = read_star(data_dir / "star" / "loop_double_quote.star")[""]
    assert table["quote_string"] == ["quote string"] * 2
    assert table["whitespace_string"] == [" ", " "]
    assert table["number_and_empty"] == ["5.0", ""]
    assert table["empty_string_and_normal_string"] == ["", "test"]


def test_bytes_that_are_not_utf8_are_kept(path):
    """A comment and a path of Latin-1, as of a file server that knows no other."""
    content = b"# caf\xe9\ndata_\nloop_\n_name\n_other\ncaf\xe9/a.mrcs '\xe9 b'\n"
    path.write_bytes(content)
    blocks = read_star(path)
    names = ["caf\udce9/a.mrcs"]
    assert blocks == {"": {"name": names, "other": ["\udce9 b"]}}
    write_star(path, blocks)
    assert b" caf\xe9/a.mrcs" in path.read_bytes() and read_star(path) == blocks


def test_a_line_of_quotes_is_split_in_linear_time(path):
    """Nothing closes them: each was searched for to the end of the line (24 s)."""
    for line, words in (
        ('"x' * 20_000, 1),
        (" ".join(['"x'] * 200_000), 200_000),
        (" ".join(["\"x 'y"] * 100_000), 200_000),
        (" ".join(['"x" "'] * 100_000), 100_001),
    ):
        path.write_text(f"data_\nloop_\n_a\n_b\n_c\n{line}\n")
        begin = time.process_time()
        with pytest.raises(InputError, match=f"must have 3 values, .* got {words}$"):
            read_star(path)
        assert time.process_time() - begin < 10


def test_many_columns_are_read_in_linear_time(path):
    """Of 100,000 columns each looked at all of the others (more than 30 s)."""
    count = 100_000
    labels = "\n".join(f"_c{i}" for i in range(count))
    row = " ".join(["1"] * count)
    path.write_text(f"data_\nloop_\n{labels}\n{row}\n{row}\n")
    begin = time.process_time()
    (table,) = read_star(path).values()
    assert time.process_time() - begin < 25
    assert len(table) == count and set(map(tuple, table.values())) == {("1", "1")}


def test_long_loops_are_read_in_order(path):
    """Rows are turned into columns many at a time, here of all three kinds of words."""
    count = 30_000
    rows = [f"{i} {i % 2} 'a {i // 100}'" for i in range(count)]
    path.write_text("\n".join(["data_x", "loop_", "_i", "_j", "_k", *rows]))
    assert read_star(path)["x"] == {
        "i": [str(i) for i in range(count)],
        "j": [str(i % 2) for i in range(count)],
        "k": [f"a {i // 100}" for i in range(count)],
    }
