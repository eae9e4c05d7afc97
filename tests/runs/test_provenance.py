"""What a run is made with is said where it can be known."""

import os
import subprocess
import sys

import jax
import pytest

from jaxrefine.runs import provenance


def test_versions_and_device():
    found = provenance.environment(["jax", "numpy"])
    assert found["versions"].keys() == {"python", "jax", "numpy"}
    assert found["versions"]["jax"] == jax.__version__
    assert found["device"].startswith(jax.default_backend())


def test_peak_memory_grows_with_what_is_held():
    pytest.importorskip("resource", reason="there is no such module on this system")
    held = bytearray(2**20)
    peak = provenance.peak_rss_mib()
    assert peak is not None and peak > 1 + len(held) / 2**21
    assert provenance.usage(2.5)["wall_s"] == 2.5


def test_without_the_means_to_measure(monkeypatch):
    monkeypatch.setitem(sys.modules, "resource", None)
    assert provenance.peak_rss_mib() is None


def test_a_commit_and_whether_files_differ(tmp_path):
    def git(*arguments):
        identity = ["-c", "user.name=A", "-c", "user.email=a@b.c"]
        subprocess.run(["git", "-C", tmp_path, *identity, *arguments], check=True)

    assert provenance.commit(tmp_path / "absent")["commit"] == "unknown"
    (tmp_path / "file").write_text("one")
    git("init", "-q")
    git("add", "file")
    git("commit", "-qm", "one")
    first = provenance.commit(tmp_path)
    assert len(first["commit"]) == 40 and first["dirty"] is False
    (tmp_path / "file").write_text("two")
    # That of the first call is what runs.
    assert provenance.commit(tmp_path) == first


def test_cores_are_counted_where_affinity_is_unknown(monkeypatch):
    assert 1 <= provenance.available_cores() <= (os.cpu_count() or 1)
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    assert provenance.available_cores() == os.cpu_count()
