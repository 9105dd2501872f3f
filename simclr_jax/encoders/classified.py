"""A linear classifier on h or on a layer of the projection head, with f frozen or trained along."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from simclr_jax.encoders import apply_network
from simclr_jax.encoders.heads import LinearClassifier, ProjectionHead
from simclr_jax.encoders.images import to_float


class Classified(NamedTuple):
    """A linear classifier with the encoder and the projection head below it.

    Attributes:
      encoder: f.
      head: g.
      layer: the layer of g whose output is classified; 0 is h. The layers after it are thrown away.
      classifier: the linear layer.
      train_encoder: whether f and g are trained along, with BatchNorm in training mode; else they
        are frozen, with their running statistics.
    """

    encoder: Any
    head: ProjectionHead
    layer: int
    classifier: LinearClassifier
    train_encoder: bool

    @property
    def width(self) -> int:
        """C, the number of logits."""
        return self.classifier.classes

    def check_image_size(self, size: int) -> None:
        """Raises a UserError if the encoder cannot take images of size x size px."""
        self.encoder.check_image_size(size)

    @property
    def trained(self) -> frozenset[str]:
        """Names of the trained parts of the parameters: "encoder", "head", "classifier"."""
        return frozenset(
            ("encoder", "head", "classifier") if self.train_encoder else ("classifier",)
        )

    def logits(self, params: dict, batch_stats: dict, images) -> tuple[jax.Array, dict]:
        """Computes logits [n, C] of images [n, H, W, 3] as a step of training does, and the new running statistics of the
        networks that have some. BatchNorm takes the statistics of the batch if `train_encoder`; else it takes the running
        ones, and no gradient passes below the classifier.

        `params` is {"encoder", "head", "classifier"}, `batch_stats` {"encoder", "head"}; images are float in
        [0, 1].
        """
        return self._apply(params, batch_stats, images, self.train_encoder)

    def predict(self, variables: dict, images) -> dict[str, jax.Array]:
        """Computes {"logits": [n, C]} of images uint8 [n, H, W, 3] in evaluation.

        `variables` is {"params", "batch_stats"}.
        """
        logits, _ = self._apply(
            variables["params"], variables["batch_stats"], to_float(images), False
        )
        return {"logits": logits}

    def _apply(self, params: dict, batch_stats: dict, images, train: bool):
        def through(network, name, x):
            own = {"params": params[name], "batch_stats": batch_stats[name]}
            return apply_network(network, own, x, train)

        seen = {}
        x, seen["encoder"] = through(self.encoder, "encoder", images)
        if self.layer > 0:
            outputs, seen["head"] = through(self.head, "head", x)
            x = outputs[self.layer]
        if not self.train_encoder:
            x = jax.lax.stop_gradient(x)
        logits: Any = self.classifier.apply({"params": params["classifier"]}, x)
        return logits, seen if train else {}

    def start(self, encoder: dict, head: dict, key: jax.Array) -> tuple[dict, dict]:
        """Returns params and batch_stats before the first step.

        Args:
          encoder, head: {"params", "batch_stats"} of f and g.
          key: random key of the classifier's weights.
        """
        width = self.encoder.width
        if self.layer > 0:
            width = head["params"][f"dense{self.layer}"]["kernel"].shape[1]
        classifier = self.classifier.init(key, jnp.zeros((1, width)))
        params = {
            "encoder": encoder["params"],
            "head": head["params"],
            "classifier": classifier["params"],
        }
        return params, {"encoder": encoder["batch_stats"], "head": head["batch_stats"]}
