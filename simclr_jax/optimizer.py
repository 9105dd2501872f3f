"""Learning-rate schedules, masks and the optimizers."""

import jax
import optax


def scaled_learning_rate(base: float, scaling: str, batch_size: int) -> float:
    """The peak learning rate for a global batch of `batch_size` images (paper, appendix B.1).

    "linear": base * B / 256 (paper: base 0.3); "sqrt": base * sqrt(B) (paper: base 0.075);
    "none": base.
    """
    factor = {"linear": batch_size / 256, "sqrt": batch_size**0.5, "none": 1.0}[scaling]
    return base * factor


def warmup_cosine(peak: float, warmup_steps: int, total_steps: int) -> optax.Schedule:
    """step -> learning rate: 0 to `peak` in a line over `warmup_steps`, then half a cosine to 0.

    The value used at step s (counted from 0) is peak * s / warmup_steps, then
    peak / 2 * (1 + cos(pi (s - warmup) / (total - warmup))): the published code's.
    """
    cosine = optax.cosine_decay_schedule(peak, max(1, total_steps - warmup_steps))
    if warmup_steps == 0:
        return cosine
    warmup = optax.linear_schedule(0.0, peak, warmup_steps)
    return optax.join_schedules([warmup, cosine], [warmup_steps])


def adapted(params):
    """True for the parameters that get weight decay and, under LARS, a trust ratio: the kernels of
    the encoder and the projection head. BatchNorm, biases and the online classifier get neither.
    The published code adapts the same ones, but decays the classifier's kernel too.
    """

    def is_adapted(path, _):
        names = [entry.key for entry in path]
        return names[-1] == "kernel" and "classifier" not in names

    return jax.tree_util.tree_map_with_path(is_adapted, params)


def make_optimizer(
    name: str,
    learning_rate: optax.ScalarOrSchedule,
    *,
    weight_decay: float,
    momentum: float,
    trust_coefficient: float,
) -> optax.GradientTransformation:
    """The optimizer called `name`, with weight decay on `adapted` parameters only.

    "lars": LARS (You et al. 2017), the learning rate inside the momentum as in the published code;
    "sgd": SGD with Nesterov momentum, the decay added to the gradient;
    "adamw": AdamW, decoupled decay; `momentum` and `trust_coefficient` do not apply.
    """
    if name == "lars":
        return optax.lars(
            learning_rate,
            weight_decay=weight_decay,
            weight_decay_mask=adapted,
            trust_coefficient=trust_coefficient,
            trust_ratio_mask=adapted,
            momentum=momentum,
        )
    if name == "sgd":
        return optax.chain(
            optax.add_decayed_weights(weight_decay, mask=adapted),
            optax.sgd(learning_rate, momentum=momentum, nesterov=True),
        )
    if name == "adamw":
        return optax.adamw(learning_rate, weight_decay=weight_decay, mask=adapted)
    raise ValueError(f"unknown optimizer {name!r}")
