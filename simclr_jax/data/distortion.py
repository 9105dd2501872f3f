"""What a view of SimCLR is (paper, appendix A), as formulas that `tf` and `jax.numpy` both evaluate.

Every function takes the module that computes, `xp`, and uses only names that the two share. So the
host and the device cannot disagree on what a view is; they differ in how they batch and branch.
All chance is drawn at once, as numbers in [0, 1), one row a view; what follows is a pure function
of them.
"""

import dataclasses
import math

import numpy as np

CROP_ATTEMPTS = 10  # then the largest centred crop of an allowed aspect ratio is taken

# How many numbers in [0, 1) each decision takes, in order.
DRAWS = {
    "crop": 2 * CROP_ATTEMPTS,
    "position": 2,
    "flip": 1,
    "jitter": 1,
    "factors": 4,
    "order": 4,
    "grey": 1,
    "blur": 1,
    "sigma": 1,
}
DRAWS_OF_A_VIEW = sum(DRAWS.values())

BLUR_SIGMA = (0.1, 2.0)  # pixels; paper, appendix A
GREY_WEIGHTS = (0.2989, 0.5870, 0.1140)  # ITU-R BT.601 luma, as tf.image.rgb_to_grayscale

# A Gaussian of sigma s has 2e-5 of its weight beyond this many s: 0.005 grey levels of 255.
_BLUR_REACH = 4.3


@dataclasses.dataclass(frozen=True)
class Distortion:
    """How strongly views differ. The defaults are the paper's for ImageNet (appendix A).

    Attributes:
      crop_area: range of the crop's share of the image's area, uniform.
      crop_aspect: range of the crop's width / height, log-uniform.
      flip: mirror left-right with probability 0.5.
      color_strength: s; brightness, contrast and saturation vary by 0.8 s, hue by 0.2 s of a turn.
      jitter_probability: of the colour jitter as a whole.
      grey_probability: of dropping colour.
      brightness: "additive" (the paper's code) or "multiplicative" (the later code).
      blur_probability: of a Gaussian blur with sigma uniform in [0.1, 2] px, drawn per image.
      views: of each image: two to learn from, one to train a classifier on.
    """

    crop_area: tuple[float, float] = (0.08, 1.0)
    crop_aspect: tuple[float, float] = (3 / 4, 4 / 3)
    flip: bool = True
    color_strength: float = 1.0
    jitter_probability: float = 0.8
    grey_probability: float = 0.2
    brightness: str = "additive"
    blur_probability: float = 0.5
    views: int = 2


def named(draws) -> dict:
    """The draws [..., DRAWS_OF_A_VIEW] of a view by name, each [..., n]."""
    ends = np.cumsum(list(DRAWS.values()))
    return {
        name: draws[..., end - n : end]
        for (name, n), end in zip(DRAWS.items(), ends.tolist(), strict=True)
    }


def crop_window(xp, height, width, attempts, position, area, aspect):
    """The Inception crop: (top, left, height, width), whole numbers of pixels, as floats.

    Args:
      height, width: of the image, float scalars.
      attempts: [2 * n] in [0, 1), pairs of (area, aspect ratio). The first that fits into the
        image is taken; if none does, the centred crop of the nearest allowed aspect ratio.
      position: [2] in [0, 1), places it.
      area, aspect: ranges, see `Distortion`.
    """
    areas = (area[0] + (area[1] - area[0]) * attempts[0::2]) * height * width
    low, high = math.log(aspect[0]), math.log(aspect[1])
    ratios = xp.exp(low + (high - low) * attempts[1::2])
    widths, heights = xp.round(xp.sqrt(areas * ratios)), xp.round(xp.sqrt(areas / ratios))
    fits = (widths >= 1) & (heights >= 1) & (widths <= width) & (heights <= height)
    ratio = xp.minimum(xp.maximum(width / height, aspect[0]), aspect[1])
    crop_width = xp.maximum(1.0, xp.minimum(width, xp.round(height * ratio)))
    crop_height = xp.maximum(1.0, xp.minimum(height, xp.round(width / ratio)))
    down, right = 0.5, 0.5
    # From the last attempt to the first, which so has the last word. Not argmax and an index: in
    # XLA on CPUs that takes a hundred times as long as all the rest of a small view.
    for i in reversed(range(CROP_ATTEMPTS)):
        crop_width = xp.where(fits[i], widths[i], crop_width)
        crop_height = xp.where(fits[i], heights[i], crop_height)
        down = xp.where(fits[i], position[0], down)
        right = xp.where(fits[i], position[1], right)
    top = xp.floor(down * (height - crop_height + 1))
    left = xp.floor(right * (width - crop_width + 1))
    return top, left, crop_height, crop_width


def resize_matrix(xp, start, length, source: int, size: int):
    """[size, source]: bicubic interpolation (Keys, a = -0.5, not antialiased) of `length` of the
    `source` pixels, from `start` on, to `size`, as `tf.image.resize` of that window does it: at
    its edges the taps outside are left out, and the others scaled to sum 1.
    """
    outputs = np.arange(size, dtype=np.float32)[:, np.newaxis]
    inputs = np.arange(source, dtype=np.float32)[np.newaxis]
    distance = xp.abs(start + (outputs + 0.5) * (length / size) - 0.5 - inputs)
    near = (1.5 * distance - 2.5) * distance * distance + 1.0
    far = ((-0.5 * distance + 2.5) * distance - 4.0) * distance + 2.0
    nothing = 0.0 * distance
    weights = xp.where(distance < 1, near, xp.where(distance < 2, far, nothing))
    weights = xp.where((inputs >= start) & (inputs < start + length), weights, nothing)
    return weights / (weights @ np.ones((source, 1), np.float32))


def factor(drawn, spread: float):
    """A factor uniform in [max(0, 1 - spread), 1 + spread), from a number in [0, 1)."""
    low = max(0.0, 1.0 - spread)
    return low + (1.0 + spread - low) * drawn


def turn(drawn, spread: float):
    """A number uniform in [-spread, spread), from one in [0, 1)."""
    return spread * (2.0 * drawn - 1.0)


def saturate(xp, rgb, factor):
    """The three channels with their HSV saturation times `factor`, at most 1.

    With hue and value v kept, each channel c is v - (v - c) s' / s, so no hue is needed:
    s' / s = min(factor, 1 / s), and s = (v - darkest) / v.
    """
    value, darkest = _value_and_darkest(xp, rgb)
    share = xp.minimum(factor, value / xp.maximum(value - darkest, 1e-9))
    return tuple(value - (value - c) * share for c in rgb)


def turn_hue(xp, rgb, turn):
    """The three channels with their HSV hue turned by `turn`, in whole turns."""
    r, g, b = rgb
    value, darkest = _value_and_darkest(xp, rgb)
    chroma = value - darkest
    per = 1.0 / xp.maximum(chroma, 1e-9)
    hue = xp.where(
        value == r,
        (g - b) * per,
        xp.where(value == g, 2.0 + (b - r) * per, 4.0 + (r - g) * per),
    )
    hue = hue + 6.0 * turn + 6.0  # sixths of a turn, above 0
    # Each channel is the value, less the chroma where the hue is far: a trapezium.
    channels = []
    for offset in (5.0, 3.0, 1.0):
        k = hue + offset
        k = k - 6.0 * xp.floor(k / 6.0)
        channels.append(value - chroma * xp.maximum(0.0, xp.minimum(1.0, xp.minimum(k, 4.0 - k))))
    return tuple(channels)


def _value_and_darkest(xp, rgb):
    r, g, b = rgb
    return xp.maximum(xp.maximum(r, g), b), xp.minimum(xp.minimum(r, g), b)


def luma(rgb):
    """The grey value of three channels."""
    return sum(w * c for w, c in zip(GREY_WEIGHTS, rgb, strict=True))


def blur_radius(size: int) -> int:
    """Taps on each side of the blur of a view of `size` px: its width is S / 10 (appendix A)."""
    return size // 10 // 2


def blur_radii(size: int) -> list[tuple[int, float]]:
    """(radius, largest sigma for which it is enough) of a view's blur, ascending: most sigmas are
    so small that the outer taps weigh nothing.
    """
    full = blur_radius(size)
    shorter = sorted({-(-full // 4), -(-full // 2)} - {0, full})
    return [*((r, (r + 0.5) / _BLUR_REACH) for r in shorter), (full, math.inf)]


def blur_weights(xp, sigma, radius: int) -> list:
    """The 2 radius + 1 taps, which sum to 1; sigma in px, of any shape."""
    taps = [xp.exp(-(i * i) / (2.0 * sigma * sigma)) for i in range(-radius, radius + 1)]
    total = sum(taps)
    return [tap / total for tap in taps]


def blur_sigma(drawn):
    """Sigma in px, from a number in [0, 1)."""
    low, high = BLUR_SIGMA
    return low + (high - low) * drawn
