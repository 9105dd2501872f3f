"""--mode=probe: linear probes with few labels, over draws of them, and with all.

The regularisation is chosen on a validation part of the training split, never on the test split.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax

from simclr_jax.console import say
from simclr_jax.data.subsets import few_labels, split_validation
from simclr_jax.evals import results
from simclr_jax.evals.contract import Evaluation, Features, Options
from simclr_jax.evals.logistic import accuracy, divided, fit_logistic, logits, scale, to_host
from simclr_jax.evals.scores import Score, score

# With fewer validation images than this, accuracy is too coarse to choose by: the l2 of the largest likelihood is taken.
# On emoji, over 8 draws of 80 and of 220 labels, the test accuracy is 1.7 and 0.9 points higher by it in the mean, and 10
# and 4 in the worst draw; of 600 labels it is 0.4 points lower.
_COARSE = 50


def rows(features: Features, options: Options, kind: str) -> list[dict]:
    """Probes with each number of "labels_per_class", with the number of labels per class that
    "label_fraction" of the data gives, and with all labels.
    """
    x_train, x_test = scale(features.train[0], features.test[0])
    scaled = features._replace(train=(x_train, features.train[1]), test=(x_test, features.test[1]))
    few = set(options["labels_per_class"])
    if options["label_fraction"] > 0:
        share = options["label_fraction"] * len(x_train) / features.classes
        few.add(max(1, round(share)))
    part, _ = split_validation(
        len(features.train[1]), options["validation_fraction"], options["seed"]
    )
    there = np.bincount(features.train[1][part], minlength=features.classes)
    found = []
    for per_class in sorted(few):
        fewer = int(np.sum(there < per_class))
        some = "1 class has" if fewer == 1 else f"{fewer} classes have"
        hint = f" ({some} fewer: all of theirs)" if fewer else ""
        say(f"probing {kind}, {per_class} label{'s' if per_class > 1 else ''} per class{hint}")
        found.append(results.row(kind, per_class, probe_few_labels(scaled, options, per_class)))
    say(f"probing {kind}, all labels")
    reached, l2, validation = probe_all_labels(scaled, options)
    more = {"l2": l2, "validation_accuracy": validation}
    return [*found, results.row(kind, None, [reached]) | more]


def settings(options: Options, images: int, classes: int) -> dict:
    """Returns the settings used."""
    names = ("l2", "validation_fraction", "seed", "max_iterations")
    return {name: options[name] for name in names} | {"classes": classes}


def probe_all_labels(features: Features, options: Options) -> tuple[Score, float, float]:
    """Fits with every label of the training split, with the l2 that does best on a validation part.

    Args:
      features: scaled by `logistic.scale`.
      options: "l2", the candidates, "validation_fraction", "seed" and "max_iterations".

    Returns:
      test accuracies, the l2 chosen, and its accuracy on the validation part.
    """
    x, y = features.train
    part, held = split_validation(len(y), options["validation_fraction"], options["seed"])
    chosen_from = divided(features.mesh, x[part], y[part])
    best, weights = _choose_l2(chosen_from, (x[held], y[held]), options, features.classes)
    l2, validation = options["l2"][best], float(accuracy(weights, x[held], y[held]))
    everything = divided(features.mesh, x, y)
    weights = fit_logistic(*everything, l2, features.classes, options["max_iterations"])
    return _score(to_host(weights), features), l2, validation


def probe_few_labels(features: Features, options: Options, per_class: int) -> list[Score]:
    """Fits with `per_class` labels of each class, for each of "seeds" draws of them.

    The labels are drawn outside the validation part, which is used only to choose the l2, separately
    for each draw.

    Returns:
      test accuracies, one for each draw.
    """
    x, y = features.train
    part, held = split_validation(len(y), options["validation_fraction"], options["seed"])
    found = []
    for draw in range(options["seeds"]):
        picked = part[few_labels(y[part], per_class, draw)]
        some = divided(features.mesh, x[picked], y[picked])
        _, weights = _choose_l2(some, (x[held], y[held]), options, features.classes)
        found.append(_score(weights, features))
    return found


def _score(weights: dict, features: Features) -> Score:
    x, y = features.test
    return score("accuracy", np.asarray(logits(weights, x)), y)


def _choose_l2(some: tuple, validation: tuple, options: Options, classes: int) -> tuple[int, dict]:
    """Returns the index of the l2 that does best on the validation part, and the weights it gives."""
    l2 = jnp.asarray(options["l2"])
    weights = to_host(_fit_each_l2(*some, l2, classes, options["max_iterations"]))
    merit = _log_likelihood if len(validation[1]) < _COARSE else accuracy
    merits = np.asarray(jax.vmap(merit, in_axes=(0, None, None))(weights, *validation))
    # Take the strongest of equally good l2: with few labels, all may do equally well on the validation part.
    best = max(range(len(merits)), key=lambda i: (merits[i], options["l2"][i]))
    return best, jax.tree.map(lambda w: np.asarray(w[best]), weights)


def _log_likelihood(weights: dict, x: jax.Array, y: jax.Array) -> jax.Array:
    """Returns the mean log-probability of the labels y [n] of features x [n, D]."""
    return -jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits(weights, x), y))


@functools.partial(jax.jit, static_argnames=("classes", "max_iterations"))
def _fit_each_l2(x, y, l2, classes: int, max_iterations: int) -> dict:
    # Fit one after the other: most fits converge long before that with the weakest regularisation, and
    # memory holds the logits of only one fit.
    return jax.lax.map(lambda one: fit_logistic(x, y, one, classes, max_iterations), l2)


EVALUATION = Evaluation(
    text="linear probes of the newest checkpoint, and of the baselines",
    rows=rows,
    settings=settings,
    title=lambda _: "Linear probe, test accuracy",
    table=results.labels_table,
    changes={},
    chooses=True,
    metric="probe_accuracy",
)
