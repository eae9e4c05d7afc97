"""Images of noise among particles: whether they are told apart, and what the map is.

Particles are projections of HJC at 46^3, in a box of 48 pixels, with uniform
orientations and shifts of 1.5 pixels along x and y (standard deviation). Their noise,
and the images that are nothing else, are

- ``background``: patches of real micrographs, a quarter of one of 96 pixels each
  (``real_betagal``), protein bright;
- ``white``: Gaussian white noise.

All poses, also those of noise, are found in the true map by ``match``, as it is by
default, and then refined. ``alone`` is the refinement of the particles alone.

Beside the share of images that are said to show no particle there is that of images
whose evidence with the prior about the matched pose is at most 0, that is without a
price for the search. Of poses that are said to be certain, with a weight of 0.95 or
more, it is counted how many are within the search's separation of the true one.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from benchmark import Settings
from datasets import mean_fsc, poses, project
from records import Record, markdown_table

import jaxrefine as jr
from jaxrefine import io
from jaxrefine.geometry import Poses
from jaxrefine.refinement.result import Result


class Case(NamedTuple):
    """Where noise is from, how many particles and images of noise, and the SNR."""

    noise: str
    particles: int
    empty: int
    snr_db: float = 0.0


CASES = {
    "background": Case("background", 0, 400),
    "white": Case("white", 0, 400),
    "background-half": Case("background", 200, 200, -10.0),
    "white-half": Case("white", 200, 200, -5.0),
    "white-low": Case("white", 500, 500, -14.2),
}
PARTS = ("mixed", "alone")
N, SHIFT, CERTAIN = 48, 1.5, 0.95
KEY = jax.random.key(0)


def simulate(case: Case, data: Path) -> tuple[np.ndarray, Poses, np.ndarray]:
    """Return images, the particles first, the true poses of these, and the map."""
    random, count = np.random.default_rng(0), case.particles + case.empty
    volume = np.pad(np.asarray(io.read_mrc(data / "hjc_46.mrc")[0], np.float32), 1)
    if case.noise == "background":
        name = "real_betagal/betagal_emd2984_background_101_96px.mrcs"
        given = -np.asarray(io.read_stack(data / name)[0], float)
        noise = np.concatenate(
            [given[:, i : i + N, j : j + N] for i in (0, N) for j in (0, N)]
        )
        noise = noise[random.permutation(len(noise))[:count]]
        noise = noise - noise.mean(axis=(1, 2), keepdims=True)
    else:
        noise = random.standard_normal((count, N, N))
    noise /= noise.std(axis=(1, 2), keepdims=True)
    angles = random.uniform(0, 2 * np.pi, (count, 3))
    angles[:, 1] = np.arccos(random.uniform(-1, 1, count))
    shifts = SHIFT * random.standard_normal((count, 2))
    clean = project(volume.astype(float), angles, shifts)
    clean *= 10 ** (case.snr_db / 20) / np.sqrt(np.mean(clean**2))
    clean[case.particles :] = 0
    truth = poses(angles.astype(np.float32), shifts.astype(np.float32))
    return (noise + clean).astype(np.float32), truth, volume


def refine(images: np.ndarray, volume: np.ndarray) -> Result:
    """Match and refine, with how well ``match`` says that the poses are known."""
    particles, start = jr.Particles(images), jnp.asarray(volume)
    found = jr.match(particles, start)
    angle, shift = (
        float(np.sqrt(np.mean(np.square(values)) / components))
        for values, components in ((found.angle_std, 3), (found.shift_std, 2))
    )
    config = jr.RefineConfig()
    config = jr.RefineConfig(
        angle_spread=min(angle, config.angle_spread),
        shift_spread=shift,
        max_shift=3 * shift,
    )
    return jr.refine(particles, found.poses, start, config, key=KEY)


def figures_of(
    result: Result, truth: Poses, volume: np.ndarray, is_particle: np.ndarray
) -> dict[str, Any]:
    """Return what a refinement says of particles and of noise."""
    (known,) = result.state.set_states
    figures: dict[str, Any] = {"mean_fsc": mean_fsc(result.volume, volume)}
    prior_only = np.asarray(known.evidence) <= 0
    for name, some in (("particles", is_particle), ("noise", ~is_particle)):
        if some.any():
            percentiles = np.percentile(result.log_likelihood[some], [5, 50, 95])
            figures[name] = {
                "flagged": float(np.mean(result.undetermined[some])),
                "flagged_with_the_prior_only": float(np.mean(prior_only[some])),
                "evidence_5_50_95": percentiles.tolist(),
            }
    weights = np.asarray(known.hypotheses.weights)[:, 0]
    certain = (weights >= CERTAIN) & is_particle & ~result.undetermined
    if certain.any():
        separation = jr.RefineConfig().search_cell(int(result.state.r_max))
        turns = np.einsum(
            "pij,pij->p",
            np.asarray(result.poses.rotations)[certain],
            np.asarray(truth.rotations)[certain],
        )
        errors = np.arccos(np.clip((turns - 1) / 2, -1, 1))
        figures["certain"] = float(certain.sum() / is_particle.sum())
        figures["certain_and_right"] = float(np.mean(errors < separation))
        figures["separation_in_degrees"] = float(np.rad2deg(separation))
    return figures


def measure(case: str, settings: Settings) -> dict[str, Any]:
    """Measure the parts of a case."""
    chosen = CASES[case]
    images, truth, volume = simulate(chosen, settings.data)
    is_particle = np.arange(len(images)) < chosen.particles
    figures: dict[str, Any] = chosen._asdict()
    if settings.measures("mixed"):
        result = refine(images, volume)
        figures["mixed"] = figures_of(result, truth, volume, is_particle)
    if settings.measures("alone") and is_particle.any() and chosen.empty:
        some = np.flatnonzero(is_particle)
        result = refine(images[some], volume)
        figures["alone"] = figures_of(
            result, truth.take(some), volume, is_particle[some]
        )
    return figures


def table(records: Sequence[Record]) -> str:
    """Return how many are flagged, and the maps."""
    header = ("noise", "particles, images of noise", "SNR (dB)", "noise flagged")
    header += ("by the prior's evidence", "particles flagged", "refined alone")
    header += ("mean FSC", "refined alone", "certain poses that are right")
    rows = []
    for each in records:
        figures = each["figures"]
        mixed, alone = figures["mixed"], figures.get("alone", {})
        counts = f"{figures['particles']}, {figures['empty']}"
        is_mixed = "particles" in mixed
        rows.append(
            (
                figures["noise"],
                counts,
                f"{figures['snr_db']:g}" if is_mixed else "",
                _percent(mixed["noise"]["flagged"]),
                _percent(mixed["noise"]["flagged_with_the_prior_only"]),
                _percent(mixed["particles"]["flagged"]) if is_mixed else "",
                _percent(alone["particles"]["flagged"]) if alone else "",
                f"{mixed['mean_fsc']:.3f}" if is_mixed else "",
                f"{alone['mean_fsc']:.3f}" if alone else "",
                _percent(alone["certain_and_right"])
                if "certain_and_right" in alone
                else "",
            )
        )
    return markdown_table(header, rows)


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"
