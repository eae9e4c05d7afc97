"""Options that several commands share."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxrefine.runs.options import option


def seed(what: str) -> Any:
    """Declare the seed of what is drawn at random."""
    return option(0, least=0, most=2**31 - 1, help=f"seed of {what}")


def batch_size(default: int | None, **declaration: Any) -> Any:
    """Declare how many particles are computed at once."""
    return option(
        default,
        least=1,
        affects_results=False,
        help="particles computed at once; memory grows with it",
        **declaration,
    )


def memory(**declaration: Any) -> Any:
    """Declare how much memory may be used."""
    return option(
        None,
        unit="GiB",
        least=0,
        above=True,
        affects_results=False,
        default_text="what is free",
        help="most memory to use, which sets --batch-size",
        **declaration,
    )


def devices() -> Any:
    """Declare how many of the devices are used."""
    return option(
        None,
        least=1,
        most=1024,
        affects_results=False,
        default_text="all; of a CPU its cores, at most 8",
        help="devices that share the particles, the first ones: GPUs, or cores of a "
        "CPU",
    )


@dataclass(frozen=True, kw_only=True)
class ProcessSettings:
    """Which of several processes this one is, that share the particles."""

    coordinator: str | None = option(
        None,
        affects_results=False,
        metavar="HOST:PORT",
        default_text="as srun or mpirun says",
        help="where the first process listens for the others",
    )
    processes: int | None = option(
        None,
        least=1,
        affects_results=False,
        default_text="as srun or mpirun says, or 1",
        help="how many processes share the particles, on one machine or on many",
    )
    process: int | None = option(
        None,
        least=0,
        affects_results=False,
        default_text="as srun or mpirun says",
        help="the number of this process, from 0; process 0 writes the results",
    )


def symmetry(default: Any = "C1", **declaration: Any) -> Any:
    """Declare the point group of a map."""
    return option(
        default,
        convert=str.upper,
        metavar="GROUP",
        help="point group of the map, such as C4, D7, T, O or I",
        **declaration,
    )


def tau(**declaration: Any) -> Any:
    """Declare the weight of the regulariser."""
    return option(
        None,
        least=0,
        above=True,
        default_text="chosen by cross-validation",
        help="weight of the total-variation regulariser, in units of the noise",
        **declaration,
    )


def resample() -> Any:
    """Declare that maps may be resampled."""
    return option(
        False, help="bring a map of another box or voxel size to that of the images"
    )


def datadir() -> Any:
    """Declare a folder of stacks."""
    return option(
        None,
        affects_results=False,  # what is found there does, see runs.fingerprint
        metavar="DIR",
        help="where else to look for stacks of images",
    )


def map_voxel_size(what: str = "the map") -> Any:
    """Declare what overrules the headers of a map, or of several."""
    return option(
        None,
        unit="angstroms",
        least=0,
        above=True,
        default_text="what the header says",
        help=f"voxel size of {what}, whatever is in a header, and of a mask with as "
        "many voxels",
    )


@dataclass(frozen=True, kw_only=True)
class CryosparcSettings:
    """What belongs to a table of cryoSPARC."""

    passthrough: Path | None = option(
        None,
        metavar="FILE.cs",
        default_text="*passthrough*.cs of the same job, beside the table",
        help="the passthrough file of a .cs table, with the fields that its job did "
        "not make",
    )
    class_: int | None = option(
        None,
        least=0,
        metavar="K",
        default_text="all, each with the pose of its most probable class",
        help="keep the particles of one class of a .cs table, counted from 0",
    )


@dataclass(frozen=True, kw_only=True)
class ImageSettings:
    """How images are found and prepared."""

    invert: bool = option(
        False,
        help="protein is dark in the images",
        implies="Implies --normalise.",
    )
    normalise: bool = option(
        False,
        help="bring the background of every image, outside of the particle's diameter, "
        "to mean 0 and standard deviation 1",
    )
    mask_images: bool = option(
        False,
        help="set images to 0 outside of the particle's diameter, with a soft edge, "
        "about the given position of the particle (about the centre of the image where "
        "poses are not used); images should be normalised",
    )
    trust_contrast: bool = option(
        False,
        help="take contrast and grey scale of images and map as they are, and keep "
        "images that are unlike the others: none of this is checked",
    )
    particle_diameter: float | None = option(
        None,
        unit="angstroms",
        least=0,
        above=True,
        default_text="three quarters of the box for --normalise and --mask-images",
        help="largest diameter of the particle",
    )
    no_ctf: bool = option(
        False,
        help="take the images to have no contrast-transfer function, beam tilt or "
        "Zernike terms, whatever the table says",
    )
    datadir: Path | None = datadir()
