"""CTF data through the command line, and RELION's reconstruction from our poses.

1000 particles of HJC at 64^3, defocus 0.8 to 2.2 micrometres with astigmatism, -5 dB,
shifts up to 3 pixels; every Euler angle off by up to 0.7 rad, initial map = truth
blurred by 4 pixels (``jaxrefine simulate``). ``jaxrefine refine`` refines them, and
``relion_reconstruct --ctf``, which must be installed, makes a map from the poses that
it wrote, and from the true ones. FSC is with the truth, shells 1 to n / 2, no mask.
"""

import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmark import Settings
from datasets import mean_fsc
from records import Record, markdown_table

from jaxrefine import io

CASES = {"hjc64": "hjc_90.mrc"}
PARTS = ()
JAXREFINE = [sys.executable, "-m", "jaxrefine.cli"]
SIMULATE = "--ctf --size 64 --particles 1000 --snr-db -5 --max-shift 3"


def measure(case: str, settings: Settings) -> dict[str, Any]:
    """Simulate, refine, reconstruct, compare."""

    def jaxrefine(*arguments: str | Path) -> None:
        subprocess.run([*JAXREFINE, *arguments], check=True)

    with tempfile.TemporaryDirectory() as scratch:
        data, out = Path(scratch) / "data", Path(scratch) / "out"
        path = settings.data / CASES[case]
        jaxrefine("simulate", path, "--out", data, *SIMULATE.split())
        begin = time.perf_counter()
        initial = data / "init.mrc"
        jaxrefine("refine", data / "particles.star", "--map", initial, "--out", out)
        figures = {"refine_s": time.perf_counter() - begin}
        truth = io.read_mrc(data / "truth.mrc")[0]
        for name, star in (
            ("ours", out / "particles.star"),
            ("true", data / "truth.star"),
        ):
            path = Path(scratch) / f"{name}.mrc"
            command = ["relion_reconstruct", "--ctf", "--i", star.name, "--o", path]
            subprocess.run(
                command, check=True, stdout=subprocess.DEVNULL, cwd=star.parent
            )
            fsc = mean_fsc(io.read_mrc(path)[0], truth)
            figures[f"relion_reconstruct_from_{name}"] = fsc
        figures["joint"] = mean_fsc(io.read_mrc(out / "map.mrc")[0], truth)
    return figures


def table(records: Sequence[Record]) -> str:
    """Return the mean FSC of the maps, and the time of the refinement."""
    header = ("case", "our map", "RELION, our poses", "RELION, true poses", "time (s)")
    rows = []
    for each in records:
        figures = each["figures"]
        ours, theirs, true = (
            figures[name]
            for name in (
                "joint",
                "relion_reconstruct_from_ours",
                "relion_reconstruct_from_true",
            )
        )
        fsc = (f"{value:.3f}" for value in (ours, theirs, true))
        rows.append((f"`{each['case']}`", *fsc, f"{figures['refine_s']:.0f}"))
    return f"Mean FSC with the truth.\n\n{markdown_table(header, rows)}"
