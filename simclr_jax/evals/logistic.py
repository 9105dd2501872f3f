"""Multinomial logistic regression on fixed features, by L-BFGS (paper, appendix B.8)."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from simclr_jax.console import Progress
from simclr_jax.errors import UserError
from simclr_jax.mesh import batch_sharded, laid_out

# The norm of the gradient at which a fit ends; features have mean square norm 1. At the smallest lambdas the optimum
# is flat: on digits a norm of 1e-5 would leave the objective 20 % above the optimum at lambda 1e-3, and 1e-7 leaves
# it 0.2 % above at lambda 1e-6.
_TOLERANCE, _TOLERANCE_OF_LAMBDAS = 1e-5, 1e-7

# A fit that only chooses ends when ten iterations lower the objective by less than this share of it. On 4,000 images of
# Fashion-MNIST the 45 fits then take 9 in place of 24 s of CPU time (features of width 192; 37 in place of 103 s for
# pixels), end up to 5 % higher at the smallest lambdas and 0.2 % at the chosen one, and choose the same.
ROUGHLY = 1e-3
_LOOKED_AT_EVERY = 10

# Every direction of the basis is taken to have at least this share of the largest variance. Directions that are 0 in
# nearly all images would otherwise be stretched so far that a fit ends above the optimum (digits, lambda 1e-6: by
# 38 % with 0, 0.1 % with 1e-4 and 0.6 % with 1e-2).
_LEAST_VARIANCE = 1e-4

# Numbers in the features, above which a fit is divided over the devices. Below, each device would
# wait longer for the others than it computes.
_DIVIDE_FROM = 2**24


def fit_logistic(x, y, l2, classes: int, max_iterations: int) -> dict:
    """Minimises mean cross-entropy + l2 / 2 * |kernel|^2; the bias is not penalised.

    Args:
      x: features float32 [n, D].
      y: labels int [n]; rows of -1 do not count. Or int [n, C], for images of several labels each: 1:
        image i is of the class; 0: it is not; -1: it does not count. Each class then has a binary
        classifier, and the cross-entropy of an image is the sum of theirs.
      l2: weight of the penalty, a scalar of at least 0.
      classes: C.
      max_iterations: most iterations of L-BFGS, which stops earlier when the gradient's norm is below 1e-5.

    Returns:
      {"kernel": [D, C], "bias": [C]}
    """
    start = {"kernel": jnp.zeros((x.shape[1], classes)), "bias": jnp.zeros(classes)}
    return fit_from(start, x, y, l2, max_iterations, Until())[0]


class Until(NamedTuple):
    """When a fit ends.

    Attributes:
      tolerance: it ends where the gradient's norm is below this.
      enough: it also ends where ten iterations lower the objective by less than this share of it; 0: where ten
        iterations raise it.
    """

    tolerance: float = _TOLERANCE
    enough: float = 0.0


class _Fit(NamedTuple):
    """A fit on its way: see `fit_from`."""

    weights: dict
    state: Any
    norm: Any
    iteration: Any
    before: Any  # the objective, ten iterations before `last`
    last: Any


@functools.partial(jax.jit, static_argnames=("max_iterations",))
def fit_from(
    start: dict, x, y, l2, max_iterations: int, until: Until, basis=None
) -> tuple[dict, jax.Array]:
    """Fits like `fit_logistic`, from other weights than 0.

    Args:
      start: {"kernel": [D, C], "bias": [C]}.
      x, y, l2, max_iterations: see `fit_logistic`.
      until: when it ends before `max_iterations`.
      basis: [D, D]: the weights are those of features x @ basis, which L-BFGS may find better conditioned, and the
        penalty is on basis @ kernel; None: of x.

    Returns:
      the weights, and whether they meet `until`.
    """
    counts = (y >= 0).astype(start["bias"].dtype)
    n = jnp.sum(counts if y.ndim == 1 else jnp.any(y >= 0, axis=1))

    def objective(weights):
        if basis is not None:
            weights = weights | {"kernel": basis @ weights["kernel"]}
        found = logits(weights, x)
        if y.ndim == 1:
            losses = optax.softmax_cross_entropy_with_integer_labels(found, jnp.maximum(y, 0))
        else:
            losses = optax.sigmoid_binary_cross_entropy(found, jnp.maximum(y, 0))
        return jnp.sum(counts * losses) / n + l2 / 2 * jnp.sum(weights["kernel"] ** 2)

    solver = optax.lbfgs()
    value_and_grad = optax.value_and_grad_from_state(objective)

    def iterate(fit):
        value, grad = value_and_grad(fit.weights, state=fit.state)
        updates, state = solver.update(
            grad, fit.state, fit.weights, value=value, grad=grad, value_fn=objective
        )
        look = fit.iteration % _LOOKED_AT_EVERY == 0
        return _Fit(
            optax.apply_updates(fit.weights, updates),
            state,
            optax.tree.norm(grad),
            fit.iteration + 1,
            jnp.where(look, fit.last, fit.before),
            jnp.where(look, value, fit.last),
        )

    def converged(fit):
        slow = fit.before - fit.last < until.enough * fit.last
        return (fit.norm <= until.tolerance) | (slow & (fit.iteration > 2 * _LOOKED_AT_EVERY))

    def unfinished(fit):
        return ~converged(fit) & (fit.iteration < max_iterations)

    infinite = jnp.full((), jnp.inf, start["bias"].dtype)
    begun = _Fit(start, solver.init(start), infinite, 0, infinite, infinite)
    found = jax.lax.while_loop(unfinished, iterate, begun)
    return found.weights, converged(found)


@jax.jit
def logits(weights: dict, x):
    """Computes logits [n, C] of features x [n, D]."""
    # HIGHEST: TPUs would round to bfloat16 and an H100 to TF32, where a line search finds no descent.
    return jnp.matmul(x, weights["kernel"], precision=jax.lax.Precision.HIGHEST) + weights["bias"]


@jax.jit
def accuracy(weights: dict, x, y):
    """Computes the share of rows of x [n, D] whose largest logit is that of the label y [n]."""
    return jnp.mean(jnp.argmax(logits(weights, x), axis=-1) == y)


def scale(train: np.ndarray, *rest: np.ndarray) -> tuple[np.ndarray, ...]:
    """Returns (train, *rest), all features [n, D] less the mean of `train` and divided by one number, so
    that the mean square norm of `train` is 1: an l2 then means the same for features of any size.
    """
    mean, factor = _mean_and_factor(train)
    return tuple((x - mean) * np.float32(factor) for x in (train, *rest))


def _mean_and_factor(x: np.ndarray) -> tuple[np.ndarray, float]:
    # In float32 the sum of a million rows near 3 is off by 0.8 %.
    mean = x.mean(axis=0, dtype=np.float64).astype(x.dtype)
    return mean, float(1 / np.sqrt(np.mean(np.sum((x - mean) ** 2, axis=1)) + 1e-12))


def divided(mesh: Mesh | None, x: np.ndarray, y: np.ndarray) -> tuple[Any, Any]:
    """Lays features x [n, D] and labels y [n] or [n, C] out over the devices of `mesh`, padded with rows of
    label -1, which fits ignore. Returns them as they are if there is no mesh, or the problem is too small
    to be worth dividing.
    """
    if mesh is None or mesh.size == 1 or x.size < _DIVIDE_FROM:
        return x, y
    n = -(-len(x) // mesh.size) * mesh.size
    x = np.concatenate([x, np.zeros((n - len(x), x.shape[1]), x.dtype)])
    y = np.concatenate([y, np.full((n - len(y), *y.shape[1:]), -1, y.dtype)])
    sharding = batch_sharded(mesh)
    return laid_out(x, sharding), laid_out(y, sharding)


def to_host(weights: dict) -> dict:
    """Copies fitted weights to NumPy arrays."""
    return jax.tree.map(np.asarray, weights)


def fit_lambdas(
    x: np.ndarray,
    y: np.ndarray,
    lambdas,
    classes: int,
    max_iterations: int,
    mesh: Mesh | None = None,
    enough: float = 0.0,
) -> tuple[list[dict], list[float]]:
    """Finds the weights that minimise sum of cross-entropies + lambda / 2 * |kernel|^2, for each lambda.

    Starts with the strongest lambda; each fit begins where the one before ended. Internally the features are
    centred, which the free bias makes up for, and scaled, with the lambda scaled to match: the optimum is the
    same, and takes fewer iterations. Works in float64: in float32 the smallest lambdas end up to 57 % above
    the optimum on digits, and only after "max_iterations", which takes six times as long. L-BFGS works in a
    basis in which the Hessian at weights of 0, the features' covariance / C + the penalty, is the unit matrix.

    Args:
      x, y, classes: see `fit_logistic`.
      lambdas: weights of the penalty.
      max_iterations: each fit does at most as many iterations of L-BFGS.
      mesh: all devices; None: one.
      enough: see `Until`; for all but the smallest lambda.

    Returns:
      the weights for each lambda, as `fit_logistic` has them, and the lambdas whose fit ended at "max_iterations".

    Raises:
      UserError: the features are not finite.
    """
    mean, factor = _mean_and_factor(x)
    x = (x - mean) * np.float32(factor)
    kernel, bias = np.zeros((x.shape[1], classes)), np.zeros(classes)
    covariance = (x.T @ x / len(x)).astype(np.float64)
    if not np.isfinite(covariance).all():
        raise UserError("the features hold numbers that are not finite: the encoder has diverged")
    variances, axes = np.linalg.eigh(covariance)
    counted = np.count_nonzero(y >= 0 if y.ndim == 1 else np.any(y >= 0, axis=1))
    found, unfinished = {}, []
    with jax.enable_x64(True), Progress(len(lambdas)) as progress:
        rows = divided(mesh, x, y)
        for value in progress.track(sorted(lambdas, reverse=True)):
            l2 = value * factor**2 / counted
            scales = np.sqrt(np.maximum(variances, _LEAST_VARIANCE * variances[-1]) / classes + l2)
            basis = axes / scales
            start = {"kernel": scales[:, None] * (axes.T @ kernel), "bias": bias}
            until = Until(_TOLERANCE_OF_LAMBDAS, enough if value > min(lambdas) else 0.0)
            fitted, done = fit_from(start, *rows, l2, max_iterations, until, basis)
            unfinished += [] if done else [value]
            kernel, bias = basis @ np.asarray(fitted["kernel"]), np.asarray(fitted["bias"])
            own = kernel * factor
            found[value] = {"kernel": own, "bias": bias - mean @ own}
    return [found[value] for value in lambdas], unfinished
