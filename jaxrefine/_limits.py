"""The limits of memory that this process was started with, as Linux tells of them."""

from dataclasses import dataclass
from pathlib import Path
from typing import final

_LIMITS = {
    "Max address space": ("VmSize:", "ulimit -v"),
    "Max data size": ("VmData:", "ulimit -d"),
}
"""Names in ``limits``, of what counts for it in ``status``, and in a shell."""

ADDRESS_SPACE, DATA = (command for _, command in _LIMITS.values())


@final
@dataclass(frozen=True)
class Limit:
    """A limit of this process.

    Attributes
    ----------
    command
        What sets it in a shell, `ADDRESS_SPACE` or `DATA`.
    total, left
        Bytes that it allows, and those that are not taken yet.
    """

    command: str
    total: int
    left: int


def memory_limits(root: Path = Path("/")) -> list[Limit]:
    """Return the limits of memory that there are; none where the system tells of none.

    Parameters
    ----------
    root
        Folder that holds the system's ``proc``.
    """
    here = root / "proc/self"
    try:
        limits = (here / "limits").read_text().splitlines()
        status = dict(
            line.split()[:2]
            for line in (here / "status").read_text().splitlines()
            if line.startswith("Vm")
        )
    except OSError:
        return []
    found = []
    for name, (counted, command) in _LIMITS.items():
        soft = [line.removeprefix(name).split()[0] for line in limits if name in line]
        if soft and soft[0].isdecimal() and counted in status:
            total = int(soft[0])
            taken = 1024 * int(status[counted])
            found.append(Limit(command, total, max(total - taken, 0)))
    return found
