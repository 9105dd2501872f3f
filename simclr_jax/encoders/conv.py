"""2-D convolution. On CPUs, shapes for which XLA's convolution is slow are computed as products of matrices; on NVIDIA's
GPUs the first layer is computed on squares of 2 x 2 pixels; everything else is XLA's convolution.

The product is patches (the pixels under the filter, for each output pixel) times filters, in blocks of as many images as
stay in cache with their patches. Measured on 2 cores with jaxlib 0.10.2, 256 images, 3x3 filters, in GFLOP/s:

| CPU | px, channels | forward, XLA | in blocks | filter gradient, XLA | in blocks |
| AVX2, float32 | 32, 64 | 131 | 250 | 50 | 172 |
| (a large product: 320) | 16, 128 | 264 | 309 | 61 | 244 |
| | 8, 256 | 388 | | 197 | 310 |
| | 4, 512 | 384 | | 252 | 342 |
| AVX-512, float32 | 32, 64 | 222 | 289 | 59 | 229 |
| (480) | 16, 128 | 411 | 345 | 70 | 330 |
| | 8, 256 | 397 | 363 | 222 | 360 |
| | 4, 512 | 348 | 405 | 241 | 383 |
| AVX512-BF16, bfloat16 | 32, 64 | 162 | 350 | 65 | 216 |
| (900) | 16, 128 | 391 | 548 | 70 | 484 |
| | 8, 256 | 380 | 675 | 225 | 604 |
| | 4, 512 | 339 | 722 | 248 | 711 |

and an image smaller than the filter: 2 by XLA, 126-170 as one product.

With AVX-512 the filter gradient's product is (filters x pixels) times (pixels x patches), the layout that XLA's fastest
kernel takes; forward, XLA's own takes less CPU time (with 64 filters it runs on one core, at that core's peak). XLA
multiplies bfloat16 without widening it to float32 only where the result is float32 and no factor is transposed in the
same loop.

Tried with AVX-512 (2026-11-28) and not taken: XLA without its kernel library for convolutions
(xla_cpu_experimental_ynn_fusion_type=LIBRARY_FUSION_TYPE_INDIVIDUAL_DOT). A step of ResNet-18 alone takes 3.15 s
instead of 3.5, but 10 % more CPU time; training on a folder, with views made on the same CPU, reaches 615 instead of
680 images/s. The filter gradient as one product for each pixel of the filter gains nothing either.

On an H100 (jaxlib 0.11.2, bfloat16, 1,024 images of 224 px) the first layer, 7x7 of 3 channels in steps of 2, takes 7.2
ms and its filter gradient 4.7; as a layer of squares of 2x2 pixels in steps of 1, 2.6 and 1.7.

The choice is made when the program is lowered, for the platform that it is lowered for, so that
compiling ahead of time for a TPU on a CPU machine gets the TPU's program; TPUs use XLA's own convolutions
throughout.
"""

import functools
import math
import pathlib

import jax
import jax.export
import jax.numpy as jnp
from jax import lax

_LAYOUT = ("NHWC", "HWIO", "NHWC")

# Output pixels that a block should have: it holds two images, or more if they are small; see `_blocks`.
_FORWARD_PIXELS = 2048
_GRADIENT_PIXELS, _GRADIENT_PIXELS_WIDE = 512, 1024  # wide: with AVX-512

# Without AVX-512, a forward pass in blocks is the faster one for images of at least this many pixels a side.
_BLOCKS_FROM = 12

# With AVX-512, from this many pixels an image or this many filters on, and in bfloat16 always, the filter gradient's
# product is (filters x pixels) times (pixels x patches). A step of ResNet-18 at 32 px, whose last feature maps have
# 4 px a side, then takes 5.8 instead of 6.3 s of CPU time.
_TURNED_FROM, _TURNED_FILTERS = 64, 512

# On a GPU, 2 x 2 pixels of at most _FEW_CHANNELS channels become one pixel, whose channels are filled up to a
# multiple of _GPU_CHANNELS, as tensor cores take them.
_FEW_CHANNELS, _GPU_CHANNELS = 4, 8


@functools.cache
def _cpu_features() -> frozenset[str]:
    """Returns the feature flags of this machine's CPU, as Linux names them; none on other systems."""
    about = pathlib.Path("/proc/cpuinfo")
    lines = about.read_text().splitlines() if about.exists() else []
    flags = next((line for line in lines if line.startswith("flags")), "")
    return frozenset(flags.partition(":")[2].split())


def wide_vectors() -> bool:
    """Returns whether this machine's CPU has AVX-512."""
    return "avx512f" in _cpu_features()


def narrow_products() -> bool:
    """Returns whether this machine's CPU multiplies bfloat16 faster than float32."""
    return "avx512_bf16" in _cpu_features()


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def conv2d(x, kernel, strides, padding):
    """Convolves x [N, H, W, I] with kernel [h, w, I, O] to [N, H', W', O].

    Inside `mesh.traced_on` the blocks of a CPU's convolution are walked on all devices of the mesh at
    once, so that no image is moved; this changes nothing but rounding.

    Args:
      x: images or feature maps.
      kernel: filters, in x's dtype.
      strides: (vertical, horizontal), a tuple of ints.
      padding: ((top, bottom), (left, right)), a tuple of ints, in pixels.
    """
    ways = {
        "cpu": _fastest_on_cpu(x, kernel, strides),
        "cuda": _fastest_on_gpu(x, kernel, strides, padding),
    }
    own = {
        platform: functools.partial(way, strides=strides, padding=padding)
        for platform, way in ways.items()
        if way is not _convolve
    }
    native = functools.partial(_convolve, strides=strides, padding=padding)
    return _by_platform(own, native, x, kernel)


def _forward(x, kernel, strides, padding):
    return conv2d(x, kernel, strides, padding), (x, kernel)


def _backward(strides, padding, saved, dy):
    x, kernel = saved

    def products(x, kernel, dy):
        return (
            _input_gradient(x, kernel, dy, strides, padding),
            filter_gradient(x, dy, kernel.shape, strides, padding),
        )

    def gradients_of(way):
        return functools.partial(_gradients, way, strides, padding)

    own = {"cpu": products}
    if (on_gpu := _fastest_on_gpu(x, kernel, strides, padding)) is not _convolve:
        own["cuda"] = gradients_of(on_gpu)
    return _by_platform(own, gradients_of(_convolve), x, kernel, dy)


conv2d.defvjp(_forward, _backward)


def _by_platform(own, elsewhere, *arrays):
    """Computes own[PLATFORM](*arrays) for the platform that the program is lowered for, or elsewhere(*arrays)."""
    return lax.platform_dependent(*arrays, **own, default=elsewhere) if own else elsewhere(*arrays)


def _gradients(way, strides, padding, x, kernel, dy):
    return jax.vjp(lambda x, kernel: way(x, kernel, strides, padding), x, kernel)[1](dy)


def _fastest_on_gpu(x, kernel, strides, padding):
    """Returns the way (x, kernel, strides, padding) -> convolution that is the fastest on an NVIDIA GPU."""
    _, height, width, channels = x.shape
    size, pad = kernel.shape[0], kernel.shape[0] // 2
    around = (
        kernel.shape[1] == size and size % 2 and pad % 2 and padding == ((pad, pad), (pad, pad))
    )
    halved = strides == (2, 2) and height % 2 == width % 2 == 0
    return _convolve_squares if channels <= _FEW_CHANNELS and around and halved else _convolve


def _fastest_on_cpu(x, kernel, strides):
    """Returns the way (x, kernel, strides, padding) -> convolution that is the fastest on a CPU."""
    if _smaller_than_filter(x, kernel):
        return _convolve_by_product
    if jax.export.is_symbolic_dim(x.shape[0]):  # exported for any number of images: no block size
        return _convolve
    if x.dtype == jnp.bfloat16 and x.shape[-1] % 2 == 0 and narrow_products():
        return _convolve_by_product if kernel.shape[:2] == (1, 1) else _convolve_in_blocks
    large = strides == (1, 1) and kernel.shape[0] > 1 and x.shape[1] >= _BLOCKS_FROM
    if large and x.dtype == jnp.float32 and not wide_vectors():
        return _convolve_in_blocks
    return _convolve


def _convolve(x, kernel, strides, padding):
    return lax.conv_general_dilated(x, kernel, strides, padding, dimension_numbers=_LAYOUT)


def _convolve_by_product(x, kernel, strides, padding):
    return _product(_patches(x, kernel.shape[:2], strides, padding), kernel).astype(x.dtype)


def _product(patches, kernel):
    """Multiplies with a float32 result: for a bfloat16 one, XLA would first widen bfloat16 factors to float32."""
    filters = kernel.reshape(-1, kernel.shape[-1])
    return jnp.einsum("...k,ko->...o", patches, filters, preferred_element_type=jnp.float32)


def _convolve_squares(x, kernel, strides, padding):
    """Convolves images of few channels with stride 2, k x k filters and k // 2 pixels of padding: as images of half
    the size, whose pixels each hold a square of 2 x 2 pixels, with stride 1.
    """
    images, height, width, channels = x.shape
    size, _, _, features = kernel.shape
    pad = padding[0][0] + 1  # even: the filter gets a row and a column of zeros before its first
    taps = (size + 1) // 2
    squares = x.reshape(images, height // 2, 2, width // 2, 2, channels).swapaxes(2, 3)
    squares = squares.reshape(images, height // 2, width // 2, 4 * channels)
    kernel = jnp.pad(kernel, ((1, 0), (1, 0), (0, 0), (0, 0)))
    kernel = kernel.reshape(taps, 2, taps, 2, channels, features).swapaxes(1, 2)
    kernel = kernel.reshape(taps, taps, 4 * channels, features)
    fill = -4 * channels % _GPU_CHANNELS
    squares = jnp.pad(squares, ((0, 0), (0, 0), (0, 0), (0, fill)))
    kernel = jnp.pad(kernel, ((0, 0), (0, 0), (0, fill), (0, 0)))
    around = (pad // 2, taps - 1 - pad // 2)
    return _convolve(squares, kernel, (1, 1), (around, around))


def _convolve_in_blocks(x, kernel, strides, padding):
    height, width = (
        (x.shape[axis + 1] + sum(padding[axis]) - kernel.shape[axis]) // strides[axis] + 1
        for axis in (0, 1)
    )
    blocks = _blocks(x, height * width, _FORWARD_PIXELS)

    def convolve(block):  # [devices, images, H, W, I]
        images = block.reshape(-1, *block.shape[2:])
        y = _product(_patches_of_pairs(images, kernel.shape[:2], strides, padding), kernel)
        return y.reshape(*block.shape[:2], *y.shape[1:])

    # [steps, devices, images, ...] to [devices, steps, images, ...] to [N, ...]
    y = lax.map(convolve, jnp.swapaxes(blocks, 0, 1))
    y = jnp.swapaxes(y, 0, 1).reshape(len(x), height, width, kernel.shape[-1])
    return y.astype(x.dtype)  # after the loop, inside which one core alone would round


def _input_gradient(x, kernel, dy, strides, padding):
    size = kernel.shape[:2]
    if strides == (1, 1) and not _smaller_than_filter(x, kernel):
        # The gradient by the input is a convolution of dy with the filters turned around.
        turned = kernel[::-1, ::-1].swapaxes(2, 3)
        around = tuple(
            (n - 1 - before, n - 1 - after)
            for n, (before, after) in zip(size, padding, strict=True)
        )
        if min(min(pair) for pair in around) >= 0:
            return _fastest_on_cpu(dy, turned, strides)(dy, turned, strides, around)
    small = _smaller_than_filter(x, kernel) or _smaller_than_filter(dy, kernel)
    convolve = _convolve_by_product if small else _convolve
    return jax.vjp(lambda x: convolve(x, kernel, strides, padding), x)[1](dy)[0]


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


@functools.partial(jax.custom_jvp, nondiff_argnums=(1, 2, 3))
def _patches_of_pairs(x, size, strides, padding):
    """Returns `_patches`; copies two numbers of bfloat16 at once, which XLA does twice as fast."""
    if x.dtype != jnp.bfloat16 or x.shape[-1] % 2:
        return _patches(x, size, strides, padding)
    return _patches(x.view(jnp.uint32), size, strides, padding).view(x.dtype)


@_patches_of_pairs.defjvp
def _patches_of_tangents(size, strides, padding, primals, tangents):
    """Copies the tangents unpaired: JAX would take the tangents of pairs, which are integers, to be zero."""
    (x,), (dx,) = primals, tangents
    return _patches_of_pairs(x, size, strides, padding), _patches(dx, size, strides, padding)


def _devices() -> int:
    """Returns how many devices the batch is sharded over, as `mesh.traced_on` says; 1 elsewhere."""
    mesh = jax.sharding.get_abstract_mesh()
    return 1 if mesh.empty else mesh.size


def _blocks(x, pixels: int, wanted: int):
    """Reshapes x [N, ...] to [devices, steps, images of a block, ...].

    Args:
      x: images or feature maps.
      pixels: output pixels of an image.
      wanted: output pixels that a block should have.
    """
    devices = math.gcd(len(x), _devices())
    each = len(x) // devices
    # The largest power of two that divides `each` and holds no more than asked for.
    block = math.gcd(each, 2 ** int(math.log2(max(2, wanted // pixels))))
    return x.reshape(devices, each // block, block, *x.shape[1:])


def filter_gradient(x, dy, kernel_shape, strides, padding):
    """Computes d loss / d kernel [h, w, I, O]: the patches' matrix, transposed, times dy, summed over
    blocks of images.

    Args:
      x: input of the convolution [N, H, W, I].
      dy: d loss / d output [N, H', W', O].
      kernel_shape: (h, w, I, O).
      strides, padding: see `conv2d`.
    """
    pixels = dy.shape[1] * dy.shape[2]
    wanted = _GRADIENT_PIXELS_WIDE if wide_vectors() else _GRADIENT_PIXELS
    x, dy = (_blocks(a, pixels, wanted) for a in (x, dy))
    devices, steps = x.shape[:2]
    dy = dy.reshape(devices, steps, -1, dy.shape[-1])  # [devices, steps, pixels, O]
    large = pixels >= _TURNED_FROM or kernel_shape[-1] >= _TURNED_FILTERS
    turned = devices == 1 and wide_vectors() and (large or x.dtype == jnp.bfloat16)
    if turned:  # before the loop: within it, XLA undoes the transposition and widens bfloat16
        dy = dy.swapaxes(2, 3)

    def add_block(step, total):
        images, gradient = (lax.dynamic_index_in_dim(a, step, 1, keepdims=False) for a in (x, dy))
        images = images.reshape(-1, *images.shape[2:])
        patches = _patches_of_pairs(images, kernel_shape[:2], strides, padding)
        patches = patches.reshape(devices, -1, patches.shape[-1])
        product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
        if turned:
            return total + product("op,pk->ok", gradient[0], patches[0])[None]
        if devices == 1:  # not a batched product of one: that is twice as slow
            return total + product("pk,po->ko", patches[0], gradient[0])
        return total + product("gpk,gpo->gko", patches, gradient)

    taps = math.prod(kernel_shape[:3])
    shape = (kernel_shape[3], taps) if turned else (taps, kernel_shape[3])
    total = jnp.zeros((devices, *shape), jnp.float32)
    total = lax.fori_loop(0, steps, add_block, total)
    if turned:
        total = total.swapaxes(1, 2)
    return jnp.sum(total, axis=0).reshape(kernel_shape).astype(x.dtype)
