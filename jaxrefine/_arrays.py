"""Arrays that are put on a device without a program."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def on_device(values: Any) -> jax.Array:
    """Return values as an array of JAX, as ``jnp.asarray`` does.

    That function compiles a program for every shape of a NumPy array. Like there, the
    array is a copy: it does not change when the values do.
    """
    if isinstance(values, (np.ndarray, np.generic)):
        return jax.device_put(np.array(values))
    return jnp.asarray(values)
