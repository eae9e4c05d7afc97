"""The state that one outer iteration of the refinement hands to the next."""

from typing import final

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxrefine._types import Volume
from jaxrefine.geometry import Poses
from jaxrefine.maps import admm
from jaxrefine.poses.hypotheses import Hypotheses
from jaxrefine.poses.optics import Optics


@final
class SetState(eqx.Module):
    """What is known of a set of particles that is refined independently.

    Attributes
    ----------
    hypotheses
        Candidate poses of each particle, with their weights.
    information, evidence
        That of each particle's best pose, and that of all its hypotheses, see
        `update.Updated`.
    maps
        ADMM states of the folds' maps.
    gain
        Scale of the maps, by shell.
    noise
        Power of the noise in each group of particles, by shell.
    tau
        Weight of the regulariser.
    fold_fsc
        Correlation of the folds' maps.
    optics
        Contrast and defocus of each particle; None if neither is refined.
    """

    hypotheses: Hypotheses
    information: Float[Array, "particles 5 5"]
    evidence: Float[Array, "particles"]
    maps: tuple[admm.ADMMState, ...]
    gain: Float[Array, "shells"]
    noise: Float[Array, "groups shells"]
    tau: Float[Array, ""]
    fold_fsc: Float[Array, "shells"]
    optics: Optics | None = None

    @property
    def mean_map(self) -> Volume:
        """The mean of the folds' maps."""
        first, second = self.maps
        return (first.coefficients + second.coefficients) / 2


@final
class RefineState(eqx.Module):
    """What the next outer iteration needs; all that a checkpoint must hold.

    Attributes
    ----------
    set_states, indices
        The states of the sets that are refined independently, and where the particles
        of each are among all.
    iteration, r_max
        Outer iterations made, and the band limit at which these poses were found.
    pose_change, correlation
        What the next iteration is compared with: the median change of the rotations,
        radians (or of the shifts, pixels, if the angles are fixed), and the correlation
        of the maps of the half sets (without half sets, of the folds) by shell, -1
        before the first iteration.
    finished
        Whether the refinement has converged.
    """

    set_states: tuple[SetState, ...]
    indices: tuple[Int[Array, "_"], ...]
    iteration: Int[Array, ""]
    r_max: Int[Array, ""]
    pose_change: Float[Array, ""]
    correlation: Float[Array, "shells"]
    finished: Bool[Array, ""]

    @property
    def poses(self) -> Poses:
        """The best poses so far, in the order of the particles."""
        best = [each.hypotheses.best() for each in self.set_states]
        back = jnp.argsort(jnp.concatenate(self.indices))
        return jax.tree.map(lambda *leaves: jnp.concatenate(leaves)[back], *best)

    @property
    def volume(self) -> Volume:
        """The mean of the maps so far."""
        maps = [each.mean_map for each in self.set_states]
        return sum(maps[1:], maps[0]) / len(maps)
