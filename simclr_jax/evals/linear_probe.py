"""Multinomial logistic regression on fixed features, by L-BFGS (paper, appendix B.8).

The regularisation is chosen on a validation part of the training split, never on the test split.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax

_TOLERANCE = 1e-5  # of the gradient's norm; features have mean square norm 1


@functools.partial(jax.jit, static_argnames=("classes", "max_iterations"))
def fit(x, y, l2, classes: int, max_iterations: int) -> dict:
    """Minimises mean cross-entropy + l2 / 2 * |kernel|^2; the bias is free.

    Args:
      x: features float32 [n, D].
      y: labels int [n].
      l2: scalar.
      classes: C.
      max_iterations: of L-BFGS; it stops earlier when the gradient's norm is below 1e-5.

    Returns:
      {"kernel": [D, C], "bias": [C]}
    """

    def objective(weights):
        logits = x @ weights["kernel"] + weights["bias"]
        cross_entropy = optax.softmax_cross_entropy_with_integer_labels(logits, y)
        return jnp.mean(cross_entropy) + l2 / 2 * jnp.sum(weights["kernel"] ** 2)

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
        return (norm > _TOLERANCE) & (iteration < max_iterations)

    start = {"kernel": jnp.zeros((x.shape[1], classes)), "bias": jnp.zeros(classes)}
    carry = (start, solver.init(start), jnp.inf, 0)
    return jax.lax.while_loop(unfinished, iterate, carry)[0]


@jax.jit
def accuracy(weights: dict, x, y):
    """Share of rows of x [n, D] whose largest logit is that of the label y [n]."""
    logits = x @ weights["kernel"] + weights["bias"]
    return jnp.mean(jnp.argmax(logits, axis=-1) == y)


def scale(train: np.ndarray, *others: np.ndarray) -> tuple[np.ndarray, ...]:
    """Centres all features by the mean of `train` and divides them by one number, so that the mean
    square norm of `train` is 1: an l2 then means the same for features of any size.
    """
    mean = train.mean(axis=0)
    factor = 1 / np.sqrt(np.mean(np.sum((train - mean) ** 2, axis=1)) + 1e-12)
    return tuple((x - mean) * np.float32(factor) for x in (train, *others))


def split_validation(y: np.ndarray, fraction: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Indices of the training part and of the validation part of labels y [n], by a fixed shuffle."""
    order = np.random.default_rng([seed, 0]).permutation(len(y))
    held = max(1, round(fraction * len(y)))
    return np.sort(order[held:]), np.sort(order[:held])


def few_labels(y: np.ndarray, per_class: int, seed: int) -> np.ndarray:
    """Indices of `per_class` images of each class of y [n], or as many as the class has."""
    rng = np.random.default_rng([seed, 1])
    picked = [rng.permutation(np.flatnonzero(y == c))[:per_class] for c in np.unique(y)]
    return np.concatenate(picked)


def probe_all_labels(
    train: tuple, test: tuple, *, l2, validation_fraction, seed, classes, max_iterations
) -> tuple[float, float]:
    """Test accuracy with every label of the training split, and the l2 chosen.

    `train` and `test` are (features, labels), scaled; `l2` the candidates.
    """
    x, y = train
    part, held = split_validation(y, validation_fraction, seed)
    validation = x[held], y[held]
    best, _ = _choose_l2(x[part], y[part], validation, l2, classes, max_iterations)
    return float(accuracy(fit(x, y, l2[best], classes, max_iterations), *test)), l2[best]


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
        _, weights = _choose_l2(x[rows], y[rows], validation, l2, classes, max_iterations)
        accuracies.append(float(accuracy(weights, *test)))
    return accuracies


def _choose_l2(x, y, validation: tuple, l2, classes: int, max_iterations: int) -> tuple[int, dict]:
    """The index of the l2 that does best on the validation part, and the weights fitted with it."""
    weights = _fit_each_l2(x, y, jnp.asarray(l2), classes, max_iterations)
    best = int(jnp.argmax(jax.vmap(accuracy, in_axes=(0, None, None))(weights, *validation)))
    return best, jax.tree.map(lambda w: w[best], weights)


@functools.partial(jax.jit, static_argnames=("classes", "max_iterations"))
def _fit_each_l2(x, y, l2, classes: int, max_iterations: int) -> dict:
    # One after the other: most converge long before the weakest regularisation does, and the
    # logits of one fit at a time are held.
    return jax.lax.map(lambda one: fit(x, y, one, classes, max_iterations), l2)
