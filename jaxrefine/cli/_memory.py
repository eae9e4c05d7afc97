"""The memory that a command may use."""

import sys

import jax

from jaxrefine._limits import memory_limits
from jaxrefine._processes import on_this_machine
from jaxrefine.refinement.memory import available_bytes


def free_bytes(given_gib: float | None) -> int | None:
    """Return the memory that a process may use; None if it is not known.

    Limits of the process are told.

    Parameters
    ----------
    given_gib
        What the user allows, GiB; None for what is free.
    """
    free = available_bytes()
    sharing = on_this_machine()
    if free is not None and jax.default_backend() == "cpu":
        free //= sharing
    for limit in memory_limits():
        left = f"{limit.left / 2**30:.1f} GiB of memory"
        print(f"`{limit.command}` leaves {left}", file=sys.stderr)
    return free if given_gib is None else int(given_gib * 2**30)
