"""Checkpoints come back exactly, or say why not."""

import hashlib
import json

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrefine.errors import InputError
from jaxrefine.io import load_checkpoint, save_checkpoint
from jaxrefine.io.checkpoint import DamagedCheckpoint, OtherCheckpoint


class State(eqx.Module):
    volume: jax.Array
    iterations: jax.Array
    rho: float
    name: str = eqx.field(static=True)


def a_state(n=4, dtype=jnp.float32, seed=0):
    volume = jax.random.normal(jax.random.key(seed), (n, n, n), dtype)
    return State(volume, jnp.asarray(7 + seed), 0.25 + seed, "state")


METADATA = {"iteration": 3, "lam": 0.1, "history": [1.0, 2.5], "name": "naïve\nrun"}


@pytest.fixture
def path(tmp_path):
    return tmp_path / "state.ckpt"


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64, jnp.complex128])
def test_round_trip_is_exact(path, dtype):
    state = {"a": a_state(dtype=dtype), "b": (jnp.arange(3), None)}
    like = {"a": a_state(dtype=dtype, seed=1), "b": (jnp.zeros(3, int), None)}
    save_checkpoint(path, state, METADATA)
    result, metadata = load_checkpoint(path, like)
    assert metadata == METADATA
    assert eqx.tree_equal(result, state)


def test_shapes_alone_are_enough_to_load(path):
    save_checkpoint(path, a_state(), {})
    result, _ = load_checkpoint(path, eqx.filter_eval_shape(a_state))
    np.testing.assert_array_equal(result.volume, a_state().volume)


def test_the_metadata_can_be_read_in_the_first_line(path):
    save_checkpoint(path, a_state(), METADATA)
    assert b'"iteration": 3' in path.read_bytes().split(b"\n")[0]


@pytest.mark.parametrize(
    ("like", "words"),
    [
        (a_state(n=5), "another structure, shape or type"),
        (a_state(dtype=jnp.float64), "another structure, shape or type"),
        ((a_state(), jnp.zeros(2)), "another structure"),
        (a_state().volume, "more arrays"),
    ],
    ids=["shape", "dtype", "too few", "too many"],
)
def test_a_checkpoint_of_another_structure_is_refused(path, like, words):
    save_checkpoint(path, a_state(), {})
    with pytest.raises(InputError, match=words) as caught:
        load_checkpoint(path, like)
    assert not isinstance(caught.value, DamagedCheckpoint)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_checkpoint_that_is_cut_or_changed_is_damaged(path):
    """Wherever the file ends, and whichever byte is another one."""
    save_checkpoint(path, a_state(n=2), {"iteration": 3})
    content = path.read_bytes()
    digit = content.index(b'"metadata"') - 4  # of the format's version
    for place in sorted({*range(0, len(content), 23), len(content) - 1, digit}):
        changed = bytearray(content)
        changed[place] ^= 4
        for damaged in (content[:place], bytes(changed), content + b"0"):
            path.write_bytes(damaged)
            with pytest.raises(DamagedCheckpoint, match="complete|or is damaged"):
                load_checkpoint(path, a_state(n=2))


@pytest.mark.parametrize(
    "content", [b"", b"\xff\xfe\x00", b"[1]\n", b"{}\n", b"hello\n", b'{"format": 1}']
)
def test_a_file_of_another_kind_is_a_damaged_checkpoint(path, content):
    path.write_bytes(content)
    with pytest.raises(DamagedCheckpoint, match="complete checkpoint of jaxrefine"):
        load_checkpoint(path, a_state())


@pytest.mark.parametrize("version", [1, 2, 4])
def test_a_checkpoint_of_another_version_is_refused(path, version):
    header = {"format": f"jaxrefine checkpoint {version}", "metadata": {}}
    content = json.dumps(header).encode() + b"\nanything"
    path.write_bytes(content + hashlib.sha256(content).digest())
    with pytest.raises(InputError, match="another version of jaxrefine$") as caught:
        load_checkpoint(path, a_state())
    assert not isinstance(caught.value, DamagedCheckpoint)
    path.write_bytes(content)
    with pytest.raises(OtherCheckpoint, match="another version .*, or is damaged$"):
        load_checkpoint(path, a_state())


def test_the_file_that_is_replaced_can_be_kept(path):
    previous = path.with_name("previous")
    for seed in range(3):
        save_checkpoint(path, a_state(seed=seed), {}, previous)
        kept = [path] if seed == 0 else [previous, path]
        assert sorted(path.parent.iterdir()) == kept
    for file, seed in ((path, 2), (previous, 1)):
        found, _ = load_checkpoint(file, a_state())
        assert eqx.tree_equal(found, a_state(seed=seed))


def test_paths_that_cannot_be_read_or_written_are_refused(path):
    with pytest.raises(InputError, match="does not exist"):
        load_checkpoint(path, a_state())
    with pytest.raises(InputError, match="got a folder"):
        load_checkpoint(path.parent, a_state())
    with pytest.raises(InputError, match="cannot write"):
        save_checkpoint(path / "absent" / "state", a_state(), {})
    path.write_text("a file, not a folder")
    with pytest.raises(InputError, match="cannot write"):
        save_checkpoint(path / "state", a_state(), {})


def test_a_write_that_dies_half_way_leaves_the_old_file(path, monkeypatch):
    save_checkpoint(path, a_state(), METADATA)
    before = path.read_bytes()

    def die(file, tree):
        file.write(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(eqx, "tree_serialise_leaves", die)
    with pytest.raises(KeyboardInterrupt):
        save_checkpoint(path, a_state(seed=1), {})
    assert path.read_bytes() == before
    assert list(path.parent.iterdir()) == [path]
