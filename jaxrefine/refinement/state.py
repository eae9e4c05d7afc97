"""What the refinement knows: the state that its iterations pass on."""

from typing import final

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxrefine._types import Volume
from jaxrefine.geometry import Poses
from jaxrefine.maps import admm
from jaxrefine.poses.hypotheses import Hypotheses


@final
class SetState(eqx.Module):
    """What is known of a set of particles that is refined by itself.

    Attributes
    ----------
    hypotheses
        Poses.
    information, evidence
        Of each particle's best pose; see `polish.Polished`.
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
    """

    hypotheses: Hypotheses
    information: Float[Array, "particles 5 5"]
    evidence: Float[Array, "particles"]
    maps: tuple[admm.ADMMState, ...]
    gain: Float[Array, "shells"]
    noise: Float[Array, "groups shells"]
    tau: Float[Array, ""]
    fold_fsc: Float[Array, "shells"]

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
    sets, members
        The sets that are refined by themselves, and the places of their particles
        among all.
    iteration, r_max
        Outer iterations made, and the band limit of the next (of the last, at the end).
    pose_change, best_gold
        What the next iteration is compared with: the median change of the angles, in
        degrees (or of the shifts, in pixels, if the angles are fixed), and the best
        correlation of half sets.
    finished
        Whether the refinement has converged.
    """

    sets: tuple[SetState, ...]
    members: tuple[Int[Array, "_"], ...]
    iteration: Int[Array, ""]
    r_max: Int[Array, ""]
    pose_change: Float[Array, ""]
    best_gold: Float[Array, ""]
    finished: Bool[Array, ""]

    @property
    def poses(self) -> Poses:
        """The best poses so far, in the order of the particles."""
        best = [each.hypotheses.best() for each in self.sets]
        back = jnp.argsort(jnp.concatenate(self.members))
        return jax.tree.map(lambda *leaves: jnp.concatenate(leaves)[back], *best)

    @property
    def volume(self) -> Volume:
        """The mean of the maps so far."""
        maps = [each.mean_map for each in self.sets]
        return sum(maps[1:], maps[0]) / len(maps)
