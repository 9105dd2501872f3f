"""What training carries from step to step, and how it starts."""

from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import optax

from simclr_jax.heads import LinearClassifier, ProjectionHead
from simclr_jax.resnet import ResNet


class Networks(NamedTuple):
    """The parts of the model: f, g, and the online classifier, None where there are no labels."""

    encoder: ResNet
    head: ProjectionHead
    classifier: LinearClassifier | None


@flax.struct.dataclass
class TrainState:
    """Attributes:
    step: int32 scalar, steps done.
    params: {"encoder", "head", "classifier"}: dicts of float32 arrays.
    batch_stats: {"encoder", "head"}: the running BatchNorm statistics, float32.
    opt_state: of the optimizer.
    """

    step: jax.Array
    params: dict[str, Any]
    batch_stats: dict[str, Any]
    opt_state: optax.OptState


def init_encoder(network: ResNet, image_size: int, key: jax.Array) -> dict:
    """{"params", "batch_stats"} of the encoder of `init_state` with the same key."""
    images = jnp.zeros((1, image_size, image_size, 3))
    return dict(network.init(jax.random.fold_in(key, 0), images, train=False))


def init_head(network: ProjectionHead, width: int, key: jax.Array) -> dict:
    """{"params", "batch_stats"} of the head of `init_state` with the same key; `width` is D."""
    head = network.init(jax.random.fold_in(key, 1), jnp.zeros((1, width)), train=False)
    return {name: head.get(name, {}) for name in ("params", "batch_stats")}


def init_state(
    networks: Networks, optimizer: optax.GradientTransformation, image_size: int, key: jax.Array
) -> TrainState:
    """The state before the first step. Pure: `jax.jit` it with output shardings, or `jax.eval_shape` it.

    Args:
      image_size: height and width of a view, pixels.
      key: the same key gives the same state on any number of devices.
    """
    encoder = init_encoder(networks.encoder, image_size, key)
    h = jnp.zeros((1, networks.encoder.width_of_h))
    head = init_head(networks.head, networks.encoder.width_of_h, key)
    params = {"encoder": encoder["params"], "head": head["params"]}
    if networks.classifier is not None:
        classifier = networks.classifier.init(jax.random.fold_in(key, 2), h)
        params["classifier"] = classifier["params"]
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        batch_stats={"encoder": encoder["batch_stats"], "head": head["batch_stats"]},
        opt_state=optimizer.init(params),
    )


def count_parameters(tree) -> int:
    """How many numbers the arrays of the tree hold."""
    return sum(x.size for x in jax.tree.leaves(tree))
