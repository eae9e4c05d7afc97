"""Double precision, and no silent promotion, so that laws can be tight."""

from pathlib import Path

import jax
import pytest

jax.config.update("jax_enable_x64", True)
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_numpy_dtype_promotion", "strict")

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"


@pytest.fixture
def data_dir() -> Path:
    """The folder of real maps and particles, which a user's clone does not have."""
    if not DATA.is_dir():
        pytest.skip(f"the folder of real maps is absent: {DATA}")
    return DATA
