"""CTF data through the command line, and RELION's reconstruction from our poses.

    python benchmarks/ctf.py MAP.mrc [--json FILE]

1000 particles of the map at 64^3, defocus 0.8 to 2.2 micrometres with astigmatism,
-5 dB, shifts up to 3 pixels; every Euler angle off by up to 0.7 rad, initial map =
truth blurred by 4 pixels (``jaxrefine simulate``). ``jaxrefine refine`` refines them,
and ``relion_reconstruct --ctf`` makes a map from the poses that it wrote, and from the
true ones. FSC is with the truth, shells 1 to n / 2, no mask.
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from refinement import mean_fsc

from jaxrefine import io

JAXREFINE = [sys.executable, "-m", "jaxrefine.cli"]
SIMULATE = "--ctf --size 64 --particles 1000 --snr-db -5 --max-shift 3"


def main() -> None:
    """Simulate, refine, reconstruct, compare."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("map", type=Path)
    parser.add_argument("--json", type=Path, help="write the results")
    options = parser.parse_args()
    if shutil.which("relion_reconstruct") is None:
        parser.error("relion_reconstruct is not installed")
    with tempfile.TemporaryDirectory() as scratch:
        data, out = Path(scratch) / "data", Path(scratch) / "out"
        command = ["simulate", options.map, "--out", data, *SIMULATE.split()]
        subprocess.run([*JAXREFINE, *command], check=True)
        begin = time.perf_counter()
        command = ["refine", data / "particles.star", "--map", data / "init.mrc"]
        subprocess.run([*JAXREFINE, *command, "--out", out], check=True)
        found = {"refine_s": time.perf_counter() - begin}
        truth = io.read_mrc(data / "truth.mrc")[0]
        for name, star in (
            ("ours", out / "particles.star"),
            ("true", data / "truth.star"),
        ):
            made = Path(scratch) / f"{name}.mrc"
            command = ["relion_reconstruct", "--ctf", "--i", star.name, "--o", made]
            subprocess.run(
                command, check=True, stdout=subprocess.DEVNULL, cwd=star.parent
            )
            found[f"relion_reconstruct_from_{name}"] = mean_fsc(
                io.read_mrc(made)[0], truth
            )
        found["joint"] = mean_fsc(np.asarray(io.read_mrc(out / "map.mrc")[0]), truth)
        command = ["evaluate", out / "particles.star", data / "truth.star"]
        subprocess.run([*JAXREFINE, *command], check=True)
    print(json.dumps(found, indent=2))
    if options.json is not None:
        options.json.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
