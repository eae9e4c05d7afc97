"""A command: its name, what is said of it, what it can be told, and what it does."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, final


@final
@dataclass(frozen=True)
class Command:
    """A command of ``jaxrefine``.

    Attributes
    ----------
    name
        As it is written on the command line.
    summary
        What it does, as a phrase.
    description
        What it reads and writes, in whole sentences.
    settings
        The dataclass of its options, see :mod:`jaxrefine.runs.options`.
    run
        Does the command, with settings that were checked. It imports what it needs when
        it is called.
    """

    name: str
    summary: str
    description: str
    settings: type
    run: Callable[[Any], None]
