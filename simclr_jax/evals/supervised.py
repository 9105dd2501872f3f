"""A classifier on f or g, trained by SGD with Nesterov momentum, with f frozen or trained along."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import optax
from flax import linen as nn

from simclr_jax.heads import LinearClassifier, ProjectionHead
from simclr_jax.losses import cross_entropy
from simclr_jax.resnet import ResNet
from simclr_jax.train_state import TrainState
from simclr_jax.train_step import to_float


class Classified(NamedTuple):
    """The classifier and what it stands on.

    Attributes:
      encoder: f.
      head: g.
      layer: of g whose output is classified; 0 is h. What follows it is thrown away.
      classifier: the linear layer.
      train_encoder: whether f and g are trained along, with BatchNorm in training mode; else they
        are frozen, with their running statistics.
    """

    encoder: ResNet
    head: ProjectionHead
    layer: int
    classifier: LinearClassifier
    train_encoder: bool

    def logits(self, variables: dict, images, train: bool = False) -> tuple[jax.Array, dict]:
        """Logits [n, C] of images [n, H, W, 3], and the new running statistics.

        `variables` is {"params", "batch_stats"} of "encoder", "head" and "classifier".
        """
        params, stats = variables["params"], variables["batch_stats"]
        train = train and self.train_encoder

        def apply(network: nn.Module, name: str, x):
            own = {"params": params[name], "batch_stats": stats[name]}
            if not train:
                return network.apply(own, x, train=False), stats[name]
            y, seen = network.apply(own, x, train=True, mutable=["batch_stats"])
            return y, seen.get("batch_stats", {})

        x, encoder_stats = apply(self.encoder, "encoder", images)
        head_stats = stats["head"]
        if self.layer > 0:
            outputs, head_stats = apply(self.head, "head", x)
            x = outputs[self.layer]
        logits: Any = self.classifier.apply({"params": params["classifier"]}, x)
        return logits, {"encoder": encoder_stats, "head": head_stats}

    def start(self, encoder: dict, head: dict, key: jax.Array) -> dict:
        """The variables before the first step, from those of f and g."""
        width = self.encoder.width_of_h
        if self.layer > 0:
            width = head["params"][f"dense{self.layer}"]["kernel"].shape[1]
        classifier = self.classifier.init(key, jax.numpy.zeros((1, width)))
        return {
            "params": {
                "encoder": encoder["params"],
                "head": head["params"],
                "classifier": classifier["params"],
            },
            "batch_stats": {"encoder": encoder["batch_stats"], "head": head["batch_stats"]},
        }

    def trained_part(self, params: dict) -> dict:
        """Of the parameters, those that are trained."""
        if self.train_encoder:
            return params
        return {"classifier": params["classifier"]}


def make_optimizer(
    peak: float, steps: int, weight_decay: float, momentum: float
) -> tuple[optax.GradientTransformation, optax.Schedule]:
    """SGD with Nesterov momentum and half a cosine without warm-up (appendix B.5; the schedule is
    the published code's), the decay on every kernel, and the schedule.
    """
    schedule = optax.cosine_decay_schedule(peak, steps)

    def kernels(params: Any) -> Any:
        return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key == "kernel", params)

    return optax.chain(
        optax.add_decayed_weights(weight_decay, mask=kernels),
        optax.sgd(schedule, momentum=momentum, nesterov=True),
    ), schedule


def make_step(
    model: Classified,
    optimizer: optax.GradientTransformation,
    schedule: optax.Schedule,
    fetch: Callable,
    make_views: Callable,
) -> Callable:
    """Makes step(state, frozen, batch) -> (state, metrics), to be jitted over any mesh.

    `state.params` are those that are trained, `frozen` all of the start; `fetch` and `make_views`
    are those of `train_step.make_train_step`, with one view of an image.
    """

    def step(state: TrainState, frozen: dict, batch: dict) -> tuple[TrainState, dict]:
        batch = fetch(batch)
        images = make_views(batch)[:, 0]

        def loss_of(params):
            variables = {"params": frozen | params, "batch_stats": state.batch_stats}
            logits, batch_stats = model.logits(variables, images, train=True)
            loss, accuracy = cross_entropy(logits, batch["label"])
            return loss, (accuracy, batch_stats)

        (loss, (accuracy, batch_stats)), grads = jax.value_and_grad(loss_of, has_aux=True)(
            state.params
        )
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        state = TrainState(
            step=state.step + 1,
            params=optax.apply_updates(state.params, updates),
            batch_stats=batch_stats,
            opt_state=opt_state,
        )
        rate = schedule(state.step - 1)
        return state, {"loss": loss, "classifier_accuracy": accuracy, "learning_rate": rate}

    return step


def make_predict(model: Classified) -> Callable:
    """(variables, images uint8 [n, H, W, 3]) to {"class": int [n, 1]}."""

    def predict(variables: dict, images):
        logits, _ = model.logits(variables, to_float(images))
        return {"class": jax.numpy.argmax(logits, axis=-1, keepdims=True)}

    return predict
