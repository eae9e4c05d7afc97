"""How to choose the regulariser's weight: four ways, on data sets of many kinds.

    python benchmarks/regularisation.py [--data FOLDER] [--json FILE]

True poses; maps are made at each ``tau`` of a grid (lambda = tau sqrt(w[0])), and each
way picks one:

- ``best``: the highest mean FSC with the truth, which no program can know;
- ``cross-validation``: half maps predict the other half's images (the package's way);
- ``SURE``: Stein's estimate of the error of prediction, its degrees of freedom found by
  perturbing the images by noise (Ramani, Blu, Unser, IEEE TIP 17, 2008);
- ``discrepancy``: the residual has the energy of the noise (Morozov), which is given.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from refinement import Case, mean_fsc, simulate

from jaxrefine.data.particles import Particles
from jaxrefine.geometry import Poses
from jaxrefine.maps import admm, folds
from jaxrefine.maps.sums import Sums, data_term
from jaxrefine.maps.sums import solve as solve_map
from jaxrefine.maps.tv import IsotropicTV
from jaxrefine.refinement import map_step
from jaxrefine.refinement.config import RefineConfig
from jaxrefine.refinement.sets import particle_set

CASES = [
    Case("hjc_46.mrc", 46, 500, 0.0),
    Case("hjc_46.mrc", 46, 20000, -15.0),
    Case("ptch1_44.mrc", 44, 500, -10.0),
    Case("ptch1_44.mrc", 44, 500, -15.0),
    Case("hjc_90.mrc", 64, 1000, -5.0),
    Case("ptch1_84.mrc", 64, 1000, -5.0),
    Case("hjc_90.mrc", 64, 3000, -14.2),
    Case("hjc_90.mrc", 90, 2000, -10.0),
    Case("hjc_90.mrc", 128, 1000, -5.0),
]
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


def compare(case: Case, folder: Path) -> dict[str, Any]:
    """Run one case."""
    data = simulate(case, folder)
    count, n = case.particles, case.size
    poses = Poses(jnp.asarray(data["angles"]), jnp.asarray(data["shifts"]))
    noise = jnp.full(n // 2 + 1, data["sigma"] ** 2 * n**2, jnp.float32)
    everyone = np.ones(count, bool)

    def sums_of(images: np.ndarray):
        particles = Particles(images)
        whole = particle_set(particles, poses, jax.random.key(1), RefineConfig())
        state = map_step.start(whole, poses, jnp.zeros((n,) * 3, jnp.float32))
        return map_step.sum_up(whole, state.hypotheses, noise, everyone)

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
        parts = (both, shaken, first, second)
        starts = [
            solve(part, start, tau) for part, start in zip(parts, starts, strict=True)
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
        "case": case._asdict(),
        "tau": {name: float(taus[i]) for name, i in picked.items()},
        "mean_fsc": {name: table["fsc"][i] for name, i in picked.items()},
        "taus": taus.tolist(),
        "table": table,
    }


def main() -> None:
    """Run all cases and print what each way picks."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--json", type=Path, help="write the results")
    parser.add_argument("--cases", type=int, nargs="*", default=range(len(CASES)))
    options = parser.parse_args()
    results = []
    for i in options.cases:
        found = compare(CASES[i], options.data)
        results.append(found)
        picks = "  ".join(
            f"{name} {found['mean_fsc'][name]:.3f} ({tau:.2f})"
            for name, tau in found["tau"].items()
        )
        print(f"{tuple(CASES[i])}: {picks}", flush=True)
        if options.json is not None:
            options.json.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
