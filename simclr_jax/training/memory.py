"""The momentum memory of SimCLR v2: negatives from the batches before (arXiv 2006.10029, section 2).

A second network, whose weights are a moving average of the trained ones, projects the second view of each
image, and its projections are negatives in the steps that follow: MoCo's queue (He et al. 2020, arXiv
1911.05722) beside the negatives of the batch. The paper gives 64K negatives and a decay of 0.999, and no
code. Where it says nothing, these are our choices: one view of an image is stored, as in MoCo; partners are
those of the batch; a batch's projections enter the memory after its step, because during the step one of
them would be a view of the anchor's own image; a memory that is not full yet counts only what it holds.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp

from simclr_jax.errors import UserError
from simclr_jax.losses.stored import Stored


@flax.struct.dataclass
class Memory:
    """The negatives of earlier batches and the network that projects them, a part of the training state.

    Attributes:
      params: {"encoder", "head"}: the moving average of the parameters.
      keys: float32 [S, B, D], projections of the last S batches; a batch's place is its number mod S.
      written: int32 scalar, batches that were stored since the start.
    """

    params: dict[str, Any]
    keys: jax.Array
    written: jax.Array


class MemoryRule(NamedTuple):
    """How a step updates the memory.

    Attributes:
      project: (params, batch_stats, batch) -> projections [B, D] of one view of each image.
      decay: the average keeps this share of itself in a step.
    """

    project: Callable[[Any, Any, Any], jax.Array]
    decay: float


def batches_of(size: int, batch_size: int, supported: bool) -> int:
    """Returns S, the number of batches in a memory of `size` projections, one an image; 0: no memory.

    Args:
      size: the option loss.memory.
      batch_size: B.
      supported: whether the loss can count negatives of earlier batches.

    Raises:
      UserError: the loss cannot, or `size` is not a multiple of `batch_size`.
    """
    if size and not supported:
        raise UserError(f"loss.memory={size}: expected loss.name=nt_xent or dcl, or loss.memory=0")
    if size % batch_size:
        near = max(1, round(size / batch_size)) * batch_size
        raise UserError(
            f"loss.memory={size} is not a multiple of data.batch_size={batch_size}: use for example {near}"
        )
    return size // batch_size


def begin(params: dict, batches: int, images: int, width: int) -> Memory:
    """Returns a memory before the first step.

    Args:
      params: parameters of the trained networks, {"encoder", "head", ...}.
      batches: S, the number of batches that it holds.
      images: B, images of a batch.
      width: D, the width of z.
    """
    return Memory(
        params={name: params[name] for name in ("encoder", "head")},
        keys=jnp.zeros((batches, images, width), jnp.float32),
        written=jnp.zeros((), jnp.int32),
    )


def stored_in(memory: Memory) -> Stored:
    """Returns the negatives that a memory holds."""
    return Stored(memory.keys, jnp.minimum(memory.written, len(memory.keys)))


def advance(memory: Memory, params: dict, keys: jax.Array, decay: float) -> Memory:
    """Returns the memory after a step.

    Args:
      memory: before the step.
      params: the trained networks' after the step.
      keys: [B, D], the batch's projections by `memory.params`; they take the place of the oldest.
      decay: see `MemoryRule`.
    """
    place = memory.written % len(memory.keys)
    followed = {name: params[name] for name in memory.params}
    return Memory(
        params=jax.tree.map(
            lambda average, x: decay * average + (1 - decay) * x, memory.params, followed
        ),
        keys=jax.lax.dynamic_update_index_in_dim(memory.keys, keys.astype(jnp.float32), place, 0),
        written=memory.written + 1,
    )
