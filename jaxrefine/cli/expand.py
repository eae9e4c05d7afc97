"""``jaxrefine expand``: the table of particles of a symmetric map, without symmetry."""

import sys

from jaxrefine import io, symmetry
from jaxrefine.cli import _particles
from jaxrefine.cli._outputs import check_can_be_written, check_is_no_input
from jaxrefine.cli.commands.expand import ExpandSettings
from jaxrefine.errors import InputError
from jaxrefine.io.columns import particle_table


def run(settings: ExpandSettings) -> None:
    """Write the particles once for each operator of their symmetry.

    Nothing but the table is read: stacks need not be there.

    Raises
    ------
    InputError
        If the table cannot be read or has no poses, if the group has one operator
        alone, or if the table cannot be written.
    """
    out, path = settings.out, settings.particles
    check_can_be_written(out)
    operators = symmetry.operators(settings.symmetry)
    if len(operators) == 1:
        raise InputError(
            "--symmetry must be a group of two operators or more, got "
            f"{settings.symmetry}"
        )
    source = io.read_table(
        path,
        settings.cryosparc.passthrough,
        settings.cryosparc.class_,
        with_ctf=False,
    )
    blocks = source.blocks
    stacks = io.stacks_found(blocks, path, settings.datadir)
    _particles.require_poses(path, source)
    _particles.tell_where_from(path, source)
    check_is_no_input(out, path, *source.joined, *stacks.values())
    names = particle_table(blocks, path)["rlnImageName"]
    if not names:
        raise InputError(f"{path} must hold particles, got none")
    if len(set(names)) < len(names):
        print(
            f"{path}: the {len(names)} rows show {len(set(names))} images, "
            "as if it was expanded already; each row is expanded",
            file=sys.stderr,
        )
    io.write_expanded(out, path, blocks, stacks, operators)
    print(
        f"{len(names)} particles, {len(operators)} rows each ({settings.symmetry}): "
        f"{out}"
    )
