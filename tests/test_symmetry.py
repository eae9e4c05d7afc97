"""Point groups: laws of groups, and RELION's own operators."""

import re
import shutil
import subprocess

import jax.numpy as jnp
import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from jaxrefine import symmetry
from jaxrefine.errors import InputError
from jaxrefine.poses import hypotheses

ORDERS = {
    **{"C1": 1, "C2": 2, "C5": 5, "C99": 99, "D1": 2, "D2": 4, "D7": 14, "T": 12},
    **{"O": 24, "I": 60, "I1": 60, "I2": 60, "I3": 60, "I4": 60},
}


def gaps(some, others):
    """How far each matrix is from the nearest of others."""
    return np.array([np.abs(others - one).max(axis=(1, 2)).min() for one in some])


@pytest.mark.parametrize("name", ORDERS)
def test_a_group_is_closed(name):
    group = symmetry.operators(name)
    assert group.shape == (ORDERS[name], 3, 3)
    np.testing.assert_array_equal(group[0], np.eye(3))
    np.testing.assert_allclose(np.linalg.det(group), 1, atol=1e-12)
    np.testing.assert_allclose(
        group @ group.swapaxes(1, 2), np.broadcast_to(np.eye(3), group.shape), atol=1e-9
    )
    products = (group[:12, None] @ group[None]).reshape(-1, 3, 3)
    assert gaps(products, group).max() < 1e-9
    # No two are alike.
    assert all((gaps(group, one[None]) < 1e-3).sum() == 1 for one in group)


@pytest.mark.parametrize("name", [name for name in ORDERS if name != "C99"])
def test_the_operators_are_relions(name):
    if shutil.which("relion_refine") is None:
        pytest.skip("RELION is not installed")
    words = ["relion_refine", "--print_symmetry_ops", "--sym", name]
    text = subprocess.run(words, capture_output=True, text=True, check=True).stdout
    number = r"[-+0-9.eE]+"
    blocks = re.findall(rf"R\(\d+\)=\s+((?:{number}\s+){{9}})", text)
    theirs = np.array([block.split() for block in blocks], float).reshape(-1, 3, 3)
    ours = symmetry.operators(name)
    assert len(theirs) == len(ours)
    # RELION's axes have six digits.
    assert gaps(theirs, ours).max() < 1e-4 and gaps(ours, theirs).max() < 1e-4


def test_equivalent_hypotheses_are_one():
    """The same pose seen through every operator counts once, another one does not."""
    group = symmetry.operators("T")
    one, other = Rotation.from_euler("zyz", [[0.3, 1, 2], [0.3, 1.4, 2]]).as_matrix()
    rotations = jnp.asarray(np.concatenate([one @ group, other[None]]))
    evidence = jnp.linspace(5.0, 4.0, 13)
    shifts, separation = jnp.zeros((13, 2)), jnp.asarray(0.1)
    merged, _ = hypotheses.merge(rotations, shifts, evidence, separation, group)
    expected = np.exp([5.0, 4.0]) / np.exp([5.0, 4.0]).sum()
    np.testing.assert_allclose(merged.weights, [*expected, *[0] * 11], atol=1e-12)
    apart, _ = hypotheses.merge(rotations, shifts, evidence, separation)
    assert (apart.weights > 0).all()


@pytest.mark.parametrize(
    ("name", "subgroup", "count"),
    [("C4", "C1", 4), ("C6", "C2", 3), ("D4", "C4", 2), ("O", "C4", 6), ("T", "T", 1)],
)
def test_representatives_and_a_subgroup_make_the_group(name, subgroup, count):
    """Every operator once, as the product of one of either."""
    whole, part = symmetry.operators(name), symmetry.operators(subgroup)
    some = symmetry.representatives(name, subgroup)
    assert len(some) == count
    np.testing.assert_array_equal(some[0], np.eye(3))
    products = (some[:, None] @ part).reshape(-1, 3, 3)
    assert len(products) == len(whole)
    assert gaps(products, whole).max() < 1e-6 and gaps(whole, products).max() < 1e-6


@pytest.mark.parametrize(("name", "subgroup"), [("C4", "C3"), ("C1", "C2"), ("T", "O")])
def test_what_is_no_subgroup(name, subgroup):
    with pytest.raises(InputError, match=f"operators of {subgroup}, .* got {name}$"):
        symmetry.representatives(name, subgroup)


@pytest.mark.parametrize("name", ["", "C", "C0", "C100", "D", "I5", "c4", "T1", "S4"])
def test_what_is_no_group(name):
    with pytest.raises(InputError, match=f"^symmetry must be C1 .* got '{name}'$"):
        symmetry.operators(name)
