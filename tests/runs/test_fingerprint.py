"""Fingerprints: nothing that results depend on is left out, and nothing else is in."""

import os
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from jaxrefine.runs.fingerprint import fingerprint, stacks_digest, times_digest
from jaxrefine.runs.options import option


@dataclass(frozen=True, kw_only=True)
class Settings:
    map: Path = option(help="the map")
    mask: Path | None = option(None, help="the mask")
    out: Path = option(affects_results=False, help="folder to write to")
    seed: int = option(0, help="seed")
    batch_size: int = option(1, affects_results=False, help="particles at a time")


@pytest.fixture
def settings(tmp_path):
    (tmp_path / "a.mrc").write_bytes(b"a map")
    return Settings(map=tmp_path / "a.mrc", out=tmp_path / "out")


def test_an_option_counts_unless_it_is_said_not_to(settings):
    first = fingerprint(settings)
    assert set(first) == {"map", "mask", "seed"}
    assert fingerprint(replace(settings, seed=1)) != first
    changed = replace(settings, out=Path("elsewhere"), batch_size=2)
    assert fingerprint(changed) == first


def test_files_count_by_their_content(settings, tmp_path):
    first = fingerprint(settings)
    copy = tmp_path / "copy.mrc"
    copy.write_bytes(b"a map")
    assert fingerprint(replace(settings, map=copy)) == first
    assert fingerprint(replace(settings, mask=copy)) != first
    copy.write_bytes(b"A map")
    assert fingerprint(replace(settings, map=copy)) != first


def test_stacks_count_by_their_sizes_and_their_ends(tmp_path):
    """In their order, whatever they are called."""
    content = bytes(range(256)) * 4096
    stack, copy = tmp_path / "a.mrcs", tmp_path / "b.mrcs"
    other = tmp_path / "c.mrcs"
    stack.write_bytes(content)
    copy.write_bytes(content)
    first = stacks_digest([stack])
    assert stacks_digest([copy]) == first
    for changed in (b"?" + content[1:], content[:-1] + b"?", content + b"?", b""):
        other.write_bytes(changed)
        assert stacks_digest([other]) != first
        assert stacks_digest([stack, other]) != stacks_digest([other, stack])


def test_small_stacks_count_by_all_of_their_content(tmp_path):
    content = bytes(10 * 2**16)
    stack = tmp_path / "a.mrcs"
    stack.write_bytes(content)
    first, unseen = stacks_digest([stack]), times_digest([stack])
    for place in range(0, len(content), 40_001):
        stack.write_bytes(content[:place] + b"?" + content[place + 1 :])
        assert stacks_digest([stack]) != first
    assert times_digest([stack]) == unseen == times_digest([])


def test_large_stacks_count_by_a_sample_and_tell_when_they_were_written(
    tmp_path,
):
    """The sample is of all of them, at equal distances; 26 GB take no time."""
    stacks = [tmp_path / "a.mrcs", tmp_path / "b.mrcs"]
    for stack in stacks:
        with open(stack, "wb") as file:
            file.truncate(13 * 2**30)
    first, unseen = stacks_digest(stacks), times_digest(stacks)
    with open(stacks[1], "r+b") as file:  # less than a hundredth of it
        file.seek(6 * 2**30)
        file.write(b"?" * 2**24)
    assert stacks_digest(stacks) != first
    os.utime(stacks[1], (1e9, 1e9))
    assert times_digest(stacks) != unseen
