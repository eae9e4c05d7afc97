r"""Algorithm 2: the density map at fixed poses, by ADMM.

.. math:: \min_c \tfrac12\|g - H c\|^2 + \lambda R(L c)
   \quad\text{split as}\quad u = L c \qquad\text{(eqs. 11, 12)}

by the alternating direction method of multipliers (Boyd, Parikh, Chu, Peleato and
Eckstein, Found. Trends Mach. Learn. 3, 2011) with the augmented Lagrangian (26), and
optionally :math:`c \ge 0` through a second split :math:`v = c`. One iteration is

.. math::
   u &\leftarrow \mathrm{prox}_{\lambda R/\rho}(L c + \tilde u/\rho) \\
   c &\leftarrow \text{solve } (H^T H + \rho L^T L)\, c
        = H^T g + \rho L^T (u - \tilde u/\rho) \qquad (30) \\
   \tilde u &\leftarrow \tilde u + \rho\,(L c - u)

The printed eq. (28) has ``prox(L c - u~/rho)``; minimising (27) gives the plus sign
used here, with which (30) agrees.

The second update is solved approximately by preconditioned conjugate gradients; where
the data term has a support, for the coefficients of the support, all others being zero.
The multipliers are part of the state, so they persist when the data term changes
between outer iterations of the joint refinement.
"""

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxrefine._types import Images, Scalar, VectorField, Volume
from jaxrefine.geometry import Poses
from jaxrefine.maps import tv
from jaxrefine.operators import normal
from jaxrefine.operators.spatial import Footprint, ImageFilter, backproject

_HIGHEST = jax.lax.Precision.HIGHEST


class DataTerm(eqx.Module):
    r"""The quadratic :math:`\tfrac12\|g - Hc\|^2` at fixed poses.

    Attributes
    ----------
    transfer
        Transfer of the kernel ``w(Theta)``, eq. (32).
    preconditioner
        Eigenvalues of a circulant approximation of the normal operator.
    backprojection
        ``H^T g``, eq. (33).
    energy
        ``||g||^2 / 2``.
    support
        1 for coefficients that may differ from zero, 0 for others; None for all.
    """

    transfer: Float[Array, "f f h"]
    preconditioner: Float[Array, "n n g"]
    backprojection: Volume
    energy: Scalar
    support: Volume | None = None

    def restrict(self, coefficients: Volume) -> Volume:
        """Set the coefficients outside of the support to zero."""
        return coefficients if self.support is None else self.support * coefficients

    def value(self, coefficients: Volume, normal_coefficients: Volume) -> Scalar:
        """Return the data term, given ``c`` and ``H^T H c``."""
        return (
            0.5 * jnp.vdot(coefficients, normal_coefficients, precision=_HIGHEST)
            - jnp.vdot(coefficients, self.backprojection, precision=_HIGHEST)
            + self.energy
        )


@eqx.filter_jit
def data_term(
    footprint: Footprint,
    image_filter: ImageFilter,
    images: Images,
    poses: Poses,
    n: int,
    batch_size: int = 8,
) -> DataTerm:
    """Return the data term of images at fixed poses, by one pass over the images.

    Parameters
    ----------
    footprint
        The footprint ``psi`` and its autocorrelation.
    image_filter, images, poses, n, batch_size
        As for :func:`jaxrefine.operators.spatial.backproject`, which also tells the
        errors raised.
    """
    kernel = normal.kernel(footprint, poses.rotations, n)
    return DataTerm(
        normal.transfer(kernel),
        normal.circulant_eigenvalues(kernel),
        backproject(image_filter, images, poses, n, batch_size),
        0.5 * jnp.sum(images**2),
    )


class ADMMConfig(eqx.Module):
    """Parameters of the volume update.

    Numbers that a sweep may vary are traced; loop lengths are static.

    Parameters
    ----------
    lam
        Weight ``lambda`` of the regulariser.
    rho
        Penalty of the split ``u = L c``.
    rho_nonnegative
        Penalty of the split ``v = c >= 0``; None leaves the sign free.
    iterations
        ADMM iterations, the paper's ``K_ADMM``.
    cg_iterations
        Maximum number of conjugate-gradient iterations in each ADMM iteration.
    cg_tolerance
        Relative residual at which the conjugate gradients stop.
    """

    lam: Float[Array, ""] = eqx.field(converter=jnp.asarray)
    rho: Float[Array, ""] = eqx.field(converter=jnp.asarray)
    rho_nonnegative: Float[Array, ""] | None = eqx.field(
        default=None, converter=lambda v: None if v is None else jnp.asarray(v)
    )
    iterations: int = eqx.field(static=True, default=5)
    cg_iterations: int = eqx.field(static=True, default=20)
    cg_tolerance: float = eqx.field(static=True, default=1e-4)


class ADMMState(eqx.Module):
    """The state that an iteration passes to the next.

    Attributes
    ----------
    coefficients
        Coefficients ``c`` of side ``n``.
    dual
        Multiplier ``u~`` of the split ``u = L c``.
    dual_nonnegative
        Multiplier of the split ``v = c``; zero without the constraint.
    """

    coefficients: Volume
    dual: VectorField
    dual_nonnegative: Volume


class ADMMInfo(eqx.Module):
    """Diagnostics of each iteration (leading axis: iterations).

    Attributes
    ----------
    objective
        The joint cost (10) at the new coefficients.
    data_term, regularisation
        Its two terms, ``1/2 ||g - H c||^2`` and ``lambda R(L c)``.
    primal_residual, dual_residual
        ``||L c - u||`` and ``rho ||L^T (u_next - u)||``, see section 3.3 of Boyd et al.
        (2011).
    nonnegativity_residual
        ``||c - v||``, zero without the constraint.
    cg_residual
        Relative residual of (30) after the conjugate gradients.
    """

    objective: Float[Array, "..."]
    data_term: Float[Array, "..."]
    regularisation: Float[Array, "..."]
    primal_residual: Float[Array, "..."]
    dual_residual: Float[Array, "..."]
    nonnegativity_residual: Float[Array, "..."]
    cg_residual: Float[Array, "..."]


@jax.jit
def init(coefficients: Volume) -> ADMMState:
    """Start from given coefficients, with zero multipliers."""
    zero = jnp.zeros_like(coefficients)
    return ADMMState(coefficients, jnp.stack([zero] * 3), zero)


def _split(state: ADMMState, config: ADMMConfig, regulariser: tv.Regulariser):
    """Minimise (26) over ``u`` and ``v``: eq. (28) with the sign corrected."""
    field = tv.gradient(state.coefficients) + state.dual / config.rho
    u = regulariser.prox(field, config.lam / config.rho)
    if config.rho_nonnegative is None:
        return u, jnp.zeros_like(state.coefficients)
    shifted = state.coefficients + state.dual_nonnegative / config.rho_nonnegative
    return u, jnp.maximum(shifted, 0.0)


def step(
    state: ADMMState,
    data: DataTerm,
    config: ADMMConfig,
    regulariser: tv.Regulariser,
) -> tuple[ADMMState, ADMMInfo]:
    """Make one iteration of Algorithm 2.

    Parameters
    ----------
    state
        Coefficients of side ``n``, and multipliers.
    data
        The data term.
    config
        Weight and penalties, in the precision of the coefficients.
    regulariser
        Prior on the map's gradient.

    Returns
    -------
    state
        The new state.
    info
        Diagnostics of this iteration.
    """
    state, _, info = _step(*_begin(state, data), data, config, regulariser)
    return state, info


def _begin(state: ADMMState, data: DataTerm) -> tuple[ADMMState, Volume]:
    """Return the state within the support, and ``H^T H c``."""
    inside = data.restrict(state.coefficients)
    state = eqx.tree_at(lambda s: s.coefficients, state, inside)
    return state, normal.apply_normal(data.transfer, inside)


def _step(
    state: ADMMState,
    normal_c: Volume,
    data: DataTerm,
    config: ADMMConfig,
    regulariser: tv.Regulariser,
) -> tuple[ADMMState, Volume, ADMMInfo]:
    """Make one iteration, given ``H^T H c``; also return that of the new ``c``."""
    rho, rho_v = config.rho, config.rho_nonnegative
    nonnegative = rho_v is not None
    if rho_v is None:
        rho_v = jnp.zeros_like(rho)
    u, v = _split(state, config, regulariser)
    right_hand_side = data.backprojection + tv.gradient_adjoint(rho * u - state.dual)
    if nonnegative:
        right_hand_side = right_hand_side + rho_v * v - state.dual_nonnegative
    right_hand_side = data.restrict(right_hand_side)
    c, normal_c, residual = _conjugate_gradients(
        state.coefficients, normal_c, right_hand_side, data, config
    )
    slack = tv.gradient(c) - u
    next_state = ADMMState(
        c,
        state.dual + rho * slack,
        state.dual_nonnegative + rho_v * (c - v),
    )
    next_u, _ = _split(next_state, config, regulariser)
    value = data.value(c, normal_c)
    penalty = config.lam * regulariser.value(tv.gradient(c))
    norm, zero = jnp.linalg.norm, jnp.zeros_like(value)
    info = ADMMInfo(
        objective=value + penalty,
        data_term=value,
        regularisation=penalty,
        primal_residual=norm(slack.ravel()),
        dual_residual=rho * norm(tv.gradient_adjoint(next_u - u).ravel()),
        nonnegativity_residual=norm((c - v).ravel()) if nonnegative else zero,
        cg_residual=norm(residual.ravel())
        / jnp.maximum(
            norm(right_hand_side.ravel()), jnp.finfo(right_hand_side.dtype).tiny
        ),
    )
    return next_state, normal_c, info


def _conjugate_gradients(
    c: Volume,
    normal_c: Volume,
    right_hand_side: Volume,
    data: DataTerm,
    config: ADMMConfig,
) -> tuple[Volume, Volume, Volume]:
    """Solve (30) by preconditioned conjugate gradients, from ``c``.

    ``H^T H c`` is the expensive part of the operator. It is known at the start and is
    updated together with ``c``, so each iteration applies it once, and the start not at
    all, which is why this is not ``jax.scipy.sparse.linalg.cg``.

    Returns
    -------
    The new ``c``, its ``H^T H c``, and the residual.
    """
    rho, rho_v = config.rho, config.rho_nonnegative
    if rho_v is None:
        rho_v = jnp.zeros_like(rho)

    def penalties(c: Volume) -> Volume:
        return rho * tv.gradient_adjoint(tv.gradient(c)) + rho_v * c

    def dot(a: Volume, b: Volume) -> Scalar:
        return jnp.vdot(a, b, precision=_HIGHEST)

    precondition = normal.circulant_inverse(data.preconditioner, rho, rho_v)
    largest = config.cg_tolerance**2 * dot(right_hand_side, right_hand_side)

    def unsolved(carry):
        count, _, _, residual, *_ = carry
        return (count < config.cg_iterations) & (dot(residual, residual) > largest)

    def iterate(carry):
        count, c, normal_c, residual, direction, before = carry
        towards = data.restrict(precondition(residual))
        descent = dot(residual, towards)
        ratio = jnp.where(count > 0, descent / before, 0.0)
        direction = towards + ratio * direction
        product = normal.apply_normal(data.transfer, direction)
        image = data.restrict(product + penalties(direction))
        length = descent / dot(direction, image)
        return (
            count + 1,
            c + length * direction,
            normal_c + length * product,
            residual - length * image,
            direction,
            descent,
        )

    residual = right_hand_side - data.restrict(normal_c + penalties(c))
    start = (0, c, normal_c, residual, jnp.zeros_like(c), jnp.ones_like(largest))
    _, c, normal_c, residual, *_ = jax.lax.while_loop(unsolved, iterate, start)
    return c, normal_c, residual


@eqx.filter_jit
def run(
    state: ADMMState,
    data: DataTerm,
    config: ADMMConfig,
    regulariser: tv.Regulariser,
) -> tuple[ADMMState, ADMMInfo]:
    """Make ``config.iterations`` iterations of Algorithm 2; parameters as of `step`.

    Returns
    -------
    state
        The final state.
    info
        Diagnostics of all iterations, stacked along a leading axis.
    """
    dtype = state.coefficients.dtype
    config = jax.tree.map(lambda leaf: leaf.astype(dtype), config)

    def body(carry, _):
        state, normal_c = carry
        state, normal_c, info = _step(state, normal_c, data, config, regulariser)
        return (state, normal_c), info

    begin = _begin(state, data)
    (state, _), info = jax.lax.scan(body, begin, None, length=config.iterations)
    return state, info
