"""The state that training carries from step to step, and how it starts."""

import dataclasses
import hashlib
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax

from simclr_jax.encoders import init_encoder, init_variables
from simclr_jax.encoders.heads import LinearClassifier, ProjectionHead
from simclr_jax.training import memory
from simclr_jax.training.memory import Memory


class Networks(NamedTuple):
    """The parts of the model: f, g, and the online classifier, None where there are no labels."""

    encoder: Any  # an encoders.EncoderNetwork
    head: ProjectionHead
    classifier: LinearClassifier | None


@flax.struct.dataclass
class TrainState:
    """The whole state of a training.

    Attributes:
      step: int32 scalar, steps done.
      params: {"encoder", "head", "classifier"}: dicts of float32 arrays.
      batch_stats: {"encoder", "head"}: the running BatchNorm statistics, float32; {} without BatchNorm.
      opt_state: the state of the optimizer.
      memory: negatives of earlier batches; None without loss.memory.
    """

    step: jax.Array
    params: dict[str, Any]
    batch_stats: dict[str, Any]
    opt_state: optax.OptState
    memory: Memory | None = None

    def variables(self, part: str) -> dict[str, Any]:
        """Returns {"params", "batch_stats"} of a part, such as "encoder"."""
        return {"params": self.params[part], "batch_stats": self.batch_stats[part]}


def init_head(network: ProjectionHead, width: int, key: jax.Array) -> dict:
    """Returns {"params", "batch_stats"} of a projection head before training.

    Args:
      network: the head.
      width: D, of h.
      key: the run's; the same key gives the same head as `init_state`.
    """
    return init_variables(network, jax.random.fold_in(key, 1), jnp.zeros((1, width)))


def init_state(
    networks: Networks,
    optimizer: optax.GradientTransformation,
    image_size: int,
    key: jax.Array,
    remembered: tuple[int, int] | None = None,
) -> TrainState:
    """Returns the state before the first step. Pure: `jax.jit` it with output shardings, or
    `jax.eval_shape` it.

    Args:
      networks: f, g and the online classifier.
      optimizer: whose state starts.
      image_size: height and width of a view, pixels.
      key: the same key gives the same state on any number of devices.
      remembered: (batches, images) of the memory, see `memory.begin`; None: no memory.
    """
    width = networks.encoder.width
    encoder = init_encoder(networks.encoder, image_size, key)
    head = init_head(networks.head, width, key)
    params = {"encoder": encoder["params"], "head": head["params"]}
    if networks.classifier is not None:
        classifier = networks.classifier.init(jax.random.fold_in(key, 2), jnp.zeros((1, width)))
        params["classifier"] = classifier["params"]
    state = start_of(
        params, {"encoder": encoder["batch_stats"], "head": head["batch_stats"]}, optimizer
    )
    if remembered is None:
        return state
    begun = memory.begin(params, *remembered, networks.head.width_of_z(width))
    return dataclasses.replace(state, memory=begun)


def start_of(
    params: dict, batch_stats: dict, optimizer: optax.GradientTransformation
) -> TrainState:
    """Returns the state at step 0 of a training that begins with these parameters and statistics."""
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        batch_stats=batch_stats,
        opt_state=optimizer.init(params),
    )


def count_parameters(tree) -> int:
    """Counts the numbers that the arrays of the tree hold."""
    return sum(x.size for x in jax.tree.leaves(tree))


def digest_of(variables: Any) -> str:
    """Returns a digest of a tree of arrays, equal for trees of equal weights."""
    digest = hashlib.blake2b(digest_size=16)
    for leaf in jax.tree.leaves(jax.device_get(variables)):
        digest.update(np.ascontiguousarray(leaf).data)
    return digest.hexdigest()
