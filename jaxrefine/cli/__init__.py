"""The command line: ``jaxrefine COMMAND``.

What a command can be told is declared in :mod:`jaxrefine.cli.commands`; what it does is
in the module of its name here, which is imported when the command runs. Bad input ends
with one sentence on standard error and exit code 2, an interruption with exit code 130,
a SIGTERM with exit code 143, a SIGHUP with exit code 129, and the loss of another
process of the same command with exit code 1.
"""

import argparse
import io
import os
import sys
import traceback
from collections.abc import Sequence

from jaxrefine._limits import ADDRESS_SPACE, DATA, memory_limits
from jaxrefine._version import __version__
from jaxrefine.cli import _processes, _signals
from jaxrefine.cli.commands import COMMANDS, Command
from jaxrefine.errors import InputError, LostProcess
from jaxrefine.runs.options import (
    add_options,
    declared,
    settings_from,
    with_numbers_joined,
)

# What commands that compute little take in the end (measured, 2 cores).
_LEAST = {ADDRESS_SPACE: 2 * 2**30, DATA: 2**29}


def main(
    arguments: Sequence[str] | None = None,
    commands: Sequence[Command] = COMMANDS,
    *,
    in_own_process: bool = False,
) -> int:
    """Run a command.

    Parameters
    ----------
    arguments
        The words of the command line; by default those of this process.
    commands
        The commands that there are.
    in_own_process
        Whether this process is the command's, which then answers signals, see
        `_signals`, and sets up JAX for it, see `_runtime`.

    Returns
    -------
    The exit code.
    """
    try:
        code = _run(arguments, commands, in_own_process)
    except KeyboardInterrupt as stop:
        code = _signals.end(stop)
    except Exception:
        if in_own_process and _processes.is_connected():
            traceback.print_exc()
            _processes.leave(1)
        raise
    return _processes.leave(code) if in_own_process else code


def _run(
    arguments: Sequence[str] | None, commands: Sequence[Command], in_own_process: bool
) -> int:
    """Run a command as `main` does, unless it is stopped."""
    if in_own_process:
        _signals.answer()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # The names of files may have bytes that are no text.
            stream.reconfigure(errors="backslashreplace")
    given = with_numbers_joined(sys.argv[1:] if arguments is None else arguments)
    options, launched = _parser(commands).parse_args(given), None
    (command,) = (each for each in commands if each.name == options.command)
    try:
        if in_own_process:
            _check_limits()
            launched = _processes.launch(options)
            if launched is not None:
                _processes.fork(launched)
            from jaxrefine.cli import _runtime

            _runtime.set_up(getattr(options, "devices", None))
            if launched is not None:
                _processes.connect(launched)
        with _processes.one_speaks(launched):
            command.run(settings_from(command.settings, vars(options)))
        sys.stdout.flush()
    except InputError as error:
        return _refuse(command, str(error))
    except LostProcess:
        print(f"jaxrefine {command.name}: {_processes.LOST}", file=sys.stderr)
        return _processes.LOST_CODE
    except (MemoryError, RuntimeError) as error:
        from jaxrefine.refinement import memory

        if not memory.ran_out(error):
            raise
        sentence = "there is not enough memory"
        names = {each.name for each in declared(command.settings)}
        if "batch_size" in names:
            sentence += "; try a smaller --batch-size"
        if "devices" in names:
            sentence += " or fewer --devices"
        return _refuse(command, sentence)
    except BrokenPipeError:
        # The reader has gone, as in ``| head``; Python's last flush must not fail too.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except OSError as error:
        return _refuse(command, f"the operating system reports: {error}")
    return 0


def _check_limits() -> None:
    """Refuse limits of memory within which JAX would end the process by itself.

    Raises
    ------
    InputError
        If there is one.
    """
    for limit in memory_limits():
        least = _LEAST[limit.command]
        if limit.total < least:
            raise InputError(
                f"`{limit.command}` must leave at least {least >> 20} MiB, got a limit "
                f"of {limit.total >> 20} MiB, within which JAX cannot work"
            )


def _refuse(command: Command, sentence: str) -> int:
    print(f"jaxrefine {command.name}: {sentence}", file=sys.stderr)
    return 2


def _parser(commands: Sequence[Command]) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="jaxrefine",
        description="Joint refinement of poses and density map for cryo-EM.",
    )
    parser.add_argument(
        "--version", action="version", version=f"jaxrefine {__version__}"
    )
    named = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for command in commands:
        add_options(
            named.add_parser(
                command.name, help=command.summary, description=command.description
            ),
            command.settings,
        )
    return parser
