"""``jaxrefine external-reconstruct``: a map from the sums of ``relion_refine``."""

import jax.numpy as jnp

from jaxrefine import io
from jaxrefine.cli._outputs import check_can_be_written, check_is_no_input
from jaxrefine.cli.commands.external_reconstruct import ExternalReconstructSettings
from jaxrefine.maps import padded
from jaxrefine.refinement.config import RefineConfig


def run(settings: ExternalReconstructSettings) -> None:
    """Make the map, and write it where RELION looks for it.

    Raises
    ------
    InputError
        If RELION's files cannot be used, or the map cannot be written.
    """
    source = io.read_external_reconstruction(settings.sums)
    check_can_be_written(source.result)
    check_is_no_input(source.result, *source.inputs)
    config = RefineConfig()
    volume, lam = padded.reconstruct(
        jnp.asarray(source.data),
        jnp.asarray(source.weight),
        source.box,
        jnp.float32(settings.tau),
        config.regulariser,
        config.admm_iterations * config.tuning.final_rounds,
    )
    io.write_mrc(source.result, volume, source.voxel_size_in_angstroms)
    print(f"tau {settings.tau:.4g}, lambda {float(lam):.4g}: {source.result}")
