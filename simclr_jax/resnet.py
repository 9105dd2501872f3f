"""ResNet encoders f: the post-activation form (He et al. 2015), as the SimCLR paper uses it.

Strides sit on the 3x3 convolution, padding is symmetric and explicit, as in the published code.
"""

import jax.numpy as jnp
from flax import linen as nn

from simclr_jax.conv import conv2d
from simclr_jax.norm import batch_norm

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

_kernel_init = nn.initializers.variance_scaling(1.0, "fan_in", "truncated_normal")


class Conv(nn.Module):
    """A k x k convolution without bias, padded by (k - 1) / 2 on each side."""

    features: int
    size: int
    stride: int = 1
    dtype: jnp.dtype = jnp.float32
    parts: int = 1

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
            self.parts,
        )


class ResidualBlock(nn.Module):
    """convolutions + shortcut, then ReLU. The last BatchNorm's scale starts at zero, so that the
    block starts as its shortcut (Goyal et al. 2017, section 5.1).
    """

    features: int
    stride: int
    bottleneck: bool
    dtype: jnp.dtype
    norm_momentum: float
    norm_group: int
    zero_init_residual: bool
    parts: int

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
            y = Conv(features, size, stride, self.dtype, self.parts)(y)
            y = norm(scale_init=initializers[last and self.zero_init_residual])(y)
            y = y if last else nn.relu(y)
        if x.shape != y.shape:
            x = norm(name="shortcut_norm")(
                Conv(y.shape[-1], 1, self.stride, self.dtype, self.parts, name="shortcut")(x)
            )
        return nn.relu(x + y)


class ResNet(nn.Module):
    """f: images [N, H, W, 3] in [0, 1] to representations h [N, D], float32.

    D is 512 * width for depths up to 34 and 2048 * width from 50 on.

    Attributes:
      depth: one of STAGES.
      width: multiplies the number of channels of every layer; may be a fraction.
      stem: one of STEMS.
      pool_padding: of the stem's max-pool, where it has one: one of POOL_PADDINGS.
      dtype: of the activations and convolutions; parameters and statistics stay float32.
      norm_momentum: share of the old running BatchNorm statistics that a step keeps.
      norm_group: rows that share BatchNorm statistics, see `norm.BatchNorm`.
      zero_init_residual: the last BatchNorm's scale of each block starts at zero.
      remat: the backward pass computes each block again instead of keeping its activations: less
        memory for one more forward pass.
      parts: of how many equal runs of images a batch consists that lie on different devices, see
        `conv.conv2d`.
    """

    depth: int = 50
    width: float = 1
    stem: str = "imagenet"
    dtype: jnp.dtype = jnp.float32
    norm_momentum: float = 0.9
    norm_group: int = 0
    zero_init_residual: bool = True
    remat: bool = False
    parts: int = 1
    pool_padding: str = "same"

    @property
    def width_of_h(self) -> int:
        """D."""
        return round(64 * self.width) * 8 * (4 if STAGES[self.depth][1] else 1)

    @nn.compact
    def __call__(self, x, train: bool):
        blocks, bottleneck = STAGES[self.depth]
        size, stride, pool = STEMS[self.stem]
        x = Conv(round(64 * self.width), size, stride, self.dtype, self.parts, name="stem")(x)
        norm = batch_norm(train, self.dtype, self.norm_momentum, self.norm_group)
        x = nn.relu(norm(name="stem_norm")(x))
        if pool:
            x = nn.max_pool(x, (3, 3), (2, 2), POOL_PADDINGS[self.pool_padding])
        block_type = nn.remat(ResidualBlock, static_argnums=(2,)) if self.remat else ResidualBlock
        for stage, count in enumerate(blocks):
            for block in range(count):
                x = block_type(
                    features=round(64 * self.width) * 2**stage,
                    stride=2 if stage > 0 and block == 0 else 1,
                    bottleneck=bottleneck,
                    dtype=self.dtype,
                    norm_momentum=self.norm_momentum,
                    norm_group=self.norm_group,
                    zero_init_residual=self.zero_init_residual,
                    parts=self.parts,
                    name=f"stage{stage + 1}_block{block + 1}",
                )(x, train)
        return jnp.mean(x, axis=(1, 2), dtype=jnp.float32)
