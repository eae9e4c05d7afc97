"""Images as they are compared with maps: whitened spectra on a disc of frequencies.

Particles are visited in batches from wherever their images are kept. The result of a
particle depends neither on the batch that it is in nor on the size of the batches.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, final

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Complex, Float, Int

from jaxrefine._types import Images, Scalar
from jaxrefine.aberrations import Aberrations, magnified
from jaxrefine.ctf import CTF
from jaxrefine.data.particles import Particles
from jaxrefine.operators import slices
from jaxrefine.operators.complex import power
from jaxrefine.operators.slices import Disc

PART = 80
"""Frequencies that are compared at a time, where a band limit is not known beforehand.

It divides the number of frequencies of a view that `up_to` is to limit. The first band
limit of a refinement, 7 cycles per box, has 75 frequencies.
"""


@final
class Observation(eqx.Module):
    """An image as it is compared with a map.

    Attributes
    ----------
    disc
        Frequencies that are compared.
    weights
        Weight of each: in a cost that is to be a negative log-likelihood, its
        multiplicity over the power of the noise; `Disc.quadrature` makes the cost the
        paper's, of the band-limited image.
    spectrum
        Fourier coefficients of the image.
    transfer
        Contrast-transfer function, or None for 1.
    length
        How many of the frequencies count, the weights of all others being 0; None for
        all.
    magnification
        Matrix that maps the frequencies to those of the slice and the transfer
        function, see :mod:`jaxrefine.aberrations`; None for the identity.
    """

    disc: Disc
    weights: Float[Array, "k"]
    spectrum: Complex[Array, "k"]
    transfer: Float[Array, "k"] | None
    length: Int[Array, ""] | None = None
    magnification: Float[Array, "2 2"] | None = None

    def sum_over_parts(self, function: Callable[["Observation"], Any]) -> Any:
        """Sum a function of the image's frequencies, `PART` of them at a time.

        Only those that count are visited, so that one program serves all band limits.
        Without a `length` the function is called once, with the image itself.
        """
        if self.length is None:
            return function(self)

        def part(index):
            def cut(leaf):
                return jax.lax.dynamic_slice_in_dim(leaf, index * PART, PART)

            arrays = (self.disc, self.weights, self.spectrum, self.transfer)
            cut_out = jax.tree.map(cut, arrays)
            return Observation(*cut_out, magnification=self.magnification)

        def add(index, carry):
            total, seen = carry
            return jax.tree.map(jnp.add, total, function(seen)), part(index + 1)

        first = part(0)
        shapes = eqx.filter_eval_shape(function, first)
        zero = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
        # A part is cut out an iteration before it is used. Otherwise XLA would cut it
        # out anew for each element of every array that is computed from it.
        rounds = (self.length + PART - 1) // PART
        return jax.lax.fori_loop(0, rounds, add, (zero, first))[0]

    @property
    def energy(self) -> Scalar:
        r"""Cost of an empty map, :math:`\tfrac12 \sum_k w_k |y_k|^2`."""
        return jnp.sum(self.weights * power(self.spectrum)) / 2


@final
class View(eqx.Module):
    r"""How images are compared with maps: a band limit and the noise there.

    All groups of particles are seen with one noise, of the least power :math:`N` of
    all in each shell: the spectra of a group whose noise has the power :math:`N_g` and
    its transfer functions are multiplied by :math:`\sqrt{N / N_g}`, which leaves the
    likelihood as it is. The phases of a group's aberrations are taken from its spectra,
    which changes no noise.

    Attributes
    ----------
    disc
        Frequencies that are compared.
    weights
        Multiplicity over the power of the noise; zero at the origin, since an image's
        mean says much about the background, and in shells without power.
    inverse_noise
        One over the power of the noise in a *pixel*: its power in the spectrum over
        the number of pixels. Zero where the weights are.
    factor
        What each group's spectra and transfer functions are multiplied by; None if
        there is one group.
    frequencies_in_inverse_angstroms
        Frequencies of the disc, for the optics.
    length
        How many of the frequencies are compared, the weights of all others being 0;
        None for all.
    phase, gamma, magnification
        The factor :math:`e^{i\chi}` of each group's spectra, the offset of its CTFs and
        the matrix that maps its frequencies, see :mod:`jaxrefine.aberrations`. None for
        what no group has.
    stretch
        What no frequency is lengthened by more than, at least 1; None without a
        magnification. Frequencies that the longest is mapped beyond the band limit are
        not compared.
    """

    disc: Disc
    weights: Float[Array, "k"]
    inverse_noise: Float[Array, "k"]
    factor: Float[Array, "groups k"] | None
    frequencies_in_inverse_angstroms: Float[Array, "k 2"]
    length: Int[Array, ""] | None = None
    phase: Complex[Array, "groups k"] | None = None
    gamma: Float[Array, "groups k"] | None = None
    magnification: Float[Array, "groups 2 2"] | None = None
    stretch: Float[Array, ""] | None = None

    def up_to(self, r_max: Int[Array, ""]) -> "View":
        """Return the view up to a lower band limit, cycles per box.

        The arrays keep their shapes, so that one program serves all band limits.
        Frequencies beyond the limit are moved to the origin.

        Raises
        ------
        ValueError
            If the number of frequencies is not a multiple of `PART`.
        """
        disc = self.disc
        if len(disc.shells) % PART:
            raise ValueError(
                f"the number of frequencies must be a multiple of {PART}, got "
                f"{len(disc.shells)}"
            )
        squares = jnp.sum(disc.frequencies**2, axis=-1)
        if self.stretch is not None:
            squares = squares * self.stretch.astype(squares.dtype) ** 2
        limit = (r_max * r_max).astype(squares.dtype)
        inside = (squares <= limit) & (disc.multiplicity > 0)
        frequencies = jnp.where(inside[:, None], disc.frequencies, 0.0)
        return replace(
            self,
            disc=replace(disc, frequencies=frequencies),
            weights=jnp.where(inside, self.weights, 0.0),
            length=jnp.sum(inside.astype(jnp.int32)),
        )

    def observation(
        self,
        spectrum: Complex[Array, "k"],
        transfer: Float[Array, "k"] | None,
        magnification: Float[Array, "2 2"] | None = None,
    ) -> Observation:
        """Return one of the images that were `seen`: of each array, its row."""
        return Observation(
            self.disc, self.weights, spectrum, transfer, self.length, magnification
        )

    def seen(
        self, images: Images, ctf: CTF | None, group: Int[Array, "particles"] | None
    ) -> tuple[
        Complex[Array, "particles k"],
        Float[Array, "particles k"] | None,
        Float[Array, "particles 2 2"] | None,
    ]:
        """Return `spectra`, `transfer` and `magnifications` of particles."""
        spectra, transfer = self.spectra(images, group), self.transfer(ctf, group)
        return spectra, transfer, self.magnifications(group)

    def spectra(
        self, images: Images, group: Int[Array, "particles"] | None
    ) -> Complex[Array, "particles k"]:
        """Return the images' spectra on the disc, at the common noise."""
        spectra = slices.image_spectra(images, self.disc)
        if self.phase is not None:
            spectra = spectra * jnp.conj(self.phase)[group].astype(spectra.dtype)
        if self.factor is None:
            return spectra
        return spectra * self.factor[group].astype(spectra.dtype)

    def transfer(
        self, ctf: CTF | None, group: Int[Array, "particles"] | None
    ) -> Float[Array, "particles k"] | None:
        """Return the particles' transfer functions on the disc, at the common noise."""
        factor = None if self.factor is None else self.factor[group]
        if ctf is None:
            return factor
        frequencies = self.frequencies_in_inverse_angstroms
        gamma = None if self.gamma is None else self.gamma[group]

        def of_particle(optics, gamma, magnification):
            return optics(magnified(magnification, frequencies), gamma)

        values = jax.vmap(of_particle)(ctf, gamma, self.magnifications(group))
        return values if factor is None else values * factor

    def magnifications(
        self, group: Int[Array, "particles"] | None
    ) -> Float[Array, "particles 2 2"] | None:
        """Return the matrices that map the particles' frequencies; None without any."""
        return None if self.magnification is None else self.magnification[group]


def relative_precision(
    noise: Float[Array, "groups shells"],
) -> Float[Array, "groups shells"]:
    """Return one over each group's noise, in units of the least of all in a shell.

    From 0, of infinite noise, to 1; also 1 where the noise of all groups is infinite.
    """
    least = jnp.min(noise, axis=0, keepdims=True)
    return jnp.where(noise > least, least / noise, 1.0)


def view(
    particles: Particles,
    r_max: int,
    noise: Float[Array, "*groups shells"],
    multiple: int = 1,
) -> View:
    """Compare up to ``r_max`` cycles per box, with the noise's power in each shell.

    Parameters
    ----------
    particles
        Images of which the size is read.
    r_max
        Band limit, cycles per box.
    noise
        Power of the noise, of every group or one for all particles.
    multiple
        The number of frequencies is filled up to a multiple of this, see `slices.disc`.
    """
    m = particles.image_size
    disc = slices.disc(m, r_max, multiple=multiple)
    side = m * particles.pixel_size_in_angstroms
    seen = _view(disc, jnp.asarray(side, noise.dtype), noise)
    if particles.aberrations is None:
        return seen
    return _aberrated(seen, particles.aberrations, particles.aberrations.stretch)


@eqx.filter_jit
def _view(
    disc: Disc,
    side_in_angstroms: Float[Array, ""],
    noise: Float[Array, "*groups shells"],
) -> View:
    """Return the view of a disc, of images of a given side."""
    m = disc.image_size
    noise = jnp.atleast_2d(noise)
    least = jnp.min(noise, axis=0)[disc.shells]
    inverse = jnp.where((disc.shells > 0) & (least < jnp.inf), m**2 / least, 0.0)
    weights = disc.multiplicity.astype(noise.dtype) * inverse / m**2
    factor = None
    if len(noise) > 1:
        factor = jnp.sqrt(relative_precision(noise))[:, disc.shells]
    frequencies = disc.frequencies.astype(noise.dtype)
    physical = frequencies / side_in_angstroms
    return View(disc, weights, inverse, factor, physical)


@eqx.filter_jit
def _aberrated(view: View, aberrations: Aberrations, stretch: float) -> View:
    """Return a view of images that have aberrations; see `Aberrations.stretch`."""
    frequencies = view.frequencies_in_inverse_angstroms
    view = replace(
        view, phase=aberrations.phase(frequencies), gamma=aberrations.gamma(frequencies)
    )
    if aberrations.magnification is None:
        return view
    disc, dtype = view.disc, view.weights.dtype
    squares = jnp.sum(disc.frequencies**2, axis=-1)
    inside = squares * stretch**2 <= disc.r_max**2

    def within(values):
        return jnp.where(inside, values, jnp.zeros_like(values))

    return replace(
        view,
        disc=replace(
            disc,
            frequencies=jnp.where(inside[:, None], disc.frequencies, 0.0),
            multiplicity=within(disc.multiplicity),
        ),
        weights=within(view.weights),
        inverse_noise=within(view.inverse_noise),
        magnification=aberrations.magnification.astype(dtype),
        stretch=jnp.asarray(stretch, dtype),
    )


def batches(
    indices: Int[np.ndarray, " chosen"], size: int
) -> Iterator[tuple[Int[np.ndarray, " size"], int]]:
    """Cut indices into batches of one size, the last one filled up by repetition.

    Yields each batch, and how many of it are not repetitions.
    """
    for first in range(0, len(indices), size):
        batch = indices[first : first + size]
        yield np.resize(batch, size), len(batch)
