"""The spatial engine: the normal operator, and the updates of poses and volume.

Each figure is the median of interleaved rounds, and a ratio the median of the rounds'
ratios. A case is the side ``n`` of the map.
"""

from collections.abc import Callable, Sequence
from statistics import median
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from benchmark import Settings, interleaved_times
from records import Record, markdown_table

from jaxrefine.geometry import Poses
from jaxrefine.operators import kbwf, normal, spatial
from jaxrefine.paper import algorithm3
from jaxrefine.simulate import equidistributed_rotations

CASES = ("46", "64", "90")
PARTS = ()
ROUNDS, PARTICLES = 25, 16


def medians(calls: dict[str, Callable[[], Any]]) -> dict[str, float]:
    """Return the median time of each call, in seconds."""
    times = interleaved_times(calls, ROUNDS)
    return {name: median(values) for name, values in times.items()}


def normal_operator(n: int) -> dict[str, float]:
    """Compare ``apply_normal`` with a real FFT pair of the doubled grid."""
    volume = jax.random.normal(jax.random.key(0), (n, n, n))
    doubled = jax.random.normal(jax.random.key(1), (2 * n,) * 3)
    rotations = equidistributed_rotations(jax.random.key(2), 20)
    psi = spatial.footprint(kbwf.KBWF())
    transfer = normal.transfer(normal.kernel(psi, rotations, n))
    apply = jax.jit(normal.apply_normal)
    pair = jax.jit(lambda v: jnp.fft.irfftn(jnp.fft.rfftn(v), s=v.shape))
    times = interleaved_times(
        {
            "apply_normal_s": lambda: apply(transfer, volume),
            "fft_pair_s": lambda: pair(doubled),
        },
        ROUNDS,
    )
    ratios = [a / b for a, b in zip(*times.values(), strict=True)]
    return {**{k: median(v) for k, v in times.items()}, "ratio": median(ratios)}


def random_poses(key: jax.Array) -> Poses:
    """Draw orientations, without shifts."""
    rotations = equidistributed_rotations(key, PARTICLES)
    return Poses(rotations, jnp.zeros((PARTICLES, 2)))


def pose_update(n: int) -> dict[str, float]:
    """Time one pose's cost, and its cost with gradient, within a batch."""
    keys = jax.random.split(jax.random.key(0), 3)
    psi = spatial.footprint(kbwf.KBWF())
    image_filter = spatial.spline_filter(psi, n)
    images = jax.random.normal(keys[0], (PARTICLES, n, n))
    poses = algorithm3.EulerPoses.of(random_poses(keys[1]))
    volume = jax.random.normal(keys[2], (n, n, n))
    terms = algorithm3.map_terms(psi, volume, spatial.Support.ball(n))

    def batched(function):
        @eqx.filter_jit
        def evaluate(terms, images, poses):
            def of_particle(image_and_pose):
                image, pose = image_and_pose
                return function(terms, algorithm3.particle(image_filter, image), pose)

            return jax.lax.map(of_particle, (images, poses), batch_size=8)

        return lambda: evaluate(terms, images, poses)

    typical = medians(
        {
            "cost_s": batched(algorithm3.particle_cost),
            "cost_and_gradient_s": batched(algorithm3.particle_cost_and_gradient),
        }
    )
    return {name: value / PARTICLES for name, value in typical.items()}


def volume_update(n: int) -> dict[str, float]:
    """Time what a volume update asks of each particle."""
    keys = jax.random.split(jax.random.key(0), 2)
    psi = spatial.footprint(kbwf.KBWF())
    image_filter = spatial.spline_filter(psi, n)
    images = jax.random.normal(keys[0], (PARTICLES, n, n))
    poses = random_poses(keys[1])
    typical = medians(
        {
            "kernel_s": lambda: normal.kernel(psi, poses.rotations, n),
            "backproject_s": lambda: spatial.backproject(
                image_filter, images, poses, n
            ),
        }
    )
    return {name: value / PARTICLES for name, value in typical.items()}


def measure(case: str, settings: Settings) -> dict[str, Any]:
    """Measure at one side of the map."""
    n = int(case)
    return {
        "normal_operator": normal_operator(n),
        "pose_update_per_particle": pose_update(n),
        "volume_update_per_particle": volume_update(n),
    }


def table(records: Sequence[Record]) -> str:
    """Return one row for each number of cores and side."""
    header = ("cores", "n", "`apply_normal` / FFT pair", "cost (ms)")
    header += ("cost and gradient (ms)", "kernel `w` (ms)", "`H^T g` (ms)")
    rows = []
    for each in sorted(records, key=lambda each: each["provenance"]["cores"]):
        figures = each["figures"]
        pose = figures.get("pose_update_per_particle", {})
        volume = figures.get("volume_update_per_particle", {})
        seconds = (
            pose.get("cost_s"),
            pose.get("cost_and_gradient_s"),
            volume.get("kernel_s"),
            volume.get("backproject_s"),
        )
        rows.append(
            (
                str(each["provenance"]["cores"]),
                each["case"],
                f"{figures['normal_operator']['ratio']:.2f}",
                *("" if s is None else f"{1e3 * s:.1f}" for s in seconds),
            )
        )
    return (
        "Time of `operators.normal.apply_normal` over that of a real FFT pair of the "
        f"doubled grid; times for one particle.\n\n{markdown_table(header, rows)}"
    )
