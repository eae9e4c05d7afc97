"""Refine a stored data set in a process of its own: ``refine_dataset.py DATA.npz``.

Part of :mod:`refinement`. Prints the figures as JSON. The clock starts before JAX is
imported.
"""

import json
import sys
import time
from typing import Any


def main(path: str) -> None:
    """Refine, compare with the truth, print."""
    begin = time.perf_counter()
    import jax
    import jax.numpy as jnp
    import numpy as np
    from datasets import mean_fsc, poses

    import jaxrefine as jr
    from jaxrefine.runs.provenance import peak_rss_mib

    with np.load(path) as file:
        data = {name: file[name] for name in file.files}
    images = data.pop("images")
    start = poses(data["start"], np.zeros((len(images), 2), np.float32))
    before = peak_rss_mib()
    rows: list[dict[str, Any]] = []
    result = jr.refine(
        jr.Particles(images),
        start,
        jnp.asarray(data["initial"]),
        key=jax.random.key(0),
        callback=lambda state, info: rows.append(info.row()),
    )
    wall, peak = time.perf_counter() - begin, peak_rss_mib()
    truth = poses(data["angles"], data["shifts"])
    figures = {
        "mean_fsc": mean_fsc(result.volume, data["volume"]),
        "tau": result.tau,
        "undetermined": int(result.undetermined.sum()),
        **jr.evaluation.summarise(jr.evaluation.pose_errors(result.poses, truth)),
        "r_max": [row["r_max"] for row in rows],
        "wall_s": wall,
        "images_mib": images.nbytes / 2**20,
        "rss_before_mib": before,
        "peak_rss_mib": peak,
    }
    print(json.dumps(figures))


if __name__ == "__main__":
    main(sys.argv[1])
