"""The particles of a command: read, checked, and their images prepared."""

import math
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Int, PRNGKeyArray

from jaxrefine import io
from jaxrefine.cli.commands.reconstruct import ReconstructSettings
from jaxrefine.cli.commands.refine import RefineSettings
from jaxrefine.cli.commands.shared import CryosparcSettings, ImageSettings
from jaxrefine.data.particles import Particles
from jaxrefine.data.preprocess import Masked, Normalised, Resampled
from jaxrefine.errors import InputError
from jaxrefine.io.columns import particle_table
from jaxrefine.io.fields import called, is_cs, lack_of
from jaxrefine.refinement.sets import FEWEST, deal, divided, is_dominated
from jaxrefine.runs.fingerprint import file_digest, fingerprint, stacks_digest

_UNEQUAL = 1.1  # ratio of the sizes of half sets from which it is told
_TUBES, _TUBE = "helical tubes", "rlnHelicalTubeID"  # what rows may share; its column
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
    if with_poses:
        require_poses(path, source)
    _check_sign(source, settings)
    m = particles.image_size
    if m % 2:
        raise InputError(
            "the side of images must be even, here as in RELION, got images of "
            f"{m} x {m} pixels in {path}"
        )
    tell_where_from(path, source)
    _tell_what_is_done(source, settings)
    tell_what_is_ignored(source)
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
    return _prepared(source, settings, with_poses)


def require_poses(path: Path, table: io.TableFile | io.ParticleFile) -> None:
    """Refuse particles without poses.

    Parameters
    ----------
    path, table
        The file of the particles, and what was read of it.

    Raises
    ------
    InputError
        If they have none.
    """
    if io.has_poses(table.blocks, path):
        return
    lack = f"{path} must have poses (rlnAngleRot, rlnAngleTilt), got none"
    if is_cs(path):
        lack = lack_of("alignments3D", path, table.joined, table.lacking)
    raise InputError(f"{lack}; `jaxrefine match` finds poses where there are none")


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
    for sentence in table.passed_over:
        done = f"it is passed over, since {path} has all that is needed"
        print(f"{sentence}; {done}", file=sys.stderr)
    if len(table.classes) > 1:
        sizes = ", ".join(f"{size} of {k}" for k, size in table.classes.items())
        kept = len(particle_table(table.blocks, path)["rlnImageName"])
        done = f"{kept} are kept"
        if kept == sum(table.classes.values()):
            done = "each has the pose of its most probable class; --class keeps one"
        print(
            f"{path}: particles of several classes ({sizes}); {done}", file=sys.stderr
        )


def circle_in_pixels(particles: Particles, settings: ImageSettings) -> float:
    """Return the diameter of the circle outside of which an image is background."""
    circle = settings.particle_diameter
    if circle is None:
        circle = _CIRCLE * particles.box_in_angstroms
    return circle / particles.pixel_size_in_angstroms


def _prepared(
    source: io.ParticleFile, settings: ImageSettings, with_poses: bool
) -> io.ParticleFile:
    """Normalise and mask the images, outside of the circle."""
    particles = source.particles
    pixels = circle_in_pixels(particles, settings)
    images = particles.images
    if settings.invert or settings.normalise:
        images = Normalised(images, pixels, settings.invert)
    if settings.mask_images:
        shifts = np.asarray(source.poses.shifts)
        images = Masked(images, pixels, shifts if with_poses else 0 * shifts)
    return replace(source, particles=replace(particles, images=images))


def _tell_what_is_done(source: io.ParticleFile, settings: ImageSettings) -> None:
    """Tell of images that are resampled, and of optics that are absent."""
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


def outside_images(
    source: io.ParticleFile,
) -> tuple[Bool[np.ndarray, " particles"], str]:
    """Return which particles lie outside of their images, and what must hold for them.

    The words name the first of them, and are empty if there is none.
    """
    half = source.particles.image_size / 2
    offset = np.abs(np.asarray(source.poses.shifts)).max(axis=1)
    beyond = offset > half
    if not beyond.any():
        return beyond, ""
    first = int(np.argmax(beyond))
    return beyond, (
        f"must be at most {half:g} pixels from the centre along x and y, got "
        f"{offset[first]:.1f} pixels for particle {first + 1}"
    )


def tell_what_is_ignored(source: io.ParticleFile) -> None:
    """Tell of optics that a table has and that are not used."""
    if source.ignored:
        verb = "are" if len(source.ignored) > 1 else "is"
        print(
            f"{source.path}: {', '.join(source.ignored)} {verb} ignored",
            file=sys.stderr,
        )


def identity(
    settings: RefineSettings | ReconstructSettings, source: io.ParticleFile
) -> dict[str, Any]:
    """Return all that the results of a command depend on, as JSON can hold it.

    Parameters
    ----------
    settings
        The options of the command.
    source
        The particles that they name.
    """
    stacks = list(source.stacks.values())
    found = fingerprint(settings) | {"stacks": stacks_digest(stacks)}
    if settings.cryosparc.passthrough is None:
        found |= identity_of_joined(source)
    return found


def identity_of_joined(source: io.ParticleFile) -> dict[str, Any]:
    """Return what results depend on beside a table: the files found to belong to it.

    They count as if they were given.
    """
    used = [path for path, groups in source.joined.items() if groups]
    digests = [file_digest(path) for path in used]
    if not digests:
        return {}
    return {"passthrough": digests[0] if len(digests) == 1 else digests}


def half_sets(
    source: io.ParticleFile, key: PRNGKeyArray
) -> Int[np.ndarray, " particles"]:
    """Return the half set of each particle, 1 or 2: the table's, or dealt at random.

    Raises
    ------
    InputError
        If a half set has fewer than 4 particles, as those may that are dealt if most
        rows are not independent, or if the table's are not 1 and 2.
    """
    subsets = source.random_subset
    if subsets is None:
        subsets = deal(source.particles, key)
    check_sizes(source, subsets)
    return subsets


def _sizes(subsets: Int[np.ndarray, " particles"]) -> tuple[int, int]:
    return int((subsets == 1).sum()), int((subsets == 2).sum())


def check_sizes(
    source: io.ParticleFile, subsets: Int[np.ndarray, " particles"], which: str = ""
) -> None:
    """Refuse half sets of too few particles, with the cause and a way out.

    Parameters
    ----------
    source
        The particles.
    subsets
        The half set of each particle that counts.
    which
        Which these are, in words.

    Raises
    ------
    InputError
        If a half set has fewer than 4.
    """
    first, second = _sizes(subsets)
    if min(first, second) >= FEWEST:
        return
    column, cause = called("rlnRandomSubset", source.path), ""
    whose = f" of the table ({column})"
    if source.random_subset is None:
        whose = ""
        if source.shared:
            cause = f": rows of one {_one_of(source)} are kept together"
            if _TUBES in source.shared:
                tube = called(_TUBE, source.path)
                cause += f"; remove the {tube} if it does not number tubes, or"
            else:
                cause += ";"
            cause += f" give half sets of your own ({column})"
    raise InputError(
        f"{source.path}: the half sets{whose} must have at least {FEWEST} particles "
        f"each, got {first} and {second}{which}{cause}"
    )


def _one_of(source: io.ParticleFile) -> str:
    """Return what rows share, in the singular."""
    return " or ".join(kind.removesuffix("s") for kind in source.shared)


def tell_what_is_shared(
    source: io.ParticleFile, subsets: Int[np.ndarray, " particles"] | None
) -> None:
    """Tell of rows that are not independent, and whether they are kept together.

    Parameters
    ----------
    source
        The particles, which are dealt into folds.
    subsets
        The half set of each particle, if there are half sets.
    """
    cluster = source.particles.cluster
    if cluster is None:
        return

    def tell(sentence: str) -> None:
        print(f"{source.path}: {sentence}", file=sys.stderr)

    everyone = np.ones(len(source), int)
    is_dealt = subsets is not None and source.random_subset is None
    sets = everyone if subsets is None else subsets
    dominated = [is_dominated(cluster[sets == each]) for each in np.unique(sets)]
    places = ["one half set"] * is_dealt + ["one fold"] * (not all(dominated))
    done = "the same one are kept together, in " + " and ".join(places)
    kinds = " and ".join(_showing(kind, n) for kind, n in source.shared.items())
    tell(f"the {len(source)} rows {kinds}" + (f"; rows of {done}" if places else ""))
    if is_dealt:
        smaller, larger = sorted(_sizes(sets))
        if larger > _UNEQUAL * smaller:
            tell(
                f"the half sets have {larger} and {smaller} particles, as rows of one "
                f"{_one_of(source)} are kept together"
            )
    if any(dominated):
        whose = "" if subsets is None else " of a half set"
        hint = ""
        if _TUBES in source.shared:
            hint = f"; remove the {called(_TUBE, source.path)} if it numbers no tubes"
        tell(
            f"more than two thirds of the rows{whose} are of one {_one_of(source)}, "
            "and are dealt into folds one by one: poses are compared with a map that "
            f"shares some of their noise{hint}"
        )
    count = 0 if subsets is None else divided(subsets, cluster)
    if count:
        name = called("rlnRandomSubset", source.path)
        tell(
            f"the half sets of the table ({name}) divide "
            f"{count} of {cluster.max() + 1} such groups of rows; they are used as "
            "they are, but they are not independent, and the Fourier shell correlation "
            f"of their maps is too high: remove the {name} to have half sets dealt "
            "anew"
        )


def _showing(kind: str, count: int) -> str:
    """Return what rows are of, as ``show 1 image`` or ``are of 2 helical tubes``."""
    verb = "show" if kind == "images" else "are of"
    return f"{verb} {count} {kind if count > 1 else kind.removesuffix('s')}"


def check_shift(flag: str, pixels: float, image_size: int) -> None:
    """Refuse a shift that leads out of the images.

    Raises
    ------
    InputError
        If it is more than half of their side, naming the option.
    """
    if pixels > image_size / 2:
        raise InputError(
            f"{flag} must be at most half of the images' side, {image_size // 2} "
            f"pixels, got {pixels:g}"
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
