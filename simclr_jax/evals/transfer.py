"""--mode=transfer: logistic regression as for transfer to other data (paper, appendix B.8).

The features are those of the centred square, without random crops. One of 45 lambdas is chosen on a validation
part, and the regression with it is fitted to all training labels.
"""

import numpy as np

from simclr_jax.console import say
from simclr_jax.data.subsets import split_validation
from simclr_jax.evals import results
from simclr_jax.evals.contract import Evaluation, Features, Options, Table
from simclr_jax.evals.logistic import ROUGHLY, fit_lambdas
from simclr_jax.evals.scores import METRIC_NAMES, METRICS, mean_per_class, score

# The candidates of appendix B.8: 45, logarithmically spaced. They weigh |kernel|^2 / 2 beside the sum
# of the cross-entropies, so that scikit-learn's C is 1 / lambda; beside a mean 1e5 would leave nothing.
LAMBDAS = tuple(np.logspace(-6, 5, 45).tolist())


def rows(features: Features, options: Options, kind: str) -> list[dict]:
    """Fits with the lambda that does best: one row."""
    say(f"fitting {kind}, {len(LAMBDAS)} values of lambda")
    found = fit_chosen_lambda(features, options, LAMBDAS)
    return [results.row(kind, None, [found.pop("score")]) | found]


def settings(options: Options, images: int, classes: int) -> dict:
    """Returns the settings used."""
    names = ("validation_fraction", "seed", "max_iterations", "metric")
    return {"lambdas": LAMBDAS} | {name: options[name] for name in names}


def fit_chosen_lambda(features: Features, options: Options, lambdas: tuple[float, ...]) -> dict:
    """Fits logistic regression with the lambda that does best on a validation part.

    Args:
      features: those of one encoder, not scaled.
      options: "validation_fraction", "seed" of the validation part, "max_iterations" of each fit, and
        "metric", by which the lambda is chosen.
      lambdas: candidates; each weighs |kernel|^2 / 2 beside the sum of the cross-entropies.

    Returns:
      {"score": the `Score` on the test images, "lambda", "validation_accuracies": the metric for each lambda,
      ascending, "unfinished": the lambdas of which a fit ended at "max_iterations", be it on the validation part's
      complement or on all training images}, and "mean_per_class_accuracy" where images have one label, unless that is
      the metric.
    """
    x, y = features.train
    part, held = split_validation(len(y), options["validation_fraction"], options["seed"])
    lambdas, targets = tuple(sorted(lambdas)), features.targets(y)
    classes = features.classes if features.members is None else features.members.shape[1]
    how = classes, options["max_iterations"], features.mesh, ROUGHLY
    fits, unfinished = fit_lambdas(x[part], targets[part], lambdas, *how)
    if unfinished:
        say(
            f"{len(unfinished)} of {len(lambdas)} fits ended at eval.max_iterations={options['max_iterations']} before "
            f"they had converged, the strongest of them that of lambda {max(unfinished):.2g}"
        )
    metric = METRICS[options["metric"]]
    scores = [metric(_logits(weights, x[held]), targets[held]) for weights in fits]
    # Take the strongest of equally good lambdas: with few validation images many are equally good.
    best = max(range(len(lambdas)), key=lambda i: (scores[i], lambdas[i]))
    # Start with the strongest, as above: each fit begins where the one before ended. Only the last one, of the chosen
    # lambda, goes on to the full tolerance.
    (weights, *_), of_all = fit_lambdas(x, targets, lambdas[best:], *how)
    if lambdas[best] in of_all:
        say(
            f"the fit that is reported, of lambda {lambdas[best]:.2g}, ended at eval.max_iterations="
            f"{options['max_iterations']} before it had converged"
        )
        unfinished = sorted({*unfinished, lambdas[best]})
    x_test, y_test = features.test
    logits = _logits(weights, x_test)
    found = {
        "score": score(options["metric"], logits, features.targets(y_test)),
        "lambda": lambdas[best],
        "validation_accuracies": scores,
        "unfinished": unfinished,
    }
    if features.members is None and options["metric"] != "mean_per_class":
        found["mean_per_class_accuracy"] = mean_per_class(logits, y_test)
    return found


def _logits(weights: dict, x: np.ndarray) -> np.ndarray:
    return x @ weights["kernel"] + weights["bias"]


def table(found: list[dict]) -> Table:
    """Shows the metric and the lambda chosen."""
    lines = [[row["features"], results.cell(row), f"{row['lambda']:.2g}"] for row in found]
    return ["features", "score", "lambda"], lines


EVALUATION = Evaluation(
    text="logistic regression, as for transfer to other data",
    rows=rows,
    settings=settings,
    title=lambda used: f"Logistic regression (appendix B.8), test {METRIC_NAMES[used['metric']]}",
    table=table,
    changes={"data.eval_crop": 1.0},
    chooses=True,
    metric="transfer_accuracy",
    sets=True,
)
