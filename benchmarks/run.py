"""Time what the package promises to be fast, and write ``benchmarks/results.json``.

Each figure is the median of several interleaved rounds, and a ratio the median of the
rounds' ratios, so that two functions compared saw the same machine. Run it alone:
``python benchmarks/run.py``.
"""

import json
import os
import platform
import time
from pathlib import Path
from statistics import median

import equinox as eqx
import jax
import jax.numpy as jnp

from jaxrefine import geometry
from jaxrefine.operators import kbwf, normal, spatial
from jaxrefine.paper import algorithm3

ROUNDS = 25


def rounds(functions: dict) -> dict[str, list[float]]:
    """Return the times of each function over interleaved rounds."""
    for function in functions.values():
        jax.block_until_ready(function())
    times = {name: [] for name in functions}
    for _ in range(ROUNDS):
        for name, function in functions.items():
            start = time.perf_counter()
            jax.block_until_ready(function())
            times[name].append(time.perf_counter() - start)
    return times


def seconds(functions: dict) -> dict[str, float]:
    """Return the median time of each function."""
    return {name: median(values) for name, values in rounds(functions).items()}


def normal_operator(n: int) -> dict[str, float]:
    """Compare ``apply_normal`` with a real FFT pair of the doubled grid."""
    volume = jax.random.normal(jax.random.key(0), (n, n, n))
    doubled = jax.random.normal(jax.random.key(1), (2 * n,) * 3)
    angles = geometry.equidistributed_angles(jax.random.key(2), 20)
    psi = spatial.footprint(kbwf.KBWF())
    transfer = normal.transfer(normal.kernel(psi, angles, n))
    apply = jax.jit(normal.apply_normal)
    pair = jax.jit(lambda v: jnp.fft.irfftn(jnp.fft.rfftn(v), s=v.shape))
    times = rounds(
        {
            "apply_normal_s": lambda: apply(transfer, volume),
            "fft_pair_s": lambda: pair(doubled),
        }
    )
    ratios = [a / b for a, b in zip(*times.values(), strict=True)]
    return {**{k: median(v) for k, v in times.items()}, "ratio": median(ratios)}


def pose_update(n: int, particles: int) -> dict[str, float]:
    """Time one pose's cost, and its cost with gradient, within a batch."""
    keys = jax.random.split(jax.random.key(0), 3)
    psi = spatial.footprint(kbwf.KBWF())
    image_filter = spatial.spline_filter(psi, n)
    images = jax.random.normal(keys[0], (particles, n, n))
    poses = geometry.Poses(
        geometry.equidistributed_angles(keys[1], particles),
        jnp.zeros((particles, 2)),
    )
    terms = algorithm3.map_terms(psi, jax.random.normal(keys[2], (n, n, n)))

    def batched(function):
        @eqx.filter_jit
        def evaluate(terms, images, poses):
            def one(image_and_pose):
                image, where = image_and_pose
                return function(terms, algorithm3.particle(image_filter, image), where)

            return jax.lax.map(one, (images, poses), batch_size=8)

        return lambda: evaluate(terms, images, poses)

    typical = seconds(
        {
            "cost_s": batched(algorithm3.particle_cost),
            "cost_and_gradient_s": batched(algorithm3.particle_cost_and_gradient),
        }
    )
    return {name: value / particles for name, value in typical.items()}


def volume_update(n: int, particles: int) -> dict[str, float]:
    """Time what a volume update asks of each particle."""
    keys = jax.random.split(jax.random.key(0), 2)
    psi = spatial.footprint(kbwf.KBWF())
    image_filter = spatial.spline_filter(psi, n)
    images = jax.random.normal(keys[0], (particles, n, n))
    angles = geometry.equidistributed_angles(keys[1], particles)
    poses = geometry.Poses(angles, jnp.zeros((particles, 2)))
    typical = seconds(
        {
            "kernel_s": lambda: normal.kernel(psi, angles, n),
            "backproject_s": lambda: spatial.backproject(
                image_filter, images, poses, n
            ),
        }
    )
    return {name: value / particles for name, value in typical.items()}


def available_cores() -> int | None:
    """Return how many cores this process may use, where the system can tell."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count()


def main() -> None:
    """Run all, print and store."""
    cores = available_cores()
    results = {
        "cores": cores,
        "machine": platform.machine(),
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
        "normal_operator": {str(n): normal_operator(n) for n in (46, 64, 90)},
        "pose_update_per_particle": {str(n): pose_update(n, 16) for n in (46, 90)},
        "volume_update_per_particle": {str(n): volume_update(n, 16) for n in (46, 90)},
    }
    text = json.dumps(results, indent=2)
    print(text)
    path = Path(__file__).with_name(f"results_{cores}_core.json")
    path.write_text(text + "\n")


if __name__ == "__main__":
    main()
