"""``jaxrefine external-reconstruct``: a map from the sums of ``relion_refine``."""

import os

import jax
import jax.numpy as jnp

from jaxrefine import io
from jaxrefine.cli._outputs import check_can_be_written, check_is_no_input
from jaxrefine.cli.commands.external_reconstruct import ExternalReconstructSettings
from jaxrefine.maps import padded
from jaxrefine.refinement import memory
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
    if source.result_table is not None and source.result_table.exists():
        # RELION would take it for ours.
        source.result_table.unlink()
        print(f"removed {source.result_table}, of another reconstruction")
    config = RefineConfig()
    # Another of these processes may share the accelerator, or RELION.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    with memory.explained(
        f"there is not enough memory for a map of {source.box} voxels a side from "
        f"grids of {len(source.weight)}; with --sequential_halves_recons relion_refine "
        "makes the maps of the halves one after the other, and with --pad 1 from "
        "smaller grids"
    ):
        volume, lam = padded.reconstruct(
            jnp.asarray(source.data),
            jnp.asarray(source.weight),
            source.box,
            jnp.float32(settings.tau),
            config.regulariser,
            config.admm_iterations * config.tuning.final_rounds,
        )
        jax.block_until_ready(volume)
    io.write_mrc(source.result, volume, source.voxel_size_in_angstroms)
    print(f"tau {settings.tau:.4g}, lambda {float(lam):.4g}: {source.result}")
