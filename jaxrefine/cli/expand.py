"""``jaxrefine expand``: the table of particles of a symmetric map, without symmetry."""

import sys

from jaxrefine import io, symmetry
from jaxrefine.cli import _particles
from jaxrefine.cli._outputs import check_can_be_written, check_is_no_input
from jaxrefine.cli.commands.expand import ExpandSettings
from jaxrefine.errors import InputError


def run(settings: ExpandSettings) -> None:
    """Write the particles once for each operator of their symmetry.

    Raises
    ------
    InputError
        If the particles cannot be used or have no poses, if the group has one operator
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
    source = io.read_particles(
        path,
        settings.datadir,
        passthrough=settings.cryosparc.passthrough,
        class_number=settings.cryosparc.class_,
    )
    _particles.require_poses(source)
    _particles.tell_where_from(path, source)
    check_is_no_input(out, path, *source.joined, *source.stacks.values())
    if "images" in source.shared:
        print(
            f"{path}: the {len(source)} rows show {source.shared['images']} images, "
            "as if it was expanded already; each row is expanded",
            file=sys.stderr,
        )
    io.write_expanded(out, source, operators)
    print(
        f"{len(source)} particles, {len(operators)} rows each ({settings.symmetry}): "
        f"{out}"
    )
