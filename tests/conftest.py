"""Double precision, and no silent promotion, so that laws can be tight.

Compiled programs are kept from one run to the next, and shared by all processes:
compilation is most of the tests' time.
"""

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import jax
import pytest

ROOT = Path(__file__).resolve().parents[1]
KEPT = {
    "JAX_COMPILATION_CACHE_DIR": str(ROOT / ".pytest_cache" / "jax"),
    "JAX_COMPILATION_CACHE_MAX_SIZE": 2**30,  # a limit also makes JAX lock the folder
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": 0.2,
}
for name, value in KEPT.items():
    os.environ[name] = str(value)  # for the programs that tests start
    jax.config.update(name.lower(), value)
jax.config.update("jax_enable_x64", True)
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_numpy_dtype_promotion", "strict")

# A shell ignores these for what it runs in the background, and so would the programs
# that tests start and stop.
for name in ("SIGINT", "SIGHUP"):
    number = getattr(signal, name, None)
    if number is not None and signal.getsignal(number) == signal.SIG_IGN:
        is_stop = number == signal.SIGINT
        signal.signal(number, signal.default_int_handler if is_stop else signal.SIG_DFL)

DATA = ROOT.parent / "shared" / "data"


def pytest_configure(config: pytest.Config) -> None:
    """Compile the programs of the unit tests in less time, to slower code.

    They compute little. The longer tests, and all tests together, run the code that
    users run.
    """
    if config.getoption("markexpr") == "not slow":
        os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"
        jax.config.update("jax_disable_most_optimizations", True)


@pytest.fixture(autouse=True, scope="module")
def _few_compiled_programs() -> Iterator[None]:
    """Drop the compiled programs of the modules before, if they are many.

    Each takes up mappings of memory, of which Linux allows a process 65,530 by default;
    XLA crashes at the next one.
    """
    yield
    mappings = Path("/proc/self/maps")
    if mappings.exists() and mappings.read_bytes().count(b"\n") > 20_000:
        jax.clear_caches()


@pytest.fixture
def data_dir() -> Path:
    """The folder of real maps and particles, which a user's clone does not have."""
    if not DATA.is_dir():
        pytest.skip(f"the folder of real maps is absent: {DATA}")
    return DATA
