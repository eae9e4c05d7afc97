"""Damaged files: whatever is in them, a sentence or a result, and nothing else."""

import bz2
import gzip
import os
from io import BytesIO

import numpy as np
import pytest

from jaxrefine.errors import InputError
from jaxrefine.io import (
    read_mrc,
    read_particles,
    read_stack,
    read_star,
    write_mrc,
    write_stack,
)

ROUNDS, M, COUNT = 120, 6, 4
MANY = int(os.environ.get("JAXREFINE_FUZZ_ROUNDS", "400"))  # of the slow test

STAR = """
# version 30001
data_optics

loop_
_rlnOpticsGroup #1
_rlnVoltage #2
_rlnSphericalAberration #3
_rlnAmplitudeContrast #4
_rlnImagePixelSize #5
_rlnImageSize #6
1 300.0 2.7 0.1 1.5 6
2 200.0 2.7 0.07 1.5 6

data_particles

loop_
_rlnImageName #1
_rlnAngleRot #2
_rlnAngleTilt #3
_rlnAnglePsi #4
_rlnOriginXAngst #5
_rlnOriginYAngst #6
_rlnDefocusU #7
_rlnDefocusV #8
_rlnOpticsGroup #9
_rlnRandomSubset #10
_note
000001@a.mrcs 10.0 20.0 30.0 1.5 0.0 15000.0 14000.0 1 1 "two words"
000003@a.mrcs 11.0 21.0 31.0 0.0 3.0 16000.0 15000.0 2 2 ''
000004@a.mrcs 12.0 22.0 32.0 0.0 -1 17000.0 16000.0 2 1 x#y
"""
WORDS = (
    b"""nan inf -1 0 1.5 1e308 1e-308 x ' " @ # _x loop_ data_ 0@a.mrcs 1_0""".split()
)
WORDS += [b"9" * 30, b"9" * 5000, b"a" * 5000, b"", b"\xff", b"\0", b"\xc2\xa0"]
INTEGERS = [-(2**31), -1, 0, 1, 7, 1000, 2**20]
FLOATS = [np.nan, np.inf, -1.0, 0.0, 1e38, 1e-40]


IMAGES = [("blob/path", "S9"), ("blob/idx", "u4"), ("blob/shape", "u4", (2,))]
IMAGES += [("blob/psize_A", "f4"), ("blob/sign", "f4")]
OPTICS = ("accel_kv", "cs_mm", "amp_contrast", "df1_A", "df2_A", "df_angle_rad")
OPTICS = [(f"ctf/{name}", "f4") for name in OPTICS]
POSES = [("alignments3D/pose", "f4", (3,)), ("alignments3D/shift", "f4", (2,))]
CLASSES = [
    (f"alignments_class_{k}/{name}", *kind)
    for k in (0, 1)
    for name, *kind in (
        ("pose", "f4", (3,)),
        ("shift", "f4", (2,)),
        ("class_posterior", "f4"),
        ("class", "u4"),
    )
]


def table(*groups):
    """A table of cryoSPARC with some groups of fields, as bytes."""
    rows = np.zeros(COUNT, [("uid", "u8"), *(each for g in groups for each in g)])
    rows["uid"] = 7 + np.arange(COUNT)
    for name, values in {
        "blob/path": b">a.mrcs",
        "blob/idx": np.arange(COUNT),
        "blob/shape": M,
        "blob/psize_A": 1.5,
        "ctf/accel_kv": 300,
        "alignments3D/pose": 0.1,
    }.items():
        if name in (rows.dtype.names or ()):
            rows[name] = values
    file = BytesIO()
    np.save(file, rows)
    return file.getvalue()


def change_lines(rng, content):
    """Drop, repeat, swap, shuffle and cut lines, and put odd words into them."""
    lines = content.split(b"\n")
    for _ in range(rng.integers(1, 4)):
        i, j = rng.integers(len(lines), size=2)
        words = lines[i].split(b" ")
        words[rng.integers(len(words))] = WORDS[rng.integers(len(WORDS))]
        letters = np.frombuffer(lines[i], np.uint8).copy()
        rng.shuffle(letters)
        changed = (
            [*lines[:i], *lines[i + 1 :]] or [b""],
            [*lines[:j], lines[i], *lines[j:]],
            [*lines[:i], b" ".join(words), *lines[i + 1 :]],
            [*lines[:i], b" ".join(words), *lines[i + 1 :]],
            [*lines[:i], letters.tobytes(), *lines[i + 1 :]],
            [*lines[:i], lines[i][: rng.integers(len(lines[i]) + 1)]],
        )
        lines = changed[rng.integers(len(changed))]
    return b"\n".join(lines)


def change_bytes(rng, content):
    """Change bytes, bits and words, mostly of the header, or cut the end off."""
    data = bytearray(content)
    for _ in range(rng.integers(1, 5)):
        end = min(1024, len(data)) if rng.random() < 0.8 else len(data)
        i = int(rng.integers(max(end - 4, 1)))
        word = 4 * (i // 4)
        what = rng.integers(9)
        if what < 2:
            data[i : i + 1] = rng.bytes(1)
        elif what < 4:
            data[i : i + 1] = bytes(b ^ (1 << rng.integers(8)) for b in data[i : i + 1])
        elif what < 6:
            data[word : word + 4] = np.array(rng.choice(INTEGERS), "<i4").tobytes()
        elif what < 8:
            data[word : word + 4] = np.array(rng.choice(FLOATS), "<f4").tobytes()
        else:
            del data[rng.integers(len(data) + 1) :]
    return bytes(data)


def change_all(rng, content):
    """Change bytes, cut, repeat and swap spans, and put words and quotes into them."""
    data = bytearray(content)
    for _ in range(rng.integers(1, 6)):
        i, j = sorted(rng.integers(len(data) + 1, size=2))
        k = int(rng.integers(len(data) + 1))
        what = rng.integers(8)
        if what == 0:
            data[i : i + 1] = rng.bytes(1)
        elif what == 1 and j > i:
            data[i] ^= 1 << int(rng.integers(8))
        elif what == 2:
            del data[i : min(j, i + 40)]
        elif what == 3:
            data[k:k] = data[i : min(j, i + 200)]
        elif what == 4:
            data = data[:i] + data[j:] + data[i:j]
        elif what == 5:
            del data[k:]
        elif what == 6:
            data[k:k] = WORDS[rng.integers(len(WORDS))]
        else:
            data[k:k] = bytes(rng.choice(list(b"\"'#\a \n@_\0"), size=rng.integers(9)))
    return bytes(data)


def swap_fields(rng, content):
    """Give a table of cryoSPARC's fields other names and types, or the others'."""
    header, rows = content[:10], content[10:]
    size = int.from_bytes(header[8:], "little")
    text, rows = rows[:size], rows[size:]
    words = text.split(b"'")
    for _ in range(rng.integers(1, 3)):
        i, j = rng.integers(len(words), size=2)
        words[i], words[j] = words[j], words[i]
    if rng.random() < 0.5:
        kinds = [b"<f4", b"<u4", b"|S9", b"<f8", b">f4", b"|O", b"<U2", b"|b1", b"<m8"]
        words[rng.integers(len(words))] = kinds[rng.integers(len(kinds))]
    text = b"'".join(words)
    return header[:8] + len(text).to_bytes(2, "little") + text + rows


def read_all(path):
    file = read_particles(path)
    file.particles.batch(np.arange(len(file)))


@pytest.fixture
def folder(tmp_path):
    rng = np.random.default_rng(0)
    write_stack(tmp_path / "a.mrcs", rng.normal(size=(COUNT, M, M)), 1.5)
    write_mrc(tmp_path / "map.mrc", rng.normal(size=(M, M, M)), 1.5)
    (tmp_path / "p.star").write_text(STAR)
    (tmp_path / "p.cs").write_bytes(table(IMAGES, OPTICS, POSES))
    (tmp_path / "classes.cs").write_bytes(table(IMAGES, OPTICS, CLASSES))
    (tmp_path / "J1").mkdir()
    (tmp_path / "J1/half.cs").write_bytes(table(IMAGES))
    (tmp_path / "J1/passthrough.cs").write_bytes(table(OPTICS, POSES))
    (tmp_path / "old.mrcs").write_bytes(old((tmp_path / "a.mrcs").read_bytes()))
    for name, module in (("gz", gzip), ("bz2", bz2)):
        packed = module.compress((tmp_path / "map.mrc").read_bytes())
        (tmp_path / f"map.mrc.{name}").write_bytes(packed)
    for name in ("p.star", "p.cs", "classes.cs", "J1/half.cs"):
        read_all(tmp_path / name)
    return tmp_path


def old(content):
    """An MRC file without the word MAP and the machine stamp."""
    return content[:208] + bytes(8) + content[216:]


CASES = {
    "table": ("p.star", change_lines, "p.star", (read_star, read_all)),
    "bytes of a table": ("p.star", change_bytes, "p.star", (read_star, read_all)),
    "stack": ("a.mrcs", change_bytes, "p.star", (read_all,)),
    "stack as a whole": ("a.mrcs", change_bytes, "a.mrcs", (read_stack,)),
    "map": ("map.mrc", change_bytes, "map.mrc", (read_mrc,)),
    "cryoSPARC": ("p.cs", change_bytes, "p.cs", (read_all,)),
    "cryoSPARC's fields": ("p.cs", swap_fields, "p.cs", (read_all,)),
    "classes": ("classes.cs", swap_fields, "classes.cs", (read_all,)),
    "passthrough": ("J1/passthrough.cs", change_bytes, "J1/half.cs", (read_all,)),
    "its fields": (
        "J1/passthrough.cs",
        swap_fields,
        "J1/half.cs",
        (read_all,),
    ),
    "table with one": ("J1/half.cs", change_bytes, "J1/half.cs", (read_all,)),
    "old stack": ("old.mrcs", change_bytes, "old.mrcs", (read_stack,)),
    "gzip": ("map.mrc.gz", change_all, "map.mrc.gz", (read_mrc,)),
    "bzip2": ("map.mrc.bz2", change_all, "map.mrc.bz2", (read_mrc,)),
}


def refused(folder, case, change, rounds, seed):
    """Change a file so many times; return how many readings end in a sentence."""
    damaged, _, asked, readers = CASES[case]
    rng = np.random.default_rng([list(CASES).index(case), seed])
    content = (folder / damaged).read_bytes()
    count = 0
    for number in range(rounds):
        changed = change(rng, content)
        (folder / damaged).write_bytes(changed)
        for read in readers:
            try:
                read(folder / asked)
            except InputError as error:
                count += 1
                assert "\n" not in str(error) and not str(error).endswith(".")
            except Exception as error:
                error.add_note(f"{case}, round {number}: {changed!r}")
                raise
    return count


@pytest.mark.parametrize("case", CASES)
def test_a_damaged_file_is_read_or_is_a_sentence(folder, case):
    """Warnings are errors here, as everywhere in the tests."""
    _, change, _, readers = CASES[case]
    count = refused(folder, case, change, ROUNDS, 0)
    assert ROUNDS / 10 < count <= ROUNDS * len(readers), "files must be refused"


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_much_more_damage(folder, case):
    """`JAXREFINE_FUZZ_ROUNDS` says how much of each kind."""
    for seed, change in enumerate((CASES[case][1], change_all), start=1):
        assert refused(folder, case, change, MANY, seed)
