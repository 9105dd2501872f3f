"""The pretrained encoder, for other people's code."""

import functools
from typing import Any

import jax
import numpy as np
from etils import epath
from ml_collections import ConfigDict

from simclr_jax import assemble
from simclr_jax.config import from_dict
from simclr_jax.encoders import apply_network, init_encoder, to_float
from simclr_jax.training import saved

_BATCH = 256


class Encoder:
    """A pretrained encoder: encoder(images) -> h.

    Attributes:
      network: the Flax module, for use inside your own jitted code:
        `encoder.network.apply(encoder.variables, images, train=False)`.
      variables: {"params", "batch_stats"}, float32.
      image_size: pixels, what it was trained on. Other sizes work.
      width: D.
      step: steps that it was trained for.
    """

    def __init__(self, network: Any, variables: dict, image_size: int, step: int):
        self.network = network
        self.variables = variables
        self.image_size = image_size
        self.step = step
        self.width = network.width
        self._apply = jax.jit(functools.partial(_represent, network))

    def __call__(self, images) -> np.ndarray:
        """Computes h float32 [N, D] of images [N, H, W, 3], uint8 or float in [0, 1].

        Works through 256 images at a time, so N may be large.

        Raises:
          ValueError: images of another shape or type.
        """
        images = np.asarray(images)
        if images.ndim != 4 or images.shape[-1] != 3:
            raise ValueError(f"images have shape {images.shape}: expected [N, H, W, 3]")
        if images.dtype != np.uint8 and not np.issubdtype(images.dtype, np.floating):
            raise ValueError(f"images are {images.dtype}: expected uint8, or float in [0, 1]")
        h = np.empty((len(images), self.width), np.float32)
        for start in range(0, len(images), _BATCH):
            batch = images[start : start + _BATCH]
            padded = np.zeros((min(_BATCH, len(images)), *images.shape[1:]), images.dtype)
            padded[: len(batch)] = batch  # one shape, so one compilation
            h[start : start + len(batch)] = self._apply(self.variables, padded)[: len(batch)]
        return h


def _represent(network: Any, variables: dict, images):
    return apply_network(network, variables, to_float(images), train=False)[0]


def load_encoder(path, step: int | None = None) -> Encoder:
    """Loads a pretrained encoder onto one device. Reads no optimizer state, needs no TensorFlow.

    Args:
      path: a workdir, or a checkpoint folder, which may have been copied from elsewhere.
      step: which checkpoint; None takes the newest.

    Raises:
      UserError: there is no checkpoint at `path`, or none of this step.
    """
    if step is not None:
        return read_encoder(saved.find(str(path), step))
    return saved.read_newest(str(path), read_encoder)


def read_encoder(found: epath.Path) -> Encoder:
    """Reads the encoder in the checkpoint folder `found` onto one device."""
    options = saved.read_options(found)
    config = from_dict(options["config"])
    network = assemble.encoder(config)
    sharding = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    variables = read_variables(config, network, found, sharding)
    return Encoder(network, variables, config.data.image_size, options["step"])


def read_variables(
    config: ConfigDict, network: Any, found: epath.Path, sharding: jax.sharding.Sharding
) -> dict:
    """Reads {"params", "batch_stats"} of the encoder in the checkpoint folder `found`.

    Args:
      config: whose encoder it is.
      network: that encoder.
      found: the folder.
      sharding: on which devices the arrays are to lie.
    """
    start = functools.partial(init_encoder, network, config.data.image_size)
    abstract = jax.eval_shape(start, jax.random.key(0))
    return saved.read_encoder_arrays(found, saved.with_shardings(abstract, sharding))
