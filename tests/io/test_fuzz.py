"""Damaged files: whatever is in them, a sentence or a result, and nothing else."""

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


def table():
    """A table of cryoSPARC, as bytes."""
    fields = [("blob/path", "S9"), ("blob/idx", "u4"), ("blob/shape", "u4", (2,))]
    fields += [("blob/psize_A", "f4"), ("blob/sign", "f4")]
    for name in ("accel_kv", "cs_mm", "amp_contrast", "df1_A", "df2_A", "df_angle_rad"):
        fields.append((f"ctf/{name}", "f4"))
    fields += [("alignments3D/pose", "f4", (3,)), ("alignments3D/shift", "f4", (2,))]
    rows = np.zeros(COUNT, fields)
    rows["blob/path"], rows["blob/idx"] = b">a.mrcs", np.arange(COUNT)
    rows["blob/shape"], rows["blob/psize_A"], rows["ctf/accel_kv"] = M, 1.5, 300
    rows["alignments3D/pose"] = 0.1
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


def read_all(path):
    file = read_particles(path)
    file.particles.batch(np.arange(len(file)))


@pytest.fixture
def folder(tmp_path):
    rng = np.random.default_rng(0)
    write_stack(tmp_path / "a.mrcs", rng.normal(size=(COUNT, M, M)), 1.5)
    write_mrc(tmp_path / "map.mrc", rng.normal(size=(M, M, M)), 1.5)
    (tmp_path / "p.star").write_text(STAR)
    (tmp_path / "p.cs").write_bytes(table())
    for name in ("p.star", "p.cs"):
        read_all(tmp_path / name)
    return tmp_path


CASES = {
    "table": ("p.star", change_lines, "p.star", (read_star, read_all)),
    "bytes of a table": ("p.star", change_bytes, "p.star", (read_star, read_all)),
    "stack": ("a.mrcs", change_bytes, "p.star", (read_all,)),
    "stack as a whole": ("a.mrcs", change_bytes, "a.mrcs", (read_stack,)),
    "map": ("map.mrc", change_bytes, "map.mrc", (read_mrc,)),
    "cryoSPARC": ("p.cs", change_bytes, "p.cs", (read_all,)),
}


@pytest.mark.parametrize("case", CASES)
def test_a_damaged_file_is_read_or_is_a_sentence(folder, case):
    """Warnings are errors here, as everywhere in the tests."""
    damaged, change, asked, readers = CASES[case]
    rng = np.random.default_rng(list(CASES).index(case))
    content = (folder / damaged).read_bytes()
    refused = 0
    for _ in range(ROUNDS):
        (folder / damaged).write_bytes(change(rng, content))
        for read in readers:
            try:
                read(folder / asked)
            except InputError as error:
                refused += 1
                assert "\n" not in str(error) and not str(error).endswith(".")
    assert ROUNDS / 10 < refused < ROUNDS * len(readers), "both must happen"
