"""ViT encoders f: the Vision Transformer (Dosovitskiy et al. 2021, arXiv 2010.11929).

Blocks are pre-norm, h is the mean over the patches' outputs (no class token), and positions are
fixed two-dimensional sines and cosines (Chen et al. 2021, MoCo v3, arXiv 2104.02057): a network trained
at one image size takes another. There is no BatchNorm, so the running statistics are empty.
"""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from simclr_jax.encoders.images import check_are_floats
from simclr_jax.errors import UserError
from simclr_jax.options import Option, whole

OPTIONS = (
    Option(
        "model.vit.patch_size",
        16,
        whole(1, 256),
        "height and width of a patch, pixels; 4 for images of 32 px",
    ),
    Option("model.vit.layers", 12, whole(1, 256), "transformer blocks; 12 in ViT-S and ViT-B"),
    Option(
        "model.vit.width",
        384,
        whole(4, 2**14),
        "D, the width of every token, a multiple of 4; 384 in ViT-S",
    ),
    Option(
        "model.vit.heads", 6, whole(1, 256), "attention heads, a divisor of the width; 6 in ViT-S"
    ),
)


def build(model: Mapping[str, Any]) -> "ViT":
    """Returns the ViT of the options "model.vit.*", "model.dtype" and "model.remat".

    Raises:
      UserError: the heads do not divide the width, or the width is no multiple of 4.
    """
    options = model["vit"]
    for divisor, what in ((options["heads"], "model.vit.heads"), (4, "4, for the positions")):
        if options["width"] % divisor:
            raise UserError(
                f"model.vit.width={options['width']}: expected a multiple of {divisor} ({what})"
            )
    return ViT(**options, dtype=jnp.dtype(model["dtype"]), remat=model["remat"])


class Block(nn.Module):
    """Maps x [N, T, D] to the same shape: adds self-attention, then a two-layer network of width 4 D with
    GELU, each applied to a LayerNorm of x.

    Attributes:
      heads: number of attention heads.
      dtype: data type of the matrix products and of GELU; LayerNorm and the softmax of the attention are float32.
    """

    heads: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x):
        width = x.shape[-1]
        y = nn.LayerNorm(dtype=jnp.float32, name="attention_norm")(x)
        y = nn.MultiHeadDotProductAttention(
            self.heads,
            dtype=self.dtype,
            kernel_init=nn.initializers.xavier_uniform(),
            deterministic=True,
            force_fp32_for_softmax=True,
            name="attention",
        )(y)
        x = x + y
        y = nn.LayerNorm(dtype=jnp.float32, name="mlp_norm")(x)
        y = nn.gelu(self._dense(4 * width, "mlp_in")(y))
        return x + self._dense(width, "mlp_out")(y)

    def _dense(self, features: int, name: str) -> nn.Dense:
        xavier = nn.initializers.xavier_uniform()
        return nn.Dense(features, dtype=self.dtype, kernel_init=xavier, name=name)


class ViT(nn.Module):
    """f: images [N, H, W, 3] in [0, 1] to representations h [N, D], float32.

    Attributes:
      patch_size: pixels; H and W are multiples of it.
      layers: number of transformer blocks.
      width: D.
      heads: number of attention heads.
      dtype: data type of the matrix products and of GELU; parameters, LayerNorm and softmax stay float32.
      remat: the backward pass computes each block again instead of keeping its activations.
    """

    patch_size: int = 16
    layers: int = 12
    width: int = 384
    heads: int = 6
    dtype: jnp.dtype = jnp.float32
    remat: bool = False

    def describe(self) -> str:
        """Returns a description such as "ViT with 12 layers of width 384, patches of 16 px"."""
        return (
            f"ViT with {self.layers} layers of width {self.width}, patches of {self.patch_size} px"
        )

    def check_image_size(self, size: int) -> None:
        """Raises a UserError unless `size`, px, is a multiple of the patch size."""
        if size % self.patch_size:
            raise UserError(
                f"model.vit.patch_size={self.patch_size} does not divide data.image_size={size}"
            )

    def as_baseline(self) -> "ViT":
        """Returns itself: nothing of a ViT starts at zero."""
        return self

    @nn.compact
    def __call__(self, x, train: bool):
        del train  # the same in training and evaluation: no BatchNorm, no dropout
        check_are_floats(x)
        size = self.patch_size
        x = nn.Conv(
            self.width, (size, size), (size, size), "VALID", dtype=self.dtype, name="patches"
        )(x.astype(self.dtype))
        n, rows, columns, width = x.shape
        x = x.reshape(n, rows * columns, width) + positions(rows, columns, width)
        block_type = nn.remat(Block) if self.remat else Block
        for layer in range(self.layers):
            x = block_type(self.heads, self.dtype, name=f"block{layer + 1}")(x)
        x = nn.LayerNorm(dtype=jnp.float32, name="norm")(x)
        return jnp.mean(x, axis=1, dtype=jnp.float32)


def positions(rows: int, columns: int, width: int) -> np.ndarray:
    """Returns float32 [rows * columns, width]: sines and cosines of the row, then of the column.

    A quarter of the width each, at wavelengths from 2 pi to 2 pi 10,000 patches (Vaswani et al. 2017,
    section 3.5, applied to both axes).
    """
    frequencies = 10_000.0 ** -(np.arange(width // 4) / (width // 4))
    row, column = np.divmod(np.arange(rows * columns), columns)
    angles = [np.outer(axis, frequencies) for axis in (row, column)]
    parts = [wave(angle) for angle in angles for wave in (np.sin, np.cos)]
    return np.concatenate(parts, axis=1).astype(np.float32)
