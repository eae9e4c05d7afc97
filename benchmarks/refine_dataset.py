"""Refine a data set in a process of its own: ``refine_dataset.py DATA CONFIG``.

:func:`refine` starts the process. DATA is a file of NumPy's, CONFIG the pickled
parameters; the figures are printed as JSON. The clock starts before JAX is imported.
"""

import json
import pickle
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

import jaxrefine as jr


def refine(
    data: dict[str, np.ndarray], config: "jr.RefineConfig | None" = None
) -> dict[str, Any]:
    """Refine a data set of :mod:`datasets` from its start; compare with the truth."""
    with tempfile.TemporaryDirectory() as scratch:
        paths = Path(scratch) / "data.npz", Path(scratch) / "config"
        np.savez(paths[0], allow_pickle=False, **data)
        paths[1].write_bytes(pickle.dumps(config))
        begin = time.perf_counter()
        command = [sys.executable, __file__, *paths]
        output = subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout
        process_s = time.perf_counter() - begin
    return {**json.loads(output), "process_s": process_s}


def main(data_path: str, config_path: str) -> None:
    """Refine, compare with the truth, print."""
    begin = time.perf_counter()
    import jax
    import jax.numpy as jnp
    from datasets import mean_fsc, poses

    from jaxrefine.runs.provenance import peak_rss_mib

    with np.load(data_path) as file:
        data = {name: file[name] for name in file.files}
    images = data.pop("images")
    start = poses(data["start"], np.zeros((len(images), 2), np.float32))
    before = peak_rss_mib()
    rows: list[dict[str, Any]] = []
    result = jr.refine(
        jr.Particles(images),
        start,
        jnp.asarray(data["initial"]),
        pickle.loads(Path(config_path).read_bytes()),
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
    main(*sys.argv[1:])
