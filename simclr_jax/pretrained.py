"""The pretrained encoder, for other people's code."""

import concurrent.futures
import functools
import itertools
import os
import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from ml_collections import ConfigDict
from PIL import Image

from simclr_jax import assemble
from simclr_jax.config import from_dict
from simclr_jax.data import pixels
from simclr_jax.encoders import apply_network, init_encoder
from simclr_jax.encoders.classified import Classified
from simclr_jax.encoders.heads import LinearClassifier
from simclr_jax.encoders.images import to_float
from simclr_jax.errors import UserError
from simclr_jax.files import expanded
from simclr_jax.mesh import here
from simclr_jax.training import saved
from simclr_jax.training.state import init_head
from simclr_jax.views.crop import EvaluationView

_BATCH = 256


class Encoder:
    """A pretrained encoder: encoder(images) -> h, and encoder.embed(paths) -> h of image files. Can be pickled.

    Attributes:
      network: the Flax module, for use inside your own jitted code:
        `encoder.network.apply(encoder.variables, images, train=False)`.
      variables: {"params", "batch_stats"}, float32.
      view: what `preprocess` makes of an image. Its size is that of the images the encoder was trained on; a ResNet
        takes other sizes too, a ViT multiples of its patch.
      width: D, the number of features in h.
      step: steps that it was trained for.
    """

    def __init__(self, network: Any, variables: dict, view: EvaluationView, step: int):
        self.network = network
        self.variables = variables
        self.view = view
        self.step = step
        self.width = network.width

    @property
    def image_size(self) -> int:
        """Returns the height and width, in pixels, of the images that `preprocess` makes."""
        return self.view.size

    @property
    def function(self) -> Callable[[dict, Any], jax.Array]:
        """(variables, images [N, H, W, 3], uint8 or float in [0, 1]) -> [N, width], to be jitted."""
        return functools.partial(_represent, self.network)

    @functools.cached_property
    def _apply(self) -> Any:
        return jax.jit(self.function)

    def __repr__(self) -> str:
        return f"<Encoder of images of {self.image_size} px, {self.width} features, trained for {self.step} steps>"

    def __getstate__(self) -> dict:
        state = {name: x for name, x in self.__dict__.items() if name != "_apply"}
        return state | {"variables": jax.device_get(self.variables)}

    def __call__(self, images) -> np.ndarray:
        """Computes h float32 [N, D] of images [N, H, W, 3], uint8 or float in [0, 1].

        Works through 256 images at a time, so N may be large. Warns of another size than `image_size`.

        Raises:
          ValueError: images of another shape or type, of a size that the network cannot take, or floats that are
            not in [0, 1].
        """
        images = np.asarray(images)
        if images.ndim != 4 or images.shape[-1] != 3 or 0 in images.shape[1:]:
            raise ValueError(
                f"images have shape {images.shape}: expected [N, H, W, 3], H and W 1 or more"
            )
        try:
            for side in images.shape[1:3]:
                self.network.check_image_size(side)
        except UserError as error:
            raise ValueError(f"images have shape {images.shape}: {error}") from error
        if images.dtype != np.uint8 and not jnp.issubdtype(images.dtype, jnp.floating):
            raise ValueError(f"images are {images.dtype}: expected uint8, or float in [0, 1]")
        if images.dtype != np.uint8 and images.size and not _are_within_0_and_1(images):
            raise ValueError(
                f"images are {images.dtype} from {float(images.min()):g} to {float(images.max()):g}: expected floats "
                "in [0, 1], or uint8; neither mean nor deviation is taken off"
            )
        if images.shape[1:3] != (self.image_size, self.image_size):
            height, width = images.shape[1:3]
            warnings.warn(
                f"images of {width} x {height} px: the encoder was trained on {self.image_size} px. encoder.embed(images) "
                "crops and resizes to that, encoder(images) takes images as they are",
                stacklevel=2,
            )
        batches = (images[start : start + _BATCH] for start in range(0, len(images), _BATCH))
        return self._features_of(batches)

    def _features_of(self, batches: Iterable[np.ndarray]) -> np.ndarray:
        """Computes h [N, D] of batches of up to `_BATCH` images, each padded to a power of 2 up to 32, to a multiple of 32, or
        to the largest size so far: each further size would be compiled, which takes seconds.
        """
        found, rows = [np.zeros((0, self.width), np.float32)], 1
        for batch in batches:
            few = 1 << (len(batch) - 1).bit_length()
            rows = max(rows, few if few <= 32 else -(-len(batch) // 32) * 32)
            padded = np.zeros((rows, *batch.shape[1:]), batch.dtype)
            padded[: len(batch)] = batch
            found.append(np.asarray(self._apply(self.variables, padded)[: len(batch)]))
        return np.concatenate(found)

    def preprocess(self, image: Any) -> np.ndarray:
        """Crops and resizes an image to what the encoder sees in --mode=embed and in every evaluation.

        Args:
          image: the path of an image file, a PIL image, or uint8 [H, W, 3], or [H, W] for grey.

        Returns:
          uint8 [image_size, image_size, 3]

        Raises:
          OSError: the file cannot be read.
          ValueError: the file is a folder or no image (the message names it), or the array has another shape or type.
        """
        try:
            x = pixels.of_anything(image, self.view.read)
        except ValueError as error:
            raise ValueError(f"{error}{_what_takes(image, self.image_size)}") from error
        return self.view.of(x)

    def embed(self, images: Iterable[Any]) -> np.ndarray:
        """Computes h float32 [N, D] of N images, each what `preprocess` takes, as --mode=embed does.

        Reads and decodes in threads, 256 images at a time, so there may be any number.

        Raises:
          OSError, ValueError: `preprocess` raises it for one of the images, or `images` is a single image.
        """
        if _is_one(images):
            raise ValueError("this is a single image: expected several, such as [image]")
        with concurrent.futures.ThreadPoolExecutor() as threads:
            batches = _in_batches(threads, self.preprocess, images)
            return self._features_of(np.stack(batch) for batch in batches)


def _what_takes(image: Any, size: int) -> str:
    """Says what takes what `preprocess` does not."""
    if isinstance(image, str | os.PathLike):
        return "; --mode=embed takes folders" if expanded(image).is_dir() else ""
    return (
        "; of 16 bits give the path, or PIL.Image.fromarray(image); encoder(images) takes floats in [0, 1], all of "
        f"{size} px"
    )


def _are_within_0_and_1(x: np.ndarray) -> bool:
    return bool(x.min() >= 0 and x.max() <= 1)  # false for nan


def _is_one(images: Any) -> bool:
    if isinstance(images, str | os.PathLike | Image.Image):
        return True
    shape = getattr(images, "shape", None)  # of NumPy, JAX, PyTorch, pandas
    if shape is None:
        return False
    if len(shape) == 1 and getattr(images.dtype, "kind", None) in ("O", "U", "S", "T"):
        return False  # paths
    return len(shape) < 3 or (len(shape) == 3 and shape[-1] == 3)


def _in_batches(threads: Any, prepare: Any, images: Iterable[Any]) -> Iterator[list[np.ndarray]]:
    waiting = iter(images)
    while some := list(itertools.islice(waiting, _BATCH)):
        yield list(threads.map(prepare, some))


def _represent(network: Any, variables: dict, images):
    return apply_network(network, variables, to_float(images), train=False)[0]


class Classifier(Encoder):
    """A classifier on a pretrained encoder: classifier(images) -> logits float32 [N, C]. The rest is as in
    `Encoder`; `embed` gives logits of image files.

    Attributes:
      network: a `Classified`.
      variables: {"params", "batch_stats"} of its encoder, head and classifier.
      classes: names of the classes in the order of the logits; None: unknown.
      width: C, the number of logits.
    """

    def __init__(self, *encoder: Any, classes: list[str] | None):
        super().__init__(*encoder)
        self.classes = classes

    def __repr__(self) -> str:
        return f"<Classifier of images of {self.image_size} px, {self.width} classes, trained for {self.step} steps>"

    @property
    def function(self) -> Callable[[dict, Any], jax.Array]:
        """(variables, images [N, H, W, 3], uint8 or float in [0, 1]) -> logits [N, C], to be jitted."""
        return functools.partial(_classify, self.network)


def _classify(network: Classified, variables: dict, images):
    return network.predict(variables, images)["logits"]


def load_classifier(path, step: int | None = None) -> Classifier:
    """Loads a classifier onto one device: one trained by --mode=linear or finetune (each prints where it lies) or
    by --mode=distill, an imported one, or the one that pretraining trained alongside the encoder.

    Args:
      path: the folder that holds it, or a checkpoint folder.
      step: which checkpoint; None takes the newest.

    Raises:
      UserError: there is no checkpoint at `path`, none of this step, or none with a classifier.
    """
    if step is not None:
        return read_classifier(saved.find(str(path), step))
    return saved.read_newest(str(path), read_classifier)


def read_classifier(found: epath.Path) -> Classifier:
    """Reads the classifier in the checkpoint folder `found` onto one device."""
    record = saved.read_record(found)
    about = record.get("classifier")
    if not about:
        raise UserError(
            f"{found} has no classifier: expected what --mode=linear, finetune or distill wrote, such as "
            "WORKDIR/finetune/.../classifier"
        )
    config = from_dict(record["config"])
    encoder, head = assemble.encoder(config), assemble.head(config)
    network = Classified(encoder, head, about["layer"], LinearClassifier(about["outputs"]), False)
    sharding = here()
    own = read_variables(config, encoder, found, sharding)

    def start(key: jax.Array) -> tuple[dict, dict]:
        below = init_head(head, encoder.width, key)
        return network.start({"params": {}, "batch_stats": {}}, below, key)

    params, batch_stats = jax.eval_shape(start, jax.random.key(0))
    wanted = {
        "params": {name: params[name] for name in ("head", "classifier")},
        "batch_stats": {"head": batch_stats["head"]},
    }
    read = saved.read_parts(found, saved.with_shardings(wanted, sharding))
    variables = {kind: {"encoder": own[kind]} | read[kind] for kind in ("params", "batch_stats")}
    view = assemble.evaluation_view(config)
    return Classifier(network, variables, view, record["step"], classes=about["classes"])


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
    record = saved.read_record(found)
    config = from_dict(record["config"])
    network = assemble.encoder(config)
    sharding = here()
    variables = read_variables(config, network, found, sharding)
    return Encoder(network, variables, assemble.evaluation_view(config), record["step"])


def read_variables(
    config: ConfigDict, network: Any, found: epath.Path, sharding: jax.sharding.Sharding
) -> dict:
    """Reads {"params", "batch_stats"} of the encoder in the checkpoint folder `found`.

    Args:
      config: the configuration that the encoder was trained with.
      network: the Flax module of that encoder.
      found: the checkpoint folder.
      sharding: on which devices the arrays are to lie.
    """
    start = functools.partial(init_encoder, network, config.data.image_size)
    abstract = jax.eval_shape(start, jax.random.key(0))
    return saved.read_encoder_arrays(found, saved.with_shardings(abstract, sharding))


def read_head_variables(
    config: ConfigDict, network: Any, found: epath.Path, sharding: jax.sharding.Sharding
) -> dict:
    """Reads {"params", "batch_stats"} of the projection head; the arguments are those of `read_variables`."""
    start = functools.partial(init_head, assemble.head(config), network.width)
    abstract = jax.eval_shape(start, jax.random.key(0))
    return saved.read_head_arrays(found, saved.with_shardings(abstract, sharding))
