"""Learning-rate schedules, masks and the optimizers."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from optax import contrib

# The root mean square of a fully orthogonal update: as large as Adam's updates are, so that one learning rate
# serves both (Liu et al. 2025, arXiv 2502.16982, section 2.2).
_MUON_RMS = 0.2
# Newton-Schulz iterations. Jordan takes 5; 3 take 0.6 of their time, and accuracies are within the spread (emoji,
# 8 epochs, 2 seeds; 10 labels per class, all labels, 20-NN): 44.4 +- 0.8, 63.2 +- 0.3, 57.7 +- 1.3 % with 3 and
# 45.2 +- 1.5, 61.7 +- 1.1, 57.7 +- 1.2 % with 5.
_MUON_ITERATIONS = 3


def scaled_learning_rate(base: float, scaling: str, batch_size: int) -> float:
    """Computes the peak learning rate for a global batch of `batch_size` images (paper, appendix B.1).

    "linear": base * B / 256 (paper: base 0.3); "sqrt": base * sqrt(B) (paper: base 0.075);
    "none": base.
    """
    factor = {"linear": batch_size / 256, "sqrt": batch_size**0.5, "none": 1.0}[scaling]
    return base * factor


def scaling_in_words(base: float, scaling: str, batch_size: int) -> str:
    """Returns how `scaled_learning_rate` comes to its result, such as "0.3 x 512 / 256"."""
    return {
        "linear": f"{base:g} x {batch_size} / 256",
        "sqrt": f"{base:g} x sqrt({batch_size})",
        "none": "as given",
    }[scaling]


def warmup_cosine(peak: float, warmup_steps: int, total_steps: int) -> optax.Schedule:
    """Makes step -> learning rate: 0 to `peak` in a line over `warmup_steps`, then half a cosine to 0.

    The value used at step s (counted from 0) is peak * s / warmup_steps, then
    peak / 2 * (1 + cos(pi (s - warmup) / (total - warmup))): the published code's.
    """
    cosine = optax.cosine_decay_schedule(peak, max(1, total_steps - warmup_steps))
    if warmup_steps == 0:
        return cosine
    warmup = optax.linear_schedule(0.0, peak, warmup_steps)
    return optax.join_schedules([warmup, cosine], [warmup_steps])


def adapted(params):
    """Marks the parameters that get weight decay and, under LARS, a trust ratio.

    They are the kernels of the encoder and the projection head. Norms, biases and the online
    classifier get neither. The published code adapts the same ones, but decays the classifier's
    kernel too.

    Args:
      params: tree of parameters.

    Returns:
      a tree of bools like it.
    """

    def is_adapted(path, _):
        names = [entry.key for entry in path]
        return names[-1] == "kernel" and "classifier" not in names

    return jax.tree_util.tree_map_with_path(is_adapted, params)


def as_matrices(params):
    """Names the axes of each `adapted` kernel that form the rows (inputs) and the columns (outputs) of a matrix,
    which Muon makes orthogonal.

    The outputs are the last axis, except for attention's queries, keys and values: there they are [heads, width].

    Args:
      params: tree of parameters.

    Returns:
      a tree like it, with optax's MuonDimensionNumbers, and None for what is not adapted.
    """

    def axes(path, kernel, is_adapted):
        if not is_adapted:
            return None
        of_heads = path[-2].key in ("query", "key", "value")
        inputs = 1 if of_heads else kernel.ndim - 1
        return contrib.MuonDimensionNumbers(tuple(range(inputs)), tuple(range(inputs, kernel.ndim)))

    return jax.tree_util.tree_map_with_path(axes, params, adapted(params))


def make_optimizer(
    name: str,
    learning_rate: optax.ScalarOrSchedule,
    *,
    weight_decay: float,
    momentum: float,
    trust_coefficient: float,
    decayed: Callable[[Any], Any] = adapted,
) -> optax.GradientTransformation:
    """Makes the optimizer called `name`, with weight decay on the parameters that `decayed` marks.

    `trust_coefficient` is LARS's factor of |parameter| / |gradient|; `decayed` does not apply to Muon.

    "lars": LARS (You et al. 2017), the learning rate inside the momentum as in the published code;
    "sgd": SGD with Nesterov momentum, the decay added to the gradient;
    "adamw": AdamW, decoupled decay; `momentum` and `trust_coefficient` do not apply;
    "muon": Muon (Jordan et al. 2024, kellerjordan.github.io/posts/muon) with Nesterov momentum and decoupled decay
    for `adapted` kernels, as matrices (`as_matrices`); for the other parameters Adam with Nesterov momentum, at the
    same learning rate and with its usual momenta.
    """
    if name == "lars":
        return optax.lars(
            learning_rate,
            weight_decay=weight_decay,
            weight_decay_mask=decayed,
            trust_coefficient=trust_coefficient,
            trust_ratio_mask=adapted,
            momentum=momentum,
        )
    if name == "sgd":
        return optax.chain(
            optax.add_decayed_weights(weight_decay, mask=decayed),
            optax.sgd(learning_rate, momentum=momentum, nesterov=True),
        )
    if name == "adamw":
        return optax.adamw(learning_rate, weight_decay=weight_decay, mask=decayed)
    if name == "muon":
        return contrib.muon(
            learning_rate,
            ns_steps=_MUON_ITERATIONS,
            beta=momentum,
            weight_decay=weight_decay,
            muon_weight_dimension_numbers=as_matrices,
            consistent_rms=_MUON_RMS,
        )
    raise ValueError(f"unknown optimizer {name!r}")


def lars_trust_ratios(
    params: Any,
    gradients: Any,
    *,
    trained: frozenset[str],
    weight_decay: float,
    trust_coefficient: float,
) -> dict[str, jax.Array]:
    """Computes LARS's trust ratio of each `adapted` array of the parts `trained`: coefficient |w| / |g + decay w|
    (You et al. 2017, equation 6), and 1 where one of the norms is 0, as optax.lars applies it.

    Returns:
      {"trust_ratio_min", "trust_ratio_median", "trust_ratio_max"} over the arrays, float32 scalars.
    """

    def ratio(w, g):
        of_w, of_g = jnp.linalg.norm(w), jnp.linalg.norm(g + weight_decay * w)
        return jnp.where((of_w == 0) | (of_g == 0), 1, trust_coefficient * of_w / of_g)

    params, gradients = (
        {name: part for name, part in tree.items() if name in trained}
        for tree in (params, gradients)
    )
    ratios = [
        ratio(w, g)
        for w, g, is_adapted in zip(
            *map(jax.tree.leaves, (params, gradients, adapted(params))), strict=True
        )
        if is_adapted
    ]
    found = jnp.stack(ratios)
    return {
        "trust_ratio_min": jnp.min(found),
        "trust_ratio_median": jnp.median(found),
        "trust_ratio_max": jnp.max(found),
    }


def make_classifier_optimizer(
    peak: float,
    steps: int,
    weight_decay: float,
    momentum: float,
    trained: frozenset[str],
    name: str = "sgd",
) -> tuple[optax.GradientTransformation, optax.Schedule]:
    """Makes the optimizer of linear evaluation and fine-tuning; half a cosine without warm-up (the published
    code's).

    "sgd": with Nesterov momentum, the decay on every kernel (paper, appendices B.5 and B.6); "lars": as in
    pretraining, so that the classifier has neither decay nor trust ratio (published code, SimCLR v2).

    Args:
      peak: the first learning rate.
      steps: steps of the training.
      weight_decay: added to the gradient of kernels, times the kernel.
      momentum: Nesterov's for "sgd", plain for "lars".
      trained: which of the top-level parts of the parameters are trained; the rest never changes.
      name: "sgd" or "lars".

    Returns:
      the optimizer, and step -> learning rate.
    """
    schedule = optax.cosine_decay_schedule(peak, steps)

    def kernels(params):
        return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key == "kernel", params)

    training = make_optimizer(
        name,
        schedule,
        weight_decay=weight_decay,
        momentum=momentum,
        trust_coefficient=1e-3,
        decayed=adapted if name == "lars" else kernels,
    )
    return of_parts(training, trained), schedule


def of_parts(
    optimizer: optax.GradientTransformation, trained: frozenset[str]
) -> optax.GradientTransformation:
    """Restricts an optimizer to some of the top-level parts of the parameters; the rest never changes, and no
    momentum is kept for it.
    """

    def group(params):
        return {
            name: jax.tree.map(lambda _, name=name: name in trained, part)
            for name, part in params.items()
        }

    return optax.partition({True: optimizer, False: optax.set_to_zero()}, group)
