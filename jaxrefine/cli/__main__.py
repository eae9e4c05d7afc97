"""``python -m jaxrefine.cli``, the same as ``jaxrefine``."""

import sys

from jaxrefine.cli import main

if __name__ == "__main__":
    sys.exit(main())
