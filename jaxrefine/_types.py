"""The array vocabulary: every shape that appears in a public signature.

Axis order follows MRC files. A volume is indexed ``[z, y, x]`` and an image
``[y, x]``, while *points* and *shifts* are written ``(x, y)`` or ``(x, y, z)``.
The origin of an axis of length ``n`` is the sample ``n // 2`` (RELION's choice).
Inside the package angles are radians and lengths are voxels.
"""

from jaxtyping import Array, Float

Volume = Float[Array, "n n n"]
"""A density map, or the coefficients of one, indexed ``[z, y, x]``."""

VectorField = Float[Array, "3 n n n"]
"""Three volumes: the components ``(x, y, z)`` of a field such as a gradient."""

Image = Float[Array, "m m"]
"""One projection image, indexed ``[y, x]``."""

Images = Float[Array, "particles m m"]
"""A stack of projection images."""

Angles = Float[Array, "*batch 3"]
"""Euler angles ``(rot, tilt, psi)`` in radians, RELION's ZYZ convention."""

Shifts = Float[Array, "*batch 2"]
"""Positions ``(x, y)`` of the particle in the image, in pixels from its origin."""

Rotations = Float[Array, "*batch 3 3"]
"""Rotation matrices, acting on column vectors ``(x, y, z)``."""

Points2 = Float[Array, "*batch 2"]
"""Points ``(x, y)`` of the image plane."""

Points3 = Float[Array, "*batch 3"]
"""Points ``(x, y, z)`` of space."""

Scalar = Float[Array, ""]
"""A real number."""
