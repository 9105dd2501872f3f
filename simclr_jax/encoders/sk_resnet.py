"""SK-ResNet encoders f, of SimCLR v2 (Chen et al. 2020, arXiv 2006.10029): ResNet-D with selective kernels.

As the published SimCLR code has them (tf2/resnet.py): two 3x3 kernels, not the 3x3 and 5x5 of Li et al. 2019
(arXiv 1903.06586), and the stem and shortcuts of ResNet-D (He et al. 2018, arXiv 1812.01187).
"""

from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import linen as nn

from simclr_jax.encoders.norm import batch_norm
from simclr_jax.encoders.resnet import STAGES, Conv, ResidualBlock, ResNet, fields
from simclr_jax.errors import UserError

# Channels of the layer between the pooled streams and their weights: SHARE of a stream's, but at least LEAST.
SHARE, LEAST = 1 / 16, 32


def build(model: Mapping[str, Any]) -> "SkResNet":
    """Returns the SK-ResNet of the options "model.*", without the group's name.

    Raises:
      UserError: the depth has no bottleneck blocks, where the selective kernels sit.
    """
    if not STAGES[model["depth"]][1]:
        depths = ", ".join(str(depth) for depth, (_, bottleneck) in STAGES.items() if bottleneck)
        raise UserError(
            f"model.depth={model['depth']} has no bottleneck blocks, which model.name=sk_resnet needs: "
            f"expected one of {depths}"
        )
    return SkResNet(**fields(model))


class SelectiveKernels(nn.Module):
    """Maps x [N, H, W, C] to a weighted sum of two 3x3 convolutions of it, [N, H / stride, W / stride, features].

    Two 1x1 convolutions compute the weights [N, 1, 1, features] of the two from their sum, averaged over the image; a
    softmax makes the two weights sum to 1.

    Attributes:
      features: channels of each convolution.
      stride: stride of both convolutions, pixels.
      dtype, norm_momentum, norm_group: see `ResNet`.
    """

    features: int
    stride: int
    dtype: jnp.dtype
    norm_momentum: float
    norm_group: int

    @nn.compact
    def __call__(self, x, train: bool):
        norm = batch_norm(train, self.dtype, self.norm_momentum, self.norm_group)
        x = Conv(2 * self.features, 3, self.stride, self.dtype, name="kernels")(x)
        x = nn.relu(norm(name="kernels_norm")(x))
        streams = x.reshape(*x.shape[:-1], 2, self.features)
        pooled = jnp.mean(streams.sum(-2), axis=(1, 2), keepdims=True, dtype=jnp.float32)
        narrow = max(int(self.features * SHARE), LEAST)
        mixed = Conv(narrow, 1, dtype=self.dtype, name="mix_in")(pooled)
        mixed = nn.relu(norm(name="mix_norm")(mixed))
        scores = Conv(2 * self.features, 1, dtype=self.dtype, name="mix_out")(mixed)
        scores = scores.astype(jnp.float32).reshape(-1, 1, 1, 2, self.features)
        return (jax.nn.softmax(scores, axis=-2).astype(self.dtype) * streams).sum(-2)


class SkBlock(ResidualBlock):
    """A bottleneck block whose 3x3 convolution has selective kernels, and whose shortcut averages instead of
    leaving pixels out (ResNet-D). The attributes are those of `ResidualBlock`.
    """

    @nn.compact
    def __call__(self, x, train: bool):
        norm = batch_norm(train, self.dtype, self.norm_momentum, self.norm_group)
        last_scale = nn.initializers.zeros if self.zero_init_residual else nn.initializers.ones
        y = nn.relu(norm()(Conv(self.features, 1, dtype=self.dtype)(x)))
        y = SelectiveKernels(
            self.features,
            self.stride,
            self.dtype,
            self.norm_momentum,
            self.norm_group,
            name="select",
        )(y, train)
        y = Conv(self.features * 4, 1, dtype=self.dtype)(y)
        y = norm(scale_init=last_scale)(y)
        if self.project or x.shape != y.shape:
            x = Conv(y.shape[-1], 1, dtype=self.dtype, name="shortcut")(_averaged(x, self.stride))
            x = norm(name="shortcut_norm")(x)
        return nn.relu(x + y)


def _averaged(x, stride: int):
    """Averages 2x2 pixels. At stride 2, zeros beyond the edge of an odd size count; at stride 1 they do not."""
    if stride == 1:
        return nn.avg_pool(x, (2, 2), padding="SAME", count_include_pad=False)
    x = jnp.pad(x, ((0, 0), (0, 1), (0, 1), (0, 0)))
    return nn.avg_pool(x, (2, 2), (2, 2))


class SkResNet(ResNet):
    """f: images [N, H, W, 3] in [0, 1] to representations h [N, D], float32. Attributes: see `ResNet`.

    The stem "imagenet" has three 3x3 convolutions instead of one of 7x7 (ResNet-D).
    """

    block: ClassVar[type[nn.Module]] = SkBlock

    def describe(self) -> str:
        """Returns a name such as "SK-ResNet-50 x1"."""
        return f"SK-{super().describe()}"

    @nn.nowrap
    def stem_layers(self, x, train: bool):
        """Maps images to the input of the max-pool, or of the first stage where there is none."""
        if self.stem != "imagenet":
            return super().stem_layers(x, train)
        norm = batch_norm(train, self.dtype, self.norm_momentum, self.norm_group)
        for i, (share, stride) in enumerate(((0.5, 2), (0.5, 1), (1, 1)), 1):
            x = Conv(max(1, int(self.channels * share)), 3, stride, self.dtype, name=f"stem{i}")(x)
            x = nn.relu(norm(name=f"stem{i}_norm")(x))
        return x
