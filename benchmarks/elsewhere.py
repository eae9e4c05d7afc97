"""Forward slices by other packages, for the table of :mod:`slices`.

A case is a package; one that is not installed is skipped. Each is best measured in an
environment of its own beside jaxrefine: ``pip install aspire``, ``pip install
torch-projectors`` (0.13.1 needs torch 2.6). 1000 projections of a volume of side 64,
single precision. Times are minima over rounds; a call's preparation of the volume (its
padded FFT) is timed where the package offers no way to keep it, and named.
"""

import functools
import importlib.util
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from benchmark import Settings, interleaved_times
from records import Record, markdown_table

CASES = ("aspire", "torch_projectors")
PARTS = ()
SIDE, PARTICLES, ROUNDS = 64, 1000, 5


def random_rotations(random: np.random.Generator) -> np.ndarray:
    """Draw rotations."""
    q, r = np.linalg.qr(random.standard_normal((PARTICLES, 3, 3)))
    q *= np.sign(np.diagonal(r, axis1=1, axis2=2))[:, None]
    q[:, :, 0] *= np.linalg.det(q)[:, None]
    return q.astype(np.float32)


def aspire(volume: np.ndarray, rotations: np.ndarray) -> dict[str, Callable[[], Any]]:
    """Return ASPIRE's projector, a non-uniform FFT and an inverse FFT per image."""
    # Optional packages, which development environments do not have.
    from aspire.utils import Rotation  # pyright: ignore[reportMissingImports]
    from aspire.volume import Volume  # pyright: ignore[reportMissingImports]

    source, rotation = Volume(volume), Rotation(rotations)
    name = "ASPIRE Volume.project (whole images out)"
    return {name: lambda: source.project(rotation).asnumpy()}


def torch_projectors(
    volume: np.ndarray, rotations: np.ndarray
) -> dict[str, Callable[[], Any]]:
    """Return torch-projectors' linear interpolation of padded spectra."""
    # Optional packages, which development environments do not have.
    import torch  # pyright: ignore[reportMissingImports]
    import torch_projectors as projectors  # pyright: ignore[reportMissingImports]

    rotation = torch.from_numpy(rotations)[None]

    def project(spectrum, padding: int):
        return projectors.project_3d_to_2d_forw(
            spectrum,
            rotation,
            output_shape=(SIDE, SIDE),
            interpolation="linear",
            oversampling=float(padding),
        )

    calls: dict[str, Callable[[], Any]] = {}
    for padding in (1, 2):
        before = (padding - 1) * SIDE // 2
        padded = torch.from_numpy(np.pad(volume, before))
        spectrum = torch.fft.rfftn(torch.fft.ifftshift(padded))[None]
        name = f"torch-projectors linear, pad {padding} (spectrum kept)"
        calls[name] = functools.partial(project, spectrum, padding)
    return calls


def measure(case: str, settings: Settings) -> dict[str, Any]:
    """Time a package, in milliseconds."""
    if importlib.util.find_spec(case) is None:
        return {}
    random = np.random.default_rng(0)
    volume = random.standard_normal((SIDE,) * 3).astype(np.float32)
    prepare = {"aspire": aspire, "torch_projectors": torch_projectors}[case]
    times = interleaved_times(prepare(volume, random_rotations(random)), ROUNDS)
    return {name: 1e3 * min(values) for name, values in times.items()}


def table(records: Sequence[Record]) -> str:
    """Return the time of every way."""
    times = (item for each in records for item in each["figures"].items())
    rows = [(name, f"{time:.0f}") for name, time in times]
    return markdown_table((f"{PARTICLES} projections at {SIDE}³", "time (ms)"), rows)
