"""Reading and writing files, which appear complete or not at all, and logs, by lines.

The other packages leave the user's files to this one: a page or a picture is written
under the path that :func:`jaxrefine.io.atomic.atomic_path` provides. There is one
exception: :mod:`jaxrefine.runs.fingerprint` reads the bytes of input files, for their
digests.
"""

from jaxrefine.io.atomic import check_writable as check_writable
from jaxrefine.io.atomic import reading as reading
from jaxrefine.io.atomic import writing as writing
from jaxrefine.io.checkpoint import load_checkpoint as load_checkpoint
from jaxrefine.io.checkpoint import save_checkpoint as save_checkpoint
from jaxrefine.io.cs import TableFile as TableFile
from jaxrefine.io.cs import read_cs as read_cs
from jaxrefine.io.external import ExternalReconstruction as ExternalReconstruction
from jaxrefine.io.external import (
    read_external_reconstruction as read_external_reconstruction,
)
from jaxrefine.io.json import append_line as append_line
from jaxrefine.io.json import json_line as json_line
from jaxrefine.io.json import read_json as read_json
from jaxrefine.io.json import write_json as write_json
from jaxrefine.io.json import write_lines as write_lines
from jaxrefine.io.mrc import Stack as Stack
from jaxrefine.io.mrc import new_stack as new_stack
from jaxrefine.io.mrc import open_stack as open_stack
from jaxrefine.io.mrc import read_densities as read_densities
from jaxrefine.io.mrc import read_mrc as read_mrc
from jaxrefine.io.mrc import read_stack as read_stack
from jaxrefine.io.mrc import voxel_size_in_angstroms as voxel_size_in_angstroms
from jaxrefine.io.mrc import write_mrc as write_mrc
from jaxrefine.io.mrc import write_stack as write_stack
from jaxrefine.io.mtf import read_mtf as read_mtf
from jaxrefine.io.particles import ParticleFile as ParticleFile
from jaxrefine.io.particles import has_poses as has_poses
from jaxrefine.io.particles import image_identities as image_identities
from jaxrefine.io.particles import read_particles as read_particles
from jaxrefine.io.particles import read_table as read_table
from jaxrefine.io.particles import read_without_images as read_without_images
from jaxrefine.io.particles import stacks_found as stacks_found
from jaxrefine.io.particles import write_expanded as write_expanded
from jaxrefine.io.particles import write_new_particles as write_new_particles
from jaxrefine.io.particles import write_particles as write_particles
from jaxrefine.io.poses import poses_on_one_grid as poses_on_one_grid
from jaxrefine.io.poses import read_poses as read_poses
from jaxrefine.io.star import Pairs as Pairs
from jaxrefine.io.star import read_star as read_star
from jaxrefine.io.star import write_star as write_star
