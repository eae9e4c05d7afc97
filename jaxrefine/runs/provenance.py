"""What a run is made with: versions, device, time and memory."""

import platform


def peak_rss_mib() -> float | None:
    """Return the most memory this process has held, in MiB, where Python can tell."""
    try:
        import resource
    except ModuleNotFoundError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if platform.system() == "Darwin" else 2**10)
