"""Encoders f: images to representations h. To add one, write its file and a row in `ENCODERS`."""

from collections.abc import Callable, Mapping
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from flax import linen as nn

from simclr_jax.encoders import resnet, sk_resnet, vit
from simclr_jax.options import Option, name_in


class EncoderNetwork(Protocol):
    """A Flax module f with a representation of fixed width. BatchNorm statistics are optional.

    Its `__call__(images, train)` takes float [N, H, W, 3] in [0, 1] and returns h float32 [N, D].
    """

    @property
    def width(self) -> int:
        """D, the width of h."""

    def describe(self) -> str:
        """Returns the encoder's name and size in words, such as "ResNet-50 x1"."""

    def check_image_size(self, size: int) -> None:
        """Raises a UserError if the encoder cannot take images of size x size px."""

    def as_baseline(self) -> "EncoderNetwork":
        """Returns the network whose random start stands for "untrained" in results.

        It has the same parameters, and an initialisation with which an untrained network is as good as
        it can be: a weak baseline would make any training look good.
        """

    init: Callable[..., Any]
    apply: Callable[..., Any]


# name: {option of the group "model", without the group: value} -> EncoderNetwork
ENCODERS: dict[str, Callable[[Mapping[str, Any]], Any]] = {
    "resnet": resnet.build,
    "sk_resnet": sk_resnet.build,
    "vit": vit.build,
}

OPTIONS = (
    Option("model.name", "resnet", name_in(ENCODERS), "architecture of the encoder f"),
    *resnet.OPTIONS,
    *vit.OPTIONS,
)


def init_variables(network: nn.Module, key: jax.Array, *inputs: Any) -> dict:
    """Returns {"params", "batch_stats"} of a network before training; without BatchNorm the latter is {}."""
    variables = network.init(key, *inputs, train=False)
    return {name: variables.get(name, {}) for name in ("params", "batch_stats")}


def init_encoder(network: Any, image_size: int, key: jax.Array) -> dict:
    """Returns {"params", "batch_stats"} of an encoder before training.

    Args:
      network: an `EncoderNetwork`.
      image_size: height and width of an image, pixels.
      key: the run's random key; `training.state.init_state` gives the same encoder for it.
    """
    images = jnp.zeros((1, image_size, image_size, 3))
    return init_variables(network, jax.random.fold_in(key, 0), images)


def apply_network(
    network: Any, variables: Mapping[str, Any], x: Any, train: bool
) -> tuple[Any, Any]:
    """Applies an encoder or a head, with or without BatchNorm.

    Args:
      network: a Flax module whose __call__ takes (x, train).
      variables: {"params", "batch_stats"}.
      x: its input.
      train: True: BatchNorm uses the statistics of the batch, and its running statistics follow.

    Returns:
      the output, and the new "batch_stats" (the old ones if `train` is False).
    """
    variables = dict(variables)
    if not train:
        return network.apply(variables, x, train=False), variables["batch_stats"]
    y, seen = network.apply(variables, x, train=True, mutable=["batch_stats"])
    return y, seen.get("batch_stats", {})
