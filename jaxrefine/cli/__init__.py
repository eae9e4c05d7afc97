"""The command line: ``jaxrefine COMMAND``.

Bad input ends with one sentence on standard error and exit code 2, an interruption
with exit code 130. Each command is a module with two functions, ``add``, which declares
its options, and ``run``.
"""

import argparse
import os
import shlex
import sys
from collections.abc import Sequence
from importlib.metadata import version

from jaxrefine.cli import (
    demo,
    evaluate,
    fsc,
    match,
    postprocess,
    reconstruct,
    refine,
    simulate,
)
from jaxrefine.errors import InputError
from jaxrefine.refinement import memory

_COMMANDS = (demo, simulate, match, refine, reconstruct, postprocess, fsc, evaluate)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; return its exit code."""
    words = sys.argv[1:] if arguments is None else arguments
    options = _parser().parse_args(words)
    options.command_line = shlex.join(["jaxrefine", *words])
    try:
        options.run(options)
        sys.stdout.flush()
    except InputError as error:
        print(f"jaxrefine {options.command}: {error}", file=sys.stderr)
        return 2
    except (MemoryError, RuntimeError) as error:
        if not memory.ran_out(error):
            raise
        sentence = "The memory does not suffice; a smaller --batch-size may."
        print(f"jaxrefine {options.command}: {sentence}", file=sys.stderr)
        return 2
    except BrokenPipeError:
        # The reader has gone, as in ``| head``; Python's last flush must not fail too.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except OSError as error:
        sentence = f"The system refused: {error}."
        print(f"jaxrefine {options.command}: {sentence}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="jaxrefine",
        description="Joint refinement of poses and density map for cryo-EM.",
    )
    parser.add_argument(
        "--version", action="version", version=f"jaxrefine {version('jaxrefine')}"
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for module in _COMMANDS:
        module.add(commands)
    return parser
