"""What a run is made with, and what it takes: versions, device, time and memory."""

import os
import platform
import subprocess
from collections.abc import Sequence
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax


def environment(
    packages: Sequence[str] = ("jaxrefine", "jax", "jaxlib", "numpy"),
) -> dict[str, Any]:
    """Return the versions of Python and of packages, and the default device."""
    device = jax.local_devices()[0]
    return {
        "versions": {
            "python": platform.python_version(),
            **{name: version(name) for name in packages},
        },
        "device": f"{device.platform}, {device.device_kind}",
    }


def usage(elapsed_s: float) -> dict[str, Any]:
    """Return what a run has taken: seconds, and the most memory, in MiB.

    Parameters
    ----------
    elapsed_s
        Seconds of work, see `history.History.elapsed_s`.
    """
    memory = jax.local_devices()[0].memory_stats() or {}
    return {
        "wall_s": elapsed_s,
        "peak_rss_mib": peak_rss_mib(),
        "peak_device_mib": memory.get("peak_bytes_in_use", 0) / 2**20 or None,
    }


def peak_rss_mib() -> float | None:
    """Return the most memory this process has held, in MiB, where Python can tell."""
    try:
        import resource
    except ModuleNotFoundError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if platform.system() == "Darwin" else 2**10)


@cache
def commit(repository: Path) -> dict[str, Any]:
    """Return the commit of a repository, and whether files differ from it.

    It is the one of the first call, since later ones are not what runs; "unknown" where
    Git does not tell.
    """

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(repository), *arguments]
        try:
            return subprocess.run(
                command, capture_output=True, text=True, check=True
            ).stdout.strip()
        except (OSError, subprocess.CalledProcessError):
            return "unknown"

    return {
        "commit": git("rev-parse", "HEAD"),
        "dirty": git("status", "--porcelain", "--untracked-files=no") != "",
    }


def available_cores() -> int:
    """Return how many cores this process may use; all of them if it cannot tell."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
