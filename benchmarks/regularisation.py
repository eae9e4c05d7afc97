"""How to choose the regulariser's weight: four ways, on data sets of many kinds.

True poses; maps are made at each ``tau`` of a grid (lambda = tau sqrt(w[0])), and each
way picks one:

- ``best``: the highest mean FSC with the truth, which no program can know;
- ``cross-validation``: half maps predict the other half's images (the package's way);
- ``SURE``: Stein's estimate of the error of prediction, its degrees of freedom found by
  perturbing the images by noise (Ramani, Blu, Unser, IEEE TIP 17, 2008);
- ``discrepancy``: the residual has the energy of the noise (Morozov), which is given.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from benchmark import Settings
from datasets import DATA_SETS, describe, mean_fsc, simulate
from datasets import poses as poses_of
from records import Record, markdown_table

import jaxrefine as jr
from jaxrefine.maps import admm, folds
from jaxrefine.maps.sums import Sums, data_term
from jaxrefine.maps.sums import solve as solve_map
from jaxrefine.maps.tv import IsotropicTV
from jaxrefine.refinement import insertion, map_step
from jaxrefine.refinement.sets import make_particle_set

CASES = ("hjc46", "hjc46-low", "ptch44", "ptch44-low", "hjc64", "ptch64")
CASES += ("hjc64-low", "hjc90", "hjc128")
PARTS = ()
WAYS = ("best", "cross-validation", "SURE", "discrepancy")
TAUS = 1.25 ** np.arange(-6, 7)
ROUNDS, ITERATIONS = 4, 10


def solve(sums: Sums, start: admm.ADMMState, tau: float) -> admm.ADMMState:
    """Make a map, to convergence for our purpose."""
    data = data_term(sums)
    for _ in range(ROUNDS):
        start = solve_map(
            data, sums.peak, start, jnp.float32(tau), IsotropicTV(), ITERATIONS
        )
    return start


def misfit(sums: Sums, volume: jax.Array) -> float:
    """Return ``1/2 ||g - H c||^2 - 1/2 ||g||^2`` in units of the noise."""
    return float(folds.prediction_error(data_term(sums), volume))


def measure(case: str, settings: Settings) -> dict[str, Any]:
    """Let each way choose, on one data set."""
    described = DATA_SETS[case]
    data = simulate(described, settings.data)
    count, n = described.particles, described.size
    poses = poses_of(data["angles"], data["shifts"])
    noise = jnp.full(n // 2 + 1, data["sigma"] ** 2 * n**2, jnp.float32)
    everyone = np.ones(count, bool)

    def sums_of(images: np.ndarray):
        particle_set = make_particle_set(
            jr.Particles(images), poses, jax.random.key(1), jr.RefineConfig()
        )
        state = map_step.start(particle_set, jnp.zeros((n,) * 3, jnp.float32))
        return insertion.sum_up(particle_set, state.hypotheses, noise, everyone)

    first, second = sums_of(data["images"])
    both = first + second
    random = np.random.default_rng(2)
    probe = random.standard_normal(data["images"].shape, np.float32)
    a, b = sums_of(probe * data["sigma"])
    ripple = (a + b).backprojection
    # Frequencies within the disc, over all images: those that the residual is made of.
    size = 2 * (n // 2) - 1
    line = np.arange(size) - size // 2
    inside = np.hypot(line[:, None], line) <= (n - 1) // 2
    spectra = np.fft.fft2(data["images"][:, :, :])
    rows = line[:, None] % n, line[None] % n
    energy = float(
        np.sum(np.abs(spectra[:, rows[0], rows[1]][:, inside]) ** 2, dtype=float)
    ) / (2 * n**2 * float(data["sigma"]) ** 2)
    half_noise = 0.5 * count * inside.sum()

    zero = admm.init(jnp.zeros((n,) * 3, jnp.float32))
    starts = [zero] * 4
    table: dict[str, list[float]] = {
        name: [] for name in ("fsc", "cross-validation", "SURE", "discrepancy")
    }
    epsilon = 0.1
    shaken = Sums(both.kernel, both.backprojection + epsilon * ripple)
    for tau in TAUS[::-1]:
        starts = [
            solve(sums, start, tau)
            for sums, start in zip((both, shaken, first, second), starts, strict=True)
        ]
        c, moved, c1, c2 = (start.coefficients for start in starts)
        freedom = float(jnp.vdot(moved - c, ripple)) / epsilon
        residual = misfit(both, c)
        table["fsc"].append(mean_fsc(np.asarray(c), data["volume"]))
        table["cross-validation"].append(misfit(second, c1) + misfit(first, c2))
        table["SURE"].append(residual + freedom)
        table["discrepancy"].append(abs(residual + energy - half_noise))
    taus = TAUS[::-1]
    picked = {"best": int(np.argmax(table["fsc"]))}
    for name in ("cross-validation", "SURE", "discrepancy"):
        picked[name] = int(np.argmin(table[name]))
    return {
        "case": described._asdict(),
        "tau": {name: float(taus[i]) for name, i in picked.items()},
        "mean_fsc": {name: table["fsc"][i] for name, i in picked.items()},
        "taus": taus.tolist(),
        "table": table,
    }


def table(records: Sequence[Record]) -> str:
    """Return the mean FSC that each way reaches, and in brackets the tau it picks."""
    rows = []
    for each in records:
        figures = each["figures"]
        case, fsc, tau = (figures[name] for name in ("case", "mean_fsc", "tau"))
        chosen = (f"{fsc[way]:.3f} ({tau[way]:.2f})" for way in WAYS)
        rows.append((describe(each["case"], case), *chosen))
    table = markdown_table(("data", *WAYS), rows)
    return f"Mean FSC with the truth, and in brackets the tau picked.\n\n{table}"
