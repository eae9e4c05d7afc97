"""RELION's refinement with our maps and with its own, from the same start.

``relion_refine_mpi --auto_refine``, which must be installed, twice on the same images,
the same initial map and the same seed; once with ``--external_reconstruct`` and
``jaxrefine external-reconstruct`` as its program. Searches are local from the start,
around the angles of the file, with a standard deviation of 15 degrees. FSC is that of
the final map with the truth, shells 1 to n / 2, no mask. Times are of all processes, on
the clock and of the CPUs, and hold the compilation of our programs unless an earlier
run has left them in the cache.
"""

import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from benchmark import Settings
from datasets import DATA_SETS, describe, mean_fsc, poses, simulate
from records import Record, markdown_table

from jaxrefine import evaluation, io
from jaxrefine.ctf import CTF

CASES = ("hjc32", "ptch32")
PARTS = ()
PIXEL = 5.0  # angstroms, which no result depends on
WAYS = {"relion": "RELION's maps", "ours": "our maps"}
HOOK = f"{sys.executable} -m jaxrefine.cli external-reconstruct"
REFINE = """mpirun --allow-run-as-root --oversubscribe -n 3 relion_refine_mpi
    --i particles.star --ref initial.mrc --auto_refine --split_random_halves
    --low_resol_join_halves 40 --sym C1 --norm --scale --ini_high 40
    --healpix_order 2 --auto_local_healpix_order 2 --sigma_ang 15 --oversampling 1
    --offset_range 5 --offset_step 2 --flatten_solvent --zero_mask --dont_check_norm
    --dont_combine_weights_via_disc --pool 10 --pad 2 --j 1 --random_seed 1""".split()


def measure(case: str, settings: Settings) -> dict[str, Any]:
    """Simulate; refine both ways; compare with the truth."""
    described = DATA_SETS[case]
    data = simulate(described, settings.data)
    n, count = described.size, described.particles
    true, start = (poses(data[name], data["shifts"]) for name in ("angles", "start"))
    figures: dict[str, Any] = {"case": described._asdict()}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        io.write_stack(folder / "particles.mrcs", data["images"], PIXEL)
        io.write_mrc(folder / "initial.mrc", data["initial"], PIXEL)
        names = [f"{i}@particles.mrcs" for i in range(1, count + 1)]
        table = folder / "particles.star"
        io.write_new_particles(table, start, names, n, PIXEL, CTF(0.0, 0.0))
        for way in WAYS:
            words = [*REFINE, "--particle_diameter", f"{0.85 * n * PIXEL:g}"]
            words += ["--o", f"./{way}"]
            if way == "ours":
                words.append("--external_reconstruct")
            times = _run(folder, words)
            volume = io.read_densities(folder / f"{way}_class001.mrc")
            table = folder / f"{way}_data.star"
            order = np.argsort(
                [
                    int(name.split("@")[0])
                    for name in io.read_star(table)["particles"]["rlnImageName"]
                ]
            )
            errors = evaluation.pose_errors(io.read_poses(table).take(order), true)
            model = io.read_star(folder / f"{way}_model.star")["model_general"]
            figures[way] = {
                "mean_fsc": mean_fsc(volume, data["volume"]),
                "iterations": len(list(folder.glob(f"{way}_it*_optimiser.star"))),
                "resolution_in_angstroms": float(model["rlnCurrentResolution"][0]),
                **evaluation.summarise(errors),
                **times,
            }
    return figures


def _run(folder: Path, words: Sequence[str]) -> dict[str, float]:
    """Run RELION in a folder; return the seconds on the clock and of the CPUs."""
    environment = os.environ | {"RELION_EXTERNAL_RECONSTRUCT_EXECUTABLE": HOOK}
    before, begin = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    subprocess.run(
        words, cwd=folder, env=environment, check=True, stdout=subprocess.DEVNULL
    )
    wall_s = time.perf_counter() - begin
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu_s = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {"wall_s": wall_s, "cpu_s": cpu_s}


def table(records: Sequence[Record]) -> str:
    """Return both ways' maps, poses and times."""
    header = ("data", "RELION with", "mean FSC", "within 10 degrees")
    header += ("median error (degrees)", "iterations", "time (s)", "CPU time (s)")
    rows = []
    for each in records:
        figures = each["figures"]
        for way, name in WAYS.items():
            found = figures[way]
            rows.append(
                (
                    describe(each["case"], figures["case"]),
                    name,
                    f"{found['mean_fsc']:.3f}",
                    f"{100 * found['fraction_within_10_degrees']:.0f} %",
                    f"{found['angle_error_in_degrees_median']:.2f}",
                    str(found["iterations"]),
                    f"{found['wall_s']:.0f}",
                    f"{found['cpu_s']:.0f}",
                )
            )
    return markdown_table(header, rows)
