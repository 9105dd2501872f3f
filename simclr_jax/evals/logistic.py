"""Multinomial logistic regression on fixed features, by L-BFGS (paper, appendix B.8)."""

import functools
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from simclr_jax.mesh import batch_sharded, laid_out

# The norm of the gradient at which a fit ends; features have mean square norm 1. At the smallest of
# the lambdas the optimum is flat: on digits 1e-5 would leave the objective 20 % above it at 1e-3, and
# 1e-7 leaves it 0.2 % above at 1e-6.
_TOLERANCE, _TOLERANCE_OF_LAMBDAS = 1e-5, 1e-7

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
      max_iterations: of L-BFGS; it stops earlier when the gradient's norm is below 1e-5.

    Returns:
      {"kernel": [D, C], "bias": [C]}
    """
    start = {"kernel": jnp.zeros((x.shape[1], classes)), "bias": jnp.zeros(classes)}
    return fit_from(start, x, y, l2, max_iterations)[0]


@functools.partial(jax.jit, static_argnames=("max_iterations",))
def fit_from(
    start: dict, x, y, l2, max_iterations: int, tolerance=_TOLERANCE
) -> tuple[dict, jax.Array]:
    """Fits like `fit_logistic`, from the weights `start`, {"kernel": [D, C], "bias": [C]}, until the
    gradient's norm is below `tolerance`. Returns the weights, and whether it came to that.
    """
    counts = (y >= 0).astype(start["bias"].dtype)
    n = jnp.sum(counts if y.ndim == 1 else jnp.any(y >= 0, axis=1))

    def objective(weights):
        logits = _logits(weights, x)
        if y.ndim == 1:
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.maximum(y, 0))
        else:
            losses = optax.sigmoid_binary_cross_entropy(logits, jnp.maximum(y, 0))
        return jnp.sum(counts * losses) / n + l2 / 2 * jnp.sum(weights["kernel"] ** 2)

    solver = optax.lbfgs()
    value_and_grad = optax.value_and_grad_from_state(objective)

    def iterate(carry):
        weights, state, _, iteration = carry
        value, grad = value_and_grad(weights, state=state)
        updates, state = solver.update(
            grad, state, weights, value=value, grad=grad, value_fn=objective
        )
        return optax.apply_updates(weights, updates), state, optax.tree.norm(grad), iteration + 1

    def unfinished(carry):
        *_, norm, iteration = carry
        return (norm > tolerance) & (iteration < max_iterations)

    carry = (start, solver.init(start), jnp.inf, 0)
    weights, _, norm, _ = jax.lax.while_loop(unfinished, iterate, carry)
    return weights, norm <= tolerance


@jax.jit
def predict(weights: dict, x):
    """Predicts the class [n] of the largest logit for each row of x [n, D]."""
    return jnp.argmax(_logits(weights, x), axis=-1)


def _logits(weights: dict, x):
    # HIGHEST: TPUs would round to bfloat16 and an H100 to TF32, where a line search finds no descent.
    return jnp.matmul(x, weights["kernel"], precision=jax.lax.Precision.HIGHEST) + weights["bias"]


@jax.jit
def accuracy(weights: dict, x, y):
    """Computes the share of rows of x [n, D] whose largest logit is that of the label y [n]."""
    return jnp.mean(predict(weights, x) == y)


def scale(train: np.ndarray, *rest: np.ndarray) -> tuple[np.ndarray, ...]:
    """Returns (train, *rest), all features [n, D] less the mean of `train` and divided by one number, so
    that the mean square norm of `train` is 1: an l2 then means the same for features of any size.
    """
    mean, factor = _mean_and_factor(train)
    return tuple((x - mean) * np.float32(factor) for x in (train, *rest))


def _mean_and_factor(x: np.ndarray) -> tuple[np.ndarray, float]:
    mean = x.mean(axis=0)
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
    watch: Callable[[Iterable[float]], Iterable[float]] = iter,
) -> tuple[list[dict], list[float]]:
    """Finds the weights that minimise sum of cross-entropies + lambda / 2 * |kernel|^2, for each lambda.

    `watch` passes the lambdas on as they are fitted, such as `Progress.track`.

    Fitted from the strongest on, each beginning where the one before ended. Internally the features
    are centred, which the free bias takes up, and scaled, with the lambda scaled to match: the same
    optimum, reached in fewer iterations. In float64: in float32 the smallest lambdas end up to 57 % above
    it on digits, and only after "max_iterations", which takes six times as long.

    Returns:
      the weights for each lambda, as `fit_logistic` has them, and the lambdas whose fit ended at "max_iterations".
    """
    mean, factor = _mean_and_factor(x)
    x = (x - mean) * np.float32(factor)
    weights = {"kernel": np.zeros((x.shape[1], classes)), "bias": np.zeros(classes)}
    found, unfinished = {}, []
    with jax.enable_x64(True):
        rows = divided(mesh, x, y)
        for value in watch(sorted(lambdas, reverse=True)):
            l2 = value * factor**2 / len(y)
            fitted, done = fit_from(weights, *rows, l2, max_iterations, _TOLERANCE_OF_LAMBDAS)
            weights = to_host(fitted)
            unfinished += [] if done else [value]
            kernel = weights["kernel"] * factor
            found[value] = {"kernel": kernel, "bias": weights["bias"] - mean @ kernel}
    return [found[value] for value in lambdas], unfinished
