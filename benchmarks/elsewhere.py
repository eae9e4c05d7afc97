"""Forward slices by other packages, for the table of `benchmarks/slices.py`.

``python benchmarks/elsewhere.py`` needs none of jaxrefine; it times what it can import,
each package best in an environment of its own: ``pip install aspire``, ``pip install
torch-projectors`` (0.13.1 wants torch 2.6). 1000 projections of a volume of side 64,
single precision. Times are minima over rounds; a call's preparation of the volume (its
padded FFT) is timed where the package offers no way to keep it, and told.
"""

import functools
import importlib.util
import time

import numpy as np

SIDE, PARTICLES, ROUNDS = 64, 1000, 5


def rotations(random: np.random.Generator) -> np.ndarray:
    """Draw rotations."""
    q, r = np.linalg.qr(random.standard_normal((PARTICLES, 3, 3)))
    q *= np.sign(np.diagonal(r, axis1=1, axis2=2))[:, None]
    q[:, :, 0] *= np.linalg.det(q)[:, None]
    return q.astype(np.float32)


def fastest(call) -> float:
    """Return the least time over rounds, in milliseconds."""
    call()
    times = []
    for _ in range(ROUNDS):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return 1e3 * min(times)


def aspire(volume: np.ndarray, turns: np.ndarray) -> None:
    """Time ASPIRE's projector, a non-uniform FFT and an inverse FFT of each image."""
    from aspire.utils import Rotation
    from aspire.volume import Volume

    source, rotation = Volume(volume), Rotation(turns)
    took = fastest(lambda: source.project(rotation).asnumpy())
    print(f"ASPIRE Volume.project (whole images out): {took:.0f} ms")


def torch_projectors(volume: np.ndarray, turns: np.ndarray) -> None:
    """Time torch-projectors' linear interpolation of a twofold padded spectrum."""
    import torch
    import torch_projectors as projectors

    rotation = torch.from_numpy(turns)[None]

    def project(spectrum, padding: int):
        return projectors.project_3d_to_2d_forw(
            spectrum,
            rotation,
            output_shape=(SIDE, SIDE),
            interpolation="linear",
            oversampling=float(padding),
        )

    for padding in (1, 2):
        before = (padding - 1) * SIDE // 2
        padded = torch.from_numpy(np.pad(volume, before))
        spectrum = torch.fft.rfftn(torch.fft.ifftshift(padded))[None]
        took = fastest(functools.partial(project, spectrum, padding))
        print(f"torch-projectors linear, pad {padding} (spectrum kept): {took:.0f} ms")


def main() -> None:
    """Time what can be imported."""
    random = np.random.default_rng(0)
    volume = random.standard_normal((SIDE,) * 3).astype(np.float32)
    turns = rotations(random)
    for name, measure in (("aspire", aspire), ("torch_projectors", torch_projectors)):
        if importlib.util.find_spec(name) is None:
            print(f"{name} is not installed: skipped")
        else:
            measure(volume, turns)


if __name__ == "__main__":
    main()
