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
from jax.scipy.sparse.linalg import cg
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
    rho, rho_v = config.rho, config.rho_nonnegative
    nonnegative = rho_v is not None
    if rho_v is None:
        rho_v = jnp.zeros_like(rho)
    inside = data.restrict(state.coefficients)
    state = eqx.tree_at(lambda s: s.coefficients, state, inside)
    u, v = _split(state, config, regulariser)

    def normal_equations(c: Volume) -> Volume:
        smooth = rho * tv.gradient_adjoint(tv.gradient(c))
        applied = normal.apply_normal(data.transfer, c) + smooth + rho_v * c
        return data.restrict(applied)

    right_hand_side = data.backprojection + tv.gradient_adjoint(rho * u - state.dual)
    if nonnegative:
        right_hand_side = right_hand_side + rho_v * v - state.dual_nonnegative
    right_hand_side = data.restrict(right_hand_side)
    precondition = normal.circulant_inverse(data.preconditioner, rho, rho_v)
    c, _ = cg(
        normal_equations,
        right_hand_side,
        x0=state.coefficients,
        tol=config.cg_tolerance,
        maxiter=config.cg_iterations,
        M=lambda residual: data.restrict(precondition(residual)),
    )
    normal_c = normal.apply_normal(data.transfer, c)
    slack = tv.gradient(c) - u
    smooth = rho * tv.gradient_adjoint(tv.gradient(c))
    residual = right_hand_side - data.restrict(normal_c + smooth + rho_v * c)
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
    return next_state, info


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

    def body(state, _):
        return step(state, data, config, regulariser)

    return jax.lax.scan(body, state, None, length=config.iterations)
