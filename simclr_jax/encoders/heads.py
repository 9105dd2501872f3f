"""What sits on the encoder while it trains: the projection head g and the online linear classifier."""

import jax
import jax.numpy as jnp
from flax import linen as nn

from simclr_jax.encoders.norm import batch_norm

HEADS = ("none", "linear", "nonlinear")

_kernel_init = nn.initializers.normal(0.01)  # the published code's, for every dense layer


def depth_of(kind: str, layers: int) -> int:
    """Returns the number of layers of a head of a kind of `HEADS`; `layers` is that of a nonlinear one."""
    return {"none": 0, "linear": 1, "nonlinear": layers}[kind]


class ProjectionHead(nn.Module):
    """g: h [N, D] to the projection z [N, out_width], and every layer's output on the way.

    `__call__(h, train)` returns the list [h, layer 1, ..., z], float32, so that fine-tuning can start from
    layer k (SimCLR v2).
    Every dense layer is followed by BatchNorm; all but the last of a nonlinear head have a ReLU.
    The last one's BatchNorm has no bias, as in the published code.

    Attributes:
      kind: one of HEADS: "none" (z is h), "linear" (one layer) or "nonlinear".
      layers: number of layers of a nonlinear head: 2 in the paper, 3 in SimCLR v2.
      out_width: width of z (128 in the paper).
      dtype: data type of the matrix products.
      norm_momentum: share of the old running BatchNorm statistics that a step keeps.
      norm_group: rows that share BatchNorm statistics, see `norm.BatchNorm`.
    """

    kind: str = "nonlinear"
    layers: int = 2
    out_width: int = 128
    dtype: jnp.dtype = jnp.float32
    norm_momentum: float = 0.9
    norm_group: int = 0

    @property
    def depth(self) -> int:
        """The number of its layers."""
        return depth_of(self.kind, self.layers)

    def width_of_z(self, width: int) -> int:
        """Returns the width of z for an h of this width."""
        return width if self.kind == "none" else self.out_width

    @nn.compact
    def __call__(self, h, train: bool):
        outputs = [h]
        for layer in range(self.depth):
            last = layer == self.depth - 1
            x = outputs[-1]
            x = nn.Dense(
                self.out_width if last else h.shape[-1],
                use_bias=False,  # the BatchNorm's bias serves
                dtype=self.dtype,
                kernel_init=_kernel_init,
                name=f"dense{layer + 1}",
            )(x)
            norm = batch_norm(train, jnp.float32, self.norm_momentum, self.norm_group)
            x = norm(use_bias=not last, name=f"norm{layer + 1}")(x)
            outputs.append(x if last else nn.relu(x))
        return outputs


class LinearClassifier(nn.Module):
    """h [N, D] to logits [N, classes], float32, also where an accelerator would round products to fewer bits."""

    classes: int

    @nn.compact
    def __call__(self, h):
        exact = jax.lax.Precision.HIGHEST
        return nn.Dense(self.classes, precision=exact, kernel_init=_kernel_init, name="dense")(h)
