"""ResNet encoders f: the post-activation form (He et al. 2015), as the SimCLR paper uses it.

Strides sit on the 3x3 convolution, padding is symmetric and explicit, as in the published code.
"""

from collections.abc import Mapping
from typing import Any, ClassVar

import jax.numpy as jnp
from flax import linen as nn

from simclr_jax.encoders.conv import conv2d
from simclr_jax.encoders.images import check_are_floats
from simclr_jax.encoders.norm import batch_norm
from simclr_jax.encoders.pool import max_pool
from simclr_jax.options import Option, flag, number, one_of

# depth: (blocks of each of the four stages, bottleneck blocks?). He et al. 2015, table 1; 200 from
# He et al. 2016 (arXiv 1603.05027); 10 is the 18 with one block a stage, for small images on CPUs.
STAGES = {
    10: ((1, 1, 1, 1), False),
    18: ((2, 2, 2, 2), False),
    34: ((3, 4, 6, 3), False),
    50: ((3, 4, 6, 3), True),
    101: ((3, 4, 23, 3), True),
    152: ((3, 8, 36, 3), True),
    200: ((3, 24, 36, 3), True),
}

# stem: (kernel size, stride, max-pool after it?). "imagenet" is He et al. 2015; "cifar" is the SimCLR
# paper's appendix B.9 for 32 px; "strided" halves the resolution once, for small images on CPUs.
STEMS = {"imagenet": (7, 2, True), "cifar": (3, 1, False), "strided": (3, 2, False)}

# Padding (before, after) of the max-pool of the stem, pixels. "same": TensorFlow's SAME, of the published
# SimCLR code: (0, 1) on the even sizes that follow the strided convolution. "symmetric": (1, 1), of
# the residual networks of He et al. in Caffe and of torchvision.
POOL_PADDINGS = {"same": "SAME", "symmetric": ((1, 1), (1, 1))}

# (mean, deviation) of each colour: the mean is taken off pixels in [0, 1], the deviation divides the rest.
# "imagenet" has those of the images that torchvision's and timm's weights were trained on.
STANDARDS = {
    "none": None,
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
}

OPTIONS = (
    Option("model.depth", 50, one_of(*STAGES), "layers of a ResNet"),
    Option(
        "model.width", 1.0, number(1 / 64, 64), "factor on the channels of every layer of a ResNet"
    ),
    Option(
        "model.stem",
        "imagenet",
        one_of(*STEMS),
        'first layers of a ResNet; "cifar": for images up to 32 px (appendix B.9); "strided": halves '
        "the resolution once, for CPUs",
    ),
    Option(
        "model.pool_padding",
        "same",
        one_of(*POOL_PADDINGS),
        'padding of the stem\'s max-pool; "same": the published code\'s; "symmetric": torchvision\'s',
    ),
    Option(
        "model.zero_init_residual",
        True,
        flag(),
        "start each residual block as its shortcut, as published; False learns faster in short runs",
    ),
    Option(
        "model.standardize",
        "none",
        one_of(*STANDARDS),
        'what a ResNet does to pixels first; "none": nothing, as published; "imagenet": subtract '
        "ImageNet's mean and divide by its deviation, for weights of torchvision or timm",
    ),
    # He et al. 2015 (option B) and torchvision, whose weights go in and out exactly, project where the
    # shapes differ. The published SimCLR code (tf2/resnet.py, BlockGroup) projects once a stage.
    Option(
        "model.project_shortcuts",
        False,
        flag(),
        "project the shortcut of the first block of every stage, in depths below 50 that of the first "
        "stage too, as the published code does; False is torchvision's way",
    ),
)


def channels_of(factor: float) -> int:
    """Returns the channels of the stem of a ResNet of this width factor."""
    return round(64 * factor)


def fields(model: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the attributes of a `ResNet` by the options "model.*", without the group's name."""
    return {
        "depth": model["depth"],
        "channel_factor": model["width"],
        "stem": model["stem"],
        "pool_padding": model["pool_padding"],
        "dtype": jnp.dtype(model["dtype"]),
        "norm_momentum": model["norm_momentum"],
        "norm_group": model["norm_group"],
        "zero_init_residual": model["zero_init_residual"],
        "remat": model["remat"],
        "project_shortcuts": model["project_shortcuts"],
        "standardize": model["standardize"],
    }


def build(model: Mapping[str, Any]) -> "ResNet":
    """Returns the ResNet of the options "model.*", without the group's name."""
    return ResNet(**fields(model))


_kernel_init = nn.initializers.variance_scaling(1.0, "fan_in", "truncated_normal")


class Conv(nn.Module):
    """A k x k convolution without bias, padded by (k - 1) / 2 on each side."""

    features: int
    size: int
    stride: int = 1
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x):
        kernel = self.param(
            "kernel", _kernel_init, (self.size, self.size, x.shape[-1], self.features), jnp.float32
        )
        pad = (self.size - 1) // 2
        return conv2d(
            x.astype(self.dtype),
            kernel.astype(self.dtype),
            (self.stride, self.stride),
            ((pad, pad), (pad, pad)),
        )


class ResidualBlock(nn.Module):
    """Maps x [N, H, W, C] to ReLU(convolutions(x) + shortcut(x)).

    With `zero_init_residual` the last BatchNorm's scale starts at zero, so that the block starts as
    its shortcut (Goyal et al. 2017, section 5.1).

    Attributes:
      features: channels of the 3x3 convolutions; a bottleneck block puts out 4 times as many.
      stride: step of the first 3x3 convolution and of the shortcut, pixels.
      bottleneck: 1x1, 3x3, 1x1 convolutions; else two of 3x3.
      project: make the shortcut a 1x1 convolution even if x already has the shape of the block's output.
      dtype, norm_momentum, norm_group, zero_init_residual: see `ResNet`.
    """

    features: int
    stride: int
    bottleneck: bool
    project: bool
    dtype: jnp.dtype
    norm_momentum: float
    norm_group: int
    zero_init_residual: bool

    @nn.compact
    def __call__(self, x, train: bool):
        norm = batch_norm(train, self.dtype, self.norm_momentum, self.norm_group)
        if self.bottleneck:
            layers = [
                (self.features, 1, 1),
                (self.features, 3, self.stride),
                (self.features * 4, 1, 1),
            ]
        else:
            layers = [(self.features, 3, self.stride), (self.features, 3, 1)]
        initializers = {True: nn.initializers.zeros, False: nn.initializers.ones}
        y = x
        for i, (features, size, stride) in enumerate(layers):
            last = i == len(layers) - 1
            y = Conv(features, size, stride, self.dtype)(y)
            y = norm(scale_init=initializers[last and self.zero_init_residual])(y)
            y = y if last else nn.relu(y)
        if self.project or x.shape != y.shape:
            x = Conv(y.shape[-1], 1, self.stride, self.dtype, name="shortcut")(x)
            x = norm(name="shortcut_norm")(x)
        return nn.relu(x + y)


class ResNet(nn.Module):
    """f: images [N, H, W, 3] in [0, 1] to representations h [N, D], float32.

    D is 512 * channel_factor for depths up to 34 and 2048 * channel_factor from 50 on.

    Attributes:
      depth: one of STAGES.
      channel_factor: multiplies the number of channels of every layer; may be a fraction.
      stem: one of STEMS.
      pool_padding: how the stem's max-pool is padded, where it has one: one of POOL_PADDINGS.
      dtype: number format of activations and convolutions; parameters and statistics stay float32.
      norm_momentum: share of the old running BatchNorm statistics that a step keeps.
      norm_group: rows that share BatchNorm statistics, see `norm.BatchNorm`.
      zero_init_residual: the last BatchNorm's scale of each block starts at zero.
      remat: the backward pass computes each block again instead of keeping its activations: less
        memory for one more forward pass.
      project_shortcuts: the first block of every stage projects its shortcut, see OPTIONS.
      standardize: one of STANDARDS.
    """

    depth: int = 50
    channel_factor: float = 1
    stem: str = "imagenet"
    dtype: jnp.dtype = jnp.float32
    norm_momentum: float = 0.9
    norm_group: int = 0
    zero_init_residual: bool = True
    remat: bool = False
    pool_padding: str = "same"
    project_shortcuts: bool = False
    standardize: str = "none"

    block: ClassVar[type[nn.Module]] = ResidualBlock

    @property
    def channels(self) -> int:
        """Channels of the stem and, within their blocks, of the first stage."""
        return channels_of(self.channel_factor)

    @property
    def width(self) -> int:
        """D, the width of h."""
        return self.channels * 8 * (4 if STAGES[self.depth][1] else 1)

    def describe(self) -> str:
        """Returns a name such as "ResNet-50 x1"."""
        return f"ResNet-{self.depth} x{self.channel_factor:g}"

    def check_image_size(self, size: int) -> None:
        """Accepts every size: convolutions and the mean at the end take any."""

    def as_baseline(self) -> "ResNet":
        """Returns the network with the last BatchNorm scale of each block starting at one.

        If these start at zero, an untrained network computes only its strided 1x1 shortcuts: at 16 px it sees one
        corner of the image.
        """
        return self.clone(zero_init_residual=False)

    @nn.compact
    def __call__(self, x, train: bool):
        check_are_floats(x)
        x = _standardized(x, self.standardize)
        x = self.stem_layers(x, train)
        if STEMS[self.stem][2]:
            x = max_pool(x, POOL_PADDINGS[self.pool_padding])
        block_type = nn.remat(self.block, static_argnums=(2,)) if self.remat else self.block
        blocks, bottleneck = STAGES[self.depth]
        for stage, count in enumerate(blocks):
            for block in range(count):
                x = block_type(
                    features=self.channels * 2**stage,
                    stride=2 if stage > 0 and block == 0 else 1,
                    bottleneck=bottleneck,
                    project=self.project_shortcuts and block == 0,
                    dtype=self.dtype,
                    norm_momentum=self.norm_momentum,
                    norm_group=self.norm_group,
                    zero_init_residual=self.zero_init_residual,
                    name=f"stage{stage + 1}_block{block + 1}",
                )(x, train)
        return jnp.mean(x, axis=(1, 2), dtype=jnp.float32)

    @nn.nowrap
    def stem_layers(self, x, train: bool):
        """Maps images to the input of the max-pool, or of the first stage where there is none."""
        size, stride, _ = STEMS[self.stem]
        x = Conv(self.channels, size, stride, self.dtype, name="stem")(x)
        norm = batch_norm(train, self.dtype, self.norm_momentum, self.norm_group)
        return nn.relu(norm(name="stem_norm")(x))


def _standardized(x, name: str):
    """Takes the mean of each colour off images [N, H, W, 3], and divides by its deviation; see STANDARDS."""
    if (standard := STANDARDS[name]) is None:
        return x
    mean, deviation = (jnp.asarray(values, jnp.float32) for values in standard)
    return (x - mean) / deviation
