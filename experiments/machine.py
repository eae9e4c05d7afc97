"""The machine that studies run on."""

import os


def available_cores() -> int:
    """Return how many cores this process may use; all of them if it cannot tell."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
