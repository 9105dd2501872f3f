"""2-D convolution with two of XLA:CPU's slow spots replaced by matrix products.

Measured on 2 cores with jaxlib 0.10.2, 512 images, in GFLOP/s:
- the filter gradient of a 3x3 convolution: 10-22 by XLA for 14x14x64, 14x14x32 and 28x28x16, where
  the blocked product below does 50-75, 74 and 20;
- an image smaller than the filter (the last stage of a ResNet on 28 px): 2 by XLA, 126-170 as a
  product.
So on CPUs every filter gradient is the blocked product, and an image smaller than its filter is
convolved by a product; the rest, and everything on accelerators, is XLA's own. The choice is made
when the program is lowered, for the platform that it is lowered for, so that compiling ahead of
time for a TPU on a CPU machine gets the TPU's program.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax

_LAYOUT = ("NHWC", "HWIO", "NHWC")

# The blocked filter gradient walks the batch in steps that take a few images from each of this many
# groups of consecutive images: a batch sharded over 1, 2, 4 or 8 devices is then walked by all of
# them at once. A block holds about this many output pixels a group, so that it stays in cache.
_GROUPS = 8
_BLOCK_PIXELS = 512


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def conv2d(x, kernel, strides, padding):
    """Convolves x [N, H, W, I] with kernel [h, w, I, O] to [N, H', W', O].

    Args:
      x: images or feature maps.
      kernel: filters, in x's dtype.
      strides: (vertical, horizontal), a tuple of ints.
      padding: ((top, bottom), (left, right)), a tuple of ints, in pixels.
    """
    native = functools.partial(_convolve, strides=strides, padding=padding)
    if not _smaller_than_filter(x, kernel):
        return native(x, kernel)
    product = functools.partial(_convolve_by_product, strides=strides, padding=padding)
    return lax.platform_dependent(x, kernel, cpu=product, default=native)


def _forward(x, kernel, strides, padding):
    return conv2d(x, kernel, strides, padding), (x, kernel)


def _backward(strides, padding, saved, dy):
    x, kernel = saved

    def native(x, kernel, dy):
        return jax.vjp(lambda x, k: _convolve(x, k, strides, padding), x, kernel)[1](dy)

    def product(x, kernel, dy):
        small = _smaller_than_filter(x, kernel) or _smaller_than_filter(dy, kernel)
        convolve = _convolve_by_product if small else _convolve
        (dx,) = jax.vjp(lambda x: convolve(x, kernel, strides, padding), x)[1](dy)
        return dx, filter_gradient(x, dy, kernel.shape, strides, padding)

    return lax.platform_dependent(x, kernel, dy, cpu=product, default=native)


conv2d.defvjp(_forward, _backward)


def _convolve(x, kernel, strides, padding):
    return lax.conv_general_dilated(x, kernel, strides, padding, dimension_numbers=_LAYOUT)


def _convolve_by_product(x, kernel, strides, padding):
    patches = _patches(x, kernel.shape[:2], strides, padding)
    return patches @ kernel.reshape(-1, kernel.shape[-1])


def _smaller_than_filter(image, kernel) -> bool:
    return image.shape[1] < kernel.shape[0] or image.shape[2] < kernel.shape[1]


def _patches(x, size, strides, padding):
    """The pixels under the filter at each output pixel: [N, H, W, I] to [N, H', W', h * w * I]."""
    x = jnp.pad(x, ((0, 0), *padding, (0, 0)))
    # Along one axis: where each tap of the filter meets the image, for all output pixels.
    rows, columns = (
        [
            slice(i, x.shape[axis] - size[axis - 1] + i + 1, strides[axis - 1])
            for i in range(size[axis - 1])
        ]
        for axis in (1, 2)
    )
    return jnp.concatenate([x[:, r, c] for r in rows for c in columns], axis=-1)


def filter_gradient(x, dy, kernel_shape, strides, padding):
    """d loss / d kernel [h, w, I, O] from x [N, H, W, I] and dy = d loss / d output [N, H', W', O]:
    the patches' matrix, transposed, times dy, summed over blocks of images.
    """
    groups = math.gcd(len(x), _GROUPS)
    each = len(x) // groups
    # The largest power of two that divides `each` and fits the block.
    pixels = dy.shape[1] * dy.shape[2]
    block = math.gcd(each, 2 ** int(math.log2(max(1, _BLOCK_PIXELS // pixels))))
    x = x.reshape(groups, each // block, block, *x.shape[1:])
    dy = dy.reshape(groups, each // block, block * pixels, dy.shape[-1])

    def add_block(step, total):
        images = lax.dynamic_index_in_dim(x, step, axis=1, keepdims=False)
        gradient = lax.dynamic_index_in_dim(dy, step, axis=1, keepdims=False)
        patches = _patches(
            images.reshape(-1, *images.shape[2:]), kernel_shape[:2], strides, padding
        )
        patches = patches.reshape(groups, block * pixels, -1)
        return total + jnp.einsum(
            "gpk,gpo->gko", patches, gradient, preferred_element_type=jnp.float32
        )

    taps = math.prod(kernel_shape[:3])
    total = jnp.zeros((groups, taps, kernel_shape[3]), jnp.float32)
    total = lax.fori_loop(0, each // block, add_block, total)
    return jnp.sum(total, axis=0).reshape(kernel_shape).astype(x.dtype)
