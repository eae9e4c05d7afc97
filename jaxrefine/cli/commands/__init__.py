"""What the commands are and what each can be told.

Nothing here imports JAX, NumPy or matplotlib: ``jaxrefine COMMAND --help`` and the
option tables of the documentation need these declarations alone. What a command does is
in the module of its name in :mod:`jaxrefine.cli`.
"""

from jaxrefine.cli.commands.command import Command as Command
from jaxrefine.cli.commands.demo import DEMO
from jaxrefine.cli.commands.evaluate import EVALUATE
from jaxrefine.cli.commands.expand import EXPAND
from jaxrefine.cli.commands.external_reconstruct import EXTERNAL_RECONSTRUCT
from jaxrefine.cli.commands.fsc import FSC
from jaxrefine.cli.commands.match import MATCH
from jaxrefine.cli.commands.postprocess import POSTPROCESS
from jaxrefine.cli.commands.reconstruct import RECONSTRUCT
from jaxrefine.cli.commands.refine import REFINE
from jaxrefine.cli.commands.simulate import SIMULATE

COMMANDS: tuple[Command, ...] = (
    DEMO,
    SIMULATE,
    MATCH,
    REFINE,
    EXPAND,
    RECONSTRUCT,
    POSTPROCESS,
    FSC,
    EVALUATE,
    EXTERNAL_RECONSTRUCT,
)
"""All commands, in the order in which they are needed."""
