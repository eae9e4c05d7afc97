"""Joint refinement of poses and density map for single-particle cryo-EM, in JAX.

Three functions do the work, on data that fit together:

- :func:`refine` refines poses and map jointly, :func:`reconstruct` makes a map of
  particles at given poses, and :func:`match` finds poses by projection matching;
- :class:`Particles` are images with their optics (:class:`CTF`, and
  :class:`Aberrations` of groups), :class:`Poses` their orientations and shifts,
  :class:`RefineConfig` the parameters, :class:`Result` what a refinement returns, and
  :class:`InputError` what is raised for bad input.

The packages are named after what they hold: ``operators`` (the basis, H, its adjoint,
H^T H), ``data`` (images), ``maps`` (the map at fixed poses), ``poses`` (the poses at a
fixed map), ``refinement`` (both in turns), ``paper`` (the published algorithm),
``simulate`` and ``evaluation`` (synthetic data, and errors against a truth) and ``io``
(files).

Importing the package changes no configuration and opens no device. Its parts are
imported when they are first used.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
