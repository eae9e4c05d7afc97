r"""Point groups: the rotations that leave a map unchanged.

A map is symmetric if :math:`V(Sx) = V(x)` for the operators ``S`` of a group. The poses
``R`` and ``R S`` then give the same image, and in Fourier space the slice of ``R`` is
also that of every ``R S``.

Groups have RELION's names and orientations, which the tests compare with the output of
``relion_refine --print_symmetry_ops``. Axes are (x, y, z), and :math:`\varphi` is the
golden ratio:

=======  ===============  ==================================
group    first axis       second axis
=======  ===============  ==================================
Cn       n-fold (0,0,1)
Dn       n-fold (0,0,1)   2-fold (1,0,0)
T        3-fold (0,0,1)   2-fold :math:`(0,\sqrt2,1)`
O        4-fold (0,0,1)   3-fold (1,1,1)
I1       2-fold (0,0,1)   5-fold :math:`(\varphi,0,1)`
I, I2    2-fold (0,0,1)   5-fold :math:`(1,0,\varphi)`
I3       5-fold (0,0,1)   2-fold :math:`(-1,0,\varphi)`
I4       5-fold (0,0,1)   2-fold :math:`(1,0,\varphi)`
=======  ===============  ==================================
"""

import math
import re

import numpy as np
from jaxtyping import Float

from jaxrefine.errors import InputError

_GOLDEN = (1 + math.sqrt(5)) / 2
_SAME = 1e-6  # Matrices this close are equal: entries of group elements differ by more.
_Z = (0.0, 0.0, 1.0)
# Order and direction of two axes that generate the group.
_POLYHEDRAL = {
    "T": ((3, _Z), (2, (0.0, math.sqrt(2), 1.0))),
    "O": ((4, _Z), (3, (1.0, 1.0, 1.0))),
    "I": ((2, _Z), (5, (1.0, 0.0, _GOLDEN))),
    "I1": ((2, _Z), (5, (_GOLDEN, 0.0, 1.0))),
    "I2": ((2, _Z), (5, (1.0, 0.0, _GOLDEN))),
    "I3": ((5, _Z), (2, (-1.0, 0.0, _GOLDEN))),
    "I4": ((5, _Z), (2, (1.0, 0.0, _GOLDEN))),
}


def operators(group: str, name: str = "symmetry") -> Float[np.ndarray, "order 3 3"]:
    """Return the rotation matrices of a point group, the identity first.

    Parameters
    ----------
    group
        C1 to C99, D1 to D99, T, O, I or I1 to I4.
    name
        What a refusal calls it.

    Raises
    ------
    InputError
        If there is no such group.
    """
    elements = [np.eye(3)]
    generators = [_rotation(*axis) for axis in _axes(group, name)]
    for element in elements:  # The list grows until no product is a new element.
        for generator in generators:
            product = element @ generator
            if np.abs(np.array(elements) - product).max(axis=(1, 2)).min() > _SAME:
                elements.append(product)
    return np.stack(elements)


def representatives(group: str, subgroup: str = "C1") -> Float[np.ndarray, "index 3 3"]:
    """Return operators of a group, of which a subgroup makes no two equivalent.

    ``S`` and ``S U`` are equivalent for the operators ``U`` of the subgroup. Of each
    such set the first operator is returned, the identity first.

    Parameters
    ----------
    group, subgroup
        As for `operators`.

    Raises
    ------
    InputError
        If there is no such group, or an operator of the subgroup is not in the group.
    """
    whole, part = operators(group), operators(subgroup)

    def distance(element, elements):
        return np.abs(elements - element).max(axis=(1, 2)).min()

    if any(distance(element, whole) > _SAME for element in part):
        raise InputError(
            f"the symmetry that is relaxed must have the operators of {subgroup}, that "
            f"of the map, with the same axes, got {group}"
        )
    kept = [whole[0]]
    for element in whole[1:]:
        equivalent = (np.stack(kept)[:, None] @ part).reshape(-1, 3, 3)
        if distance(element, equivalent) > _SAME:
            kept.append(element)
    return np.stack(kept)


def _axes(group: str, name: str) -> tuple[tuple[int, tuple[float, float, float]], ...]:
    """Return the axes that generate a group."""
    if group in _POLYHEDRAL:
        return _POLYHEDRAL[group]
    match = re.fullmatch("([CD])([1-9][0-9]?)", group)
    if match is None:
        raise InputError(
            f"{name} must be C1 to C99, D1 to D99, T, O, I or I1 to I4, got {group!r}"
        )
    main_axis = (int(match[2]), _Z)
    return (main_axis, (2, (1.0, 0.0, 0.0))) if match[1] == "D" else (main_axis,)


def _rotation(order: int, axis: tuple[float, float, float]) -> Float[np.ndarray, "3 3"]:
    """Return the rotation by one step about an axis, by Rodrigues' formula."""
    x, y, z = np.array(axis) / np.linalg.norm(axis)
    cross = np.array([[0.0, -z, y], [z, 0.0, -x], [-y, x, 0.0]])
    angle = 2 * math.pi / order
    return np.eye(3) + math.sin(angle) * cross + (1 - math.cos(angle)) * cross @ cross
