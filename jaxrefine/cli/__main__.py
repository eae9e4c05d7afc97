"""``jaxrefine``, or ``python -m jaxrefine.cli``: a command in a process of its own."""

import sys

from jaxrefine.cli import main


def run() -> int:
    """Run the command of this process; return its exit code."""
    return main(in_own_process=True)


if __name__ == "__main__":
    sys.exit(run())
