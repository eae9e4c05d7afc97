"""What JAX is told before a command runs, and only then: never by an import.

- Compiled programs are kept in the user's cache folder, so that the next run need not
  compile them again. ``JAXREFINE_CACHE`` names another folder, or turns this off (0).
  ``JAX_COMPILATION_CACHE_DIR``, which is JAX's own, is left as it is.
- The cores of a CPU are JAX's devices, up to eight, which particles are shared out
  among, or as many of them as ``--devices`` says. ``JAX_NUM_CPU_DEVICES``, which is
  JAX's own, says how many there are instead.
- ``--devices`` takes the first of the GPUs, or the first of those that
  ``JAX_CUDA_VISIBLE_DEVICES`` or ``JAX_ROCM_VISIBLE_DEVICES`` name.
"""

import hashlib
import os
import platform
import warnings
from pathlib import Path

import jax
from jaxlib import version

from jaxrefine.errors import InputError
from jaxrefine.runs.provenance import available_cores

_MOST_DEVICES = 8
_OFF = "0"
_VISIBLE = ("jax_cuda_visible_devices", "jax_rocm_visible_devices")


def set_up(devices: int | None = None) -> None:
    """Tell JAX; to be called before it is used.

    Parameters
    ----------
    devices
        How many devices to use; None for all.
    """
    there = int(os.environ.get("JAX_NUM_CPU_DEVICES", "-1"))  # negative for unknown
    if devices is not None:
        cores = available_cores() if there < 0 else there
        jax.config.update("jax_num_cpu_devices", min(devices, cores))
        for name in _VISIBLE:
            visible = os.environ.get(name.upper(), "all")
            named = range(devices) if visible == "all" else visible.split(",")
            jax.config.update(name, ",".join(map(str, named[:devices])))
    elif there < 0:
        jax.config.update("jax_num_cpu_devices", min(available_cores(), _MOST_DEVICES))
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        folder = cache_folder()
        if folder is not None and _can_be_written(folder):
            jax.config.update("jax_compilation_cache_dir", str(folder))
            jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
            jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
            # An entry that another run is writing is compiled instead: nothing to say.
            warnings.filterwarnings("ignore", message=".*compilation cache entry.*")


def check_devices(asked: int | None) -> None:
    """Check that JAX has as many devices as were asked for.

    Raises
    ------
    InputError
        If there are not so many; or if there are more, since this process has begun to
        use them all before, or they cannot be taken apart.
    """
    count = jax.local_device_count()
    if asked is None or asked == count:
        return
    kind = jax.local_devices()[0].device_kind
    if asked > count:
        raise InputError(f"--devices must be at most {count} ({kind}), got {asked}")
    raise InputError(
        f"--devices must be {count}, as many as JAX uses in this process already "
        f"({kind}), got {asked}"
    )


def cache_folder() -> Path | None:
    """Return the folder of compiled programs; None if there is to be none.

    Programs are compiled for a version of jaxlib and for the features of a processor:
    machines that share a home folder have one each.
    """
    named = os.environ.get("JAXREFINE_CACHE")
    if named == _OFF:
        return None
    if named:
        root = Path(named)
    else:
        base = os.environ.get("XDG_CACHE_HOME")
        try:
            root = (Path(base) if base else Path.home() / ".cache") / "jaxrefine"
        except RuntimeError:  # there is no home folder
            return None
    machine = "\n".join([jax.__version__, version.__version__, *_features()])
    return root / hashlib.sha256(machine.encode()).hexdigest()[:16]


def _features() -> list[str]:
    """Return what distinguishes processors that programs are compiled for."""
    known = [platform.system(), platform.machine(), platform.processor()]
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return known
    keys = ("flags", "Features", "model name")
    return known + sorted({line for line in lines if line.startswith(keys)})


def _can_be_written(folder: Path) -> bool:
    """Make the folder; return whether this process may write to it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return False
    return os.access(folder, os.W_OK | os.X_OK)
