"""The particles of a command: read, checked, and their images prepared."""

import math
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar, final

import numpy as np
from jaxtyping import Bool, Int

from jaxrefine import io
from jaxrefine.cli.commands.shared import CryosparcSettings, ImageSettings
from jaxrefine.data.particles import Particles
from jaxrefine.data.preprocess import Masked, Normalised, Resampled
from jaxrefine.errors import InputError
from jaxrefine.geometry import Poses
from jaxrefine.io.columns import particle_table
from jaxrefine.io.fields import called, is_cs, lack_of
from jaxrefine.refinement.sets import divided
from jaxrefine.runs.progress import Bars

_IGNORED = {"rlnBeamTiltX", "rlnBeamTiltY", "rlnOddZernike", "rlnEvenZernike"}
_IGNORED |= {f"rlnMagMat{i}{j}" for i in (0, 1) for j in (0, 1)}
_TRIVIAL = {"0", "0.0", "0.000000", "1", "1.0", "1.000000"}
_TOLD = 3  # images that cannot be used and are named
_CIRCLE = 0.75  # of the side of the images: what is not background, by default


_Data = TypeVar("_Data", Particles, Poses)


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


@final
@dataclass(frozen=True)
class Usable:
    """Which particles of a table are used.

    Attributes
    ----------
    count
        Number of particles in the table.
    indices
        Where those that are used are in the table.
    """

    count: int
    indices: Int[np.ndarray, " chosen"]

    @property
    def left_out(self) -> Bool[np.ndarray, " particles"]:
        """Whether each particle of the table is left out."""
        return ~np.isin(np.arange(self.count), self.indices)

    def of(self, data: _Data) -> _Data:
        """Return the particles or poses that are used, of those of the table."""
        return data if len(self.indices) == self.count else data.take(self.indices)

    def of_table(self, values: Any, elsewhere: Any) -> np.ndarray:
        """Return values of the particles that are used, among those of all others.

        Parameters
        ----------
        values
            A value for each particle that is used.
        elsewhere
            The value of all others, or a value for each particle of the table.
        """
        values, elsewhere = np.asarray(values), np.asarray(elsewhere)
        shape = (self.count, *values.shape[1:])
        kind = np.result_type(values, elsewhere)
        everywhere = np.array(np.broadcast_to(elsewhere, shape), kind)
        everywhere[self.indices] = values
        return everywhere

    def poses(self, given: Poses, found: Poses) -> Poses:
        """Return poses that were found, among those given of what is left out."""
        if not self.left_out.any():
            return found
        rotations = self.of_table(found.rotations, given.rotations)
        return Poses(rotations, self.of_table(found.shifts, given.shifts))


def usable(source: io.ParticleFile, *, with_poses: bool) -> Usable:
    """Look at all images; tell of those that cannot be used, which are then left out.

    These are images that are constant or not finite and, where poses are used,
    particles whose given position is outside of their image.

    Parameters
    ----------
    source
        The particles, whose images are prepared.
    with_poses
        Whether the poses of the particles are used.

    Raises
    ------
    InputError
        If none can be used.
    """
    count, m = len(source), source.particles.image_size
    with Bars() as bars:
        bad = source.particles.unusable(bars.watch)
    offset = np.abs(np.asarray(source.poses.shifts)).max(axis=1)
    outside = with_poses & (offset > m / 2)
    left_out = outside | np.isin(np.arange(count), list(bad))
    sentences = []
    if bad:
        told = list(bad.values())[: 1 if left_out.all() else _TOLD]
        if len(bad) > len(told):
            told.append(f"and {len(bad) - len(told)} more")
        sentences.append(
            f"{len(bad)} of {count} images cannot be used: {'; '.join(told)}"
        )
    if outside.any():
        sentences.append(
            f"{outside.sum()} of {count} particles are outside of their images: they "
            f"must be at most {m / 2:g} pixels from the centre along x and y, got "
            f"{offset[outside][0]:.1f} pixels for particle {np.argmax(outside) + 1}"
        )
    if left_out.all():
        raise InputError(f"{source.path}: {sentences[0]}")
    for sentence in sentences:
        print(
            f"{source.path}: {sentence}; these particles are left out", file=sys.stderr
        )
    return Usable(count, np.flatnonzero(~left_out))


def tell_what_is_shared(
    source: io.ParticleFile, subsets: Int[np.ndarray, " particles"] | None
) -> None:
    """Tell of rows that are not independent, and whether they are kept together.

    Parameters
    ----------
    source
        The particles, which are dealt into folds, and into half sets unless the table
        has some.
    subsets
        The half set of each particle, if the table's are used.
    """
    cluster = source.particles.cluster
    if cluster is None:
        return
    kinds = " and of ".join(f"{n} {kind}" for kind, n in source.shared.items())
    where = "one half set and one fold" if subsets is None else "one fold"
    print(
        f"{source.path}: {len(source)} rows are of {kinds}; rows of the same one are "
        f"kept together, in {where}",
        file=sys.stderr,
    )
    count = 0 if subsets is None else divided(subsets, cluster)
    if count:
        name = called("rlnRandomSubset", source.path)
        print(
            f"{source.path}: the half sets of the table ({name}) divide "
            f"{count} of {cluster.max() + 1} such groups of rows; they are used as "
            "they are, but they are not independent, and the Fourier shell correlation "
            f"of their maps is too high: remove the {name} to have half sets dealt "
            "anew",
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
