"""Multinomial logistic regression on fixed features, by L-BFGS (paper, appendix B.8).

The regularisation is chosen on a validation part of the training split, never on the test split.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from simclr_jax.data.order import few_labels, split_validation
from simclr_jax.mesh import batch_sharded, laid_out

# The norm of the gradient at which a fit ends; features have mean square norm 1. At the smallest of
# the lambdas the optimum is flat: on digits 1e-5 would leave the objective 20 % above it at 1e-3.
_TOLERANCE, _TOLERANCE_OF_LAMBDAS = 1e-5, 1e-7

# The candidates of appendix B.8: 45, logarithmically spaced. They weigh |kernel|^2 / 2 beside the sum
# of the cross-entropies, so that scikit-learn's C is 1 / lambda; beside a mean 1e5 would leave nothing.
LAMBDAS = tuple(np.logspace(-6, 5, 45).tolist())

# Numbers in the features, above which a fit is divided over the devices. Below, each device would
# wait longer for the others than it computes.
_DIVIDE_FROM = 2**24


def fit(x, y, l2, classes: int, max_iterations: int) -> dict:
    """Minimises mean cross-entropy + l2 / 2 * |kernel|^2; the bias is free.

    Args:
      x: features float32 [n, D].
      y: labels int [n]; rows of -1 do not count.
      l2: scalar.
      classes: C.
      max_iterations: of L-BFGS; it stops earlier when the gradient's norm is below 1e-5.

    Returns:
      {"kernel": [D, C], "bias": [C]}
    """
    start = {"kernel": jnp.zeros((x.shape[1], classes)), "bias": jnp.zeros(classes)}
    return fit_from(start, x, y, l2, max_iterations)


@functools.partial(jax.jit, static_argnames=("max_iterations",))
def fit_from(start: dict, x, y, l2, max_iterations: int, tolerance=_TOLERANCE) -> dict:
    """`fit`, beginning with the weights `start`, until the gradient's norm is below `tolerance`."""
    counts = (y >= 0).astype(jnp.float32)
    n = jnp.sum(counts)

    def objective(weights):
        logits = x @ weights["kernel"] + weights["bias"]
        cross_entropy = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.maximum(y, 0))
        return jnp.sum(counts * cross_entropy) / n + l2 / 2 * jnp.sum(weights["kernel"] ** 2)

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
    return jax.lax.while_loop(unfinished, iterate, carry)[0]


@jax.jit
def predict(weights: dict, x):
    """The class [n] of the largest logit of each row of x [n, D]."""
    return jnp.argmax(x @ weights["kernel"] + weights["bias"], axis=-1)


@jax.jit
def accuracy(weights: dict, x, y):
    """Share of rows of x [n, D] whose largest logit is that of the label y [n]."""
    return jnp.mean(predict(weights, x) == y)


def scale(train: np.ndarray, *others: np.ndarray) -> tuple[np.ndarray, ...]:
    """Centres all features by the mean of `train` and divides them by one number, so that the mean
    square norm of `train` is 1: an l2 then means the same for features of any size.
    """
    mean, factor = _mean_and_factor(train)
    return tuple((x - mean) * np.float32(factor) for x in (train, *others))


def _mean_and_factor(x: np.ndarray) -> tuple[np.ndarray, float]:
    mean = x.mean(axis=0)
    return mean, float(1 / np.sqrt(np.mean(np.sum((x - mean) ** 2, axis=1)) + 1e-12))


def divided(mesh: Mesh | None, x: np.ndarray, y: np.ndarray) -> tuple[Any, Any]:
    """Features and labels laid out over the devices of `mesh`, filled up with rows that do not
    count; as they are if there is no mesh, or too little to do for it.
    """
    if mesh is None or mesh.size == 1 or x.size < _DIVIDE_FROM:
        return x, y
    n = -(-len(x) // mesh.size) * mesh.size
    x = np.concatenate([x, np.zeros((n - len(x), x.shape[1]), x.dtype)])
    y = np.concatenate([y, np.full(n - len(y), -1, y.dtype)])
    sharding = batch_sharded(mesh)
    return laid_out(x, sharding), laid_out(y, sharding)


def probe_all_labels(
    train: tuple, test: tuple, *, l2, validation_fraction, seed, classes, max_iterations, mesh=None
) -> tuple[float, float]:
    """Test accuracy with every label of the training split, and the l2 chosen.

    `train` and `test` are (features, labels), scaled; `l2` the candidates.
    """
    x, y = train
    part, held = split_validation(y, validation_fraction, seed)
    validation = x[held], y[held]
    rows = divided(mesh, x[part], y[part])
    best, _ = _choose_l2(*rows, validation, l2, classes, max_iterations)
    weights = fit(*divided(mesh, x, y), l2[best], classes, max_iterations)
    return float(accuracy(_here(weights), *test)), l2[best]


def probe_few_labels(
    train: tuple,
    test: tuple,
    *,
    per_class,
    seeds,
    l2,
    validation_fraction,
    seed,
    classes,
    max_iterations,
    mesh=None,
) -> list[float]:
    """Test accuracies with `per_class` labels of each class, one for each of `seeds` draws.

    The labels are drawn outside the validation part, which only chooses the l2, for each draw.
    """
    x, y = train
    part, held = split_validation(y, validation_fraction, seed)
    picked = [part[few_labels(y[part], per_class, draw)] for draw in range(seeds)]
    validation = x[held], y[held]
    accuracies = []
    for rows in picked:
        some = divided(mesh, x[rows], y[rows])
        _, weights = _choose_l2(*some, validation, l2, classes, max_iterations)
        accuracies.append(float(accuracy(weights, *test)))
    return accuracies


def _here(weights: dict) -> dict:
    return jax.tree.map(np.asarray, weights)


def _choose_l2(x, y, validation: tuple, l2, classes: int, max_iterations: int) -> tuple[int, dict]:
    """The index of the l2 that does best on the validation part, and the weights fitted with it."""
    weights = _here(_fit_each_l2(x, y, jnp.asarray(l2), classes, max_iterations))
    best = int(jnp.argmax(jax.vmap(accuracy, in_axes=(0, None, None))(weights, *validation)))
    return best, jax.tree.map(lambda w: w[best], weights)


@functools.partial(jax.jit, static_argnames=("classes", "max_iterations"))
def _fit_each_l2(x, y, l2, classes: int, max_iterations: int) -> dict:
    # One after the other: most converge long before the weakest regularisation does, and the
    # logits of one fit at a time are held.
    return jax.lax.map(lambda one: fit(x, y, one, classes, max_iterations), l2)


def fit_chosen_lambda(
    train: tuple,
    test: tuple,
    *,
    lambdas,
    validation_fraction: float,
    seed: int,
    classes: int,
    max_iterations: int,
    mesh: Mesh | None = None,
) -> dict:
    """Logistic regression as in appendix B.8: the lambda that does best on a validation part, then
    fitted to all of `train`.

    Args:
      train, test: (features, labels), as they are.
      lambdas: candidates; each weighs |kernel|^2 / 2 beside the sum of the cross-entropies.
      validation_fraction: of `train`.
      seed: of the validation part.
      classes: C.
      max_iterations: of each fit.
      mesh: devices to divide the work over.

    Returns:
      {"accuracy", "mean_per_class_accuracy", "lambda", "validation_accuracies": one a lambda}
    """
    x, y = train
    part, held = split_validation(y, validation_fraction, seed)
    lambdas = sorted(lambdas)
    fits = fit_lambdas(x[part], y[part], lambdas, classes, max_iterations, mesh)
    scores = [float(accuracy(weights, x[held], y[held])) for weights in fits]
    # Of equals the strongest: on few validation images many lambdas are.
    best = max(range(len(lambdas)), key=lambda i: (scores[i], lambdas[i]))
    # From the strongest on, as above: each fit begins where the one before ended.
    weights = fit_lambdas(x, y, lambdas[best:], classes, max_iterations, mesh)[0]
    right = np.asarray(predict(weights, test[0])) == test[1]
    return {
        "accuracy": float(right.mean()),
        "mean_per_class_accuracy": float(
            np.mean([right[test[1] == c].mean() for c in np.unique(test[1])])
        ),
        "lambda": lambdas[best],
        "validation_accuracies": scores,
    }


def fit_lambdas(
    x: np.ndarray,
    y: np.ndarray,
    lambdas,
    classes: int,
    max_iterations: int,
    mesh: Mesh | None = None,
) -> list[dict]:
    """The weights that minimise sum of cross-entropies + lambda / 2 * |kernel|^2, for each lambda.

    Fitted from the strongest on, each beginning where the one before ended. Internally the features
    are centred, which the free bias takes up, and scaled, with the lambda scaled to match: the same
    optimum, reached in fewer iterations.
    """
    mean, factor = _mean_and_factor(x)
    rows = divided(mesh, (x - mean) * np.float32(factor), y)
    weights = {
        "kernel": np.zeros((x.shape[1], classes), np.float32),
        "bias": np.zeros(classes, np.float32),
    }
    found = {}
    for value in sorted(lambdas, reverse=True):
        l2 = value * factor**2 / len(y)
        weights = _here(fit_from(weights, *rows, l2, max_iterations, _TOLERANCE_OF_LAMBDAS))
        kernel = weights["kernel"] * np.float32(factor)
        found[value] = {"kernel": kernel, "bias": weights["bias"] - mean @ kernel}
    return [found[value] for value in lambdas]
