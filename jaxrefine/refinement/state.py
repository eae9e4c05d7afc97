"""What the refinement knows: the state that its iterations pass on."""

from typing import final

import equinox as eqx
from jaxtyping import Array, Float

from jaxrefine._types import Volume
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
        first, second = (one.coefficients for one in self.maps)
        return (first + second) / 2
