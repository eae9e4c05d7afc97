"""The particles of a command: read, checked, and their images prepared."""

import math
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np

from jaxrefine import io
from jaxrefine.cli.commands.shared import CryosparcSettings, ImageSettings
from jaxrefine.data.particles import Particles
from jaxrefine.data.preprocess import Masked, Normalised, Resampled
from jaxrefine.errors import InputError
from jaxrefine.io.columns import particle_table
from jaxrefine.io.fields import is_cs, lack_of

_IGNORED = {"rlnBeamTiltX", "rlnBeamTiltY", "rlnOddZernike", "rlnEvenZernike"}
_IGNORED |= {f"rlnMagMat{i}{j}" for i in (0, 1) for j in (0, 1)}
_TRIVIAL = {"0", "0.0", "0.000000", "1", "1.0", "1.000000"}
_CIRCLE = 0.75  # of the side of the images: what is not background, by default


def read(
    path: Path,
    settings: ImageSettings,
    cryosparc: CryosparcSettings,
    *,
    with_poses: bool,
    diameter_used: bool = False,
) -> io.ParticleFile:
    """Read the particles; prepare their images as the settings say.

    Parameters
    ----------
    path
        The table of particles.
    settings
        How images are found and prepared.
    cryosparc
        What belongs to a table of cryoSPARC.
    with_poses
        Whether the poses of the particles are used.
    diameter_used
        Whether the command uses the diameter of the particle for more than images.

    Raises
    ------
    InputError
        If the particles cannot be used, or lack poses that are used; if the side of
        the images is odd; if the diameter is larger than the box, or of no use.
    """
    source = io.read_particles(
        path,
        settings.datadir,
        passthrough=cryosparc.passthrough,
        class_number=cryosparc.class_,
        with_ctf=not settings.no_ctf,
    )
    particles = source.particles
    if with_poses and not source.has_poses:
        lack = f"{path} must have poses (rlnAngleRot, rlnAngleTilt), got none"
        if is_cs(path):
            lack = lack_of("alignments3D", path, source.joined)
        raise InputError(f"{lack}; `jaxrefine match` finds poses where there are none")
    _check_sign(source, settings)
    m = particles.image_size
    if m % 2:
        raise InputError(
            "the side of images must be even, here as in RELION, got images of "
            f"{m} x {m} pixels in {path}"
        )
    tell_where_from(path, source)
    _tell_what_is_done(source, settings)
    diameter, box = settings.particle_diameter, particles.box_in_angstroms
    if diameter is not None and diameter > box:
        raise InputError(
            f"--particle-diameter must be at most the box, {box:g} angstroms, got "
            f"{diameter:g}"
        )
    circled = settings.invert or settings.normalise or settings.mask_images
    if diameter is not None and not (diameter_used or circled):
        raise InputError(
            "--particle-diameter must be given with --normalise, --invert or "
            "--mask-images, without which it has no effect here, got none of them"
        )
    circle = _CIRCLE * box if diameter is None else diameter
    return _prepared(source, settings, circle, with_poses)


def _check_sign(source: io.ParticleFile, settings: ImageSettings) -> None:
    """Refuse to invert images twice, and to lose what the table says of their sign.

    It says it by the scale of the contrast-transfer function.
    """
    if not source.protein_is_dark or settings.invert == settings.no_ctf:
        return
    says = (
        f"{source.path}, which says that protein is dark (a negative "
        "rlnCtfScalefactor, or blob/sign)"
    )
    if settings.invert:
        raise InputError(
            "--invert must not be given for particles that are inverted already, got "
            f"{says}"
        )
    raise InputError(
        f"--no-ctf must be given with --invert if protein is dark, got {says}"
    )


def tell_where_from(path: Path, table: io.TableFile | io.ParticleFile) -> None:
    """Tell which files and which classes the fields of a cryoSPARC table are from."""
    for passthrough, groups in table.joined.items():
        if groups:
            print(
                f"{path}: {', '.join(groups)} by uid from {passthrough}",
                file=sys.stderr,
            )
    if len(table.classes) > 1:
        sizes = ", ".join(f"{size} of {k}" for k, size in table.classes.items())
        kept = len(particle_table(table.blocks, path)["rlnImageName"])
        done = f"{kept} are kept"
        if kept == sum(table.classes.values()):
            done = "each has the pose of its most probable class; --class keeps one"
        print(
            f"{path}: particles of several classes ({sizes}); {done}", file=sys.stderr
        )


def _prepared(
    source: io.ParticleFile, settings: ImageSettings, circle: float, with_poses: bool
) -> io.ParticleFile:
    """Normalise and mask the images, outside of a circle given in angstroms."""
    particles = source.particles
    pixels = circle / particles.pixel_size_in_angstroms
    images = particles.images
    if settings.invert or settings.normalise:
        images = Normalised(images, pixels, settings.invert)
    if settings.mask_images:
        shifts = np.asarray(source.poses.shifts)
        images = Masked(images, pixels, shifts if with_poses else 0 * shifts)
    return replace(source, particles=replace(particles, images=images))


def _tell_what_is_done(source: io.ParticleFile, settings: ImageSettings) -> None:
    """Tell of images that are resampled, and of optics that are ignored or absent."""
    pixel, smallest = source.particles.pixel_size_in_angstroms, source.pixel_sizes.min()
    if isinstance(source.particles.images, Resampled):
        print(
            f"{source.path}: images with pixels of {smallest:g} A and more are "
            f"resampled to {pixel:g} A",
            file=sys.stderr,
        )
    if source.particles.ctf is None and not settings.no_ctf:
        print(
            f"{source.path} gives no defocus: its images are taken to have no "
            "contrast-transfer function",
            file=sys.stderr,
        )
    ignored = [
        name
        for block in source.blocks.values()
        for name, values in block.items()
        if name in _IGNORED and set(values) - _TRIVIAL
    ]
    if ignored:
        print(
            f"{source.path}: {', '.join(ignored)} are ignored; the optics that count "
            "here are defocus, spherical aberration and amplitude contrast",
            file=sys.stderr,
        )


def shell_of(flag: str, resolution: float, particles: Particles) -> int:
    """Return a resolution in angstroms as a band limit in cycles per box.

    Raises
    ------
    InputError
        If the images do not have it, naming the option.
    """
    box, last = particles.box_in_angstroms, (particles.image_size - 1) // 2
    if not box / (last + 1) < resolution <= box:
        raise InputError(
            f"{flag} must be from {box / last:.3g} to {box:g} angstroms for these "
            f"images, got {resolution:g}"
        )
    return math.floor(box / resolution)
